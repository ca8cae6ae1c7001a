"""The front-end's registry with real registrar processes: what it remembers, and what no fault makes it forget."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import ApplianceError, Conflict
from appliance.registry import FILE_NAME
from appliance.registry_link import registrar_command
from appliance.stored import StoredPlacement, WantedJob
from support.registry import evidence, key, measurement, registry, rows, unprivileged, variant, wait_for_end
from support.workers import until


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


def run(directory, scenario, **settings):
    """Run `scenario` with an open registry, and close it; returns what the scenario does."""

    async def whole():
        opened = registry(directory, **settings)
        await opened.open()
        try:
            return await scenario(opened)
        finally:
            await opened.close()

    return asyncio.run(whole())


def reopened(directory, look):
    """What `look` finds in a registry that was just opened."""

    async def scenario(opened):
        assert not opened.problem
        return look(opened)

    return run(directory, scenario)


def kill_registrar(opened) -> None:
    pid = opened.registrar_pid
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


# ---------------------------------------------------------------- remembering


def test_everything_comes_back_as_it_was_after_a_restart(directory):
    placement = StoredPlacement("model", "1", key().id, "onnxruntime/cpu/FP32", "measured", "faster", at="today")
    job = WantedJob("model", "tune", {"budget_seconds": 3.5}, "today")
    failed = replace(evidence(1), comparison=None, problem="cannot run it")

    async def scenario(opened):
        assert await opened.put_measurement("model", "1", measurement())
        assert await opened.put_evidence("model", "1", "cosine", evidence())
        assert await opened.put_evidence("model", "1", "accuracy", failed)
        assert await opened.put_variant(variant())
        assert await opened.put_placement(placement)
        assert await opened.put_digest("print", "c" * 64)
        assert await opened.put_wanted(job)

    run(directory, scenario)

    def look(opened):
        assert opened.measurement(key().id) == measurement()
        assert opened.evidence(key().id, key(99).id, "f" * 64, "cosine") == evidence()
        assert opened.evidence(key(1).id, key(99).id, "f" * 64, "accuracy") == failed
        assert opened.evidence(key().id, key(98).id, "f" * 64, "cosine") is None
        assert opened.evidence(key().id, key(99).id, "f" * 64, "accuracy") is None
        assert opened.variants("model", "1") == opened.variants("model") == [variant()]
        assert opened.variants("model", "2") == opened.variants("other") == []
        assert opened.placement("model", "1") == placement
        assert opened.placement("model", "2") is None
        assert opened.digest("print") == "c" * 64
        assert opened.digest("other") is None
        assert opened.wanted() == [job]

    reopened(directory, look)


def test_what_is_removed_is_gone_after_a_restart_too(directory):
    async def scenario(opened):
        await opened.put_variant(variant())
        await opened.put_variant(variant(model="twin"))
        await opened.put_placement(StoredPlacement("model", "1", key().id, "name", "pinned", is_pinned=True))
        await opened.put_wanted(WantedJob("model", "tune"))
        await opened.remove_variant(variant())
        await opened.remove_placement("model", "1")
        await opened.remove_wanted("model", "tune")
        assert (opened.variants("model"), opened.placement("model", "1"), opened.wanted()) == ([], None, [])

    run(directory, scenario)
    assert reopened(directory, lambda opened: (opened.variants("model"), opened.wanted())) == ([], [])
    assert reopened(directory, lambda opened: opened.placement("model", "1")) is None
    assert reopened(directory, lambda opened: opened.variants("twin")) == [variant(model="twin")]


def test_the_newest_of_one_thing_replaces_what_was_there(directory):
    other = replace(measurement(), load_ms=99.0)

    async def scenario(opened):
        await opened.put_measurement("model", "1", measurement())
        await opened.put_measurement("model", "1", other)
        await opened.put_evidence("model", "1", "cosine", evidence(value=0.5))
        await opened.put_evidence("model", "1", "cosine", evidence(value=0.75))

    run(directory, scenario)
    assert len(rows(directory, "measurements")) == len(rows(directory, "evidence")) == 1
    assert reopened(directory, lambda opened: opened.measurement(key().id)) == other
    found = reopened(directory, lambda opened: opened.evidence(key().id, key(99).id, "f" * 64, "cosine"))
    assert found.comparison.value == 0.75


def test_a_measurement_half_done_is_kept_and_is_no_measurement_yet(directory):
    async def begin(opened):
        await opened.put_measurement("model", "1", measurement(points=1), is_complete=False)
        assert opened.measurement(key().id) is None

    async def finish(opened):
        assert opened.measurement(key().id) is None
        assert opened.partial(key().id) == measurement(points=1)
        await opened.put_measurement("model", "1", measurement(points=3))
        assert opened.partial(key().id) is None

    run(directory, begin)
    run(directory, finish)
    assert reopened(directory, lambda opened: opened.measurement(key().id)) == measurement(points=3)


def test_forgetting_a_model_leaves_the_others_and_the_events(directory):
    async def scenario(opened):
        for number, model in enumerate(("model", "other")):
            await opened.put_measurement(model, "1", measurement(number))
            await opened.put_variant(variant(model=model))
            await opened.put_wanted(WantedJob(model, "tune"))
            await opened.add_event("swap", model, "it took over")
        assert await opened.forget("model")
        assert [opened.measurement(key(0).id), opened.measurement(key(1).id)] == [None, measurement(1)]

    run(directory, scenario)
    for table in ("measurements", "variants", "wanted"):
        assert [row["model"] for row in rows(directory, table)] == ["other"]
    assert len(rows(directory, "events")) == 2


def test_events_are_told_newest_first_and_for_one_model_where_asked(directory):
    async def scenario(opened):
        for number in range(5):
            await opened.add_event("swap", f"model{number % 2}", f"number {number}")
        assert [event.text for event in await opened.events(2)] == ["number 4", "number 3"]
        assert [event.text for event in await opened.events(model="model1")] == ["number 3", "number 1"]
        assert (await opened.events(1))[0].at == "now"

    run(directory, scenario, now=lambda: "now")


def test_dates_are_filled_in_where_there_is_none(directory):
    async def scenario(opened):
        await opened.put_placement(StoredPlacement("model", "1", key().id, "name", "rule"))
        await opened.put_wanted(WantedJob("model", "tune"))
        assert (opened.placement("model", "1").at, opened.wanted()[0].requested_at) == ("now", "now")

    run(directory, scenario, now=lambda: "now")


def test_a_thousand_writes_at_once_all_arrive(directory):
    async def scenario(opened):
        kept = await asyncio.gather(*(opened.put_digest(f"print{n}", f"{n:064x}") for n in range(1000)))
        assert all(kept)

    run(directory, scenario)
    assert len(rows(directory, "digests")) == 1000
    assert reopened(directory, lambda opened: opened.digest("print999")) == f"{999:064x}"


def test_a_thousand_measurements_are_read_in_parts(directory):
    async def scenario(opened):
        assert all(await asyncio.gather(*(opened.put_measurement("m", "1", measurement(n, 5)) for n in range(1000))))

    run(directory, scenario)

    def look(opened):
        assert len(opened.measurements("m")) == 1000
        assert opened.measurement(key(567).id) == measurement(567, 5)

    reopened(directory, look)


def test_directory_and_database_belong_to_the_user_alone(directory):
    before = os.umask(0)
    try:
        reopened(directory, lambda opened: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / FILE_NAME).stat().st_mode) == 0o600


# ---------------------------------------------------------------- the registrar's life


def test_the_registrar_ends_when_it_is_idle_and_leaves_the_database_alone_in_its_place(directory):
    async def scenario(opened):
        first = opened.registrar_pid
        await until(lambda: opened.registrar_pid is None)
        assert await opened.put_digest("print", "c")
        assert opened.registrar_pid != first

    run(directory, scenario, idle_seconds=0.01)
    assert [each.name for each in directory.iterdir()] == [FILE_NAME]


def test_a_registrar_that_is_killed_is_started_again_and_nothing_is_lost(directory):
    async def scenario(opened):
        await opened.put_measurement("model", "1", measurement(points=1), is_complete=False)
        kill_registrar(opened)
        assert await opened.put_digest("print", "c")
        assert not opened.problem

    run(directory, scenario)
    assert reopened(directory, lambda opened: opened.partial(key().id)) == measurement(points=1)


def test_a_registrar_killed_in_the_middle_of_200_writes_loses_none(directory):
    async def scenario(opened):
        async def write(number):
            if number == 100:
                kill_registrar(opened)
            return await opened.put_digest(f"print{number}", "c")

        async def some(first):
            return [await write(number) for number in range(first, 200, 4)]

        kept = await asyncio.gather(*(some(first) for first in range(4)))
        assert all(all(each) for each in kept)

    run(directory, scenario)
    assert len(rows(directory, "digests")) == 200


def test_what_was_acknowledged_survives_the_front_end_being_killed(directory):
    """The registrar dies with it, wherever it was."""
    program = """
