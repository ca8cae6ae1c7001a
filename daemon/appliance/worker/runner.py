"""Runs one batch and answers it."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from appliance.wire.worker import DONE_HEADER, Kind
from appliance.worker.answer import Written, fault, with_row_errors, write_outputs
from appliance.worker.link import Link
from appliance.worker.messages import presentable
from appliance.worker.model import ContractBroken, ServedModel
from appliance.worker.plan import Plan
from appliance.worker.recording import Recorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DONE: Final = int(Kind.DONE)

#: ONNX Runtime ("Failed to allocate memory for requested buffer"), CUDA (CUDA_ERROR_OUT_OF_MEMORY), C++
#: (std::bad_alloc), OpenCL and Level Zero (CL_OUT_OF_RESOURCES, ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY).
_NO_MEMORY: Final = re.compile(
    r"out[ _]of[ _](?:device[ _]|host[ _])?(?:memory|resources)|failed to allocate|bad_alloc", re.IGNORECASE
)


@dataclass(slots=True)
class Batch:
    """One batch, ready to run. Not frozen, since a frozen dataclass takes twice as long to make.

    Attributes:
        number: The front-end's.
        plan: What its layout says.
        pictures: The tensor made from its pictures, or None.
        row_errors: Why a row's picture could not be decoded, by row; None where all could.
        decode_ns: How long decoding took.
    """

    number: int
    plan: Plan
    pictures: "NDArray[Any] | None" = None
    row_errors: dict[int, str] | None = None
    decode_ns: int = 0


def run(model: ServedModel, link: Link, batch: Batch, recorder: Recorder | None = None) -> None:
    """Run, post-process, copy out and send DONE or FAULT.

    The inputs of a batch that ran go to `recorder`, unless a picture among them could not be decoded.

    Raises:
        OSError: The front-end is gone.
    """
    plan = batch.plan
    written: Written | None = None
    try:
        feeds = plan.feeds
        if plan.fresh or batch.pictures is not None:
            feeds = dict(feeds)
            for name, make in plan.fresh:
                feeds[name] = make()
            if model.pictures is not None and batch.pictures is not None:
                feeds[model.pictures.tensor] = batch.pictures
        states, steps = model.states, plan.steps
        if states is not None and steps is not None:
            feeds = states.complete(feeds, steps)
        started = time.monotonic_ns()
        if states is None or steps is None:
            results = model.session.run(feeds, plan.runs)
        else:
            results = states.gather(model.session.run(states.spread(feeds, steps), plan.runs), steps)
            states.check(model, results, plan.rows)
        computed = time.monotonic_ns()
        if plan.needs_classes:
            results = _classified(model, plan, results)
        postprocessed = time.monotonic_ns()
        written = write_outputs(model, plan, results)
        packet = with_row_errors(written, batch.row_errors) if batch.row_errors else written.packet
        if recorder is not None and not batch.row_errors:
            recorder.take(feeds, plan.rows)  # before the answer, which gives the inputs' memory back
        if states is not None and steps is not None:
            states.keep(results, steps, batch.row_errors)  # last, since a batch that fails leaves states as they were
    except Exception as error:  # whatever the runtime raises fails this batch and no other
        if written is not None and written.fd >= 0:
            os.close(written.fd)
        link.send(fault(plan.slot, batch.number, _reason(error), is_out_of_memory(error)))
        return
    copied = time.monotonic_ns()
    DONE_HEADER.pack_into(
        packet,
        0,
        _DONE,
        plan.slot,
        written.tensors,
        len(batch.row_errors) if batch.row_errors else 0,
        batch.number,
        batch.decode_ns,
        0,
        computed - started,
        postprocessed - computed,
        copied - postprocessed,
    )
    if written.fd < 0:
        link.send(packet)
        return
    try:
        link.send(packet, [written.fd])
    finally:
        os.close(written.fd)


def _classified(model: ServedModel, plan: Plan, results: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
    classifier = model.classifier
    if classifier is None:
        raise ContractBroken("it has no classes")
    logits = next(spec for spec in model.outputs if spec.name == classifier.logits)
    checked = model.check_output(logits, results.get(logits.name), plan.rows)
    return {**results, **classifier.classify(checked)}


def is_out_of_memory(error: Exception) -> bool:
    """True where a runtime says that memory ran out; each has its own words for it and raises what it likes."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _reason(error: Exception) -> str:
    if isinstance(error, ContractBroken):
        return f"cannot run the batch: the backend broke its contract: {error}"
    return f"cannot run the batch: {presentable(error)}"
