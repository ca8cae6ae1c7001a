"""The queue and its policy over thousands of requests, in virtual time: what they do to latency, and in trouble.

Service times are made up (`support.simulator`); the rest is the daemon's own code. Nothing here takes the time of day,
so figures are the same each time, up to the last digit.
"""

import heapq
import random

import pytest

from appliance.clients import Client
from appliance.cost_model import CostModel
from appliance.manifest import BatchSection
from support.rules import bentoml, triton
from support.simulator import (
    MS,
    SECOND,
    Arrival,
    Fate,
    Service,
    Simulation,
    bursts,
    merge,
    percentile,
    poisson,
)

#: A batch of one row takes as long.
S = 10 * MS
#: The share of it that no row adds to: a CPU, a small model on one, a GPU.
SHARES = (0.05, 0.2, 0.75)
MAX_ROWS = 32


def make_service(share, **trouble) -> Service:
    return Service((1 - share) * S, share * S, **trouble)


def rate_of(share, load):
    """Requests a second at a share of what the largest batches sustain."""
    return make_service(share).capacity(MAX_ROWS) * load


def p99(outcome, **chosen):
    return percentile(outcome.latencies_ns(**chosen), 0.99)


def later(arrivals, seconds=1):
    return [arrival._replace(at_ns=arrival.at_ns + seconds * SECOND) for arrival in arrivals]


# ---------------------------------------------------------------- the simulator itself


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_a_server_without_batches_waits_as_long_as_queueing_theory_says(load):
    """M/D/1: the mean wait is S * load / (2 * (1 - load)); it checks the simulator, not the policy."""
    arrivals = poisson(random.Random(5), load / S * SECOND, 40_000)
    for outcome in (Simulation(make_service(0.2), max_rows=1).run(arrivals), triton(arrivals, make_service(0.2), 1)):
        latencies = outcome.latencies_ns(skip=0.05)
        assert sum(latencies) / len(latencies) == pytest.approx(S + S * load / (2 * (1 - load)), rel=0.03)


def test_the_other_rules_and_the_daemon_told_to_be_eager_agree():
    """Two programs for one rule, Triton's: the daemon's own queue with a preferred size, and the one compared with.

    They may differ by what comes while a batch is about to end, since the daemon has the next one ready by then.
    """
    arrivals = poisson(random.Random(5), rate_of(0.75, 0.7), 10_000)
    section = BatchSection(preferred_batch_sizes=[MAX_ROWS], max_queue_size=100_000)
    daemon = Simulation(make_service(0.75), MAX_ROWS, section=section).run(arrivals)
    other = triton(arrivals, make_service(0.75), MAX_ROWS)
    assert sum(daemon.latencies_ns()) == pytest.approx(sum(other.latencies_ns()), rel=0.01)


# ---------------------------------------------------------------- latency below capacity


@pytest.mark.parametrize("share", SHARES)
def test_a_lone_request_takes_what_a_batch_of_one_takes(share):
    arrivals = [Arrival(number * SECOND) for number in range(20)]
    outcome = Simulation(make_service(share), MAX_ROWS).run(arrivals)
    assert outcome.latencies_ns() == [S] * 20


