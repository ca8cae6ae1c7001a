"""Energy counters, read off recorded directory trees."""

import pytest

from appliance.inventory import Device
from appliance.worker.energy import NoCounter, NvidiaCounter, PackageCounter, counter_of, difference


def zone(root, directory, name, energy, highest=262143328850):
    path = root / directory
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    if energy is not None:
        (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{highest}\n")
    return path


@pytest.fixture
def tree(tmp_path):
    """/sys/class/powercap of a server with two packages, each with its cores as a zone of its own."""
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which has no name
    zone(tmp_path, "intel-rapl:0", "package-0", 1000)
    zone(tmp_path, "intel-rapl:0:0", "core", 400)
    zone(tmp_path, "intel-rapl:1", "package-1", 2000)
    zone(tmp_path, "intel-rapl:2", "psys", 9000)
    return tmp_path


def test_packages_add_up_and_their_parts_are_not_counted_twice(tree):
    counter = PackageCounter(tree)
    for directory, energy in (("intel-rapl:0", 1500), ("intel-rapl:0:0", 800), ("intel-rapl:1", 2700)):
        (tree / directory / "energy_uj").write_text(str(energy))
    assert counter.microjoules() == 500 + 700
    assert counter.microjoules() == 0


def test_a_package_with_memory_mapped_registers_too_is_counted_once(tree):
    zone(tree, "intel-rapl-mmio:0", "package-0", 10)
    counter = PackageCounter(tree)
    (tree / "intel-rapl-mmio:0" / "energy_uj").write_text("99")
    (tree / "intel-rapl:0" / "energy_uj").write_text("1001")
    assert counter.microjoules() == 1


def test_a_counter_that_starts_again_from_zero_is_followed(tree):
    zone(tree, "intel-rapl:0", "package-0", 9_900, highest=10_000)
    counter = PackageCounter(tree)
    (tree / "intel-rapl:0" / "energy_uj").write_text("50")
    assert counter.microjoules() == 150
    assert difference(9_900, 50, 10_000) == 150
    assert difference(50, 9_900, 10_000) == 9_850


def test_a_counter_that_cannot_be_read_gives_no_figure(tree):
    """Since a side channel was found in it, root alone may read it on most machines."""
    counter = PackageCounter(tree)
    (tree / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.microjoules() is None
    assert PackageCounter(tree).microjoules() is None


@pytest.mark.parametrize("content", ["", "-1", "many", "\N{ARABIC-INDIC DIGIT ONE}x"])
def test_a_counter_of_nonsense_gives_no_figure(tree, content):
    (tree / "intel-rapl:0" / "energy_uj").write_text(content)
    assert PackageCounter(tree).microjoules() is None


def test_a_machine_without_counters_gives_no_figure(tmp_path):
    assert PackageCounter(tmp_path).microjoules() is None
    assert PackageCounter(tmp_path / "missing").microjoules() is None


def test_nvml_counts_in_millijoules():
    readings = iter([10, 17])
    counter = NvidiaCounter(lambda: next(readings))
    assert counter.microjoules() == 7000


def test_nvml_that_fails_or_loses_count_gives_no_figure():
    def fail():
        raise RuntimeError("Not Supported")

    assert NvidiaCounter(fail).microjoules() is None
    readings = iter([10, 3])
    assert NvidiaCounter(lambda: next(readings)).microjoules() is None


def test_each_device_has_the_counter_its_energy_shows_in(tree):
    def device(**fields):
        return Device(**{"id": "d", "kind": "gpu", "name": "d", "memory_bytes": 0, **fields})

    assert isinstance(counter_of(device(kind="cpu"), tree), PackageCounter)
    assert isinstance(counter_of(device(kind="npu", vendor="intel", is_integrated=True), tree), PackageCounter)
    assert isinstance(counter_of(device(vendor="intel"), tree), NoCounter)
    assert isinstance(counter_of(device(vendor="nvidia", uuid="MIG-1"), tree), NoCounter)
    assert isinstance(counter_of(device(vendor="nvidia", uuid="GPU-of-no-machine"), tree), NoCounter)
    assert isinstance(counter_of(None, tree), NoCounter)
    assert NoCounter().microjoules() is None
