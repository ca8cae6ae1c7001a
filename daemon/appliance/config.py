"""The daemon's configuration: one TOML file, every key with a default, every problem reported at once.

``config.toml`` in the repository equals the defaults, and a test says so.
"""

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from appliance.errors import ConfigError
from appliance.problems import describe_problems
from appliance.types import Role

UserName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RepositorySection(_Section):
    """Where models are and which are loaded at start.

    Attributes:
        path: The model repository.
        load: Names loaded at start; ``["*"]`` for every model there is.
        strict: The daemon is not ready while a startup model has failed.
        cache: Directory of compiled models; empty for ``$CACHE_DIRECTORY``, ``$XDG_CACHE_HOME/inference-appliance`` or
            ``~/.cache/inference-appliance``, the first that is set.
        state: Directory of what must last: measurements, evidence, quantised variants; empty for ``$STATE_DIRECTORY``,
            ``$XDG_STATE_HOME/inference-appliance`` or ``~/.local/state/inference-appliance``, the first that is set.
    """

    path: str = "models"
    load: list[str] = ["*"]
    strict: bool = False
    cache: str = ""
    state: str = ""


class ListenSection(_Section):
    """Sockets.

    Attributes:
        directory: Directory of the Unix sockets; empty for ``$XDG_RUNTIME_DIR/appliance``, or ``/run/appliance`` for
            root.
        grpc_tcp: ``host:port`` for gRPC over TCP, empty for none. Loopback only.
        http_tcp: ``host:port`` for HTTP over TCP, empty for none. Loopback only.
    """

    directory: str = ""
    grpc_tcp: str = ""
    http_tcp: str = ""

    @field_validator("grpc_tcp", "http_tcp")
    @classmethod
    def _loopback_only(cls, address: str) -> str:
        if address:
            _check_loopback(address)
        return address


class AccessSection(_Section):
    """Who may do what.

    Attributes:
        admin_uids: Users who may load and unload besides root and the daemon's own user.
        tcp_role: Role of everybody who connects over TCP, where no identity is known.
        hosts: Host names accepted in HTTP's Host and Origin besides localhost, 127.0.0.1 and [::1].
    """

    admin_uids: list[Annotated[int, Field(ge=0)]] = []
    tcp_role: Role = Role.INFER
    hosts: list[str] = []


class LimitsSection(_Section):
    """Bounds on what clients can ask of the daemon.

    Attributes:
        max_request_bytes: One request's inline tensors and framing, decompressed.
        max_region_bytes: One memfd region.
        max_regions: Regions of one connection.
        max_connections: Connections of one transport.
        max_connections_per_uid: Connections of one user on the native socket.
        max_requests_in_flight: Unanswered requests of one connection.
        max_unsent_bytes: Answers a connection may leave unread. Beyond them a native client gets errors, and is closed
            where it reads nothing for `header_seconds`; a gRPC client is closed at once.
        header_seconds: Time for a handshake, a frame or a request's headers to arrive.
    """

    max_request_bytes: Annotated[int, Field(ge=4096, le=2147483647)] = 67108864
    max_region_bytes: Annotated[int, Field(ge=4096, le=1099511627776)] = 1073741824
    max_regions: Annotated[int, Field(ge=0, le=65536)] = 64
    max_connections: Annotated[int, Field(ge=1)] = 4096
    max_connections_per_uid: Annotated[int, Field(ge=1)] = 1024
    max_requests_in_flight: Annotated[int, Field(ge=1, le=1048576)] = 1024
    max_unsent_bytes: Annotated[int, Field(ge=65536)] = 134217728
    header_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0


class ClientsSection(_Section):
    """What one client may have under way, over all its connections, and its share where clients compete.

    On Unix sockets a client is a process of a user; over TCP every connection is one.

    Attributes:
        max_requests_in_flight: Unanswered requests of one client.
        max_bytes_in_flight: Bytes of tensors in them.
        weights: Shares by user name or number, beside the 1.0 of everybody else.
    """

    max_requests_in_flight: Annotated[int, Field(ge=1, le=1 << 24)] = 16384
    max_bytes_in_flight: Annotated[int, Field(ge=4096)] = 1073741824
    weights: dict[UserName, Annotated[float, Field(ge=0.001, le=1000)]] = {}


