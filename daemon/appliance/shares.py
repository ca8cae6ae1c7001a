"""Models that use one device at the same time, and how much of it each may have.

The operating system or the driver runs batches of several models side by side and gives each the same. Where the
manifests' weights say otherwise, the model that is ahead of its share waits with its next batch until the others have
caught up, but only while one of them keeps the device busy: nothing is ever held back on a device that would idle.
"""

import asyncio
from collections.abc import Callable
from typing import Final

#: How far ahead of its share a model may run, in ns of a model of weight 1: it need not wait for every single batch.
_SLACK_NS: Final = 20_000_000
#: How far behind that it may be, likewise: more than the longest of others' batches, which it is to make up for. One
#: further behind has had little to do, and would keep others off the device for all that time once it has much.
_MAX_LAG_NS: Final = 1_000_000_000


class Share:
    """One model's part of a device.

    Attributes:
        weight: Its part, beside the others'.
        resume: Called in a later turn of the loop where `may_run` said no and things have changed.
        is_held: True from then on until it is called.
    """

    __slots__ = (
        "_began_ns",
        "_device",
        "_ended_ns",
        "_running",
        "_timer",
        "_used_ns",
        "_was_refused",
        "is_held",
        "resume",
        "weight",
    )

    def __init__(self, device: "_Device", weight: float, resume: Callable[[], None]) -> None:
        self._device = device
        self.weight = weight
        self.resume = resume
        self._used_ns = 0.0
        self._began_ns = 0
        self._ended_ns = -_SLACK_NS
        self._running = 0
        self._was_refused = False  # since it ran last
        self._timer: asyncio.TimerHandle | None = None
        self.is_held = False

    def used_ns(self, now_ns: int) -> float:
        """What it has had of the device so far, by weight."""
        return self._used_ns + (now_ns - self._began_ns) / self.weight if self._running else self._used_ns

    def may_run(self, now_ns: int) -> bool:
        """False where it is ahead of a model that is running; `resume` is called when that may have changed."""
        running = self._device.running
        if not running or (len(running) == 1 and self._running):
            return True
        limit_ns = self.used_ns(now_ns) - _SLACK_NS
        wait_ns = max([other.catch_up(limit_ns, now_ns) for other in running if other is not self])
        if wait_ns <= 0:
            return True
        self._was_refused = True
        if not self.is_held:
            self.is_held = True
            self._timer = self._device.wake_after(self, wait_ns)
        return False

    def catch_up(self, limit_ns: float, now_ns: int) -> float:
        """How long it must run yet to have had as much as `limit_ns`; below 0 where it has had more."""
        lag_ns = limit_ns - self.used_ns(now_ns)
        if lag_ns > _MAX_LAG_NS:
            self._used_ns += lag_ns - _MAX_LAG_NS
            lag_ns = _MAX_LAG_NS
        return lag_ns * self.weight

    def begin(self, now_ns: int) -> None:
        """A batch starts."""
        self._running += 1
        if self._running == 1:
            if now_ns - self._ended_ns > _SLACK_NS and not self._was_refused:  # nobody saves up while idle
                self._used_ns = max(self._used_ns, self._device.time_ns(now_ns))
            self._was_refused = False
            self._began_ns = now_ns
            self._device.running.append(self)

    def end(self, now_ns: int) -> None:
        """A batch has ended."""
        if not self._running:
            return
        self._used_ns = self.used_ns(now_ns)
        self._began_ns = self._ended_ns = now_ns
        self._device.last_ns = max(self._device.last_ns, self._used_ns)
        self._running -= 1
        if not self._running:
            self._device.running.remove(self)
        self._device.wake()

    def leave(self, now_ns: int) -> None:
        """The model is off the device, with whatever ran."""
        self._running = min(self._running, 1)
        self.end(now_ns)
        self._device.shares.remove(self)

    def wake(self) -> None:
        """Try again, where it was held."""
        if self.is_held:
            self.is_held = False
            if self._timer is not None:
                self._timer.cancel()
            self.resume()


class _Device:
    """One device.

    Attributes:
        shares: Of all models on it.
        running: Those that have a batch on it.
        last_ns: The most that any of them has had of it, by weight.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.shares: list[Share] = []
        self.running: list[Share] = []
        self.last_ns = 0.0

    def time_ns(self, now_ns: int) -> float:
        """What a model that comes now counts as having had: as much as those that are running, or ran last."""
        return min([share.used_ns(now_ns) for share in self.running], default=self.last_ns)

    def wake(self) -> None:
        """Let those that were held try again."""
        for share in self.shares if len(self.shares) > 1 else ():
            if share.is_held:
                self._loop.call_soon(share.wake)

    def wake_after(self, share: Share, delay_ns: float) -> asyncio.TimerHandle:
        """Let `share` try again when the others will have caught up, if they go on running."""
        return self._loop.call_later(delay_ns / 1e9, share.wake)


class Shares:
    """All devices that models run on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._devices: dict[str, _Device] = {}

    def enter(self, device: str, weight: float, resume: Callable[[], None]) -> Share:
        """The share of a model that is to run on `device`."""
        on = self._devices.setdefault(device, _Device(self._loop))
        share = Share(on, weight, resume)
        on.shares.append(share)
        return share
