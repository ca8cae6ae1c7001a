"""Answers that are kept: which requests are the same, what is read back, what goes first, what it all weighs."""

import itertools
import random
import struct
import tracemalloc
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from appliance.cache import Answer, ResponseCache
from appliance.call import Call, OutputTable
from appliance.manifest import CacheSection, Manifest
from appliance.metrics import ModelStatistics
from appliance.planner import make_plan, signature_of
from appliance.wire import worker_pb2
from appliance.wire.elements import join_elements
from appliance.wire.worker import TensorLayout

SECOND = 1_000_000_000


def signature(rows=8):
    """Inputs a (FP32), b (INT32 of any length), words (BYTES); outputs y (FP32), label (BYTES), z (INT64)."""

    def specs(*entries):
        leading = (-1,) if rows else ()
        return [worker_pb2.TensorSpec(name=n, datatype=d, shape=(*leading, *s)) for n, d, s in entries]

    loaded = worker_pb2.Loaded(
        inputs=specs(("a", "FP32", (-1, -1)), ("b", "INT32", (-1,)), ("words", "BYTES", (2,))),
        outputs=specs(("y", "FP32", (3,)), ("label", "BYTES", (2,)), ("z", "INT64", (1,))),
        max_batch_size=rows,
    )
    return signature_of(loaded, Manifest(name="m", artifacts=[{"path": "1/model.onnx", "format": "onnx"}]))


SIGNATURE = signature()
UNBATCHED = signature(rows=0)


