"""What batches cost, learned in virtual time from batches of a device that is made up."""

import math
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.cost_line import Line
from appliance.cost_model import CostModel
from appliance.measurement import Measurement, Point, VariantKey
from support.simulator import SECOND, Fate, Service, Simulation, poisson

MS = 1_000_000
KEY = VariantKey("a" * 64, "onnxruntime", "1", "cpu", "1", "FP32", "{}")
SIZES = {
    "one row": lambda rng, number: 1,
    "eight rows": lambda rng, number: 8,
    "alternating": lambda rng, number: (1, 16)[number % 2],
    "random": lambda rng, number: rng.randint(1, 16),
    "in blocks": lambda rng, number: (1, 16)[number // 40 % 2],
}
#: c / (a + c) of a CPU, of the least that is worth batching, and of a GPU.
SHARES = (0.05, 0.2, 0.75)


class Device:
    """Takes ``pace * (slope * rows * units + intercept)``, with noise, and stalls now and then."""

    def __init__(self, slope_ns=0.8 * MS, intercept_ns=0.2 * MS, noise=0.05, stalls=0.0, seed=0):
        self.slope_ns = slope_ns
        self.intercept_ns = intercept_ns
        self.pace = 1.0
        self.stalls = stalls
        self._noise = noise
        self.rng = random.Random(seed)

    def true_ns(self, rows, units=1):
        return self.pace * (self.slope_ns * rows * units + self.intercept_ns)

    def took_ns(self, rows, units=1):
        took = self.true_ns(rows, units) * self.rng.lognormvariate(0, self._noise)
        return int(took * (self.rng.choice((3, 10, 1000)) if self.rng.random() < self.stalls else 1))

    def measured(self, units=0, rows=(1, 2, 4, 8, 16), spread=0.05, **changes):
        """What the registry knows of it."""
        us = [(n, self.true_ns(max(n, 1), max(units, 1)) / 1e3) for n in rows]
        points = tuple(Point(n, took, took * spread, 50) for n, took in us)
        return Measurement(KEY, points, tokens=units, units=units, **changes)


def run(model, device, count, sizes, units=1):
    """Let `count` batches run."""
    line = model.line(units)
    for number in range(count):
        rows = sizes(device.rng, number)
        model.note(line, rows, device.took_ns(rows, units))
    return line


def error(line, device, *sizes, units=1):
    """The largest relative error of the predictions for batches of `sizes`."""
    return max(abs(line.ns(rows) / device.true_ns(rows, units) - 1) for rows in sizes)


def split(share):
    return {"slope_ns": (1 - share) * MS, "intercept_ns": share * MS}


# ---------------------------------------------------------------- a line


def test_a_line_predicts_the_median_and_what_few_batches_exceed():
    line = Line(1)
    line.slope_ns, line.intercept_ns, line.spread = 100.0, 50.0, 0.1
    assert line.ns(4) == 450.0
    assert line.late_ns(4) == pytest.approx(540.0)
    assert line.setup_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.95])
def test_the_efficient_batch_is_the_smallest_that_reaches_its_share_of_the_throughput(share, wanted):
    line = Line(1)
    line.slope_ns, line.intercept_ns = 1 - share, share

    def reached(rows):
        return rows / line.ns(rows) * line.slope_ns

    rows = line.efficient_rows(1 << 16, wanted)
    assert reached(rows) >= wanted - 1e-9
    assert rows == 1 or reached(rows - 1) < wanted
    assert line.efficient_rows(4, wanted) == min(rows, 4)


def test_where_rows_cost_nothing_the_largest_batch_is_the_efficient_one_and_where_nothing_else_does_a_single_row_is():
    line = Line(1)
    line.slope_ns, line.intercept_ns = 0.0, 10.0
    assert line.efficient_rows(32) == 32
    assert line.setup_share == 1.0
    line.slope_ns, line.intercept_ns = 10.0, 0.0
    assert line.efficient_rows(32) == 1
    assert line.efficient_rows(0) == 1  # a model without batch dimension


