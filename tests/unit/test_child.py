"""Short-lived children: what they answer, and everything they can do wrong."""

import asyncio
import os
import signal
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.child import MAX_ANSWER_BYTES, MAX_LINE_BYTES, Child, ChildFailed, ask
from support.processes import is_over, state
from support.workers import until

#: Longer than anything here takes.
PATIENCE = 50.0
IMPORTS = "import json, os, signal, subprocess, sys, time\n"


def command(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", IMPORTS + program)


def answers(program: str, question=None, seconds: float = PATIENCE) -> list[dict]:
    async def whole():
        child = await Child.start(command(program), question)
        try:
            return [answer async for answer in child.answers(seconds)]
        finally:
            await child.end()
            await child.end()  # does no harm

    return asyncio.run(whole())


def failure(program: str, question=None, seconds: float = PATIENCE) -> ChildFailed:
    with pytest.raises(ChildFailed) as caught:
        answers(program, question, seconds)
    return caught.value


# ---------------------------------------------------------------- what it says


def test_lines_come_in_order_and_the_last_one_needs_no_end():
    program = "for n in range(3): print(json.dumps({'n': n}))\nprint(json.dumps(json.load(sys.stdin)), end='')"
    assert answers(program, {"all": "of it"}) == [{"n": 0}, {"n": 1}, {"n": 2}, {"all": "of it"}]


def test_one_answer_is_wanted_and_no_more():
    assert asyncio.run(ask(command("print('{\"a\": 1}')"), None, PATIENCE)) == {"a": 1}
    for count in (0, 2):
        with pytest.raises(ChildFailed, match=f"it answered {count} times and must answer once"):
            asyncio.run(ask(command(f"print('{{}}\\n' * {count}, end='')"), None, PATIENCE))


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("'half of {'", "it is not JSON"),
        ("'\\n'", "it is not JSON"),
        ("'[' * 100000", "it is not JSON"),
        ("'[1]'", "it is not a JSON object"),
        ("'null'", "it is not a JSON object"),
    ],
)
def test_anything_but_json_objects_is_no_answer(says, message):
    assert str(failure(f"print({says})")) == message.replace("it is", "its answer is")


def test_a_line_that_is_too_long_ends_the_reading():
    program = "sys.stdout.write('x' * (3 << 20)); sys.stdout.flush(); time.sleep(3600)"
    assert str(failure(program)) == f"its answer is longer than {MAX_LINE_BYTES} bytes"


def test_too_many_lines_end_the_reading():
    program = "line = json.dumps({'x': 'y' * 500000})\nwhile True: print(line)"
    assert str(failure(program)) == f"its answer is longer than {MAX_ANSWER_BYTES} bytes"


# ---------------------------------------------------------------- how it ends


def test_one_that_cannot_be_started_says_why():
    with pytest.raises(ChildFailed, match="No such file or directory"):
        asyncio.run(ask(("/nowhere/at/all",), None, PATIENCE))


def test_one_that_ends_without_reading_a_long_question_is_heard_all_the_same():
    assert answers("print('{}')\nos.close(0)", {"long": "q" * (4 << 20)}) == [{}]


@pytest.mark.parametrize(
    ("number", "was_ended"), [(signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGSEGV, False)]
)
def test_the_signal_that_killed_it_is_named_with_its_last_words(number, was_ended):
    words = "print('one', 'the last words', sep='\\n', file=sys.stderr, flush=True)"
    error = failure(f"{words}\nprint('{{}}', flush=True)\nos.kill(os.getpid(), {int(number)})")
    assert str(error) == f"its process was killed by {number.name}: the last words"
    assert error.was_ended is was_ended


def test_a_status_other_than_0_is_a_failure_even_after_an_answer():
    silent, spoken = failure("sys.exit('no luck')"), failure("print('{}', flush=True)\nsys.exit(3)")
    assert str(silent) == "its process ended with status 1 and no answer: no luck"
    assert str(spoken) == "its process ended with status 3 before it was done"
    assert not silent.was_ended


