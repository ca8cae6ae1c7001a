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


class Share:
    """One model's part of a device.

    Attributes:
        weight: Its part, beside the others'.
        resume: Called in a later turn of the loop where `may_run` said no and things have changed.
        is_held: True from then on until it is called.
    """

    __slots__ = ("_began_ns", "_device", "_ended_ns", "_running", "_used_ns", "is_held", "resume", "weight")

    def __init__(self, device: "_Device", weight: float, resume: Callable[[], None]) -> None:
        self._device = device
        self.weight = weight
        self.resume = resume
        self._used_ns = 0.0
        self._began_ns = 0
        self._ended_ns = -_SLACK_NS
        self._running = 0
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
        lags = [
            (limit_ns - used_ns) * other.weight
            for other in running
            if other is not self and (used_ns := other.used_ns(now_ns)) < limit_ns
        ]
        if lags and not self.is_held:
            self.is_held = True
            self._device.wake_after(self, max(lags))
        return not lags

    def begin(self, now_ns: int) -> None:
        """A batch starts."""
        self._running += 1
        if self._running == 1:
            running = self._device.running
            if running and now_ns - self._ended_ns > _SLACK_NS:  # nobody saves up while idle
                self._used_ns = max(self._used_ns, min(other.used_ns(now_ns) for other in running))
            self._began_ns = now_ns
            running.append(self)

    def end(self, now_ns: int) -> None:
        """A batch has ended."""
        if not self._running:
            return
        self._used_ns = self.used_ns(now_ns)
        self._began_ns = self._ended_ns = now_ns
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
            self.resume()


class _Device:
    """One device: the shares of it, and those of them that have a batch on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.shares: list[Share] = []
        self.running: list[Share] = []

    def wake(self) -> None:
        """Let those that were held try again."""
        for share in self.shares if len(self.shares) > 1 else ():
            if share.is_held:
                self._loop.call_soon(share.wake)

    def wake_after(self, share: Share, delay_ns: float) -> None:
        """Let `share` try again when the others will have caught up, if they go on running."""
        self._loop.call_later(delay_ns / 1e9, share.wake)


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
