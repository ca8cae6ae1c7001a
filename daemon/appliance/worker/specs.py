"""What a session says about its tensors, narrowed by what the manifest says about them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from appliance.errors import BackendError, InvalidManifest
from appliance.types import TensorSpec
from appliance.worker.tensors import DTYPES

if TYPE_CHECKING:
    from appliance.manifest import Manifest, TensorEntry


def check_session_specs(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Refuse a session that cannot be served at all.

    Raises:
        BackendError: It has no input or no output, repeats a name, or has a datatype outside the protocol.
    """
    for kind, specs in (("inputs", inputs), ("outputs", outputs)):
        if not specs:
            raise BackendError(f"cannot serve the model: it has no {kind}")
        if len({spec.name for spec in specs}) != len(specs):
            raise BackendError(f"cannot serve the model: two of its {kind} have one name")
        for spec in specs:
            if spec.datatype not in DTYPES:
                raise BackendError(f"cannot serve the model: {spec.name!r} has the unknown datatype {spec.datatype!r}")


def narrow(
    manifest: "Manifest", inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The session's tensors with the manifest's lengths in place of dynamic dimensions.

    A manifest that lists inputs lists all of them; of the outputs it may list some.

    Raises:
        InvalidManifest: It disagrees with the session; the message lists every difference.
    """
    problems: list[str] = []
    if manifest.inputs:
        listed = {entry.name for entry in manifest.inputs}
        problems += [f"input {spec.name!r} of the model is not listed" for spec in inputs if spec.name not in listed]
    narrowed = tuple(
        _narrowed(kind, specs, entries, manifest.max_batch_size, problems)
        for kind, specs, entries in (("input", inputs, manifest.inputs), ("output", outputs, manifest.outputs))
    )
    if problems:
        raise InvalidManifest(f"cannot use the manifest of {manifest.name!r}: {'; '.join(problems)}")
    return narrowed[0], narrowed[1]


def _narrowed(
    kind: str,
    specs: Sequence[TensorSpec],
    entries: "Sequence[TensorEntry]",
    max_batch_size: int | None,
    problems: list[str],
) -> tuple[TensorSpec, ...]:
    by_name = {spec.name: spec for spec in specs}
    for entry in entries:
        spec = by_name.get(entry.name)
        if spec is None:
            problems.append(f"{kind} {entry.name!r} is not one of the model's: {', '.join(by_name)}")
        elif spec.datatype != entry.datatype:
            problems.append(
                f"{kind} {entry.name!r} is {spec.datatype} in the model and {entry.datatype} in the manifest"
            )
        elif (shape := _merged(spec.shape, tuple(entry.shape), max_batch_size)) is None:
            problems.append(
                f"{kind} {entry.name!r} has shape {list(spec.shape)} in the model and, without the batch dimension, "
                f"{entry.shape} in the manifest"
            )
        else:
            by_name[entry.name] = TensorSpec(spec.name, spec.datatype, shape)
    return tuple(by_name.values())


def _merged(own: tuple[int, ...], listed: tuple[int, ...], max_batch_size: int | None) -> tuple[int, ...] | None:
    """`own` with dynamic dimensions taken from `listed`, or None where both disagree.

    Without a `max_batch_size` the ranks tell whether `listed` leaves a batch dimension out.
    """
    if len(listed) == len(own) - 1 and max_batch_size != 0:
        listed = (own[0], *listed)
    elif len(listed) != len(own) or max_batch_size:
        return None
    if any(-1 not in (a, b) and a != b for a, b in zip(own, listed, strict=True)):
        return None
    return tuple(b if a == -1 else a for a, b in zip(own, listed, strict=True))


def check_batch_dimension(max_batch_size: int, specs: Sequence[TensorSpec], model: str) -> None:
    """Refuse a batch size that the model's shapes do not allow.

    Raises:
        InvalidManifest: A tensor's first dimension is fixed, or it has none.
    """
    for spec in specs:
        first = spec.shape[0] if spec.shape else None
        if first != -1 and not (first == 1 and max_batch_size == 1):
            raise InvalidManifest(
                f"cannot use the manifest of {model!r}: max_batch_size is {max_batch_size} and the first dimension of "
                f"{spec.name!r} {list(spec.shape)} is not dynamic; 0 stands for a model without batch dimension"
            )
