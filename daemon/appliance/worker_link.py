"""The front-end's end of one worker: process, socket, slabs. Frames go out and come in; nothing is decided."""

import array
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from appliance.call import Call
from appliance.errors import KINDS, BackendError, InvalidManifest, Overloaded, WorkerLost
from appliance.flights import Flight
from appliance.slab import Slab
from appliance.wire import worker as frames
from appliance.wire import worker_pb2

_log = logging.getLogger("appliance.worker")

#: Lines of a worker's standard error that reach the log in one second, and what is read at a time of the rest.
_MAX_LINES_A_SECOND: Final = 50
_DROPPED_BYTES: Final = 65536
#: Time a worker has to go by itself, and, once it is killed, for the kernel to let go of it.
_EXIT_SECONDS: Final = 0.25
_REAP_SECONDS: Final = 2.0
_FD_BYTES: Final = array.array("i").itemsize
# Plain numbers: enum members cost ten times as much to read, and every batch compares them.
_DONE: Final = int(frames.Kind.DONE)
_FAULT: Final = int(frames.Kind.FAULT)
_PONG: Final = int(frames.Kind.PONG)
_PACKET_BYTES: Final = frames.MAX_PACKET_BYTES
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * _FD_BYTES)
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)


class Slot:
    """One of a worker's pairs of slabs, and the batch that occupies it.

    Attributes:
        number: The slot's number on the wire.
        input: Where the batch's inputs are gathered.
        output: Where the worker writes.
        calls: The batch; empty while the slot is free.
        batch: The batch's number.
        started_ns: When it was sent.
        copy_ns: What gathering it took.
        flight: What the batcher predicts of it; None while the slot is free.
        spill: A slab made for this batch alone, where the inputs outgrew the slot's.
        spill_region: The spill's number on the wire.
    """

    __slots__ = (
        "batch",
        "calls",
        "copy_ns",
        "flight",
        "input",
        "number",
        "output",
        "spill",
        "spill_region",
        "started_ns",
    )

    def __init__(self, number: int, input_bytes: int, output_bytes: int) -> None:
        self.number = number
        self.input = Slab.create(input_bytes, "appliance-input")
        try:
            self.output = Slab.create(output_bytes, "appliance-output")
        except Overloaded:
            self.input.close()
            raise
        self.calls: list[Call] = []
        self.batch = 0
        self.started_ns = 0
        self.copy_ns = 0
        self.flight: Flight | None = None
        self.spill: Slab | None = None
        self.spill_region = 0

    def close(self) -> None:
        """Give the shared memory back."""
        for slab in (self.input, self.output, self.spill):
            if slab is not None:
                slab.close()
        self.spill = None


class LinkListener(Protocol):
    """Who hears what a worker says."""

    def on_done(self, packet: memoryview, attached: Slab | None) -> None:
        """A batch was answered. `packet` is valid during the call; `attached` is the listener's to close."""
        ...

    def on_fault(self, slot: int, batch: int, message: str, is_out_of_memory: bool) -> None:
        """A batch failed as a whole and the worker lives."""
        ...

    def on_lost(self, reason: str) -> None:
        """The worker is gone. Said once."""
        ...


