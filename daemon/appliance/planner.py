"""Checks a request's head against what a session takes, once, and leaves a plan.

Everything a client can say about tensors without sending a byte of them is checked here; sizes and elements of BYTES
are checked per call by `check_contents`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from appliance.call import Plan, PlannedTensor
from appliance.errors import InvalidManifest, InvalidRequest
from appliance.manifest import Manifest, TextSection
from appliance.types import ITEM_BYTES, Buffer, TensorSpec
from appliance.wire import worker_pb2
from appliance.wire.elements import check_elements

if TYPE_CHECKING:
    from appliance.instance import Instance

#: Elements of one tensor at most; keeps every product of dimensions far from overflowing an int64.
_MAX_ELEMENTS: Final = 1 << 40

#: Elements of one BYTES tensor at most: they are walked one by one on the event loop, 60 ms for so many.
MAX_BYTES_ELEMENTS: Final = 1 << 20

#: Index of the text input, which no worker sees.
TEXT_INDEX: Final = -1


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loaded session takes and gives, edge inputs and outputs included.

    Attributes:
        inputs: Every input by name with its place in the worker's table.
        outputs: Every output by name, likewise.
        output_names: Outputs by place.
        made: For each edge input the session inputs the daemon makes from it.
        text: Name of the text input, or empty.
        max_batch_size: Rows at most; 0 for no batch dimension.
        required: The session's own inputs.
    """

    inputs: dict[str, tuple[int, TensorSpec]]
    outputs: dict[str, tuple[int, TensorSpec]]
    output_names: tuple[str, ...]
    made: dict[str, frozenset[str]]
    text: str
    max_batch_size: int
    required: frozenset[str]

    def public_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs as clients should send them: edge inputs in place of what is made from them."""
        hidden = frozenset().union(*self.made.values()) if self.made else frozenset()
        return tuple(spec for name, (_, spec) in self.inputs.items() if name not in hidden)

    def public_outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, edge outputs last."""
        return tuple(spec for _, spec in self.outputs.values())


def _spec(message: worker_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, message.datatype, tuple(message.shape))


def signature_of(loaded: worker_pb2.Loaded, manifest: Manifest) -> Signature:
    """The signature of a session a worker has loaded.

    What the daemon keeps of sequences is not in it; the output that a state is taken from is where the manifest lists
    it.

    Raises:
        InvalidManifest: Nothing is left that clients could get.
    """
    own = [_spec(message) for message in loaded.inputs]
    table = [*own, *(_spec(message) for message in loaded.edge_inputs)]
    inputs = {spec.name: (index, spec) for index, spec in enumerate(table)}
    made: dict[str, frozenset[str]] = {}
    if manifest.image is not None and manifest.image.input in inputs:
        made[manifest.image.input] = frozenset((manifest.image.tensor,))
    text = ""
    if manifest.text is not None:
        text = manifest.text.input
        leading = (-1,) if loaded.max_batch_size else ()
        inputs[text] = (TEXT_INDEX, TensorSpec(text, "BYTES", (*leading, 1)))
        made[text] = frozenset(name for name in (manifest.text.ids, manifest.text.mask) if name)
    offered = [_spec(message) for message in (*loaded.outputs, *loaded.edge_outputs)]
    outputs = {spec.name: (index, spec) for index, spec in enumerate(offered)}
    kept: frozenset[str] = frozenset()
    if manifest.sequence is not None:
        kept = manifest.sequence.inputs
        for name in manifest.sequence.outputs - {entry.name for entry in manifest.outputs}:
            outputs.pop(name, None)
        if not outputs:
            raise InvalidManifest(
                f"cannot serve model {manifest.name!r}: all its outputs are states, of which clients get those that "
                "[[outputs]] lists"
            )
    return Signature(
        inputs={name: entry for name, entry in inputs.items() if name not in kept},
        outputs=outputs,
        output_names=tuple(spec.name for spec in offered),
        made=made,
        text=text,
        max_batch_size=loaded.max_batch_size,
        required=frozenset(spec.name for spec in own) - kept,
    )


def check_text(section: TextSection, signature: Signature, model: str) -> None:
    """Check that a session takes what the daemon makes of texts.

    Raises:
        InvalidManifest: It has no such input, or one of another datatype or rank.
    """
    rank = 2 if signature.max_batch_size else 1
    for name in signature.made[section.input]:
        spec = signature.inputs[name][1] if name in signature.required else None
        if spec is None or spec.datatype != "INT64" or len(spec.shape) != rank:
            found = f"it is {spec.datatype} {list(spec.shape)}" if spec is not None else "the model has no such input"
            raise InvalidManifest(
                f"cannot feed tokens to {name!r} of {model!r} as INT64 with {rank} dimensions: {found}"
            )


