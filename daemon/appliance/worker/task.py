"""``python -m appliance.worker.task``: measures, evaluates or quantises one variant, in a process of its own.

Standard input holds one JSON object that says what to do; standard output gets JSON objects, one a line, and nothing
else: what a plugin or a runtime prints goes to standard error. A task that fails says ``{"failed": {"kind": ...,
"message": ...}}`` last.
"""

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Final, NoReturn

# Before numpy: its own thread pool is of no use here and would cost threads and memory.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from appliance.errors import ApplianceError, InvalidRequest
from appliance.worker.lifeline import die_with_parent, volunteer_for_oom_kill
from appliance.worker.messages import presentable
from appliance.worker.question import Say

_NICENESS: Final = 19


def main() -> NoReturn:
    """Do what standard input says and leave with status 0.

    The process ends with `os._exit`, since a vendor runtime's own clean-up may hang.
    """
    answers = _settle()

    def say(document: Mapping[str, Any]) -> None:
        line = json.dumps(document).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    try:
        try:
            _do(_question(), say)
        except ApplianceError as error:
            say({"failed": {"kind": error.kind, "message": str(error)}})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            say({"failed": {"kind": ApplianceError.kind, "message": f"cannot do the task: {presentable(error)}"}})
    except BrokenPipeError:
        pass  # nobody listens any more
    sys.stderr.flush()
    os._exit(0)


def _settle() -> int:
    """Give way to everything else, die with the daemon, and keep standard output; returns its new descriptor."""
    die_with_parent()
    volunteer_for_oom_kill()
    os.nice(_NICENESS)
    # Whoever stops the daemon may signal its whole control group; what that says of a variant is nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable()
    return answers


def _question() -> Mapping[str, Any]:
    try:
        question = json.loads(sys.stdin.buffer.read())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("cannot do the task: the question is not JSON") from error
    if not isinstance(question, dict):
        raise InvalidRequest("cannot do the task: the question is no JSON object")
    return question


def _do(question: Mapping[str, Any], say: Say) -> None:
    """Import the task when it is asked for: each brings libraries that the others do without."""
    match question.get("task"):
        case "measure":
            from appliance.worker.measuring import measure

            measure(question, say)
        case "evaluate":
            from appliance.worker.evaluation import evaluate

            evaluate(question, say)
        case "quantize":
            from appliance.worker.quantizing import quantize

            quantize(question, say)
        case other:
            raise InvalidRequest(f"cannot do task {other!r}: there are measure, evaluate and quantize")


if __name__ == "__main__":
    main()
