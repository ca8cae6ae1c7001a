"""``python -m appliance.registrar PATH``: answers questions about the registry, a JSON object a line.

``{"id": n, "do": verb, ...}`` on standard input is answered on standard output by any number of
``{"id": n, "part": {...}}`` and then by ``{"id": n, "result": {...}}`` or
``{"id": n, "failed": {"kind": ..., "message": ...}}``, in the order asked. The process ends with its input.
"""

import argparse
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from appliance.child import MAX_LINE_BYTES
from appliance.lifeline import die_with_parent, volunteer_for_oom_kill

#: Installed for other parts of the daemon, the database's library would load them for column types of its own: 15 MB.
_NOT_NEEDED = ("numpy", "pandas")


def main() -> NoReturn:
    """Answer until there are no more questions; status 2 after a line that is no question."""
    parser = argparse.ArgumentParser(prog="appliance.registrar", description="owns the registry; started by the daemon")
    parser.add_argument("path", type=Path, help="the database")
    parser.add_argument("--busy-seconds", type=float, default=5.0, help="wait for another process's lock as long")
    arguments = parser.parse_args()
    answers = _settle()
    status = 2
    try:
        status = _serve(arguments.path, arguments.busy_seconds, answers)
    except BrokenPipeError:  # the daemon is gone
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _settle() -> BinaryIO:
    """Make this a child of the daemon; what is printed goes to standard error from here on.

    Returns:
        Where the answers go.
    """
    die_with_parent()
    volunteer_for_oom_kill()
    # Whoever stops the daemon may signal its whole control group, and the daemon still has things to write then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.umask(0o077)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in _NOT_NEEDED:
        sys.modules[name] = None  # type: ignore[assignment] # an import of it fails then, as where it is not installed
    return answers


def _serve(path: Path, busy_seconds: float, answers: BinaryIO) -> int:
    from appliance.registrar.verbs import Verbs

    verbs = Verbs(path, busy_seconds)
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES + 1):
        if not line.endswith(b"\n"):
            return 2
        question = json.loads(line)
        number = question["id"]

        def say(answer: dict[str, Any], number: int = number) -> None:
            answers.write(json.dumps({"id": number, **answer}, separators=(",", ":")).encode() + b"\n")
            answers.flush()

        say(verbs.answer(question, lambda part: say({"part": part})))
    verbs.close()
    return 0


if __name__ == "__main__":
    main()
