"""Writes a batch's outputs to where the front-end reads them, and makes the DONE packet."""

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from appliance.types import TensorSpec
from appliance.wire.worker import (
    ATTACHED,
    DONE_HEADER,
    FAULT_HEADER,
    MAX_PACKET_BYTES,
    OUT_OF_MEMORY,
    ROW_ERROR,
    Kind,
    TensorLayout,
    pack_layout,
)
from appliance.worker.model import ContractBroken, ServedModel
from appliance.worker.plan import Plan
from appliance.worker.tensors import join_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALIGNMENT: Final = 64
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_FAULT_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the outputs of one layout and these shapes go.

    Attributes:
        arrays: Name of each output and the place in the output slab that takes it.
        packet: DONE: room for the header, then the layout.
    """

    arrays: "tuple[tuple[str, NDArray[Any]], ...]"
    packet: bytearray


@dataclass(frozen=True, slots=True)
class Written:
    """A DONE packet whose header is not filled in yet, and the memfd that goes with it, or -1."""

    packet: bytearray
    tensors: int
    fd: int = -1


def write_outputs(model: ServedModel, plan: Plan, results: "Mapping[str, NDArray[Any]]") -> Written:
    """Copy the wanted outputs into the slot's output slab, or into a memfd of their own where they do not fit.

    Raises:
        ContractBroken: An output is missing or has another datatype or shape than the session promises.
        OSError: There is no memory for a memfd.
    """
    targets = plan.targets
    if targets is not None:
        for name, target in targets.arrays:
            array = results.get(name)
            if array is None or array.shape != target.shape or array.dtype != target.dtype:
                break
            target[...] = array
        else:
            return Written(targets.packet, len(targets.arrays))
    return _write_anew(model, plan, results)


def _write_anew(model: ServedModel, plan: Plan, results: "Mapping[str, NDArray[Any]]") -> Written:
    arrays = [model.check_output(spec, results.get(spec.name), plan.rows) for _, spec in plan.wanted]
    rows = plan.rows if model.max_batch_size else 1
    joined = {
        place: _joined(spec, array, rows)
        for place, ((_, spec), array) in enumerate(zip(plan.wanted, arrays, strict=True))
        if spec.datatype == "BYTES"
    }
    layout: list[TensorLayout] = []
    end = 0
    for place, ((index, spec), array) in enumerate(zip(plan.wanted, arrays, strict=True)):
        byte_length = len(joined[place]) if place in joined else array.nbytes
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        layout.append(TensorLayout(index, spec.datatype, array.shape, 0, offset, byte_length))
        end = offset + byte_length
    if end > plan.area.byte_length:
        fd = _attach(layout, [joined.get(place, array) for place, array in enumerate(arrays)], end)
        attached = [tensor._replace(region=ATTACHED) for tensor in layout]
        return Written(bytearray(DONE_HEADER.size) + pack_layout(attached), len(layout), fd)

    packet = bytearray(DONE_HEADER.size) + pack_layout(layout)
    targets: list[tuple[str, NDArray[Any]]] = []
    for place, (tensor, (_, spec), array) in enumerate(zip(layout, plan.wanted, arrays, strict=True)):
        if place in joined:
            plan.area.part(tensor.offset, tensor.byte_length).data[:] = joined[place]
            continue
        target = plan.area.array(tensor.offset, tensor.shape, array.dtype, tensor.byte_length)
        target[...] = array
        targets.append((spec.name, target))
    # The length of BYTES follows its content, so such a layout holds for this batch only.
    plan.targets = None if joined else Targets(tuple(targets), packet)
    return Written(packet, len(layout))


def _joined(spec: TensorSpec, array: "NDArray[Any]", rows: int) -> bytes:
    try:
        return join_rows(array, rows)
    except TypeError as error:
        raise ContractBroken(f"output {spec.name!r} holds something else than bytes") from error


def _attach(layout: Sequence[TensorLayout], contents: "Sequence[NDArray[Any] | bytes]", byte_length: int) -> int:
    fd = os.memfd_create("outputs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, byte_length)
        for tensor, content in zip(layout, contents, strict=True):
            raw = content if isinstance(content, bytes) else content.reshape(-1).view("u1").data
            written = 0
            while written < tensor.byte_length:
                written += os.pwrite(fd, raw[written:], tensor.offset + written)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def with_row_errors(written: Written, row_errors: Mapping[int, str]) -> bytearray:
    """The packet with its row errors behind the layout; messages are cut so that the packet is one the socket takes.

    Raises:
        ValueError: There are too many for one packet.
    """
    room = (MAX_PACKET_BYTES - len(written.packet)) // len(row_errors) - ROW_ERROR.size
    if room < 0:
        raise ValueError(f"{len(row_errors)} rows are undecodable")
    packet = bytearray(written.packet)
    for row, text in row_errors.items():
        message = text.encode()[:room]
        packet += ROW_ERROR.pack(row, len(message)) + message
    return packet


def fault(slot: int, batch: int, text: str, is_out_of_memory: bool = False) -> bytes:
    """A FAULT packet."""
    cause = OUT_OF_MEMORY if is_out_of_memory else 0
    return FAULT_HEADER.pack(Kind.FAULT, slot, cause, 0, batch) + text.encode("utf-8", "replace")[:_MAX_FAULT_BYTES]
