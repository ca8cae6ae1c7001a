"""Which daemon a command talks to, and the options every command has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from appliance_client import AdminClient, AsyncClient, Client

#: A load may take the daemon's `workers.load_seconds`, 300 by default; the daemon gives up first.
ADMIN_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Target:
    """The daemon, by the directory of its sockets; empty for the client library's own search.

    Attributes:
        directory: Directory that holds ``infer.sock`` and ``http.sock``.
        wants_json: Standard output takes JSON only.
    """

    directory: Path | None
    wants_json: bool

    @property
    def http_socket(self) -> Path:
        """The HTTP socket's path."""
        from appliance_client.endpoints import http_socket

        return self._socket("http.sock") or http_socket()

    def admin(self, timeout: float = ADMIN_TIMEOUT_S) -> "AdminClient":
        """A client of the HTTP socket."""
        from appliance_client import AdminClient

        return AdminClient(self._socket("http.sock"), timeout=timeout)

    def client(self) -> "Client":
        """A blocking client of the native socket."""
        from appliance_client import Client

        return Client(self._socket("infer.sock"))

    def async_client(self) -> "AsyncClient":
        """An asyncio client of the native socket."""
        from appliance_client import AsyncClient

        return AsyncClient(self._socket("infer.sock"))

    def _socket(self, name: str) -> Path | None:
        return self.directory / name if self.directory else None


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json`` and ``--socket-dir``, and its first argument, a `Target` of the two."""

    @click.option("--json", "wants_json", is_flag=True, help="Print JSON, errors included, and nothing else.")
    @click.option(
        "--socket-dir",
        envvar="APPLIANCE_SOCKET_DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory of the daemon's sockets. [default: the user's own daemon, else /run/appliance]",
    )
    @functools.wraps(command)
    def with_target(*args: Any, wants_json: bool, socket_dir: Path | None, **kwargs: Any) -> Any:
        return command(Target(socket_dir, wants_json), *args, **kwargs)

    return with_target
