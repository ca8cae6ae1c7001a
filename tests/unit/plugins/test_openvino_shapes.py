"""Compilations for single shapes: made in the background where they pay, few, and never waited for."""

import threading
import time

import pytest

from appliance_plugins.openvino.shapes import ShapeCompilations

ONE, TWO, THREE = ((1, 8),), ((2, 8),), ((3, 8),)


class Compiler:
    """Compiles in no time, or when told to; a shape with a negative size cannot be compiled."""

    def __init__(self):
        self.calls = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, shapes):
        self.calls.append(shapes)
        self.threads.add(threading.get_ident())
        assert self.gate.wait(10)
        if shapes[0][0] < 0:
            raise RuntimeError("no such shape")
        return f"for {shapes[0]}"


@pytest.fixture
def compiler():
    compiler = Compiler()
    yield compiler
    compiler.gate.set()


def settle(compilations, shapes, seconds=1.0):
    """Run `shapes` until nothing more is to come."""
    deadline = time.monotonic() + 10
    while True:
        found = compilations.find(shapes)
        if compilations.is_settled:
            return compilations.find(shapes)
        compilations.spend(shapes, seconds if found is None else 0.0)
        assert time.monotonic() < deadline, "it settles"
        time.sleep(0)


def test_a_shape_gets_its_own_once_it_took_four_times_what_compiling_takes(compiler):
    compilations = ShapeCompilations(compiler, 2, seconds=10.0)
    assert compilations.is_settled
    for _ in range(3):
        assert compilations.find(ONE) is None
        compilations.spend(ONE, 10.0)
        assert not compilations.is_settled
    assert compiler.calls == []
    compilations.spend(ONE, 10.0)
    assert settle(compilations, ONE) == "for (1, 8)"
    assert compiler.calls == [ONE]
    compilations.close()


def test_compiling_happens_in_another_thread_and_nobody_waits_for_it(compiler):
    compiler.gate.clear()
    compilations = ShapeCompilations(compiler, 2, seconds=0.0)
    compilations.find(ONE)
    compilations.spend(ONE, 1.0)
    assert compilations.find(ONE) is None
    assert not compilations.is_settled
    compilations.spend(TWO, 1.0)  # one at a time
    compiler.gate.set()
    assert settle(compilations, ONE) == "for (1, 8)"
    assert compiler.calls == [ONE]
    assert threading.get_ident() not in compiler.threads
    compilations.close()


def test_the_least_recently_used_goes(compiler):
    compilations = ShapeCompilations(compiler, 2, seconds=0.1)
    for shapes in (ONE, TWO):
        settle(compilations, shapes)
    compilations.find(ONE)
    settle(compilations, THREE)
    assert compilations.find(TWO) is None
    assert compilations.find(ONE) == "for (1, 8)"
    assert compilations.find(THREE) == "for (3, 8)"
    compilations.close()


def test_a_shape_that_cannot_be_compiled_is_tried_once_and_settled(compiler):
    compilations = ShapeCompilations(compiler, 2, seconds=0.1)
    assert settle(compilations, ((-1, 8),)) is None
    for _ in range(20):
        compilations.find(((-1, 8),))
        compilations.spend(((-1, 8),), 10.0)
    assert compiler.calls == [((-1, 8),)]
    assert settle(compilations, ONE) == "for (1, 8)"
    compilations.close()


def test_traffic_of_ever_new_shapes_compiles_nothing(compiler):
    compilations = ShapeCompilations(compiler, 2, seconds=1.0)
    for size in range(10_000):
        shapes = ((size, 8),)
        assert compilations.find(shapes) is None
        compilations.spend(shapes, 0.5)
    assert compiler.calls == []
    compilations.close()


def test_on_demand_it_compiles_in_the_callers_thread_and_raises_what_the_runtime_raises(compiler):
    compilations = ShapeCompilations(compiler, 1, seconds=0.0)
    assert compilations.compile_now(ONE) == "for (1, 8)"
    assert compilations.find(ONE) == "for (1, 8)"
    compilations.compile_now(TWO)
    assert compilations.find(ONE) is None
    with pytest.raises(RuntimeError, match="no such shape"):
        compilations.compile_now(((-1, 8),))
    assert compiler.threads == {threading.get_ident()}


def test_closing_waits_for_a_compilation_under_way(compiler):
    compiler.gate.clear()
    compilations = ShapeCompilations(compiler, 1, seconds=0.0)
    compilations.find(ONE)
    compilations.spend(ONE, 1.0)
    closing = threading.Thread(target=compilations.close)
    closing.start()
    compiler.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert compilations.find(ONE) is None
