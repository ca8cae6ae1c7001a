"""How a request asks to be scheduled, in the parameters that Triton reserves for it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance_client.answer import Parameter


def scheduled(
    parameters: "Mapping[str, Parameter] | None",
    priority: int | str,
    sequence_id: int | str = 0,
    sequence_start: bool = False,
    sequence_end: bool = False,
) -> "dict[str, Parameter]":
    """A request's parameters with those of its scheduling; arguments as `Client.infer`."""
    made = dict(parameters or {})
    if priority:
        made["priority"] = priority
    if sequence_id or sequence_start or sequence_end:
        made["sequence_id"] = sequence_id
        made["sequence_start"] = sequence_start
        made["sequence_end"] = sequence_end
    return made
