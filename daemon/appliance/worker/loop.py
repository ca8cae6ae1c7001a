"""A worker's main loop: receive → prepare → run.

Without pictures everything happens on one thread, since handing over to another costs more than a small model's run.
With pictures the receiving thread decodes the next batch while a runner thread runs the last one; answers keep their
order.
"""

import os
import queue
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.wire.worker import FAULT_HEADER, REGION, SLAB, Kind
from appliance.worker.answer import fault
from appliance.worker.image import UndecodableImage
from appliance.worker.link import Link, LinkBroken
from appliance.worker.memory import Area, Memory, Slabs
from appliance.worker.model import Pictures, ServedModel
from appliance.worker.plan import Plan, Planner
from appliance.worker.recording import Recorder
from appliance.worker.runner import Batch, run
from appliance.worker.tensors import split_elements

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Pillow releases the interpreter lock while it decodes; more threads than this compete with the session's own.
_MAX_DECODERS: Final = 4

_PONG: Final = bytes((Kind.PONG,))
_RUN: Final = int(Kind.RUN)


class Loop:
    """Serves one loaded model until the front-end is gone."""

    def __init__(self, link: Link, model: ServedModel, recorder: Recorder | None = None) -> None:
        self._link = link
        self._model = model
        self._recorder = recorder
        self._memory = Memory()
        self._planner = Planner(model, self._memory)
        self._queue: queue.SimpleQueue[Batch | bytes] | None = None
        if model.pictures is not None:
            self._queue = queue.SimpleQueue()
            self._decoders = ThreadPoolExecutor(min(_MAX_DECODERS, len(os.sched_getaffinity(0))), "decode")
            threading.Thread(target=self._run_queued, args=(self._queue,), name="run", daemon=True).start()

    def serve(self) -> None:
        """Answer packets until end of file.

        Raises:
            LinkBroken: The front-end broke the protocol.
            OSError: The front-end is gone.
        """
        link, buffer, planner = self._link, self._link.buffer, self._planner
        while length := link.receive():
            if buffer[0] != _RUN:
                self._control(buffer[0], length)
                continue
            try:
                plan, number = planner.plan(buffer[:length])
                batch = Batch(number, plan) if plan.pictures is None else self._decoded(number, plan)
            except (ValueError, OverflowError) as error:
                self._answer(self._refusal(length, error))
                continue
            if self._queue is None:
                run(self._model, link, batch, self._recorder)
            else:
                self._queue.put(batch)
            del plan, batch  # until the next packet they would keep memory mapped that the front-end has given back

    def _control(self, kind: int, length: int) -> None:
        packet = self._link.buffer[:length]
        try:
            if kind == Kind.PING:
                self._answer(_PONG)
            elif kind == Kind.SLAB:
                _, slot, _, _, input_bytes, output_bytes = SLAB.unpack(packet)
                inputs, outputs = self._map(input_bytes, output_bytes)
                self._planner.forget()
                self._memory.set_slot(slot, Slabs(inputs, outputs))
            elif kind == Kind.MAP:
                _, _, _, region, byte_length = REGION.unpack(packet)
                (area,) = self._map(byte_length)
                self._planner.forget_region(region)
                self._memory.set_region(region, area)
            elif kind == Kind.UNMAP:
                _, _, _, region, _ = REGION.unpack(packet)
                self._planner.forget_region(region)
                self._memory.drop_region(region)
            else:
                raise LinkBroken(f"a packet of kind {kind} came where none is expected")
        except (ValueError, struct.error) as error:
            raise LinkBroken(str(error)) from error

    def _map(self, *byte_lengths: int) -> list[Area]:
        fds = self._link.take_fds(len(byte_lengths))
        try:
            return [Area(fd, byte_length) for fd, byte_length in zip(fds, byte_lengths, strict=True)]
        finally:
            for fd in fds:
                os.close(fd)

    def _decoded(self, number: int, plan: Plan) -> Batch:
        pictures = self._model.pictures
        if pictures is None or plan.pictures is None:
            return Batch(number, plan)
        started = time.monotonic_ns()
        # One copy before anything is checked: a client may rewrite its region at any time.
        contents = split_elements(plan.pictures.tobytes(), plan.rows)
        tensor = np.zeros((plan.rows, *pictures.decoder.shape), dtype=np.float32)
        if plan.rows == 1:
            problems = [_decode(pictures, contents[0], tensor[0])]
        else:
            problems = list(self._decoders.map(_decode, [pictures] * plan.rows, contents, tensor))
        row_errors = {row: problem for row, problem in enumerate(problems) if problem}
        fed = tensor if pictures.is_batched else tensor[0]
        return Batch(number, plan, fed, row_errors or None, time.monotonic_ns() - started)

    def _refusal(self, length: int, error: Exception) -> bytes:
        if length < FAULT_HEADER.size:
            raise LinkBroken("a packet was too short to say which batch it is about")
        _, slot, _, _, number = FAULT_HEADER.unpack_from(self._link.buffer)
        return fault(slot, number, str(error))

    def _answer(self, packet: bytes) -> None:
        """Send `packet` behind the answers of everything received before it."""
        if self._queue is None:
            self._link.send(packet)
        else:
            self._queue.put(packet)

    def _run_queued(self, waiting: "queue.SimpleQueue[Batch | bytes]") -> None:
        try:
            while True:
                item = waiting.get()
                if isinstance(item, Batch):
                    run(self._model, self._link, item, self._recorder)
                else:
                    self._link.send(item)
                del item
        except OSError:
            os._exit(0)  # the front-end is gone
        except BaseException:
            # Without this thread nothing is ever answered again; a dead worker is noticed and replaced.
            traceback.print_exc()
            os._exit(1)


def _decode(pictures: Pictures, content: bytes, row: "NDArray[Any]") -> str:
    """Decode one picture into `row`; returns why it cannot be, or an empty string."""
    try:
        pictures.decoder.decode(content, row)
    except UndecodableImage as error:
        row[...] = 0
        return str(error)
    return ""
