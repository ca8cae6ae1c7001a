"""The variant chosen for a model, with who chose it and why, and what a worker needs to load it."""

from dataclasses import dataclass
from enum import StrEnum

from appliance.measurement import Measurement
from appliance.wire import worker_pb2


class ChosenBy(StrEnum):
    """What a choice rests on."""

    RULE = "rule"
    MEASURED = "measured"
    PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class Placement:
    """One variant as a worker loads it.

    Attributes:
        backend: Backend name.
        python: Interpreter of the backend's environment; empty for the daemon's own.
        load: The message a worker is started with.
        variant: The candidate's name, such as ``"openvino/cpu/BF16"``.
        chosen_by: What the choice rests on.
        fallback: Why it is not the first choice, where that was on another device; empty where it is.
        measurement: What measuring found out about it, or None.
    """

    backend: str
    python: str
    load: worker_pb2.Load
    variant: str = ""
    chosen_by: ChosenBy = ChosenBy.RULE
    fallback: str = ""
    measurement: Measurement | None = None
