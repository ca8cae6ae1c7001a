"""The choice among measured candidates, and the values it rests on."""

import dataclasses

import pytest

from appliance.backend import Artifact, Variant
from appliance.candidates import Candidate, Source
from appliance.choice import Verdict, choose
from appliance.inventory import Device
from appliance.measurement import Measurement, Point, VariantKey, canonical_options, fit_line, key_of
from appliance.quality import Comparison, Evidence

CPU = Device("cpu", "cpu", "a CPU", 1 << 34, cores=2)


def candidate(name: str, precision: str = "FP32") -> Candidate:
    variant = Variant(name.partition("/")[0], "cpu", precision)
    return Candidate(name, Source(Artifact(name, "onnx", "FP32")), variant, "runtime 1", "", CPU)


def key(one: Candidate) -> VariantKey:
    return key_of("digest of the artifact", one.variant, one.runtime, CPU.identity, CPU.driver_key)


def measured(one: Candidate, *medians_us: float, peak_bytes=0, energy_mj=None, is_disturbed=False) -> Measurement:
    """Points at 1, 2, 4, ... rows."""
    points = tuple(
        Point(1 << index, median, 1.0, 20, is_disturbed, energy_mj and energy_mj * (1 << index))
        for index, median in enumerate(medians_us)
    )
    return Measurement(key(one), points, peak_bytes=peak_bytes)


def judged(one: Candidate, value=1.0, reference=1.0, bound=0.01, metric="cosine", **changes) -> Evidence:
    compared = Comparison(metric, value, reference, worst=value, count=100, **changes)
    return Evidence(key(one), "reference", "sample", bound, compared)


REFERENCE, FAST, SLOW = candidate("ort/cpu/FP32"), candidate("fast/cpu/BF16", "BF16"), candidate("slow/cpu/FP32")
ALL = (REFERENCE, FAST, SLOW)


def decide(measurements, evidence=(), objective="latency", incumbent=None, candidates=ALL):
    speed = {each.key: each for each in measurements}
    proof = {each.key: each for each in evidence}
    return choose(
        objective, candidates, lambda one: speed.get(key(one)), lambda one: proof.get(key(one)), REFERENCE, incumbent
    )


def verdicts(choice) -> dict[str, Verdict]:
    return {each.candidate.name: each.verdict for each in choice.considered}


SPEEDS = (measured(REFERENCE, 100, 200), measured(FAST, 50, 90), measured(SLOW, 300, 600))


def test_nothing_measured_is_no_choice():
    choice = decide(())
    assert choice.winner is None
    assert set(verdicts(choice).values()) == {Verdict.UNMEASURED}


def test_the_best_wins_once_its_accuracy_is_proved_and_the_slower_ones_need_no_proof():
    choice = decide(SPEEDS)
    assert (choice.winner, choice.unchecked) == (None, FAST)
    choice = decide(SPEEDS, [judged(FAST)])
    assert (choice.winner, choice.unchecked) == (FAST, None)
    assert verdicts(choice) == {
        FAST.name: Verdict.CHOSEN, REFERENCE.name: Verdict.SLOWER, SLOW.name: Verdict.SLOWER,
    }  # fmt: skip


def test_a_candidate_that_loses_accuracy_is_refused_with_its_evidence_and_the_next_serves():
    choice = decide(SPEEDS, [judged(FAST, value=0.9)])
    assert choice.winner is REFERENCE
    refused = choice.considered[0]
    assert (refused.candidate, refused.verdict) == (FAST, Verdict.REFUSED)
    assert refused.reason == (
        "cosine 0.9000 against 1.0000 of the reference on 100 rows: 10.00% worse, and the bound is 1.00%"
    )


