"""Everything a diagnosis looks at. Values; `appliance.doctor.gathering` reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.inventory import Inventory, Memory
from appliance.inventory.system import Identity
from appliance.plugins import BackendRecord
from appliance.registry import RegistryHealth
from appliance.types import ModelStatus


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model.

    Attributes:
        status: As `status` shows it.
        fallback_policy: The manifest's ``fallback``.
        pinned: Name of the variant an administrator wants; empty where none is pinned.
        ways: In how many ways it can be run; 0 where nobody knows, since it is not ready.
        unmeasured: How many of them have no measurement that can be relied on.
        outdated: Measurements of this version that hold for none of them any more: a driver, runtime or device changed.
        swapped_bytes: What of its worker's memory the kernel has moved to disk.
    """

    status: ModelStatus
    fallback_policy: str = "warn"
    pinned: str = ""
    ways: int = 0
    unmeasured: int = 0
    outdated: int = 0
    swapped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory the daemon needs.

    Attributes:
        purpose: ``"models"``, ``"cache"`` or ``"state"``.
        path: Where it is.
        problem: Why the daemon cannot use it as it must; empty where it can.
        total_bytes: Size of its file system; 0 where unknown.
        free_bytes: What the service's user may still write there.
    """

    purpose: str
    path: str
    problem: str = ""
    total_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment that workers run in.

    Attributes:
        python: Its interpreter.
        distributions: Normalised names of what is installed there.
    """

    python: str
    distributions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """An installation.

    Attributes:
        inventory: The hardware, as last surveyed.
        backends: Every plugin by name.
        models: Every model of the repository.
        registry: What a close look at the registry found.
        registry_moved_aside: Name of a damaged registry that was replaced since the daemon's start; else empty.
        directories: Those the daemon needs.
        environments: Those of the daemon and of backends with one of their own.
        memory: The host's memory now.
        cpu_quota: CPU time the control group allows, in cores; None for no limit.
        descriptors: Files the daemon may have open.
        max_connections: Connections that the configuration allows on each of the three transports.
        service: Who the daemon is.
        is_unit: True where systemd started it.
        service_environment: The daemon's environment variables that matter to runtimes.
        caller_environment: The same of whoever asks; empty where nobody said.
    """

    inventory: Inventory
    backends: Mapping[str, BackendRecord]
    models: tuple[ModelFacts, ...]
    registry: RegistryHealth
    registry_moved_aside: str
    directories: tuple[Directory, ...]
    environments: tuple[Environment, ...]
    memory: Memory
    cpu_quota: float | None
    descriptors: int
    max_connections: int
    service: Identity
    is_unit: bool
    service_environment: Mapping[str, str] = field(default_factory=dict)
    caller_environment: Mapping[str, str] = field(default_factory=dict)

    def in_unit(self, line: str, otherwise: str) -> str:
        """How to change what the daemon is started with: `line` in a unit's section ``[Service]``, or another way."""
        if not self.is_unit:
            return f"{otherwise}, then start the daemon again"
        return f"sudo systemctl edit applianced, write {line} below [Service], then sudo systemctl restart applianced"
