"""What a request's options do to its call."""

import time
from types import SimpleNamespace

import pytest

from appliance.call import Call, Plan, RegionView
from appliance.errors import InvalidRequest
from appliance.manifest import BatchSection
from appliance.region import Region
from appliance.slab import Slab
from appliance.types import RequestOptions, SequenceStep

SECOND_US = 1_000_000


def call_of(takes_sequences: bool = False, **batch: object) -> Call:
    """A call of a model whose manifest says `batch`."""
    instance = SimpleNamespace(policies=BatchSection(**batch).policies(), takes_sequences=takes_sequences)
    return Call(Plan(instance, 1, (), (), 0, (), 0, False), [b"x"], sink=None)


def seconds_left(call: Call) -> int:
    """Whole seconds until the deadline, rounded; 0 for none."""
    return round((call.deadline_ns - time.monotonic_ns()) / 1e9) if call.deadline_ns else 0


@pytest.mark.parametrize(
    ("transport", "parameter", "model", "allows", "left"),
    [
        (0, 0, 0, True, 0),
        (0, 500, 0, True, 500),
        (900, 500, 0, True, 500),
        (500, 900, 0, True, 500),
        (0, 0, 700, True, 700),
        (0, 500, 700, True, 500),
        (0, 900, 700, True, 700),
        (0, 500, 0, False, 0),
        (0, 500, 700, False, 700),
        (600, 500, 700, False, 600),
    ],
)
def test_the_shortest_time_limit_counts_and_the_parameters_only_where_the_model_allows(
    transport, parameter, model, allows, left
):
    call = call_of(default_timeout_ms=model * 1000, allow_timeout_override=allows)
    call.ask(RequestOptions(parameter * SECOND_US, 1), transport * SECOND_US)
    assert seconds_left(call) == left


@pytest.mark.parametrize(("priority", "left"), [(0, 300), (1, 100), (2, 300), (3, 500), (4, 300), (2**64 - 1, 300)])
def test_a_levels_time_limit_counts_for_its_requests(priority, left):
    levels = {1: {"default_timeout_ms": 100_000}, 3: {"default_timeout_ms": 500_000}}
    call = call_of(default_timeout_ms=300_000, priority_queue_policy=levels)
    call.ask(RequestOptions(priority=priority, timeout_us=900 * SECOND_US), 0)
    assert (call.priority, seconds_left(call)) == (priority, left)


def test_a_step_of_a_sequence_goes_to_a_model_that_keeps_state():
    call = call_of(takes_sequences=True)
    step = SequenceStep("s", True, False)
    call.ask(RequestOptions(sequence=step), 0)
    assert call.sequence is step


def test_a_call_refused_for_its_sequence_lets_its_tensors_go():
    freed = []
    region = Region(Slab.create(4096, "test"), lambda: freed.append(True))
    call = call_of()
    call.use_regions([RegionView(region, 0, True)])
    region.release()
    assert not freed
    with pytest.raises(InvalidRequest, match="the model is not stateful"):
        call.ask(RequestOptions(sequence=SequenceStep(7)), 0)
    assert freed
    assert not call.contents
