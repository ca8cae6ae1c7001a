"""``make serve``: ``applianced`` in the foreground with the sample models, and how to talk to it.

Sockets go where the client library and ``appliancectl`` look by themselves; where the user has no such place, into a
directory of the user's own. Arguments are handed on to ``applianced``.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]


def socket_directory() -> tuple[Path, bool]:
    """Directory for the sockets, and True where clients find it by themselves."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "appliance", True
    if os.geteuid() == 0:
        return Path("/run/appliance"), True
    return Path(tempfile.gettempdir()) / f"appliance-{os.geteuid()}", False


def instructions(directory: Path, is_found: bool, environment: Path) -> str:
    """Commands to try, ready to be copied."""
    lines = [
        "Try, in another terminal:",
        "",
        f"  {environment}/appliancectl status",
        f'  {environment}/appliancectl infer language-id --input "Wo ist der Bahnhof, bitte?"',
        "",
        f"  curl --unix-socket {directory}/http.sock http://localhost/v2/models/language-id/infer -d \\",
        '    \'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["Bonjour à tous"]}]}\'',
        "",
        f"  {environment}/python",
        "  >>> from appliance_client import Client",
        '  >>> Client().infer("language-id", {"text": ["Hvor er banegården?"]}).text("label")',
        "",
    ]
    if not is_found:
        lines[2:2] = [f"  export APPLIANCE_SOCKET_DIR={directory}"]
    return "\n".join(lines)


def main() -> None:
    """Print the instructions and become the daemon."""
    directory, is_found = socket_directory()
    environment = Path(sys.executable).parent
    sys.stdout.write(instructions(directory, is_found, Path(os.path.relpath(environment))) + "\n")
    sys.stdout.flush()
    options = ["--models", str(REPOSITORY / "models"), "--socket-dir", str(directory), *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, "-m", "appliance.main", *options])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
