"""``python -m appliance.worker.survey``: the machine's inventory, as one line of JSON on standard output.

Standard input holds the question: ``{"directories": {purpose: path}, "record": bool, "seconds": float}``, where drivers
get ``seconds`` to answer; the answer is ``{"inventory": ...}``, with the ``"recording"`` of what was read where asked.
What a vendor's library prints goes to standard error, so it cannot spoil the answer.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any, Final

from appliance.inventory.recording import Recorder
from appliance.inventory.survey import live, survey
from appliance.worker.lifeline import die_with_parent

_DEFAULT_SECONDS: Final = 1.0


def answer(question: dict[str, Any], daemon: int) -> dict[str, Any]:
    """The answer to `question`; `daemon` is the process id of who asks."""
    system = live(float(question.get("seconds", _DEFAULT_SECONDS)), die_with_parent)
    directories = {str(purpose): str(path) for purpose, path in question["directories"].items()}
    if not question.get("record"):
        return {"inventory": asdict(survey(system, directories, daemon))}
    recorder = Recorder(system)
    inventory = survey(recorder, directories, daemon)
    return {"inventory": asdict(inventory), "recording": recorder.document}


def main() -> None:
    """Answer and leave at once."""
    die_with_parent()
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    document = answer(json.loads(sys.stdin.read()), os.getppid())
    with open(answer_fd, "w", encoding="utf-8") as out:
        json.dump(document, out)
        out.write("\n")
    os._exit(0)


if __name__ == "__main__":
    main()