def test_three_times_slower_loses():
    choice = decide([measured(REFERENCE, 100, 200), measured(SLOW, 300, 600)], [judged(SLOW)])
    assert choice.winner is REFERENCE
    assert (
        next(each.reason for each in choice.considered if each.candidate is SLOW)
        == "3.00 times the cost of ort/cpu/FP32"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"not_finite": 3}, "3 of 100 rows are NaN"),
        ({"value": float("nan")}, "worse, and the bound"),
    ],
)
def test_nan_is_refused(changes, reason):
    choice = decide(SPEEDS, [judged(FAST, **changes)])
    assert choice.winner is REFERENCE
    assert reason in choice.considered[0].reason


def test_an_empty_sample_proves_nothing():
    nothing = Evidence(key(FAST), "reference", "sample", 0.01, Comparison("cosine", 1.0, 1.0, 1.0, 0))
    assert nothing.refusal == "the sample is empty"


def test_a_candidate_that_could_not_be_compared_is_refused_with_the_reason():
    broken = Evidence(key(FAST), "reference", "sample", 0.01, None, "cannot evaluate: it crashed")
    choice = decide(SPEEDS, [broken])
    assert (choice.winner, choice.considered[0].reason) == (REFERENCE, "cannot evaluate: it crashed")


def test_relative_l2_counts_upwards():
    assert judged(FAST, value=0.002, reference=0.0, metric="relative-l2").refusal == ""
    assert "worse" in judged(FAST, value=0.02, reference=0.0, metric="relative-l2").refusal


def test_a_variant_that_cannot_run_has_failed_with_its_reason():
    choice = decide([measured(REFERENCE, 100), Measurement(key(FAST), problem="cannot load: no such operator")])
    assert verdicts(choice)[FAST.name] is Verdict.FAILED
    assert choice.winner is REFERENCE


def test_each_objective_looks_at_its_own_number():
    quick = measured(REFERENCE, 100, 200, peak_bytes=500)
    broad = measured(FAST, 120, 125, peak_bytes=900)
    small = measured(SLOW, 400, 800, peak_bytes=100)
    evidence = [judged(FAST), judged(SLOW)]
    found = (quick, broad, small)
    assert decide(found, evidence, "latency").winner is REFERENCE
    assert decide(found, evidence, "throughput").winner is FAST
    assert decide(found, evidence, "memory").winner is SLOW
    assert decide(found, evidence, "balanced").winner is FAST


def test_energy_needs_a_counter_for_every_candidate_and_says_so():
    counted = [measured(REFERENCE, 100, energy_mj=5.0), measured(FAST, 200, energy_mj=1.0)]
    choice = decide(counted, [judged(FAST)], "energy", candidates=(REFERENCE, FAST))
    assert (choice.winner, choice.objective) == (FAST, "energy of a row")
    choice = decide([counted[0], measured(FAST, 200)], [judged(FAST)], "energy", candidates=(REFERENCE, FAST))
    assert choice.winner is REFERENCE
    assert "no energy counter" in choice.objective


def test_what_serves_keeps_serving_unless_another_is_better_by_a_margin():
    close = [measured(REFERENCE, 100), measured(FAST, 97)]
    choice = decide(close, [judged(FAST)], incumbent=REFERENCE, candidates=(REFERENCE, FAST))
    assert choice.winner is REFERENCE
    assert "not worth a swap" in choice.considered[1].reason
    assert decide(close, [judged(FAST)], candidates=(REFERENCE, FAST)).winner is FAST


def test_a_disturbed_measurement_needs_a_wider_margin():
    noisy = [measured(REFERENCE, 100), measured(FAST, 85, is_disturbed=True)]
    assert decide(noisy, [judged(FAST)], incumbent=REFERENCE, candidates=(REFERENCE, FAST)).winner is REFERENCE
    clean = [measured(REFERENCE, 100), measured(FAST, 85)]
    assert decide(clean, [judged(FAST)], incumbent=REFERENCE, candidates=(REFERENCE, FAST)).winner is FAST


# ---------------------------------------------------------------- values


def test_a_key_changes_with_each_of_its_parts():
    whole = key(REFERENCE)
    ids = {dataclasses.replace(whole, **{each.name: "other"}).id for each in dataclasses.fields(whole)}
    assert len(ids | {whole.id}) == 1 + len(dataclasses.fields(whole))


