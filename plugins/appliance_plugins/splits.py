"""How the cores of a CPU are split among runs that go on at the same time."""

from collections.abc import Mapping, Sequence

from appliance.backend import MAX_STREAMS


def splits(cores: int) -> Sequence[Mapping[str, str]]:
    """Options ``streams`` and ``threads`` worth measuring beside one run that has all cores.

    A run on one core never waits for threads of its own, so a run for each core often answers most in a second,
    although each takes longer. On 4 cores and more two cores for each run lie between.

    Args:
        cores: Of the device; 0 where they are not known.
    """
    found: list[Mapping[str, str]] = []
    for threads in (1, 2):
        streams = min(cores // threads, MAX_STREAMS)
        if streams > 1:
            found.append({"streams": str(streams), "threads": str(cores // streams)})
    return [split for place, split in enumerate(found) if split not in found[:place]]