@pytest.mark.parametrize("load", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("group", [1, 16])
def test_the_tail_is_no_longer_than_under_any_other_rule(share, load, group):
    """But for 4 %, which chance makes of so few requests; benchmarks/ablation.py takes more."""
    arrivals = bursts(random.Random(1), rate_of(share, load), 10_000, group)
    ours = p99(Simulation(make_service(share), MAX_ROWS).run(arrivals), skip=0.05)
    others = [
        triton(arrivals, make_service(share), MAX_ROWS),
        triton(arrivals, make_service(share), MAX_ROWS, S // 2),
        bentoml(arrivals, make_service(share), MAX_ROWS),
    ]
    if load * MAX_ROWS / make_service(share).ns(MAX_ROWS) < 0.98 / S:
        others.append(triton(arrivals, make_service(share), 1))
    assert ours <= 1.04 * min(p99(outcome, skip=0.05) for outcome in others)


@pytest.mark.parametrize("load", [0.4, 0.9])
@pytest.mark.parametrize("share", SHARES)
def test_with_two_streams_the_tail_is_no_longer_than_eager_or_one_by_one(share, load):
    rate = 2 * rate_of(share, load)
    arrivals = poisson(random.Random(1), rate, 10_000)
    ours = p99(Simulation(make_service(share), MAX_ROWS, streams=2).run(arrivals), skip=0.05)
    eager = BatchSection(preferred_batch_sizes=[MAX_ROWS], max_queue_size=100_000)
    others = [Simulation(make_service(share), MAX_ROWS, streams=2, section=eager)]
    if rate * S < 1.96 * SECOND:
        others.append(Simulation(make_service(share), max_rows=1, streams=2))
    assert ours <= 1.03 * min(p99(other.run(arrivals), skip=0.05) for other in others)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_tail_is_near_that_of_the_ideal_queue(streams):
    """70 % load on a CPU: within 15 % of servers that run one request after the other, first come first served."""
    share = 0.05
    arrivals = poisson(random.Random(2), 0.7 * streams / S * SECOND, 20_000)
    free = [0] * streams
    ideal = []
    for arrival in arrivals:
        ended = max(arrival.at_ns, free[0]) + S
        heapq.heapreplace(free, ended)
        ideal.append(ended - arrival.at_ns)
    outcome = Simulation(make_service(share), MAX_ROWS, streams).run(arrivals)
    assert p99(outcome) <= 1.15 * percentile(sorted(ideal), 0.99)


# ---------------------------------------------------------------- trouble with the device


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_device_that_throttles_or_recovers_is_known_within_50_batches(share, factor):
    """Predictions are within 20 % of what batches take from then on."""
    change = 20 * SECOND
    service = make_service(share, noise=0.05, slow=[(change, factor)])
    arrivals = poisson(random.Random(3), rate_of(share, 0.3), int(rate_of(share, 0.3) * 60))
    outcome = Simulation(service, MAX_ROWS, keeps_batches=True).run(arrivals)
    before = [batch for batch in outcome.batches if batch.ended_ns < change]
    after = [batch for batch in outcome.batches if batch.began_ns >= change]
    assert len(before) > 100
    assert len(after) > 100
    for batches in (before[50:], after[50:]):
        errors = sorted(abs(batch.predicted_ns / (batch.ended_ns - batch.began_ns) - 1) for batch in batches)
        assert percentile(errors, 0.9) < 0.2


@pytest.mark.parametrize("share", SHARES)
def test_a_stall_of_30_seconds_does_no_lasting_harm(share):
    """What waited while the device stood still is refused or late; two seconds later all is as if nothing had been."""
    arrivals = poisson(random.Random(4), rate_of(share, 0.5), int(rate_of(share, 0.5) * 60), patience_ns=SECOND)
    calm = Simulation(make_service(share), MAX_ROWS).run(arrivals)
    service = make_service(share, stalls=[(5 * SECOND, 30 * SECOND)])
    stalled = Simulation(service, MAX_ROWS, keeps_batches=True).run(arrivals)
    during = [arrival for arrival in arrivals if 6 * SECOND < arrival.at_ns < 34 * SECOND]
    assert all(
        fate is not Fate.ANSWERED
        for arrival, fate in zip(arrivals, stalled.fates, strict=True)
        if 6 * SECOND < arrival.at_ns < 33 * SECOND
    )
    assert len(during) > 100

    def is_later(arrival):
        return arrival.at_ns > 37 * SECOND

    assert all(
        fate is Fate.ANSWERED for arrival, fate in zip(arrivals, stalled.fates, strict=True) if is_later(arrival)
    )
    assert p99(stalled, chosen=is_later) <= 1.05 * p99(calm, chosen=is_later)
    last = stalled.batches[-1]
    assert last.predicted_ns == pytest.approx(last.ended_ns - last.began_ns, rel=0.05)


# ---------------------------------------------------------------- clients beside each other


@pytest.mark.parametrize("share", SHARES)
def test_who_asks_seldom_does_not_wait_for_who_queues_a_thousand(share):
    """A keeps 1,000 requests waiting, B sends one each 100 ms: B's 99th percentile is two batches at most.

    The first second does not count, in which it is learned what batches take.
    """

    def follow(number, now):
        return Arrival(now, "a") if simulation.outcome.arrivals[number].client == "a" and now < 30 * SECOND else None

    simulation = Simulation(make_service(share, noise=0.02), MAX_ROWS, keeps_batches=True)
    arrivals = merge([Arrival(0, "a")] * 1000, [Arrival(number * 100 * MS, "b") for number in range(300)])
    outcome = simulation.run(arrivals, follow)
    longest = max(batch.ended_ns - batch.began_ns for batch in outcome.batches)
    assert p99(outcome, chosen=lambda arrival: arrival.client == "b" and arrival.at_ns > SECOND) <= 2 * longest
    assert set(outcome.fates) == {Fate.ANSWERED}


def test_clients_that_want_more_than_there_is_get_what_their_weights_say():
    clients = {name: Client((name,), name, weight) for name, weight in (("a", 3.0), ("b", 1.0))}

    def follow(number, now):
        return Arrival(now, simulation.outcome.arrivals[number].client) if now < 10 * SECOND else None

    simulation = Simulation(make_service(0.2), MAX_ROWS, clients=clients)
    outcome = simulation.run([Arrival(0, "a"), Arrival(0, "b")] * 100, follow, until_ns=10 * SECOND)
    of_a, of_b = (len(outcome.latencies_ns(chosen=lambda arrival, name=name: arrival.client == name)) for name in "ab")
    assert of_a / of_b == pytest.approx(3.0, rel=0.05)


def test_background_work_ends_under_constant_interactive_load():
    """64 interactive requests are in flight all the time, which the device cannot keep up with."""

    def follow(number, now):
        is_interactive = simulation.outcome.arrivals[number].priority == 1
        return Arrival(now, "user", priority=1) if is_interactive and now < 60 * SECOND else None

    simulation = Simulation(make_service(0.2), MAX_ROWS)
    interactive = [Arrival(0, "user", priority=1)] * 64
    background = [Arrival(0, "nightly", priority=3)] * 100
    outcome = simulation.run(interactive + background, follow)
    ends = [
        ended
        for arrival, ended, fate in zip(outcome.arrivals, outcome.ended_ns, outcome.fates, strict=True)
        if arrival.priority == 3 and fate is Fate.ANSWERED
    ]
    assert len(ends) == 100
    assert max(ends) < 20 * SECOND  # the interactive ones stop later by far
    share = 100 / len(outcome.latencies_ns(chosen=lambda arrival: arrival.at_ns < max(ends)))
    assert share < 0.15  # but it is the interactive ones that most of the time is spent on


def test_ten_thousand_clients_are_all_served():
    """Each sends three requests at once; nobody gets its third before everybody has had one."""
    arrivals = [Arrival(0, f"client {number % 10_000}") for number in range(30_000)]
    simulation = Simulation(make_service(0.75), MAX_ROWS)
    outcome = simulation.run(arrivals)
    assert set(outcome.fates) == {Fate.ANSWERED}
    ends = {}
    for arrival, ended in zip(arrivals, outcome.ended_ns, strict=True):
        ends.setdefault(arrival.client, []).append(ended)
    assert min(max(each) for each in ends.values()) >= max(min(each) for each in ends.values())
    assert simulation.batcher.queued == 0
    assert all(client.requests == 0 for client in simulation.clients.values())


# ---------------------------------------------------------------- more than can be served


@pytest.mark.parametrize("share", SHARES)
def test_goodput_holds_in_overload_and_what_is_accepted_is_in_time(share):
    """At ten times what can be served: 95 % of the best goodput, a queue that does not grow, and no broken promise."""
    patience = 20 * S

    def run(load):
        """A quiet second, in which it is learned what batches take, and ten of `load`."""
        arrivals = poisson(random.Random(5), rate_of(share, 0.3), int(rate_of(share, 0.3)), patience_ns=patience)
        arrivals += later(
            poisson(random.Random(6), rate_of(share, load), int(rate_of(share, load) * 10), patience_ns=patience)
        )
        outcome = Simulation(make_service(share, noise=0.02), MAX_ROWS).run(merge(arrivals))
        return outcome, outcome.goodput(2 * SECOND, 10 * SECOND)

    peak = max(run(load)[1] for load in (0.9, 1.2, 2.0))
    outcome, goodput = run(10.0)
    assert goodput >= 0.95 * peak
    assert p99(outcome) <= patience
    assert outcome.peak_queued <= rate_of(share, 1.0) * patience / SECOND
    counts = outcome.counts()
    assert counts[Fate.DROPPED] + counts[Fate.EXPIRED] <= 0.01 * (len(outcome.fates) - counts[Fate.REFUSED])


@pytest.mark.parametrize(("priority", "wanted"), [(0, 0.95), (3, 0.85)])  # the background's batches stay small
@pytest.mark.parametrize("share", SHARES)
def test_who_believed_that_batches_gain_nothing_finds_out_in_overload(share, priority, wanted):
    """On a busy machine batches came when it was slow: it looks as if a row cost more in a batch than alone."""
    model = CostModel()
    line = model.line(1)
    for number in range(400):
        model.note(line, 1 + number % 2, S * (1 + number % 2 * 2))
    assert line.setup_share == 0.0
    rate = rate_of(share, 2.0)
    arrivals = poisson(random.Random(10), rate, int(rate * 10), patience_ns=40 * S)
    arrivals = [arrival._replace(priority=priority) for arrival in arrivals]
    outcome = Simulation(make_service(share, noise=0.02), MAX_ROWS, cost_model=model).run(arrivals)
    assert outcome.goodput(2 * SECOND, 9 * SECOND) >= wanted * make_service(share).capacity(MAX_ROWS)


@pytest.mark.parametrize("share", SHARES)
def test_a_device_that_throttles_in_overload_goes_on_doing_what_it_can(share):
    """Half as fast from one moment on, with a queue of requests that were promised more, and three times too many.

    Goodput is a third of what the device still can in the very second, and 90 % a second later.
    """
    change = 5 * SECOND
    service = make_service(share, noise=0.02, slow=[(change, 2.0)])
    rate = rate_of(share, 3.0)
    arrivals = poisson(random.Random(6), rate, int(rate * 10), patience_ns=40 * S)
    outcome = Simulation(service, MAX_ROWS).run(arrivals)
    left = service.capacity(MAX_ROWS) / 2
    assert outcome.goodput(change, change + SECOND) >= 0.33 * left
    assert outcome.goodput(change + 2 * SECOND, change + 4 * SECOND) >= 0.9 * left


@pytest.mark.parametrize("share", SHARES)
def test_latency_is_back_soon_after_overload(share):
    """Ten times too much for five seconds; half a second after the end requests take what they always take."""
    patience = 20 * S
    calm = poisson(random.Random(7), rate_of(share, 0.3), int(rate_of(share, 0.3) * 30), patience_ns=patience)
    flood = later(poisson(random.Random(8), rate_of(share, 10), int(rate_of(share, 10) * 5), patience_ns=patience), 5)
    end = flood[-1].at_ns + SECOND // 2

    def is_later(arrival):
        return arrival.at_ns > end

    usual = Simulation(make_service(share), MAX_ROWS).run(calm)
    flooded = Simulation(make_service(share), MAX_ROWS).run(merge(calm, flood))
    assert p99(flooded, chosen=is_later) <= 1.02 * p99(usual, chosen=is_later)
    assert all(
        fate is Fate.ANSWERED
        for arrival, fate in zip(flooded.arrivals, flooded.fates, strict=True)
        if is_later(arrival)
    )


@pytest.mark.parametrize("share", SHARES)
def test_a_client_that_floods_takes_nothing_from_one_that_does_not(share):
    """A sends ten times what can be served, B a tenth of it; B's requests are answered in time."""
    of_a, of_b = (
        poisson(random.Random(9), rate_of(share, load), int(rate_of(share, load) * 10), client=name, patience_ns=40 * S)
        for name, load in (("a", 10), ("b", 0.1))
    )
    outcome = Simulation(make_service(share), MAX_ROWS).run(merge(of_a, of_b))
    fates = [
        fate
        for arrival, fate in zip(outcome.arrivals, outcome.fates, strict=True)
        if arrival.client == "b" and arrival.at_ns > SECOND
    ]
    assert sum(fate is Fate.ANSWERED for fate in fates) >= 0.99 * len(fates)
