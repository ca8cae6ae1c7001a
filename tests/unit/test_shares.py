"""Models on one device: who is held back, for how long, and that the device never idles for it. Time is the test's."""

import asyncio

import pytest

from appliance.shares import Shares

MS = 1_000_000


class Model:
    """A model with a queue without end, one batch at a time."""

    def __init__(self, shares: Shares, device: str, weight: float, batch_ms: int) -> None:
        self.was_resumed = asyncio.Event()
        self.share = shares.enter(device, weight, self.resumed)
        self.batch_ns = batch_ms * MS
        self.ends_ns = 0
        self.had_ns = 0
        self.resumes = 0

    def resumed(self) -> None:
        self.resumes += 1
        self.was_resumed.set()

    def step(self, now_ns: int) -> None:
        """End the batch that is due, start the next if it may."""
        if self.ends_ns and now_ns >= self.ends_ns:
            self.share.end(now_ns)
            self.had_ns += self.batch_ns
            self.ends_ns = 0
        if not self.ends_ns and self.share.may_run(now_ns):
            self.share.begin(now_ns)
            self.ends_ns = now_ns + self.batch_ns


def play(models: list[Model], until_ms: int) -> None:
    for millisecond in range(until_ms):
        for model in models:
            model.step(millisecond * MS)
        assert any(model.ends_ns for model in models), "the device idles"


def run(scenario):
    async def whole():
        scenario(Shares(asyncio.get_running_loop()))

    asyncio.run(whole())


@pytest.mark.parametrize(("weight", "batches"), [(1.0, (5, 5)), (3.0, (5, 5)), (3.0, (40, 2)), (0.25, (2, 30))])
def test_time_on_the_device_follows_weights_whatever_batches_cost(weight, batches):
    def scenario(shares):
        heavy, light = Model(shares, "cpu", weight, batches[0]), Model(shares, "cpu", 1.0, batches[1])
        play([heavy, light], 6000)
        assert heavy.had_ns / light.had_ns == pytest.approx(weight, rel=0.1)

    run(scenario)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_hot_model_never_holds_back_one_that_needs_less_than_its_share(weight):
    """Reliability 86: a batch of 5 ms each 100 ms begins when it comes, beside a model that never pauses."""

    def scenario(shares):
        hot, cold = Model(shares, "cpu", 1.0, 5), shares.enter("cpu", weight, lambda: None)
        for millisecond in range(5000):
            hot.step(millisecond * MS)
            if millisecond % 100 == 50:
                assert cold.may_run(millisecond * MS)
                cold.begin(millisecond * MS)
            elif millisecond % 100 == 55:
                cold.end(millisecond * MS)
        assert hot.had_ns >= 4500 * MS, "nor does it lose more than that"

    run(scenario)


def test_a_model_alone_is_never_held_back_and_devices_are_apart():
    def scenario(shares):
        alone, elsewhere = Model(shares, "cpu", 0.01, 5), Model(shares, "nvidia0", 100.0, 5)
        play([alone, elsewhere], 1000)
        assert alone.had_ns == elsewhere.had_ns > 900 * MS

    run(scenario)


def test_who_was_idle_has_saved_nothing_up():
    def scenario(shares):
        busy, late = Model(shares, "cpu", 1.0, 5), Model(shares, "cpu", 1.0, 5)
        play([busy], 2000)
        before = busy.had_ns
        for millisecond in range(2000, 4000):
            busy.step(millisecond * MS)
            late.step(millisecond * MS)
        assert busy.had_ns - before == pytest.approx(late.had_ns, rel=0.1)

    run(scenario)


def test_who_ran_alone_is_not_behind_all_others_afterwards():
    """Whoever begins on a device that idles starts level with whoever had it last."""

    def scenario(shares):
        first, second = Model(shares, "cpu", 1.0, 5), Model(shares, "cpu", 1.0, 5)
        play([first], 60_000)
        first.share.end(60_000 * MS)
        first.ends_ns, before = 0, first.had_ns
        for millisecond in range(60_100, 62_000):
            second.step(millisecond * MS)
            if millisecond >= 60_200:
                first.step(millisecond * MS)
        assert first.had_ns - before > 1700 * MS

    run(scenario)


def test_a_model_that_had_little_to_do_for_long_may_not_keep_the_device_for_as_long():
    def scenario(shares):
        busy, light = Model(shares, "cpu", 1.0, 5), Model(shares, "cpu", 1.0, 1)
        for millisecond in range(20_000):
            busy.step(millisecond * MS)
            if millisecond % 15 == 0:
                light.share.begin(millisecond * MS)
            elif millisecond % 15 == 1:
                light.share.end(millisecond * MS)
        before = busy.had_ns
        for millisecond in range(20_000, 23_000):
            light.step(millisecond * MS)
            busy.step(millisecond * MS)
        assert busy.had_ns - before > 1500 * MS, "it waits for a second, not for twenty"

    run(scenario)


def test_a_model_that_was_held_is_told_when_another_ends_a_batch_or_leaves():
    async def scenario():
        shares = Shares(asyncio.get_running_loop())
        light, heavy = Model(shares, "cpu", 0.1, 10), Model(shares, "cpu", 10.0, 1000)
        heavy.share.begin(0)
        light.share.begin(0)
        light.share.end(40 * MS)
        assert not light.share.may_run(41 * MS)
        heavy.share.end(50 * MS)
        await asyncio.sleep(0)
        assert light.resumes == 1
        assert light.share.may_run(51 * MS), "nobody else runs"
        heavy.share.begin(51 * MS)
        assert not light.share.may_run(52 * MS)
        heavy.share.leave(53 * MS)
        await asyncio.sleep(0)
        assert light.resumes == 2
        assert light.share.may_run(54 * MS)

    asyncio.run(scenario())


def test_a_model_held_behind_one_that_hangs_goes_on_by_itself():
    async def scenario():
        shares = Shares(asyncio.get_running_loop())
        light, stuck = Model(shares, "cpu", 1.0, 1), Model(shares, "cpu", 1.0, 1000)
        light.share.begin(0)
        stuck.share.begin(0)
        light.share.end(10 * MS)
        light.share._used_ns += 25 * MS  # ahead by more than the slack
        assert not light.share.may_run(10 * MS)
        async with asyncio.timeout(10):
            await light.was_resumed.wait()
        assert light.share.may_run(30 * MS)

    asyncio.run(scenario())