def test_the_largest_batch_within_a_time_is_the_one_that_few_times_takes_longer():
    line = Line(1)
    line.slope_ns, line.intercept_ns, line.spread = 100.0, 50.0, 0.1
    for limit in range(0, 5000, 7):
        rows = line.rows_within(limit)
        assert rows == 0 or line.late_ns(rows) <= limit + 1e-6
        assert line.late_ns(rows + 1) > limit - 1e-6
    line.slope_ns = 0.0
    assert line.rows_within(1000) == 65536


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize("share", SHARES)
def test_what_was_measured_is_predicted_before_the_first_batch(share):
    device = Device(**split(share))
    model = CostModel()
    model.seed(device.measured(spread=0.07))
    line = model.line(1)
    assert error(line, device, 1, 3, 16, 64) < 0.001
    assert line.spread == pytest.approx(0.07)
    assert line.setup_share == pytest.approx(share)
    assert line.samples == 0


def test_a_measurement_that_came_to_nothing_says_nothing():
    model = CostModel()
    model.seed(Measurement(KEY, problem="out of memory"))
    model.seed(None)
    assert model.describe(32) == ()


def test_other_lengths_than_the_measured_one_are_scaled_by_their_units_until_they_are_learned():
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    model.seed(device.measured(units=64))
    for units in (1, 16, 64, 100, 256):
        assert error(model.line(units), device, 1, 16, units=units) < 0.001


def test_a_measurement_of_one_batch_size_leaves_the_share_of_the_intercept_open():
    device = Device(**split(0.75))
    model = CostModel()
    model.seed(device.measured(rows=(1,)))
    line = model.line(1)
    assert error(line, device, 1) < 0.001
    assert line.setup_share == pytest.approx(0.2)
    assert error(run(model, device, 60, SIZES["alternating"]), device, 1, 4, 16) < 0.08


def test_without_a_measurement_the_first_batch_sets_the_scale_and_the_share_of_the_intercept_is_a_fifth():
    model = CostModel()
    line = model.line(1)
    assert line.ns(1) > 0
    model.note(line, 8, 7_400_000)
    assert line.ns(8) == pytest.approx(7_400_000)
    assert line.setup_share == pytest.approx(0.2)


def test_a_first_run_that_compiles_is_forgotten_with_the_second_batch():
    model = CostModel()
    line = model.line(1)
    model.note(line, 1, 30_000 * MS)
    model.note(line, 1, 10 * MS)
    assert line.ns(1) == pytest.approx(10 * MS)


def test_a_first_run_that_compiles_does_not_shake_what_was_measured():
    device = Device()
    model = CostModel()
    model.seed(device.measured())
    line = model.line(1)
    model.note(line, 1, 30_000 * MS)
    assert error(line, device, 1, 16) < 0.001
    assert error(run(model, device, 10, SIZES["random"]), device, 1, 16) < 0.1


def test_a_model_without_batch_dimension_works():
    device = Device(slope_ns=0.0, intercept_ns=5 * MS)
    model = CostModel()
    model.seed(device.measured(rows=(0,)))
    line = model.line(1)
    assert line.ns(1) == pytest.approx(5 * MS)
    device.pace = 3.0
    for _ in range(40):
        model.note(line, 0, device.took_ns(1))
    assert error(line, device, 1) < 0.05


def test_a_measurement_can_come_late():
    """A tune that finds that what serves is the best swaps nothing, but now something is measured."""
    device = Device(**split(0.75))
    model = CostModel()
    line = model.line(1)
    model.note(line, 1, device.took_ns(1))
    model.seed(device.measured())
    assert error(line, device, 1, 16) < 0.001
    run(model, device, 30, SIZES["one row"])
    device.pace = 2.0
    model.seed(device.measured())
    device.pace = 1.0
    assert error(line, device, 1, 16) < 0.1  # it goes by its own batches


# ---------------------------------------------------------------- what it learns


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_sizes_that_are_seen_are_learned_without_a_measurement(share, sizes):
    device = Device(**split(share))
    line = run(CostModel(), device, 120, SIZES[sizes])
    seen = {"one row": [1], "eight rows": [8]}.get(sizes, [1, 8, 16])
    assert error(line, device, *seen) < 0.08