class WorkersSection(_Section):
    """Worker processes.

    Attributes:
        load_seconds: A load that takes longer is given up.
        heartbeat_seconds: An idle worker is asked this often whether it still answers; the same time is its limit.
        backoff_seconds: Wait before the first restart after a crash that did not follow a success; doubles.
        crashes_to_quarantine: Crashes within a minute after which the model is quarantined.
        quarantine_seconds: First quarantine; doubles each time, up to 16-fold.
    """

    load_seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    heartbeat_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    backoff_seconds: Annotated[float, Field(gt=0, le=3600)] = 0.5
    crashes_to_quarantine: Annotated[int, Field(ge=1, le=1000)] = 3
    quarantine_seconds: Annotated[float, Field(gt=0, le=86400)] = 60.0


class TuningSection(_Section):
    """Measuring by itself while the machine is idle. ``appliancectl tune`` measures at any time.

    Attributes:
        enabled: False leaves measuring to ``appliancectl tune``.
        idle_seconds: The daemon has had no request for this long before it measures.
        resume_seconds: A measurement that a request interrupted goes on after this long without another.
        budget_seconds: Measuring time one model may take at a stretch; what is left over waits for the next idle time.
        point_seconds: Time spent on one batch size of one variant; less where the budget asks for it.
        max_load: Other programs may use this share of the cores while the daemon begins to measure by itself.
    """

    enabled: bool = True
    idle_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0
    resume_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    budget_seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    point_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    max_load: Annotated[float, Field(gt=0, le=1000)] = 0.3


class ShutdownSection(_Section):
    """Stopping.

    Attributes:
        grace_seconds: Time for requests in flight to finish after SIGTERM.
    """

    grace_seconds: Annotated[float, Field(ge=0, le=3600)] = 10.0


class LogSection(_Section):
    """Logging to standard error.

    Attributes:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        json_lines: One JSON object a line instead of text.
    """

    level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    json_lines: bool = False


class BackendSection(_Section):
    """One backend.

    Attributes:
        enabled: False keeps the backend out of every choice.
        python: Interpreter of the environment its runtime is installed in; empty for the daemon's own.
    """

    enabled: bool = True
    python: str = ""


class Config(_Section):
    """Everything ``config.toml`` can say."""

    repository: RepositorySection = RepositorySection()
    listen: ListenSection = ListenSection()
    access: AccessSection = AccessSection()
    limits: LimitsSection = LimitsSection()
    clients: ClientsSection = ClientsSection()
    workers: WorkersSection = WorkersSection()
    tuning: TuningSection = TuningSection()
    shutdown: ShutdownSection = ShutdownSection()
    log: LogSection = LogSection()
    backends: dict[str, BackendSection] = {}

    def cache_directory(self) -> Path:
        """Where compiled models go."""
        if self.repository.cache:
            return Path(self.repository.cache).absolute()
        service = os.environ.get("CACHE_DIRECTORY")
        if service:
            return Path(service.partition(":")[0])
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-appliance"

    def state_directory(self) -> Path:
        """Where measurements, evidence and quantised variants go."""
        if self.repository.state:
            return Path(self.repository.state).absolute()
        service = os.environ.get("STATE_DIRECTORY")
        if service:
            return Path(service.partition(":")[0])
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "inference-appliance"

    def socket_directory(self) -> Path:
        """Where the Unix sockets go."""
        if self.listen.directory:
            return Path(self.listen.directory)
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        return Path(runtime) / "appliance" if runtime else Path("/run/appliance")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        ValueError: It has no port between 0 and 65535.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} must be host:port")
    return host.strip("[]"), int(port)


def _check_loopback(address: str) -> None:
    host, _ = split_address(address)
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(f"{address!r} must be a loopback address: this version has neither TLS nor tokens")


def parse_config(text: str) -> Config:
    """Read the text of a configuration file.

    Raises:
        ConfigError: With every problem, and a suggestion for each unknown key.
    """
    try:
        return Config.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"cannot use the configuration: {describe_problems(error, Config)}") from error


def read_config(path: Path | None, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """Read a configuration file, or the defaults where there is none, with command-line overrides on top.

    Raises:
        ConfigError: The file cannot be read or used.
    """
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from error
    config = parse_config(text)
    if not overrides:
        return config
    merged = config.model_dump()
    for section, values in overrides.items():
        merged[section].update(values)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"cannot use the command line: {describe_problems(error, Config)}") from error
