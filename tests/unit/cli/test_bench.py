"""The numbers of ``appliancectl bench``."""

from appliance_client.answer import Timings
from appliancectl.bench import Tally


def test_percentiles_are_by_nearest_rank():
    tally = Tally(4, elapsed_s=2.0)
    for ms in range(100, 0, -1):
        tally.answered(ms / 1e3, Timings(0, 0, 10, 0, 20, 0, 3))
    row = tally.row()
    assert (row["p50_ms"], row["p90_ms"], row["p99_ms"]) == (50, 90, 99)
    assert (row["requests"], row["requests_per_s"]) == (100, 50.0)
    assert (row["mean"]["queue_us"], row["mean"]["compute_us"], row["mean"]["batch_rows"]) == (10, 20, 3)


def test_nothing_answered_is_no_number():
    row = Tally(1).row()
    assert (row["p50_ms"], row["requests_per_s"], row["mean"]) == (None, 0.0, {})