@pytest.mark.parametrize("sizes", ["alternating", "random", "in blocks"])
@pytest.mark.parametrize("share", SHARES)
def test_with_several_sizes_the_share_of_the_intercept_is_learned(share, sizes):
    line = run(CostModel(), Device(**split(share)), 120, SIZES[sizes])
    assert line.setup_share == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_the_spread_is_that_of_the_noise_and_heeds_no_stalls(noise):
    device = Device(noise=noise, stalls=0.05)
    model = CostModel()
    found = [run(model, device, 10, SIZES["random"]).spread for _ in range(60)][10:]
    assert statistics.median(found) == pytest.approx(noise, rel=0.3)


@pytest.mark.parametrize("sizes", SIZES)
def test_one_stall_changes_predictions_by_a_few_percent_at_most(sizes):
    """Reliability, number 84: beside a model that saw the same batches and no stall."""
    device = Device()
    models = CostModel(), CostModel()
    lines = [model.line(1) for model in models]
    for number in range(300):
        rows = SIZES[sizes](device.rng, number)
        took = device.took_ns(rows)
        for model, line in zip(models, lines, strict=True):
            model.note(line, rows, 30_000 * MS if number == 200 and model is models[0] else took)
        if number >= 200:
            stalled, plain = ([line.ns(rows) for rows in (1, 4, 16)] for line in lines)
            assert stalled == pytest.approx(plain, rel=0.04)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", SIZES)
def test_stalls_in_a_tenth_of_all_batches_change_little(sizes, seed):
    device = Device(stalls=0.1, seed=seed)
    model = CostModel()
    model.seed(device.measured())
    run(model, device, 100, SIZES[sizes])
    seen = {"one row": [1], "eight rows": [8]}.get(sizes, [8, 16])
    errors = [error(run(model, device, 1, SIZES[sizes]), device, *seen) for _ in range(500)]
    assert statistics.median(errors) < 0.04
    assert max(errors) < 0.15


