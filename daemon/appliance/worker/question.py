"""What a child task is asked, read with checks, and how it answers."""

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from appliance.errors import InvalidRequest
from appliance.wire import worker_pb2

#: Says one JSON object to whoever asked.
Say = Callable[[Mapping[str, Any]], None]


def load_of(question: Mapping[str, Any]) -> worker_pb2.Load:
    """The variant the task is about: ``load``, base64 of a `worker_pb2.Load`.

    Raises:
        InvalidRequest: It is missing or something else.
    """
    try:
        return worker_pb2.Load.FromString(base64.b64decode(question["load"], validate=True))
    except (KeyError, TypeError, binascii.Error, ValueError, DecodeError) as error:
        raise InvalidRequest("cannot do the task: 'load' is no base64 of a Load message") from error


def path_of(question: Mapping[str, Any], name: str) -> Path | None:
    """The path in field `name`, or None where it is null or left out.

    Raises:
        InvalidRequest: It is no text.
    """
    value = question.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"cannot do the task: {name!r} is no path")
    return Path(value) if value is not None else None


def count_of(question: Mapping[str, Any], name: str) -> int:
    """The number above 0 in field `name`.

    Raises:
        InvalidRequest: It is missing or something else.
    """
    value = question.get(name)
    if type(value) is not int or value < 1:
        raise InvalidRequest(f"cannot do the task: {name!r} must be a number above 0, not {value!r}")
    return value


def counts_of(question: Mapping[str, Any], name: str) -> list[int]:
    """The numbers from 0 up in field `name`; none where it is left out.

    Raises:
        InvalidRequest: It is something else.
    """
    values = question.get(name, [])
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise InvalidRequest(f"cannot do the task: {name!r} must be a list of numbers from 0 up, not {values!r}")
    return values
