"""One blocking connection to the daemon: requests out, answers in, regions in between."""

import math
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance_client.calls import Call
from appliance_client.channel import Channel, kept
from appliance_client.errors import ApplianceError, ProtocolError, not_due, several_answers, too_long
from appliance_client.frames import JOIN_BYTES, Frame
from appliance_client.regions import Region, RegionPool
from appliance_client.retry import microseconds
from appliance_client.wire import native

if TYPE_CHECKING:
    from typing import TypeVar

    from appliance_client.answer import Answer
    from appliance_client.messages import Codec, Request

    _T = TypeVar("_T")

#: Id of a request, its answer or error, and whether more answers follow.
Outcome = tuple[int, "Answer | ApplianceError", bool]


class Connection:
    """Sends requests and receives answers; used by one thread at a time.

    Args:
        path: The native socket.
        connect_timeout: Seconds for connecting and the handshake.
        max_answer_bytes: Longest answer accepted.
        region_threshold: Bytes from which an input travels in a region; None for never.
        pool_bytes: Bytes of regions to keep.

    Attributes:
        welcome: What the daemon granted.

    Raises:
        ApplianceError: As `Channel`.
    """

    def __init__(
        self,
        path: Path,
        *,
        connect_timeout: float,
        max_answer_bytes: int,
        region_threshold: int | None,
        pool_bytes: int,
    ) -> None:
        self._channel = Channel(path, connect_timeout)
        self._channel.accept_up_to(max_answer_bytes)
        self.begin = self._channel.begin
        self._receive = self._channel.receive
        self.welcome = welcome = self._channel.welcome
        self._pool = RegionPool(welcome.regions_usable, welcome.max_region_bytes, pool_bytes)
        self._threshold: float = math.inf if region_threshold is None else region_threshold
        self._lent: dict[int, Region] = {}
        self._last_id = 0
        self._outstanding = 0
        self._was_used = False
        self._is_draining = False

    @property
    def is_idle(self) -> bool:
        """True where the connection can take another caller: nothing outstanding, not closed, not draining."""
        return not (self._outstanding or self._is_draining or self._channel.is_closed)

    @property
    def is_closed(self) -> bool:
        """True once closed."""
        return self._channel.is_closed

    @property
    def is_silent(self) -> bool:
        """True where the other end has neither closed nor said anything since the last answer; asks the kernel."""
        return self._channel.is_silent

    def close(self) -> None:
        """Close at once; the daemon withdraws what was outstanding. Safe to call again."""
        self._channel.close()
        self._pool.close()
        for region in self._lent.values():
            region.close()
        self._lent.clear()

    def infer(self, codec: "Codec", request: "Request", timeout: float | None) -> "Answer":
        """One request and its one answer.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        timeout_us = microseconds(timeout)
        deadline = self.begin(timeout)
        identifier = self.send(codec, request, timeout_us, deadline)
        frame = self._receive(deadline)
        while frame.identifier != identifier or frame.kind != native.RESULT:
            self._raise_for(frame, identifier)
            frame = self._receive(deadline)
        if frame.flags & native.FLAG_MORE:
            raise several_answers()
        answer = codec.answer(frame.head, frame.body, frame.is_owned)
        self._settle(identifier)
        return answer

    def call(self, call: "Call[_T]", timeout: float | None) -> "_T":
        """One method call and its reply.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        timeout_us = min(microseconds(timeout), native.MAX_TIMEOUT_US)
        deadline = self.begin(timeout)
        self._last_id = identifier = self._last_id + 1
        self._send([native.pack_call(identifier, call.method, call.message, timeout_us)], deadline)
        frame = self._receive(deadline)
        while frame.identifier != identifier or frame.kind != native.REPLY:
            self._raise_for(frame, identifier)
            frame = self._receive(deadline)
        self._settle(identifier)
        return call.read(bytes(frame.body))

    def send(self, codec: "Codec", request: "Request", timeout_us: int, deadline: float) -> int:
        """Send one inference; gives the id its answers carry.

        Raises:
            InvalidRequest: It is longer than the server takes.
            ApplianceError: What became of the connection.
        """
        head = request.head
        tail_size = request.byte_size
        region = None
        if request.largest >= self._threshold and self._pool.is_usable:
            offsets, region_size = request.region_offsets()
            region = self._region(region_size, deadline)
            if region is not None:
                request.write(region.memory, offsets)
                head = codec.region_head(request, region.identifier, offsets)
                tail_size = 0
        if timeout_us > native.MAX_TIMEOUT_US:
            head, timeout_us = codec.long_timeout_head(head, timeout_us), 0
        length = len(head) + tail_size
        self._last_id = identifier = self._last_id + 1
        if region is not None:
            self._lent[identifier] = region
        if length > self.welcome.max_frame_bytes:
            self._return_region(identifier)
            raise too_long(length, self.welcome.max_frame_bytes)
        header = native.HEADER.pack(length, native.INFER, 0, 0, identifier, len(head), timeout_us)
        if not tail_size:
            buffers: list[Any] = [header + head]
        elif length <= JOIN_BYTES:
            buffers = [header + head + request.tail()]
        else:
            buffers = [header + head, *request.buffers()]
        self._send(buffers, deadline)
        return identifier

    def _send(self, buffers: list[Any], deadline: float, descriptor: int = -1) -> None:
        """Send what one answer will come to."""
        is_alone = not self._outstanding
        self._outstanding += 1
        self._channel.send(
            buffers,
            deadline,
            descriptor=descriptor,
            answers_due=not is_alone,
            may_be_stale=is_alone and self._was_used,
        )

    def receive(self, codec: "Codec", due: Container[int], deadline: float) -> Outcome:
        """The next outcome of one of the requests that are `due`, waiting for it.

        Raises:
            ApplianceError: What became of the connection.
        """
        while True:
            outcome = self._outcome(codec, self._receive(deadline), due)
            if outcome is not None:
                return outcome

    def receive_if_any(self, codec: "Codec", due: Container[int]) -> Outcome | None:
        """As `receive`, but None where nothing has come.

        Raises:
            ApplianceError: What became of the connection.
        """
        while (frame := self._channel.receive_if_any()) is not None:
            outcome = self._outcome(codec, frame, due)
            if outcome is not None:
                return outcome
        return None

    def _outcome(self, codec: "Codec", frame: Frame, due: Container[int]) -> Outcome | None:
        """What a frame means to a request; None where it means nothing to one."""
        identifier = frame.identifier
        if frame.kind != native.RESULT:
            error = self._error(frame)
            if error is None:
                return None
            outcome: Outcome = identifier, error, False
        else:
            answer = codec.answer(frame.head, frame.body, frame.is_owned)
            outcome = identifier, answer, bool(frame.flags & native.FLAG_MORE)
        if identifier not in due:
            raise not_due(identifier)
        if not outcome[2]:
            self._settle(identifier)
        return outcome

    def _raise_for(self, frame: Frame, identifier: int) -> None:
        """Raise what a frame means to the one request outstanding, where it is not its answer."""
        if frame.kind in (native.RESULT, native.REPLY) and frame.identifier != identifier:
            raise not_due(frame.identifier)
        error = self._error(frame)
        if error is None:
            return
        if frame.identifier != identifier:
            raise not_due(frame.identifier)
        self._settle(identifier)
        raise error

    def _error(self, frame: Frame) -> ApplianceError | None:
        """The error in a frame that is no answer; None where it tells something else.

        Raises:
            ApplianceError: The error concerns the connection.
            ProtocolError: The frame has no place here; the request stays outstanding, so the connection is not used
                again.
        """
        if frame.kind == native.ERROR:
            error = native.unpack_error(frame.body)
            if frame.identifier == 0:
                self.close()
                raise error
            return error
        if frame.kind == native.GOAWAY:
            self._is_draining = True
        elif frame.kind not in (native.RELEASED, native.REGION_READY):
            raise ProtocolError(f"cannot read the answer: a frame of type {frame.kind} was not due")
        return None

    def _settle(self, identifier: int) -> None:
        self._outstanding -= 1
        self._was_used = True
        if self._lent:
            self._return_region(identifier)

    def _return_region(self, identifier: int) -> None:
        region = self._lent.pop(identifier, None)
        if region is not None:
            surplus = self._pool.give_back(region)
            if surplus is not None:
                self._release(surplus, math.inf)

    def _release(self, region: Region, deadline: float) -> None:
        self._channel.send([native.pack_release(region.identifier)], deadline, answers_due=self._outstanding > 0)

    def _region(self, byte_size: int, deadline: float) -> Region | None:
        """A region of at least `byte_size`, or None where the inputs are to travel in the frame."""
        region = self._pool.take(byte_size)
        if region is not None:
            return region
        self._last_id = identifier = self._last_id + 1
        region, surplus = self._pool.make(identifier, byte_size)
        for old in surplus:
            self._release(old, deadline)
        if region is None:
            return None
        try:
            self._send([native.pack_region(identifier, region.byte_size)], deadline, region.descriptor)
            error = self._reply_to_region(identifier, deadline)
        except BaseException:
            region.close()
            raise
        self._outstanding -= 1
        region.forget_descriptor()
        if error is None:
            return region
        if not error.is_retryable:
            self._pool.refuse()
        self._pool.discard(region)
        return None

    def _reply_to_region(self, identifier: int, deadline: float) -> ApplianceError | None:
        """Wait for the answer to REGION; what comes for other requests meanwhile is received after it."""
        early: list[Frame] = []
        while True:
            frame = self._receive(deadline)
            if frame.identifier not in (0, identifier):
                early.append(kept(frame))
                continue
            error = self._error(frame)
            if error is not None or frame.kind == native.REGION_READY:
                self._channel.put_back(early)
                return error
