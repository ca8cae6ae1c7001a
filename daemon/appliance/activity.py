"""Whether requests come in, for those who use the machine only while it is idle."""

from collections.abc import Callable


class Activity:
    """Noted for every batch, so it costs one call and one comparison.

    Attributes:
        last_ns: When the last batch was sent, CLOCK_MONOTONIC.
        listener: Called before a batch is sent; None while nobody wants to know.
    """

    __slots__ = ("last_ns", "listener")

    def __init__(self) -> None:
        self.last_ns = 0
        self.listener: Callable[[], None] | None = None

    def note(self, now_ns: int) -> None:
        """A batch is about to be sent."""
        self.last_ns = now_ns
        if self.listener is not None:
            self.listener()