def make_call(order=("a", "b", "words"), outputs=(), rows=1, a=(2, 3), **contents) -> Call:
    """A call whose tensors hold zeros and empty words but for what `contents` says; `a` is the shape of one row."""
    b = contents.get("b", bytes(4 * 4 * rows))
    tensors = {
        "a": ("FP32", (rows, *a), contents.get("a", bytes(4 * a[0] * a[1] * rows))),
        "b": ("INT32", (rows, len(b) // 4 // rows), b),
        "words": ("BYTES", (rows, 2), contents.get("words", join_elements([b"", b""] * rows))),
    }
    plan = make_plan(None, SIGNATURE, [(name, *tensors[name][:2]) for name in order], outputs)
    return Call(plan, [tensors[name][2] for name in order], SimpleNamespace())


def make_cache(max_bytes=1 << 20, **section) -> ResponseCache:
    return ResponseCache(CacheSection(max_bytes=max_bytes, **section), ModelStatistics())


def make_answer(rows=1, fill=1, size=24) -> Answer:
    """The answer of one FP32 output of `size` bytes a row."""
    plan = make_plan(None, SIGNATURE, heads(rows), ["y"])
    layout = TensorLayout(0, "FP32", (rows, size // 4), 0, 0, size * rows)
    table = OutputTable(((0, "FP32", (size // 4,)),), {0: layout}, SIGNATURE.output_names, True)
    return Answer.copy(plan, table, memoryview(bytes([fill]) * (size * rows)), 0)


def heads(rows):
    return [("a", "FP32", (rows, 1, 1)), ("b", "INT32", (rows, 1)), ("words", "BYTES", (rows, 2))]


# ---------------------------------------------------------------- which requests are the same


def test_equal_requests_have_one_key_and_the_order_of_tensors_does_not_matter():
    cache = make_cache()
    key = cache.key(make_call())
    assert cache.key(make_call()) == key
    for order in itertools.permutations(("a", "b", "words")):
        assert cache.key(make_call(order)) == key
    assert cache.key(make_call(outputs=["z", "y"])) == cache.key(make_call(outputs=["y", "z"]))
    assert cache.key(make_call(outputs=["y", "label", "z"])) == key, "all outputs is what none named stands for"


def test_everything_that_can_change_the_answer_changes_the_key():
    cache = make_cache()
    calls = {
        "plain": make_call(),
        "an output less": make_call(outputs=["y", "z"]),
        "one output": make_call(outputs=["y"]),
        "a bit of a": make_call(a=(2, 3), b=bytes(15) + b"\1"),
        "another shape of the same bytes": make_call(a=(3, 2)),
        "rows": make_call(rows=2),
        "the same bytes as fewer, longer rows": make_call(rows=1, a=(4, 3), b=bytes(32)),
        "a word": make_call(words=join_elements([b"a", b""])),
        "the other word": make_call(words=join_elements([b"", b"a"])),
        "a byte in both": make_call(words=join_elements([b"\0", b""])),
    }
    assert len({cache.key(call) for call in calls.values()}) == len(calls)


def test_datatypes_and_rows_are_part_of_the_key():
    """Two plans that differ in nothing else; no session has both."""
    cache = make_cache()
    call = make_call()
    keys = {cache.key(call)}
    tensors = call.plan.tensors
    call.plan.tensors = (tensors[0]._replace(datatype="INT32"), *tensors[1:])
    keys.add(cache.key(call))
    call.plan.tensors = tensors
    call.plan.rows = 2
    keys.add(cache.key(call))
    assert len(keys) == 3


def test_bytes_are_read_from_any_buffer():
    cache = make_cache()
    content = bytes(range(24))
    expected = cache.key(make_call(a=(2, 3), b=bytes(16), words=join_elements([b"x", b"yz"])))
    words = join_elements([b"x", b"yz"])
    assert cache.key(make_call(words=bytearray(words))) == expected
    assert cache.key(make_call(words=memoryview(b"--" + words)[2:])) == expected
    call = make_call()
    call.contents[0] = memoryview(bytearray(content))
    first = cache.key(call)
    call.contents[0] = content
    assert cache.key(call) == first


def test_keys_stay_right_when_more_heads_come_than_are_kept():
    cache = make_cache()
    keys = {cache.key(make_call(a=(width, 1))) for width in range(1, 1500)}
    assert len(keys) == 1499
    assert keys == {cache.key(make_call(a=(width, 1))) for width in range(1, 1500)}


# ---------------------------------------------------------------- what is read back


def slab(rows, words, numbers, signature_=SIGNATURE):
    """A batch's output slab with all three outputs, laid out as a worker does: an index before the words."""
    is_batched = signature_ is SIGNATURE
    leading = (rows,) if is_batched else ()
    y = struct.pack(f"<{3 * rows}f", *numbers)
    per_row = [join_elements(row) for row in words]
    starts = list(itertools.accumulate((len(row) for row in per_row), initial=0))
    label = struct.pack(f"<{len(starts)}Q", *starts) + b"".join(per_row)
    z = struct.pack(f"<{rows}q", *range(100, 100 + rows))
    memory, layouts = bytearray(), {}
    for place, (datatype, shape, content) in enumerate((("FP32", (3,), y), ("BYTES", (2,), label), ("INT64", (1,), z))):
        memory += bytes(-len(memory) % 64)
        layouts[place] = TensorLayout(place, datatype, (*leading, *shape), 0, len(memory), len(content))
        memory += content
    table = OutputTable(
        tuple((each.place, each.datatype, each.shape[len(leading) :]) for each in layouts.values()),
        layouts,
        signature_.output_names,
        is_batched,
    )
    return table, memoryview(memory)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("rows", [1, 2])
def test_an_answer_is_the_batchs_rows_byte_for_byte(row, rows):
    words = [[b"", b"zero"], [b"one", b""], [b"\0\xff", b"two"], [b"three", b"3" * 300], [b"", b""]]
    table, memory = slab(5, words, range(15))
    plan = make_plan(None, SIGNATURE, heads(rows), ["z", "label", "y"])
    answer = Answer.copy(plan, table, memory, row)
    for place in (0, 1, 2):
        shape, content = table.view(place, memory, row, rows)
        kept_shape, kept = answer.table.view(place, answer.memory, 0, rows)
        assert (kept_shape, bytes(kept)) == (shape, bytes(content))
        assert answer.table.tensor(place, answer.memory, 0, rows) == table.tensor(place, memory, row, rows)
    assert answer.table.signature == table.signature, "so that heads of answers are encoded once for both"


def test_an_answer_holds_what_was_asked_for_alone_and_in_memory_of_its_own():
    table, memory = slab(2, [[b"a", b"b"], [b"c", b"d"]], range(6))
    plan = make_plan(None, SIGNATURE, heads(1), ["y"])
    answer = Answer.copy(plan, table, memory, 1)
    memory[:] = bytes(len(memory))
    assert list(answer.table.tensors) == [0]
    assert bytes(answer.memory) == struct.pack("<3f", 3, 4, 5)


def test_an_answer_of_a_model_without_batch_dimension():
    table, memory = slab(1, [[b"left", b"right"]], range(3), UNBATCHED)
    plan = make_plan(None, UNBATCHED, [("a", "FP32", (1, 1)), ("b", "INT32", (1,)), ("words", "BYTES", (2,))], [])
    answer = Answer.copy(plan, table, memory, 0)
    for place in (0, 1, 2):
        assert answer.table.tensor(place, answer.memory, 0, 1) == table.tensor(place, memory, 0, 1)


# ---------------------------------------------------------------- what goes


def test_what_was_used_longest_ago_goes_first():
    one = make_answer().nbytes
    cache = make_cache(3 * one)
    for name in (b"a", b"b", b"c"):
        cache.put(name, make_answer(), 0)
    assert cache.get(b"a", 0) is not None
    cache.put(b"d", make_answer(), 0)
    assert [cache.get(name, 0) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert (len(cache), cache.nbytes) == (3, 3 * one)
    assert cache._statistics.cache_evictions == 1


def test_a_large_answer_takes_the_room_of_several_small_ones():
    small, large = make_answer(), make_answer(size=4000)
    cache = make_cache(large.nbytes + small.nbytes)
    for number in range(4):
        cache.put(bytes([number]), make_answer(), 0)
    assert len(cache) == 4
    cache.put(b"large", large, 0)
    assert cache.nbytes <= large.nbytes + small.nbytes
    assert cache.get(b"\3", 0) is not None, "the one used last stays"
    assert cache.get(b"\2", 0) is None


def test_an_answer_larger_than_the_cache_is_not_kept_and_drives_nothing_out():
    cache = make_cache(make_answer().nbytes)
    cache.put(b"a", make_answer(), 0)
    cache.put(b"b", make_answer(size=4000), 0)
    assert cache.get(b"b", 0) is None
    assert cache.get(b"a", 0) is not None


def test_an_answer_that_comes_again_takes_its_own_place():
    cache = make_cache()
    cache.put(b"a", make_answer(size=4000), 0)
    newer = make_answer(fill=2)
    cache.put(b"a", newer, 0)
    assert cache.get(b"a", 0) is newer
    assert (len(cache), cache.nbytes) == (1, newer.nbytes)
    assert cache._statistics.cache_evictions == 0


def test_an_answer_too_old_is_computed_anew():
    cache = make_cache(max_age_seconds=1.5)
    cache.put(b"a", make_answer(), 10 * SECOND)
    assert cache.get(b"a", 11 * SECOND) is not None
    assert cache.get(b"a", 11 * SECOND + SECOND // 2) is not None, "being read makes it no younger, and no older"
    assert cache.get(b"a", 11 * SECOND + SECOND // 2 + 1) is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_without_an_age_limit_an_answer_stays():
    cache = make_cache()
    cache.put(b"a", make_answer(), 0)
    assert cache.get(b"a", 10**6 * SECOND) is not None


def test_clearing_leaves_nothing():
    cache = make_cache()
    cache.put(b"a", make_answer(), 0)
    cache.clear()
    assert cache.get(b"a", 0) is None
    assert (len(cache), cache.nbytes) == (0, 0)


# ---------------------------------------------------------------- what it weighs


def test_a_hundred_thousand_operations_keep_the_account_right():
    """Against a list of (key, answer) in the order of use, which is what the cache is to be."""
    chance = random.Random(4)
    answers = [make_answer(size=size) for size in (4, 24, 400, 2000, 9000)]
    bound = 12_000
    cache = make_cache(bound, max_age_seconds=30)
    expected: dict[bytes, tuple[Answer, int]] = {}
    now = evicted = 0
    for step in range(100_000):
        now += chance.randrange(SECOND)
        key = bytes([chance.randrange(24)])
        action = chance.random()
        if action < 0.55:
            found = expected.get(key)
            if found is not None and now - found[1] > 30 * SECOND:
                del expected[key]
                evicted += 1
                found = None
            elif found is not None:
                expected[key] = expected.pop(key)
            assert cache.get(key, now) is (found[0] if found is not None else None)
        elif action < 0.9999:
            answer = chance.choice(answers)
            fresh = Answer(answer.table, answer.memory, answer.nbytes)
            expected.pop(key, None)
            while sum(each.nbytes for each, _ in expected.values()) + fresh.nbytes > bound:
                del expected[next(iter(expected))]
                evicted += 1
            expected[key] = (fresh, now)
            cache.put(key, fresh, now)
        else:
            expected.clear()
            cache.clear()
        assert 0 <= cache.nbytes <= bound
        assert cache.nbytes == sum(each.nbytes for each, _ in expected.values()), step
        assert len(cache) == len(expected)
    assert cache._statistics.cache_evictions == evicted
    assert evicted > 1000


@pytest.mark.parametrize("outputs", [["y"], ["label"], ["y", "label", "z"]])
@pytest.mark.parametrize("rows", [1, 8])
def test_an_answer_takes_no_more_memory_than_it_is_charged(outputs, rows):
    """Everything counted: keys, dictionaries, objects. It is charged no more than three times what it takes, either."""
    table, memory = slab(8, [[b"a" * row, b"b" * 40] for row in range(8)], range(24))
    plan = make_plan(None, SIGNATURE, heads(rows), outputs)
    cache = make_cache(1 << 30)
    tracemalloc.start()
    try:
        for number in range(3000):
            cache.put(number.to_bytes(32), Answer.copy(plan, table, memory, 8 - rows), number << 40)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= cache.nbytes <= 3 * taken


# ---------------------------------------------------------------- the manifest


def test_a_model_keeps_nothing_unless_it_says_so():
    assert Manifest(name="m", artifacts=[{"path": "1/m.onnx", "format": "onnx"}]).cache.max_bytes == 0


def test_a_model_with_sequences_cannot_have_one():
    """Its answers depend on the requests before."""
    sequence = {"state": [{"input": "in", "output": "out"}]}
    whole = {"name": "m", "artifacts": [{"path": "1/m.onnx", "format": "onnx"}], "sequence": sequence}
    Manifest.model_validate(whole)
    with pytest.raises(ValidationError, match="sequence does not go with cache"):
        Manifest.model_validate(whole | {"cache": {"max_bytes": 1}})


@pytest.mark.parametrize(
    "section", [{"max_bytes": -1}, {"max_bytes": 1 << 40}, {"max_age_seconds": -1}, {"max_request_bytes": -1}, {"x": 1}]
)
def test_what_a_cache_cannot_be_is_refused(section):
    with pytest.raises(ValidationError):
        CacheSection(**section)
