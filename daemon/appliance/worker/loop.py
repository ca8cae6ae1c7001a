"""A worker's main loop: receive → prepare → run.

Where the session has one stream everything happens on one thread, since handing over to another costs more than a small
model's run. With pictures, though, the receiving thread decodes the next batch while a runner thread runs the last one;
answers keep their order.

Where the session has several streams there is a thread for each. They take turns at receiving: the one whose turn it is
takes packets until a batch comes, passes the turn on, and runs the batch itself, so that here too nothing is handed
over. Answers go out as batches finish, in any order. The front-end gives a slot to one batch at a time, so whatever
belongs to a slot belongs to one thread.
"""

import os
import queue
import struct
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
        self._turn = threading.Lock()  # held by the thread that receives, to which memory and plans belong meanwhile
        self._queue: queue.SimpleQueue[Batch | bytes] | None = None
        if model.pictures is not None:
            self._decoders = ThreadPoolExecutor(min(_MAX_DECODERS, len(os.sched_getaffinity(0))), "decode")
            if model.streams == 1:
                self._queue = queue.SimpleQueue()
                self._start(partial(self._run_queued, self._queue), "run")

    def serve(self) -> None:
        """Answer packets until end of file.

        Raises:
            LinkBroken: The front-end broke the protocol.
            OSError: The front-end is gone.
        """
        if self._model.streams > 1:
            for number in range(1, self._model.streams):
                self._start(self._serve_in_turns, f"run-{number}")
            self._serve_in_turns()
            return
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

    def _serve_in_turns(self) -> None:
        """One of the threads; `serve` says what it raises."""
        while (received := self._next_in_turn()) is not None:
            plan, number = received
            try:
                batch = Batch(number, plan) if plan.pictures is None else self._decoded(number, plan)
            except ValueError as error:
                self._link.send(fault(plan.slot, number, str(error)))
            else:
                run(self._model, self._link, batch, self._recorder)
                del batch
            del plan, received  # until the next batch they would keep memory mapped that the front-end has given back

    def _next_in_turn(self) -> tuple[Plan, int] | None:
        """Wait for the turn, and then for a batch; returns its plan and number, None once the front-end is gone."""
        with self._turn:
            link, buffer = self._link, self._link.buffer
            while length := link.receive():
                if buffer[0] != _RUN:
                    self._control(buffer[0], length)
                    continue
                try:
                    return self._planner.plan(buffer[:length])
                except (ValueError, OverflowError) as error:
                    link.send(self._refusal(length, error))
        return None

    def _start(self, work: Callable[[], None], name: str) -> None:
        threading.Thread(target=_ending_all, args=(work,), name=name, daemon=True).start()

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
        while True:
            item = waiting.get()
            if isinstance(item, Batch):
                run(self._model, self._link, item, self._recorder)
            else:
                self._link.send(item)
            del item


def _ending_all(work: Callable[[], None]) -> None:
    """A thread's work. Where it fails the process ends: batches would go unanswered, and a dead worker is replaced."""
    try:
        work()
    except OSError:
        os._exit(0)  # the front-end is gone
    except BaseException:
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