@pytest.mark.parametrize("is_measured", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_throttling_that_doubles_latency_is_adapted_to_within_sixteen_batches_and_so_is_its_end(sizes, is_measured):
    """Reliability, number 102, which asks for fifty."""
    device = Device()
    model = CostModel()
    model.seed(device.measured() if is_measured else None)
    run(model, device, 100, SIZES[sizes])
    device.pace = 2.0
    line = run(model, device, 16, SIZES[sizes])
    assert error(line, device, 1, 4, 16) < 0.12
    run(model, device, 84, SIZES[sizes])
    assert error(line, device, 1, 4, 16) < 0.12
    device.pace = 1.0
    run(model, device, 16, SIZES[sizes])
    assert error(line, device, 1, 4, 16) < 0.12


def test_throttling_amid_stalls_and_much_noise_is_adapted_to_as_well():
    device = Device(noise=0.25, stalls=0.1)
    model = CostModel()
    model.seed(device.measured(spread=0.25))
    run(model, device, 200, SIZES["random"])
    device.pace = 2.0
    assert error(run(model, device, 50, SIZES["random"]), device, 4, 16) < 0.25


def test_where_one_size_is_seen_slope_and_intercept_scale_together():
    device = Device(**split(0.2))
    model = CostModel()
    model.seed(device.measured())
    device.pace = 1.7
    line = run(model, device, 50, SIZES["eight rows"])
    assert line.setup_share == pytest.approx(0.2, abs=1e-6)
    assert error(line, device, 1, 8, 32) < 0.05


@pytest.mark.parametrize("sizes", ["alternating", "random", "in blocks"])
@pytest.mark.parametrize(("slope", "intercept"), [(2, 1), (0.5, 1), (1, 4)])
def test_a_change_of_shape_is_learned_once_several_sizes_are_seen(sizes, slope, intercept):
    device = Device()
    model = CostModel()
    model.seed(device.measured())
    run(model, device, 100, SIZES[sizes])
    device.slope_ns *= slope
    device.intercept_ns *= intercept
    line = run(model, device, 240, SIZES[sizes])
    assert error(line, device, 1, 4, 16) < 0.12


def test_a_size_that_nobody_uses_any_more_does_not_hold_the_others_back():
    device = Device()
    model = CostModel()
    model.seed(device.measured())
    run(model, device, 50, SIZES["alternating"])
    for step in range(2000):
        device.pace = 1 + step / 2000
        line = run(model, device, 1, lambda rng, number: 16)
    assert error(line, device, 1, 4, 16) < 0.12


def test_one_batch_that_is_impossibly_fast_changes_little():
    device = Device()
    model = CostModel()
    model.seed(device.measured())
    line = run(model, device, 200, SIZES["eight rows"])
    model.note(line, 1, 1)
    assert max(error(run(model, device, 1, SIZES["eight rows"]), device, 8) for _ in range(200)) < 0.1


def test_what_is_no_line_is_met_in_between():
    """Batches are padded to powers of two, as compiled models have them: every size is near what it really takes."""
    model = CostModel()
    line = model.line(1)
    rng = random.Random(1)

    def took(rows):
        return (0.1 * (1 << (rows - 1).bit_length()) + 0.4) * MS

    for _ in range(300):
        rows = rng.randint(1, 16)
        model.note(line, rows, int(took(rows)))
    assert all(line.ns(rows) == pytest.approx(took(rows), rel=0.35) for rows in range(1, 17))


# ---------------------------------------------------------------- several lengths

LENGTHS = range(16, 257, 16)


def run_lengths(model, device, count, lengths=LENGTHS):
    for _ in range(count):
        units, rows = device.rng.choice(lengths), device.rng.randint(1, 16)
        model.note(model.line(units), rows, device.took_ns(rows, units))


def errors_of(model, device, lengths=LENGTHS):
    return [error(model.line(units), device, 1, 8, 16, units=units) for units in lengths]


def test_lengths_from_16_to_256_are_learned_without_a_measurement():
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    run_lengths(model, device, 60)
    assert statistics.mean(errors_of(model, device)) < 0.15
    run_lengths(model, device, 540)
    assert max(errors_of(model, device)) < 0.1


def test_throttling_is_adapted_to_for_every_length_at_once():
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    model.seed(device.measured(units=64))
    run_lengths(model, device, 400)
    for pace in (2.0, 1.0):
        device.pace = pace
        run_lengths(model, device, 16)
        assert max(errors_of(model, device)) < 0.15


def test_a_pace_that_creeps_is_followed_although_each_length_comes_seldom():
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    model.seed(device.measured(units=64))
    run_lengths(model, device, 400)
    for step in range(1000):
        device.pace = 1 + step / 1000
        run_lengths(model, device, 1)
    assert max(errors_of(model, device)) < 0.15


def test_a_new_length_starts_from_its_neighbours():
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    for units in (32, 128):
        run(model, device, 60, SIZES["random"], units)
    assert error(model.line(64), device, 1, 16, units=64) < 0.1  # in between
    assert error(model.line(256), device, 1, 16, units=256) < 0.1  # beyond


def test_a_length_that_was_taken_up_before_anything_was_known_starts_once_something_is():
    """The queue keeps the line of a length for as long as calls wait."""
    device = Device(slope_ns=0.05 * MS)
    model = CostModel()
    early = model.line(256)
    run(model, device, 8, SIZES["random"], 32)
    assert error(early, device, 16, units=256) < 0.2


def test_attention_costs_more_than_its_length_and_every_length_has_a_line_of_its_own():
    model = CostModel()
    rng = random.Random(3)

    def took(rows, units):
        return (rows * (units * 0.02 + units * units * 0.0004) + 0.3) * MS

    for _ in range(2000):
        units, rows = rng.choice(LENGTHS), rng.randint(1, 16)
        model.note(model.line(units), rows, int(took(rows, units) * rng.lognormvariate(0, 0.05)))
    for units in LENGTHS:
        assert model.line(units).ns(8) == pytest.approx(took(8, units), rel=0.1)


def test_lengths_that_hardly_differ_share_a_line():
    model = CostModel()
    assert model.line(1000) is model.line(1001)
    assert model.line(15) is not model.line(16)
    assert [model.line(units) for units in (0, 1)] == [model.line(1)] * 2


def test_the_number_of_lines_is_bounded_and_who_holds_a_dropped_one_can_go_on():
    device = Device(slope_ns=0.001 * MS)
    model = CostModel()
    oldest = run(model, device, 20, SIZES["random"])
    for exponent in range(200):
        run(model, device, 1, SIZES["eight rows"], 1 << exponent // 8 << exponent % 8)
        model.line(1 << exponent)
    assert len(model.describe(32)) <= 64
    assert model.line(1) is not oldest
    device.pace = 3.0
    for _ in range(60):
        model.note(oldest, 8, device.took_ns(8))
    assert error(oldest, device, 8) < 0.05


# ---------------------------------------------------------------- whatever comes


@pytest.mark.parametrize("seed", range(30))
def test_whatever_batches_take_predictions_are_numbers_above_nothing(seed):
    rng = random.Random(seed)
    model = CostModel()
    if seed % 3 == 0:
        model.seed(Device(**split(rng.random())).measured(units=rng.choice((0, 64))))
    held = [model.line(rng.choice((0, 1, 16, 300, 1 << 40)))]
    for _ in range(600):
        if rng.random() < 0.05:
            held.append(model.line(int(10 ** rng.uniform(0, 12))))
        rows = rng.choice((0, 1, 1, 2, 3, 8, 64, 65536, -1))
        took = rng.choice((0, 1, -5, 10**3, 10**6, 10**6, 10**9, 10**13, int(10 ** rng.uniform(0, 15))))
        model.note(rng.choice(held), rows, took)
        if rng.random() < 0.02:
            model.seed(None if rng.random() < 0.5 else Device().measured())
    for line in held:
        for rows in (1, 2, 100, 65536):
            assert 0 < line.ns(rows) <= line.late_ns(rows) < math.inf
        assert line.slope_ns >= 0 <= line.intercept_ns
        assert 0 <= line.spread <= 1
        assert 0 <= line.setup_share <= 1
        assert 1 <= line.efficient_rows(32) <= 32
    for cost in model.describe(32):
        assert all(math.isfinite(value) for value in (cost.slope_us, cost.intercept_us, cost.spread, cost.scale or 0))


def test_after_madness_comes_sense():
    """Whatever was learned, batches that agree with one another are believed."""
    rng = random.Random(7)
    model = CostModel()
    line = model.line(1)
    for _ in range(500):
        model.note(line, rng.randint(1, 16), int(10 ** rng.uniform(0, 14)))
    device = Device()
    run(model, device, 200, SIZES["random"])
    assert error(line, device, 1, 8, 16) < 0.1


def reachable(value, seen=None):
    """How many objects of ours and of containers hang together."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (int, float, str, type(None))):
        return 0
    seen.add(id(value))
    parts = list(value.values()) if isinstance(value, dict) else []
    if isinstance(value, (list, tuple)) or hasattr(value, "maxlen"):
        parts = list(value)
    for name in getattr(type(value), "__slots__", ()) or getattr(value, "__dict__", ()):
        parts.append(getattr(value, name))
    return 1 + len(parts) + sum(reachable(part, seen) for part in parts)


def test_what_is_remembered_is_bounded():
    device = Device()
    model = CostModel()
    sizes = []
    for _ in range(8):
        run(model, device, 2000, lambda rng, number: 1 << rng.randint(0, 16))
        run_lengths(model, device, 2000)
        sizes.append(reachable(model))
    assert sizes[-1] <= 1.02 * sizes[-3]


def test_a_note_seldom_looks_at_more_than_its_own_size():
    """A fit, which looks at every size, follows one batch in five; everything is scaled once in 21 batches at most."""
    fits = 0

    class Counted(Line):
        __slots__ = ()

        def fit(self):
            nonlocal fits
            fits += 1
            super().fit()

    model = CostModel()
    line = model._lines[1] = Counted(1)
    assert model.line(1) is line
    run(model, Device(), 5000, SIZES["random"])
    assert fits < 5000 / 5 + 50


# ---------------------------------------------------------------- with the queue that goes by it


@pytest.mark.parametrize("begins_s", [0, 10], ids=["the first run compiles", "a batch stalls"])
def test_nobody_starves_after_a_stall_of_thirty_seconds(begins_s):
    """Reliability, number 84: who comes a second after it is answered as if it had not been."""
    rng = random.Random(84)
    arrivals = poisson(rng, 50.0, 4000, patience_ns=100 * MS)
    stalled = Service(8 * MS, 2 * MS, noise=0.05, stalls=[(begins_s * SECOND, 30 * SECOND)])
    plain = Service(8 * MS, 2 * MS, noise=0.05)
    outcomes = [Simulation(service).run(arrivals) for service in (stalled, plain)]
    after_ns = (begins_s + 31) * SECOND

    def late(arrival):
        return arrival.at_ns > after_ns

    answered = [outcome.latencies_ns(chosen=late) for outcome in outcomes]
    assert statistics.mean(answered[0]) == pytest.approx(statistics.mean(answered[1]), rel=0.05)
    assert len(answered[0]) >= 0.99 * len(answered[1])


def test_with_the_queue_throttling_is_adapted_to_within_fifty_batches_and_so_is_its_end():
    """Reliability, number 102."""
    arrivals = poisson(random.Random(102), 40.0, 2000)
    service = Service(8 * MS, 2 * MS, noise=0.05, slow=[(15 * SECOND, 2.0), (30 * SECOND, 1.0)])
    batches = Simulation(service, keeps_batches=True).run(arrivals).batches
    for since_s in (15, 30):
        after = [batch for batch in batches if batch.began_ns >= since_s * SECOND]
        errors = [abs(batch.predicted_ns / (batch.ended_ns - batch.began_ns) - 1) for batch in after[16:200]]
        assert statistics.median(errors) < 0.08
        assert max(errors) < 0.4


def test_a_device_that_throttles_refuses_what_it_cannot_do_in_time_any_more_and_takes_it_again():
    """What it takes it answers in time soon after it has slowed down, and soon after it has recovered it takes all."""
    arrivals = poisson(random.Random(103), 60.0, 6000, patience_ns=100 * MS)
    service = Service(8 * MS, 2 * MS, noise=0.05, slow=[(30 * SECOND, 3.0), (60 * SECOND, 1.0)])
    outcome = Simulation(service).run(arrivals)

    def share(fate, from_s, to_s):
        fates = [
            each
            for each, arrival in zip(outcome.fates, arrivals, strict=True)
            if from_s * SECOND <= arrival.at_ns < to_s * SECOND
        ]
        return fates.count(fate) / len(fates)

    assert share(Fate.EXPIRED, 32, 60) < 0.05
    assert share(Fate.REFUSED, 32, 60) > 0.3
    assert share(Fate.ANSWERED, 62, 90) == pytest.approx(share(Fate.ANSWERED, 2, 30), abs=0.05)


# ---------------------------------------------------------------- what people see


def test_it_says_what_it_believes_beside_what_was_measured():
    device = Device(**split(0.2), noise=0.01)
    model = CostModel()
    model.seed(device.measured(units=64))
    (before,) = model.describe(32)
    assert (before.units, before.samples, before.scale) == (64, 0, 1.0)
    device.pace = 2.0
    run(model, device, 30, SIZES["random"], 32)
    (now,) = model.describe(32)
    assert (now.units, now.samples) == (32, 30)
    assert now.slope_us == pytest.approx(2 * 800 * 32, rel=0.05)
    assert now.scale == pytest.approx(2, rel=0.05)
    assert now.efficient_rows == 1


def test_without_a_measurement_there_is_nothing_to_compare_with():
    model = CostModel()
    run(model, Device(**split(0.75)), 60, SIZES["random"])
    (cost,) = model.describe(8)
    assert cost.scale is None
    assert cost.efficient_rows == 8
