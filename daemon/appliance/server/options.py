"""Triton's reserved request parameters: ``timeout``, ``priority`` and the three of sequences.

After its extensions schedule_policy and sequence, whatever encoding a transport uses. Other parameters have no effect.
"""

from collections.abc import Mapping
from typing import Final

from appliance.errors import InvalidRequest
from appliance.types import NO_OPTIONS, RequestOptions, SequenceStep

RESERVED: Final = ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end")

#: Numbers of the levels of a model that has no others; requests may use the words.
PRIORITIES: Final = {"interactive": 1, "default": 2, "background": 3}

#: Bytes of a sequence's name, as with Triton.
MAX_SEQUENCE_ID_BYTES: Final = 128

_END_U64: Final = 1 << 64


def read_options(values: Mapping[str, object]) -> RequestOptions:
    """How a request asks to be scheduled.

    Args:
        values: Its reserved parameters; bool, int, float, str, or whatever else the client sent.

    Returns:
        NO_OPTIONS itself where it asks for nothing.

    Raises:
        InvalidRequest: With the parameter and its rule.
    """
    timeout_us = _natural("timeout", values.get("timeout", 0), "an integer of microseconds")
    priority = values.get("priority", 0)
    if isinstance(priority, str):
        if priority not in PRIORITIES:
            words = ", ".join(PRIORITIES)
            raise InvalidRequest(f"cannot use {priority[:64]!a} as the parameter priority: it is none of {words}")
        priority = PRIORITIES[priority]
    priority = _natural("priority", priority, f"an integer or one of {', '.join(PRIORITIES)}")
    sequence = _read_sequence(values)
    if not timeout_us and not priority and sequence is None:
        return NO_OPTIONS
    return RequestOptions(timeout_us, priority, sequence)


def _read_sequence(values: Mapping[str, object]) -> SequenceStep | None:
    is_start = _flag("sequence_start", values.get("sequence_start", False))
    is_end = _flag("sequence_end", values.get("sequence_end", False))
    identity = values.get("sequence_id", 0)
    if isinstance(identity, str):
        if len(identity.encode("utf-8", "replace")) > MAX_SEQUENCE_ID_BYTES:
            raise InvalidRequest(
                f"cannot use the parameter sequence_id: it is longer than {MAX_SEQUENCE_ID_BYTES} bytes"
            )
    else:
        identity = _natural("sequence_id", identity, "an integer or a string")
    if identity:
        return SequenceStep(identity, is_start, is_end)
    if is_start or is_end:
        raise InvalidRequest("cannot start or end a sequence: sequence_id must name it, and is 0 or empty")
    return None


def _natural(name: str, value: object, rule: str) -> int:
    if type(value) is not int:
        raise InvalidRequest(f"cannot use the parameter {name}: it must be {rule}")
    if not 0 <= value < _END_U64:
        problem = "must not be negative" if value < 0 else "must fit into 64 bits"
        raise InvalidRequest(f"cannot use {value if value < 0 else 'its value'} as the parameter {name}: it {problem}")
    return value


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise InvalidRequest(f"cannot use the parameter {name}: it must be true or false")
    return value