def test_one_that_closes_its_answer_and_stays_is_a_failure():
    """However much time it had left."""
    error = failure("print('{}', flush=True)\nos.close(1)\ntime.sleep(3600)", seconds=0.5)
    assert str(error) in ("it closed its answer and did not end", "it gave no answer within 0.5 s")


def test_a_flood_on_standard_error_blocks_nobody():
    program = "sys.stderr.write('noise\\n' * 1000000)\nsys.stderr.write('the end')\nprint('{}', flush=True)"
    assert answers(program) == [{}]
    assert str(failure(f"{program}\nsys.exit(2)")).endswith(": the end")


# ---------------------------------------------------------------- time


def test_one_that_hangs_has_a_limit():
    assert str(failure("time.sleep(3600)", seconds=0.3)) == "it gave no answer within 0.3 s"


def test_one_that_talks_without_end_has_the_same_limit():
    program = "while True: print('{}', flush=True); time.sleep(0.01)"
    assert str(failure(program, seconds=0.3)) == "it gave no answer within 0.3 s"


def test_time_that_it_is_suspended_does_not_count():
    async def whole():
        child = await Child.start(command("time.sleep(3600)"), None)

        async def listen():
            async with aclosing(child.answers(0.1)) as said:
                await anext(said)

        try:
            child.suspend()
            listening = asyncio.ensure_future(listen())
            await asyncio.wait({listening}, timeout=1.0)  # ten times its limit
            assert not listening.done()
            child.resume()
            with pytest.raises(ChildFailed, match=r"within 0\.1 s"):
                await listening
        finally:
            await child.end()

    asyncio.run(whole())


# ---------------------------------------------------------------- its group

GRANDCHILD = "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"


def test_what_it_started_is_killed_with_it():
    async def whole():
        program = GRANDCHILD + "print(json.dumps({'pid': other.pid}), flush=True)\ntime.sleep(3600)"
        child = await Child.start(command(program), None)
        try:
            async with aclosing(child.answers(PATIENCE)) as said:
                grandchild = (await anext(said))["pid"]
        finally:
            await child.end()
        assert is_over(child.pid)
        await until(lambda: is_over(grandchild))

    asyncio.run(whole())


def test_what_it_left_behind_is_killed_too():
    """It has ended itself, and its process id is its group's."""

    async def whole():
        program = GRANDCHILD.replace(")\n", ", stdout=2)\n") + "print(json.dumps({'pid': other.pid}))"
        child = await Child.start(command(program), None)
        try:
            (said,) = [answer async for answer in child.answers(PATIENCE)]
        finally:
            await child.end()
        await until(lambda: is_over(said["pid"]))

    asyncio.run(whole())


def test_it_is_suspended_with_what_it_started_and_killed_so():
    async def whole():
        program = GRANDCHILD + "print(json.dumps({'pid': other.pid}), flush=True)\ntime.sleep(3600)"
        child = await Child.start(command(program), None)
        try:
            async with aclosing(child.answers(PATIENCE)) as said:
                pids = (child.pid, (await anext(said))["pid"])
            child.suspend()
            await until(lambda: all(state(pid) == "T" for pid in pids))
            child.resume()
            await until(lambda: all(state(pid) != "T" for pid in pids))
            child.suspend()
        finally:
            await child.end()
        await until(lambda: all(map(is_over, pids)))

    asyncio.run(whole())


def test_it_is_the_first_of_a_session_of_its_own():
    """A signal for the daemon's group, such as Ctrl-C, is none of its business."""
    (said,) = answers("print(json.dumps([os.getpid(), os.getpgid(0), os.getsid(0)]).join(('{\"ids\": ', '}')))")
    assert len(set(said["ids"])) == 1
    assert said["ids"][0] != os.getpid()
