"""Shared memory in one process: what is checked before it is mapped, and that a region lives as long as it is used."""

import fcntl
import gc
import mmap
import os
import tempfile
from pathlib import Path

import pytest

from appliance.call import Call, Plan, RegionView
from appliance.errors import InvalidRequest, Overloaded
from appliance.region import Region
from appliance.slab import ALIGNMENT, Slab, aligned, check_memfd

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def memfd(size=4096, seals=SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left():
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


# ---------------------------------------------------------------- slabs


def test_a_slab_is_sealed_for_good_and_writable():
    slab = Slab.create(10_000, "test")
    try:
        assert fcntl.fcntl(slab.fd, fcntl.F_GET_SEALS) == SEALS | fcntl.F_SEAL_SEAL
        assert not os.get_inheritable(slab.fd)
        slab.memory[:5] = b"hello"
        with mmap.mmap(slab.fd, 10_000) as other:
            assert other[:5] == b"hello"
        for size in (0, 20_000):
            with pytest.raises(PermissionError):
                os.ftruncate(slab.fd, size)
    finally:
        slab.close()
    slab.close()
    assert slab.fd == -1


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1])
def test_a_slab_that_cannot_be_had_is_overload_and_leaves_no_descriptor(size):
    with pytest.raises(Overloaded, match="shared memory"):
        Slab.create(size, "test")


def test_closing_a_slab_with_a_view_alive_keeps_the_view_readable():
    slab = Slab.create(4096, "test")
    slab.memory[:3] = b"abc"
    view = slab.memory[:3]
    slab.close()
    assert bytes(view) == b"abc"


def test_a_clients_memory_is_mapped_and_seen_by_both():
    fd = memfd()
    kept = os.dup(fd)
    slab = Slab.adopt(fd, 4000)
    with mmap.mmap(kept, 4096) as ours:
        ours[:2] = b"hi"
        assert bytes(slab.memory[:2]) == b"hi"
        assert len(slab.memory) == 4000
    os.close(kept)
    slab.close()


def reopened(flags) -> int:
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def file_in(directory) -> int:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(4096)
        return os.dup(file.fileno())


REFUSED = {
    "no seals": lambda: memfd(seals=0),
    "may shrink": lambda: memfd(seals=fcntl.F_SEAL_GROW),
    "may grow": lambda: memfd(seals=fcntl.F_SEAL_SHRINK),
    "sealed against writing": lambda: memfd(seals=SEALS | fcntl.F_SEAL_WRITE),
    "sealed against new writing": lambda: memfd(seals=SEALS | 0x10),
    "too small": lambda: memfd(size=4095),
    "empty": lambda: memfd(size=0),
    "read only": lambda: reopened(os.O_RDONLY),
    "write only": lambda: reopened(os.O_WRONLY),
    "a path": lambda: reopened(os.O_PATH),
    "a file": lambda: file_in(None),
    "a file in memory": lambda: file_in("/dev/shm"),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a directory": lambda: os.open("/", os.O_RDONLY),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_fault_later_is_refused_now_and_closed(what):
    with pytest.raises(InvalidRequest, match=r"^cannot use the region: "):
        Slab.adopt(REFUSED[what](), 4096)


@pytest.mark.parametrize("size", [0, -1, 1 << 62, 1 << 64])
def test_a_declared_size_must_lie_within_the_memory(size):
    with pytest.raises(InvalidRequest, match="declared"):
        Slab.adopt(memfd(), size)


def test_a_closed_descriptor_is_refused():
    fd = memfd()
    os.close(fd)
    with pytest.raises((InvalidRequest, OSError)):
        check_memfd(fd, 4096)


@pytest.mark.parametrize(
    ("offset", "expected"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128), (2**40 + 1, 2**40 + 64)]
)
def test_alignment_rounds_up(offset, expected):
    assert aligned(offset) == expected
    assert expected % ALIGNMENT == 0


# ---------------------------------------------------------------- regions


class Log:
    """Notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *words):
        self.calls.append(words)

    def __len__(self):
        return len(self.calls)


def region(size=4096):
    freed = Log()
    return Region(Slab.adopt(memfd(size), size), freed), freed


def test_numbers_are_never_the_same():
    regions = [region()[0] for _ in range(5)]
    assert len({each.number for each in regions}) == 5
    for each in regions:
        each.release()


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 4097), (4096, 1), (4097, 0), (-1, 1), (0, -1), (2**63, 2**63), (1, 2**64 - 1), (2**64, 0), (4095, 2)],
)
def test_a_view_lies_inside(offset, size):
    made, _ = region()
    with pytest.raises(InvalidRequest, match="beyond its 4096 bytes"):
        made.view(offset, size)
    made.release()


def test_the_edges_are_inside():
    made, _ = region()
    assert [len(made.view(*place)) for place in ((0, 4096), (4095, 1), (4096, 0), (0, 0))] == [4096, 1, 0, 0]
    made.release()


def test_a_region_is_freed_once_it_is_released_and_unused_whatever_comes_first():
    for uses_first in (True, False):
        made, freed = region()
        forgotten = Log()
        made.watch(forgotten)
        made.watch(forgotten)
        made.acquire()
        made.acquire()
        if uses_first:
            made.release_use()
            made.release_use()
            assert not freed.calls
            made.release()
        else:
            made.release()
            made.release_use()
            assert not freed.calls
            made.release_use()
        assert (freed.calls, forgotten.calls) == ([()], [(made.number,)])
        made.release()
        assert len(freed) == 1
        assert made.slab.fd == -1


def test_a_call_uses_its_regions_until_it_lets_go_and_only_once():
    made, freed = region()
    call = Call(Plan(None, 1, (), (), 0, (), 0, False), (made.view(0, 4),), None)
    call.use_regions([RegionView(made, 0, True), None, RegionView(made, 8, False)])
    made.release()
    assert not freed.calls
    call.let_go()
    assert freed.calls == [()]
    call.let_go()
    assert (len(freed), call.contents) == (1, ())


def test_freeing_unmaps(tmp_path: Path):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:test")

    before = mapped()
    made, _ = region()
    assert mapped() == before + 1
    made.release()
    assert mapped() == before