import asyncio, sys
from pathlib import Path
from appliance.registry import Registry

async def main():
    registry = Registry(Path(sys.argv[1]))
    await registry.open()
    print(registry.registrar_pid, flush=True)
    async def some(first):
        for number in range(first, 100_000, 8):
            if await registry.put_digest(f"print{number}", "c"):
                print(f"print{number}", flush=True)
    await asyncio.gather(*(some(first) for first in range(8)))

asyncio.run(main())
"""
    front_end = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True)
    registrar = int(front_end.stdout.readline())
    acknowledged = {front_end.stdout.readline().strip() for _ in range(200)}
    front_end.kill()
    lines = front_end.communicate()[0].splitlines(keepends=True)
    acknowledged |= {line.strip() for line in lines if line.endswith("\n")}
    wait_for_end(registrar)
    assert acknowledged <= {row["fingerprint"] for row in rows(directory, "digests")}
    assert len(acknowledged) >= 200


def test_a_registrar_that_cannot_be_started_stops_nobody(directory, caplog):
    async def scenario(opened):
        assert "killed by SIGKILL" in opened.problem
        assert not await opened.put_measurement("model", "1", measurement())
        assert not await opened.put_digest("print", "c")
        assert opened.measurement(key().id) == measurement()
        assert opened.unwritten == 2
        assert (await opened.check()).reason
        with pytest.raises(ApplianceError, match="killed by SIGKILL"):
            await opened.events()

    run(directory, scenario, command=[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert sum("goes on" in message for message in caplog.messages) == 1


def test_nothing_is_written_once_it_is_closed(directory):
    async def scenario(opened):
        await opened.close()
        assert not await opened.put_digest("print", "c")
        assert opened.digest("print") == "c"

    run(directory, scenario)
    assert rows(directory, "digests") == []


def test_closing_writes_what_nobody_waits_for(directory):
    async def scenario(opened):
        task = asyncio.ensure_future(opened.put_digest("print", "c"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

    run(directory, scenario)
    assert len(rows(directory, "digests")) == 1


# ---------------------------------------------------------------- bad files


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 5] = b"\xa5" * 8192
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_garbage, _truncated, _emptied, _overwritten])
def test_a_damaged_database_is_moved_aside_and_a_new_one_begun_with_an_event(directory, damage):
    async def fill(opened):
        await asyncio.gather(*(opened.put_measurement("model", "1", measurement(n)) for n in range(100)))

    async def scenario(opened):
        assert opened.moved_aside == f"{FILE_NAME}.corrupt-1"
        assert not opened.problem
        assert opened.measurements("model") == []
        assert await opened.put_digest("print", "c")
        (event,) = await opened.events()
        assert event.kind == "registry-damaged"
        assert f"{FILE_NAME}.corrupt-1" in event.text
        health = await opened.check()
        assert health.moved_aside == (f"{FILE_NAME}.corrupt-1",)
        assert health.problems == ()

    run(directory, fill)
    damage(directory / FILE_NAME)
    damaged = (directory / FILE_NAME).read_bytes()
    run(directory, scenario)
    assert (directory / f"{FILE_NAME}.corrupt-1").read_bytes() == damaged
    assert reopened(directory, lambda opened: (opened.digest("print"), opened.moved_aside)) == ("c", "")


def test_every_damaged_database_is_kept(directory):
    for _ in range(3):
        reopened(directory, lambda opened: None)
        _garbage(directory / FILE_NAME)
    reopened(directory, lambda opened: None)
    assert sorted(each.name for each in directory.iterdir()) == [
        FILE_NAME,
        *(f"{FILE_NAME}.corrupt-{number}" for number in (1, 2, 3)),
    ]


@pytest.mark.parametrize("damage", [_garbage, Path.unlink])
def test_what_is_in_memory_is_written_again_where_the_database_was_lost(directory, damage):
    async def scenario(opened):
        await opened.put_measurement("model", "1", measurement())
        await opened.put_placement(StoredPlacement("model", "1", key().id, "name", "rule"))
        kill_registrar(opened)
        for beside in ("-wal", "-shm"):
            (directory / f"{FILE_NAME}{beside}").unlink()
        damage(directory / FILE_NAME)
        assert await opened.put_digest("print", "c")

    run(directory, scenario)
    assert reopened(directory, lambda opened: opened.measurement(key().id)) == measurement()
    assert reopened(directory, lambda opened: opened.placement("model", "1")).variant == "name"
    assert reopened(directory, lambda opened: opened.digest("print")) == "c"


def test_a_row_that_cannot_be_understood_is_left_out_and_the_others_are_read(directory, caplog):
    async def fill(opened):
        await opened.put_measurement("model", "1", measurement(0))
        await opened.put_measurement("model", "1", measurement(1))

    run(directory, fill)
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.execute("UPDATE measurements SET document = '{\"points\": []}' WHERE key = ?", [key(0).id])
        connection.commit()
    found = reopened(directory, lambda opened: opened.measurements("model"))
    assert [each.measurement for each in found] == [measurement(1)]
    assert "left out" in caplog.text


# ---------------------------------------------------------------- locks and disks


def _locker(directory) -> sqlite3.Connection:
    return sqlite3.connect(directory / FILE_NAME, isolation_level=None)


def test_while_another_process_writes_memory_goes_on_and_the_writes_arrive_later(directory, caplog):
    async def scenario(opened):
        with closing(_locker(directory)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(3):
                assert not await opened.put_measurement("model", "1", measurement(number))
            assert opened.problem == "cannot use the registry: it is locked by another process"
            assert opened.measurement(key(2).id) == measurement(2)
            other.execute("ROLLBACK")
        assert await opened.put_digest("print", "c")
        assert (opened.problem, opened.unwritten) == ("", 0)

    run(directory, scenario, busy_seconds=0.01)
    assert sum("locked" in message for message in caplog.messages) == 1
    assert len(rows(directory, "measurements")) == 3


def test_a_lock_at_the_start_delays_what_is_known_and_loses_nothing(directory):
    async def fill(opened):
        await opened.put_measurement("model", "1", measurement(0))
        await opened.put_measurement("model", "1", measurement(1))
        await opened.put_placement(StoredPlacement("model", "1", key().id, "old", "rule"))
        await opened.put_measurement("gone", "1", measurement(2))

    async def scenario():
        opened = registry(directory, busy_seconds=0.01)
        with closing(_locker(directory)) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            await opened.open()
            assert "locked" in opened.problem
            assert opened.measurement(key(0).id) is None
            newer = replace(measurement(1), load_ms=1.0)
            assert not await opened.put_measurement("model", "1", newer)
            assert not await opened.remove_placement("model", "1")
            assert not await opened.forget("gone")
            other.execute("ROLLBACK")
        assert await opened.put_digest("print", "c")
        assert opened.measurement(key(0).id) == measurement(0)
        assert opened.measurement(key(1).id) == newer
        assert opened.measurement(key(2).id) is None
        assert opened.placement("model", "1") is None
        await opened.close()

    run(directory, fill)
    asyncio.run(scenario())
    assert [row["model"] for row in rows(directory, "measurements")] == ["model", "model"]


def test_a_lock_is_a_conflict_to_who_asks_for_events(directory):
    async def scenario(opened):
        kill_registrar(opened)
        with closing(_locker(directory)) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(Conflict, match="locked by another process"):
                await opened.events()

    run(directory, scenario, busy_seconds=0.01)


def test_a_directory_that_cannot_be_written_leaves_memory_and_what_can_be_read(directory):
    async def fill(opened):
        await opened.put_measurement("model", "1", measurement())

    async def scenario(opened):
        assert opened.measurement(key().id) == measurement()
        assert not await opened.put_digest("print", "c")
        assert "read-only" in opened.problem
        assert opened.digest("print") == "c"
        directory.chmod(0o700)
        assert await opened.put_digest("other", "c")

    run(directory, fill)
    directory.chmod(0o500)
    try:
        run(directory, scenario, command=unprivileged(registrar_command(directory / FILE_NAME)))
    finally:
        directory.chmod(0o700)
    assert len(rows(directory, "digests")) == 2


def test_a_directory_that_cannot_be_made_leaves_memory(tmp_path):
    tmp_path.chmod(0o500)
    directory = tmp_path / "state"

    async def scenario(opened):
        assert "read-only, or another user's" in opened.problem
        assert not await opened.put_digest("print", "c")
        assert opened.digest("print") == "c"

    try:
        run(directory, scenario, command=unprivileged(registrar_command(directory / FILE_NAME)))
    finally:
        tmp_path.chmod(0o700)
    assert not directory.exists()


def test_a_state_directory_that_is_a_file_leaves_memory(tmp_path):
    (tmp_path / "state").write_text("something else")

    async def scenario(opened):
        assert opened.problem == "cannot use the registry: File exists"
        assert not await opened.put_digest("print", "c")

    run(tmp_path / "state", scenario)


# ---------------------------------------------------------------- changes that cannot be made


def test_a_change_that_can_never_be_made_holds_up_no_other(directory, caplog):
    async def scenario(opened):
        odd = replace(variant("odd"), bytes=1 << 80)
        kept = await asyncio.gather(
            opened.put_digest("one", "c"), opened.put_variant(odd), opened.put_digest("two", "c")
        )
        assert kept == [True, False, True]
        assert (opened.unwritten, opened.problem) == (0, "")

    run(directory, scenario)
    assert len(rows(directory, "digests")) == 2
    assert "a change of variants is kept in memory alone" in caplog.text


def test_a_change_too_long_to_send_is_kept_in_memory_alone(directory, caplog):
    async def scenario(opened):
        assert not await opened.put_wanted(WantedJob("model", "tune", {"path": "x" * (1 << 20)}))
        assert len(opened.wanted()) == 1
        assert await opened.put_digest("print", "c")

    run(directory, scenario)
    assert rows(directory, "wanted") == []
    assert "it takes" in caplog.text