def test_where_compiled_models_lie_is_no_part_of_a_key():
    assert canonical_options({"threads": "2", "cache_dir": "/one"}) == canonical_options(
        {"cache_dir": "", "threads": "2"}
    )


def test_values_come_back_from_json_as_they_were():
    found = dataclasses.replace(measured(FAST, 50, 90, energy_mj=2.0), load_ms=12.5, device="cpu", provider="CPU")
    assert Measurement.from_json(found.as_json()) == found
    proof = judged(FAST, value=0.995)
    assert Evidence.from_json(proof.as_json()) == proof
    assert Evidence.from_json(Evidence(key(FAST), "r", "s", 0.01, None, "why").as_json()).problem == "why"


def test_one_stalled_point_does_not_move_the_line():
    assert fit_line([(1, 30), (2, 50), (4, 90), (8, 170)]) == pytest.approx((20, 10))
    slope, intercept = fit_line([(1, 30), (2, 50), (4, 9000), (8, 170), (16, 330)])
    assert (slope, intercept) == pytest.approx((20, 10))
    assert fit_line([(1, 30)]) == (0, 30)


def test_throughput_is_that_of_all_streams_and_latency_that_of_a_run_alone():
    """Two streams: a run takes 160 µs beside another and 90 alone, so 12,500 rows a second against one's 11,111."""
    found = dataclasses.replace(
        measured(FAST, 160, 400), points=(Point(1, 160, 1.0, 20, alone_us=90), Point(2, 400, 1.0, 20)), streams=2
    )
    assert (found.best_rows, found.latency_us) == (1, 90)
    assert found.rows_per_second == pytest.approx(2e6 / 160)
    assert found.line == pytest.approx((240, 0)), "the batcher goes by batches beside others"
    assert Measurement.from_json(found.as_json()) == found


def test_each_objective_weighs_streams_by_its_own_number():
    """One run on two cores takes 100 µs; two runs on one core each 180, or 150 while the other core is idle."""
    one = measured(REFERENCE, 100)
    two = dataclasses.replace(measured(FAST, 180), points=(Point(1, 180, 1.0, 20, alone_us=150),), streams=2)
    found, evidence, both = (one, two), [judged(FAST)], (REFERENCE, FAST)
    assert decide(found, evidence, "latency", candidates=both).winner is REFERENCE
    assert decide(found, evidence, "throughput", candidates=both).winner is FAST
    assert decide(found, evidence, "balanced", candidates=both).winner is REFERENCE


def test_measurements_from_before_there_were_streams_have_one():
    document = measured(FAST, 50, 90).as_json()
    del document["streams"]
    for point in document["points"]:
        del point["alone_us"]
    assert Measurement.from_json(document) == measured(FAST, 50, 90)


def test_how_cores_are_split_changes_the_speed_and_nothing_of_the_computation():
    def key_with(**options):
        return key_of("digest", Variant("a", "cpu", "INT8", options), "a 1", "cpu", "", "workload")

    plain, split = key_with(float="bf16"), key_with(float="bf16", streams="2", threads="1")
    assert plain.id != split.id
    assert plain.computation == split.computation == plain
    assert key_with(float="f32").computation != plain


def test_throughput_is_that_of_the_best_batch_size():
    found = measured(FAST, 100, 150, 400)
    assert (found.best_rows, found.latency_us) == (2, 100)
    assert found.rows_per_second == pytest.approx(2e6 / 150)


def test_streams_of_a_model_of_microseconds_count_for_what_a_worker_can_answer():
    """Two streams that could do 200,000 rows a second are no better than one that does 60,000."""
    one, two = measured(REFERENCE, 20, 33), dataclasses.replace(measured(FAST, 20, 20), streams=2)
    assert (one.rows_per_second, two.rows_per_second) == (pytest.approx(2e6 / 33), pytest.approx(4e6 / 20))
    both, proof = (REFERENCE, FAST), [judged(FAST)]
    assert decide((one, two), proof, "throughput", candidates=both).winner is REFERENCE
