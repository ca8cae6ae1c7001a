"""``nvml_survey.py MACHINE``: the survey's child on a recorded machine, with NVML asked for real.

Answers as ``python -m appliance.worker.survey`` does.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from appliance.inventory.survey import live, survey
from appliance.worker.lifeline import die_with_parent
from support.machine import Replay


class RealNvml(Replay):
    """Asks NVML's real binding, and the recording all else."""

    def ask(self, question, argument=""):
        return self.live.ask(question, argument) if question == "nvml" else super().ask(question, argument)


if __name__ == "__main__":
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.read())
    system = RealNvml.of(sys.argv[1])
    system.live = live(asked["seconds"], die_with_parent)
    inventory = survey(system, asked["directories"], os.getppid())
    loaded = "pynvml" in sys.modules or "libnvidia-ml" in Path("/proc/self/maps").read_text()
    with open(answer_fd, "w") as out:
        json.dump({"inventory": asdict(inventory), "has_loaded_nvml": loaded}, out)