def make_plan(
    instance: "Instance",
    signature: Signature,
    inputs: Sequence[tuple[str, str, tuple[int, ...]]],
    outputs: Sequence[str],
) -> Plan:
    """Check a head.

    Args:
        instance: Who will run the plan.
        signature: What its session takes and gives.
        inputs: Name, datatype and shape of each tensor the client sends.
        outputs: Names wanted, empty for all.

    Raises:
        InvalidRequest: Naming the tensor, the value and the rule.
    """
    seen: set[str] = set()
    planned = []
    rows = 1 if signature.max_batch_size == 0 else 0
    units = 1
    for name, datatype, shape in inputs:
        if name in seen:
            raise InvalidRequest(f"cannot take input {_shown(name)}: it is given twice")
        seen.add(name)
        entry = signature.inputs.get(name)
        if entry is None:
            known = ", ".join(repr(spec.name) for spec in signature.public_inputs())
            raise InvalidRequest(f"cannot take input {_shown(name)}: the model takes {known}")
        index, spec = entry
        if datatype != spec.datatype:
            raise InvalidRequest(
                f"cannot take input {name!r}: its datatype is {_shown(datatype)} and must be {spec.datatype!r}"
            )
        if name in signature.made and len(shape) == 1 and len(spec.shape) == 2:
            shape = (*shape, 1)  # one text or picture a row: people leave the second dimension out
        elements = _check_shape(name, shape, spec.shape)
        if signature.max_batch_size:
            rows = _check_rows(name, shape[0], rows, signature.max_batch_size)
        units = max(units, _units(shape, spec.shape, bool(signature.max_batch_size)))
        item = ITEM_BYTES[datatype]
        if not item and elements > MAX_BYTES_ELEMENTS:
            raise InvalidRequest(
                f"cannot take input {name!r}: it has {elements} elements, and BYTES may have {MAX_BYTES_ELEMENTS}"
            )
        row_shape = shape[1:] if signature.max_batch_size else shape
        planned.append(PlannedTensor(index, datatype, row_shape, elements * item if item else -1, elements))
    _check_complete(signature, seen)
    wanted = tuple(_wanted(signature, outputs))
    mask = 0
    for index in wanted:
        mask |= 1 << min(index, 63)
    key = tuple((tensor.place, tensor.row_shape) for tensor in planned)
    return Plan(
        instance=instance,
        rows=rows,
        tensors=tuple(planned),
        outputs=wanted,
        wanted=mask,
        signature=key,
        byte_length=sum(tensor.byte_length for tensor in planned if tensor.byte_length > 0),
        has_bytes=any(tensor.byte_length < 0 for tensor in planned),
        is_text=signature.text in seen,
        units=units,
        cost=rows * units,
    )


def check_contents(plan: Plan, names: Sequence[str], contents: Sequence[Buffer]) -> int:
    """Check the bytes of a call against its plan; returns how many they are.

    Raises:
        InvalidRequest: A tensor has too few or too many bytes or elements.
    """
    total = 0
    for tensor, name, content in zip(plan.tensors, names, contents, strict=True):
        size = len(content)
        total += size
        if tensor.byte_length < 0:
            check_elements(content, tensor.elements, name)
        elif size != tensor.byte_length:
            raise InvalidRequest(
                f"cannot take input {name!r}: it has {size} bytes and its shape and datatype need {tensor.byte_length}"
            )
    return total


def _shown(text: str) -> str:
    return repr(text[:64]) + ("..." if len(text) > 64 else "")


def _check_shape(name: str, shape: tuple[int, ...], allowed: tuple[int, ...]) -> int:
    """Compare a shape with a spec's; returns the number of elements."""
    if len(shape) != len(allowed):
        raise InvalidRequest(
            f"cannot take input {name!r}: its shape {list(shape[:16])} must have the dimensions {list(allowed)}"
        )
    elements = 1
    for dimension, expected in zip(shape, allowed, strict=True):
        if dimension < 0:
            raise InvalidRequest(f"cannot take input {name!r}: its shape {list(shape)} has a negative dimension")
        if expected not in (-1, dimension):
            raise InvalidRequest(f"cannot take input {name!r}: its shape is {list(shape)} and must be {list(allowed)}")
        elements *= dimension
        if max(elements, dimension) > _MAX_ELEMENTS:  # each by itself too: a zero beside it would hide it
            raise InvalidRequest(f"cannot take input {name!r}: its shape {list(shape)} has more than 2^40 elements")
    return elements


def _units(shape: tuple[int, ...], allowed: tuple[int, ...], is_batched: bool) -> int:
    """Elements of the dimensions that `allowed` leaves open, the batch dimension aside."""
    units = 1
    for dimension, expected in zip(shape[is_batched:], allowed[is_batched:], strict=True):
        if expected < 0:
            units *= dimension
    return max(units, 1)


def _check_rows(name: str, rows: int, others: int, limit: int) -> int:
    if rows < 1 or rows > limit:
        raise InvalidRequest(f"cannot take input {name!r}: its batch dimension is {rows} and must be 1 to {limit}")
    if others not in (0, rows):
        raise InvalidRequest(
            f"cannot take input {name!r}: its batch dimension is {rows} and another input's is {others}"
        )
    return rows


def _check_complete(signature: Signature, given: set[str]) -> None:
    made: set[str] = set()
    for edge, tensors in signature.made.items():
        if edge in given:
            both = tensors & given
            if both:
                raise InvalidRequest(f"cannot take input {min(both)!r}: it is made from {edge!r}, which is given too")
            made |= tensors
    missing = signature.required - given - made
    if missing:
        instead = {tensor: edge for edge, tensors in signature.made.items() for tensor in tensors}
        name = min(missing)
        hint = f" (or {instead[name]!r}, from which the daemon makes it)" if name in instead else ""
        raise InvalidRequest(f"cannot run the request: input {name!r} is missing{hint}")


def _wanted(signature: Signature, outputs: Sequence[str]) -> list[int]:
    if not outputs:
        return [index for index, _ in signature.outputs.values()]
    if len(outputs) > len(signature.outputs):
        raise InvalidRequest(
            f"cannot give {len(outputs)} outputs: the model has {len(signature.outputs)}, each given at most once"
        )
    indices = []
    for name in outputs:
        entry = signature.outputs.get(name)
        if entry is None:
            known = ", ".join(repr(known) for known in signature.outputs)
            raise InvalidRequest(f"cannot give output {_shown(name)}: the model gives {known}")
        if entry[0] in indices:
            raise InvalidRequest(f"cannot give output {name!r}: it is asked for more than once")
        indices.append(entry[0])
    return indices
