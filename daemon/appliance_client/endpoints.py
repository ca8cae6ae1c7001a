"""Where the daemon's sockets are, and what to say when nothing answers there."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance_client.errors import DaemonUnreachable

SERVICE_DIRECTORY: Final = Path("/run/appliance")


def _in_directory(name: str, environ: Mapping[str, str]) -> Path:
    named = environ.get("APPLIANCE_SOCKET_DIR")
    if named:
        return Path(named) / name
    own = environ.get("XDG_RUNTIME_DIR")
    if own:
        candidate = Path(own) / "appliance" / name
        if candidate.exists():
            return candidate
    return SERVICE_DIRECTORY / name


def inference_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """Path of the native socket.

    ``$APPLIANCE_SOCKET`` where set; else ``infer.sock`` in ``$APPLIANCE_SOCKET_DIR`` where set; else the user's own
    daemon, ``$XDG_RUNTIME_DIR/appliance/infer.sock``, where that socket exists; else the service,
    ``/run/appliance/infer.sock``.
    """
    named = environ.get("APPLIANCE_SOCKET")
    return Path(named) if named else _in_directory("infer.sock", environ)


def http_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """Path of the HTTP socket.

    ``$APPLIANCE_HTTP_SOCKET`` where set; else ``http.sock`` beside ``$APPLIANCE_SOCKET`` where that is set; else as
    `inference_socket`.
    """
    named = environ.get("APPLIANCE_HTTP_SOCKET")
    if named:
        return Path(named)
    native = environ.get("APPLIANCE_SOCKET")
    return Path(native).with_name("http.sock") if native else _in_directory("http.sock", environ)


def unreachable(path: Path, cause: OSError) -> DaemonUnreachable:
    """The error for a socket that cannot be connected to.

    It names the path: it is told to the user who gave it, and travels to nobody else.
    """
    if isinstance(cause, PermissionError):
        advice = "your user may not open it; ask to be added to the group that owns the socket"
    elif isinstance(cause, FileNotFoundError):
        advice = (
            "there is no such socket; start the service with `systemctl start applianced`, or a daemon of your own "
            "with `applianced`, or name the socket in APPLIANCE_SOCKET"
        )
    else:
        reason = (cause.strerror or "no answer").lower()
        advice = f"{reason}; see `systemctl status applianced`, or start a daemon of your own with `applianced`"
    return DaemonUnreachable(f"cannot reach the daemon at {path}: {advice}")
