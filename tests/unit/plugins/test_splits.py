"""How cores are split among runs at the same time."""

import pytest

from appliance_plugins.splits import splits


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (0, []),
        (1, []),
        (2, [(2, 1)]),
        (3, [(3, 1)]),
        (4, [(4, 1), (2, 2)]),
        (5, [(5, 1), (2, 2)]),
        (64, [(64, 1), (32, 2)]),
        (96, [(64, 1), (48, 2)]),
        (128, [(64, 2)]),
        (256, [(64, 4)]),
    ],
)
def test_a_run_for_each_core_and_for_each_two(cores, expected):
    assert [(int(one["streams"]), int(one["threads"])) for one in splits(cores)] == expected
