"""Schedules of open loops: pure, seeded, and with the statistics their names promise."""

from itertools import groupby, islice, pairwise
from math import exp
from statistics import fmean, pstdev

import pytest

from appliancectl.bench.arrivals import ARRIVALS, instants

COUNT = 20_000
RATE = 250.0

SEEDS = pytest.mark.parametrize("seed", range(5))


def drawn(arrivals, count=COUNT, rate=RATE, **options):
    return list(islice(instants(arrivals, rate, **options), count))


def gaps(times):
    return [after - before for before, after in pairwise([0.0, *times])]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_the_seed_decides_and_time_only_goes_on(arrivals):
    times = drawn(arrivals, 1000, burst=8, seed=1)
    assert times == sorted(times)
    assert times == drawn(arrivals, 1000, burst=8, seed=1)
    if arrivals != "uniform":
        assert times != drawn(arrivals, 1000, burst=8, seed=2)


def test_uniform_arrivals_are_evenly_spaced():
    assert drawn("uniform", 5) == [0.0, 0.004, 0.008, 0.012, 0.016]


def test_uniform_arrivals_do_not_drift():
    assert drawn("uniform", 1_000_001, rate=3.0)[-1] == pytest.approx(1_000_000 / 3, rel=1e-12)


@SEEDS
def test_poisson_gaps_are_exponential_with_the_mean_of_the_rate(seed):
    between = gaps(drawn("poisson", seed=seed))
    mean = fmean(between)
    assert mean * RATE == pytest.approx(1, rel=0.04)  # more than five standard errors
    assert pstdev(between) / mean == pytest.approx(1, rel=0.05)
    assert sum(gap > mean for gap in between) / COUNT == pytest.approx(exp(-1), rel=0.05)
    assert sum(gap > 3 * mean for gap in between) / COUNT == pytest.approx(exp(-3), rel=0.2)


@SEEDS
def test_poisson_gaps_do_not_depend_on_the_one_before(seed):
    between = gaps(drawn("poisson", seed=seed))
    mean = fmean(between)
    covariance = fmean((before - mean) * (after - mean) for before, after in pairwise(between))
    assert abs(covariance) < 0.05 * mean**2


@SEEDS
def test_bursts_have_their_size_and_the_same_mean_rate(seed):
    times = drawn("burst", COUNT * 16, burst=16, seed=seed)
    groups = [(time, len(list(members))) for time, members in groupby(times)]
    assert {size for _, size in groups} == {16}
    assert len(times) / times[-1] == pytest.approx(RATE, rel=0.04)
    between = gaps([time for time, _ in groups])
    assert pstdev(between) / fmean(between) == pytest.approx(1, rel=0.05)


def test_bursts_of_one_are_poisson():
    assert drawn("burst", 100, burst=1, seed=3) == drawn("poisson", 100, seed=3)
