"""One exchange of a connection: a request and its answer."""

from collections import deque
from typing import Any

from appliance.types import Buffer


class Stream:
    """A stream that is not closed.

    Attributes:
        id: Its number.
        request: What its header block means.
        work: Whatever the application keeps with it.
        is_received: The peer has sent the end of its side.
        is_open: False once it is closed for both sides.
        receive_window: Bytes the peer may still send.
        send_window: Bytes the peer still takes; negative after it lowered its initial window.
        pending: Content that waits for a window.
        trailers: Header block that ends the stream once nothing is pending.
    """

    __slots__ = (
        "id",
        "is_open",
        "is_received",
        "pending",
        "receive_window",
        "request",
        "send_window",
        "trailers",
        "work",
    )

    def __init__(self, id: int, request: Any, receive_window: int, send_window: int, is_received: bool) -> None:
        self.id = id
        self.request = request
        self.work: Any = None
        self.is_received = is_received
        self.is_open = True
        self.receive_window = receive_window
        self.send_window = send_window
        self.pending: deque[memoryview] | None = None
        self.trailers: bytes | None = None

    def queue(self, content: Buffer) -> None:
        """Keep content, which must own its bytes, until a window opens."""
        if self.pending is None:
            self.pending = deque()
        self.pending.append(memoryview(content))