class WorkerLink:
    """One worker process.

    Attributes:
        pid: Process id, or None before the start.
        loaded: What the worker said of the session it loaded.
        last_heard_ns: When the worker last said anything.
        is_lost: True once it is gone; `LinkListener.on_lost` follows when it is known how it ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: LinkListener, label: str) -> None:
        self._loop = loop
        self._listener = listener
        self._label = label
        self._socket: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: asyncio.Task[None] | None = None
        self._greeting: asyncio.Future[worker_pb2.Loaded] | None = None
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._buffer = memoryview(bytearray(_PACKET_BYTES))
        self.is_lost = False
        self._is_open = False
        self._loss: asyncio.Task[None] | None = None
        self._mapped: set[int] = set()
        self.loaded = worker_pb2.Loaded()
        self.last_heard_ns = 0

    @property
    def pid(self) -> int | None:
        """The worker's process id while there is a process."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, python: str, load: worker_pb2.Load, timeout_seconds: float) -> worker_pb2.Loaded:
        """Spawn the worker and have it load. The listener hears nothing before this returns, nor if it raises.

        Raises:
            ApplianceError: As the worker reported it; `WorkerLost` where it died, `BackendError` where it took too
                long.
        """
        packet = bytes((frames.Kind.LOAD,)) + load.SerializeToString()
        if len(packet) > _PACKET_BYTES:
            raise InvalidManifest(
                f"cannot load the model: its manifest takes {len(packet)} bytes and {_PACKET_BYTES} are the limit"
            )
        greeting = self._greeting = self._loop.create_future()
        try:
            await self._spawn(python)
            self.send(packet)
            async with asyncio.timeout(timeout_seconds):
                self.loaded = await greeting
            if self.is_lost:
                raise WorkerLost("cannot load the model: the worker ended as soon as it had")
        except TimeoutError:
            await self.close()
            raise BackendError(f"cannot load the model: loading took longer than {timeout_seconds:g} s") from None
        except BaseException:
            await self.close()
            raise
        self._is_open = True
        return self.loaded

    async def _spawn(self, python: str) -> None:
        """Start the process and listen to it.

        Raises:
            BackendError: It cannot be started.
        """
        environment = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")}
        try:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._socket.setblocking(False)
                # A session of its own: signals meant for the daemon's group pass it by, and what a plugin starts goes
                # with it.
                self._process = await asyncio.create_subprocess_exec(
                    python or sys.executable, "-P", "-m", "appliance.worker", "--fd", str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),), env=environment, start_new_session=True,
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
        except OSError as error:
            raise BackendError(f"cannot start a worker: {error.strerror}") from error
        self._stderr = self._loop.create_task(self._read_stderr())
        self._loop.add_reader(self._socket, self._on_readable)

    def make_slot(self, number: int, input_bytes: int, output_bytes: int) -> Slot:
        """Make a pair of slabs and hand it to the worker.

        Raises:
            Overloaded: There is no memory or descriptor for them.
        """
        slot = Slot(number, input_bytes, output_bytes)
        packet = frames.SLAB.pack(frames.Kind.SLAB, number, 0, 0, input_bytes, output_bytes)
        self.send(packet, (slot.input.fd, slot.output.fd))
        return slot

    def map_region(self, region: int, slab: Slab) -> None:
        """Let the worker map `slab` as `region`; does nothing where it has it already."""
        if region not in self._mapped:
            self._mapped.add(region)
            self.send(frames.REGION.pack(frames.Kind.MAP, 0, 0, region, slab.size), (slab.fd,))

    def unmap_region(self, region: int) -> None:
        """Let the worker forget `region`."""
        if region in self._mapped:
            self._mapped.discard(region)
            self.send(frames.REGION.pack(frames.Kind.UNMAP, 0, 0, region, 0))

    def send(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a packet, or keep it until the worker has taken what it was sent before."""
        if self._socket is None or self.is_lost:
            return
        if not self._outgoing:
            try:
                if descriptors:
                    socket.send_fds(self._socket, [packet], list(descriptors))
                else:
                    self._socket.send(packet)
                return
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._on_writable)
            except OSError:
                return  # the reader sees the end of file and says so
        self._outgoing.append((packet, [os.dup(fd) for fd in descriptors]))

    def _on_writable(self) -> None:
        while self._outgoing and self._socket is not None:
            packet, descriptors = self._outgoing[0]
            try:
                socket.send_fds(self._socket, [packet], descriptors)
            except BlockingIOError:
                return
            except OSError:
                break
            self._outgoing.popleft()
            for fd in descriptors:
                os.close(fd)
        if self._socket is not None:
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        connection = self._socket
        if connection is None:
            return
        try:
            size, ancillary, _, _ = connection.recvmsg_into((self._buffer,), _ANCILLARY_BYTES, _CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            size, ancillary = 0, []
        if size == 0:
            self._lose()
            return
        self.last_heard_ns = time.monotonic_ns()
        try:
            self._take(size, ancillary)
        except Exception:  # what cannot be taken leaves calls unanswered; losing the worker answers them
            _log.exception("%s: cannot take a packet of the worker, which is replaced", self._label)
            self.kill()

    def _take(self, size: int, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        packet = self._buffer[:size]
        kind = packet[0]
        if kind == _DONE and self._is_open:
            attached = self._adopt(ancillary) if ancillary else None
            self._listener.on_done(packet, attached)
        elif kind == _FAULT and self._is_open:
            _, slot, cause, _, batch = frames.FAULT_HEADER.unpack_from(packet)
            message = bytes(packet[frames.FAULT_HEADER.size :]).decode("utf-8", "replace")
            self._listener.on_fault(slot, batch, message, cause == frames.OUT_OF_MEMORY)
        elif kind != _PONG:
            self._on_greeting(kind, bytes(packet[1:]))

    def _on_greeting(self, kind: int, body: bytes) -> None:
        if self._greeting is None or self._greeting.done():
            raise ValueError(f"a packet of kind {kind} came where none is expected")
        if kind == frames.Kind.LOADED:
            self._greeting.set_result(worker_pb2.Loaded.FromString(body))
        elif kind == frames.Kind.FAILED:
            failed = worker_pb2.Failed.FromString(body)
            self._greeting.set_exception(KINDS.get(failed.kind, BackendError)(failed.message))

    @staticmethod
    def _adopt(ancillary: Sequence[tuple[int, int, bytes]]) -> Slab:
        descriptors = array.array("i")
        for _, _, content in ancillary:
            descriptors.frombytes(content[: len(content) - len(content) % _FD_BYTES])
        for fd in descriptors[1:]:
            os.close(fd)
        return Slab.adopt(descriptors[0], os.fstat(descriptors[0]).st_size)

    def _lose(self) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        self._close_socket()
        self._loss = self._loop.create_task(self._report_loss())

    async def _report_loss(self) -> None:
        reason = await self._end_process()
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(WorkerLost(f"cannot load the model: the worker {reason}"))
        elif self._is_open:
            self._is_open = False
            self._listener.on_lost(reason)

    def kill(self) -> None:
        """End the worker at once; `LinkListener.on_lost` follows."""
        self._signal()
        # A process stuck in the kernel keeps its socket open; nobody shall wait for it.
        self._loop.call_later(_REAP_SECONDS, self._lose)

    def _signal(self) -> None:
        """Kill the worker and whatever it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End the worker without telling the listener, and reap it."""
        self.is_lost = True
        self._is_open = False
        self._close_socket()
        await self._end_process()

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        for _, descriptors in self._outgoing:
            for fd in descriptors:
                os.close(fd)
        self._outgoing.clear()

    async def _end_process(self) -> str:
        """Reap the process, by force if it does not go; returns how it ended."""
        process = self._process
        if process is None:
            return "was never started"
        gone = self._loop.create_task(process.wait())
        await asyncio.wait({gone}, timeout=_EXIT_SECONDS)
        self._signal()
        await asyncio.wait({gone}, timeout=_REAP_SECONDS)
        if self._stderr is not None:
            await asyncio.wait({self._stderr}, timeout=_EXIT_SECONDS)
            self._stderr.cancel()
        code = process.returncode
        if code is None:
            return "does not end, although it was killed"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    async def _read_stderr(self) -> None:
        """Pass a worker's standard error on to the log, a bounded number of lines a second, and never let it block."""
        stream = self._process.stderr if self._process is not None else None
        if stream is None:
            return
        second, lines = 0, 0
        while True:
            now = int(time.monotonic())
            second, lines = (now, 1) if now != second else (second, lines + 1)
            if lines > _MAX_LINES_A_SECOND:  # dropped in large pieces, which costs the loop next to nothing
                if lines == _MAX_LINES_A_SECOND + 1:
                    _log.warning("%s: writes too much to standard error; some of it is dropped", self._label)
                if not await stream.read(_DROPPED_BYTES):
                    return
                continue
            try:
                line = await stream.readline()
            except ValueError:  # a line longer than the stream's limit; what is buffered is dropped
                continue
            if not line:
                return
            _log.info("%s: %s", self._label, line.decode("utf-8", "replace").rstrip()[:500])
