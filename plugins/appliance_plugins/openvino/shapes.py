"""Compilations of one model for single input shapes, beside the one that takes any.

The runtime plans a compilation of one shape better: 5 to 15 % faster at a single row on the CPUs seen, next to nothing
at large batches, and NPUs take nothing else. Each has packed weights of its own, so there are few, and compiling takes
as long as loading, so it happens in a thread while the general compilation answers.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: One shape for each input, in the model's order.
Shapes = tuple[tuple[int, ...], ...]

#: A shape is worth compiling for once it has taken as many times what compiling takes: what is wasted on shapes that
#: never come again then stays a fraction of what they took anyway.
_WORTH: Final = 4

#: Shapes whose times are kept; traffic of more shapes than this has no use for any of its own.
_MAX_WATCHED: Final = 256


class ShapeCompilations(Generic[T]):
    """What was compiled for which shapes; the least recently used goes when there are too many.

    All methods are called by the one thread that runs the session.
    """

    def __init__(self, make: Callable[[Shapes], T], limit: int, seconds: float) -> None:
        """Begin with none.

        Args:
            make: Compiles for one combination of shapes; called in a thread of its own, one call at a time.
            limit: How many are kept.
            seconds: How long compiling is thought to take.
        """
        self._make = make
        self._limit = limit
        self._worth = _WORTH * seconds
        self._ready: OrderedDict[Shapes, T] = OrderedDict()
        self._refused: set[Shapes] = set()
        self._spent: dict[Shapes, float] = {}
        self._last: Shapes | None = None
        self._thread: threading.Thread | None = None
        self._finished: SimpleQueue[tuple[Shapes, T | None]] = SimpleQueue()

    @property
    def is_settled(self) -> bool:
        """False while the shapes asked for last have no compilation and may get one."""
        self._collect()
        return self._last is None or self._last in self._ready or self._last in self._refused

    def find(self, shapes: Shapes) -> T | None:
        """What was compiled for `shapes`, or None."""
        if self._thread is not None:
            self._collect()
        self._last = shapes
        found = self._ready.get(shapes)
        if found is not None:
            self._ready.move_to_end(shapes)
        return found

    def compile_now(self, shapes: Shapes) -> T:
        """Compile for `shapes` and wait for it.

        Raises:
            Exception: Whatever the runtime raises.
        """
        made = self._make(shapes)
        self._keep(shapes, made)
        return made

    def spend(self, shapes: Shapes, seconds: float) -> None:
        """Count a run that the general compilation did; begins one for `shapes` where they have become worth it."""
        if shapes in self._refused:
            return
        if len(self._spent) >= _MAX_WATCHED and shapes not in self._spent:
            self._spent.clear()
        spent = self._spent[shapes] = self._spent.get(shapes, 0.0) + seconds
        if spent >= self._worth and self._thread is None:
            # Not a daemon thread: the interpreter must not be taken down under the runtime.
            self._thread = threading.Thread(target=self._work, args=(shapes,), name="compile")
            self._thread.start()

    def close(self) -> None:
        """Wait for a compilation under way and drop all."""
        if self._thread is not None:
            self._thread.join()
            self._collect()
        self._ready.clear()

    def _work(self, shapes: Shapes) -> None:
        try:
            made = self._make(shapes)
        except Exception:  # a model that has no such shape keeps to the general compilation
            self._finished.put((shapes, None))
        else:
            self._finished.put((shapes, made))

    def _collect(self) -> None:
        """Take over what the thread has finished."""
        try:
            shapes, made = self._finished.get_nowait()
        except Empty:
            return
        self._thread = None
        self._spent.pop(shapes, None)
        if made is None:
            if len(self._refused) >= _MAX_WATCHED:
                self._refused.clear()
            self._refused.add(shapes)
        else:
            self._keep(shapes, made)

    def _keep(self, shapes: Shapes, made: T) -> None:
        self._ready[shapes] = made
        while len(self._ready) > self._limit:
            self._ready.popitem(last=False)
