"""What sequences keep from one request to the next, and what else their model is told of them.

A state is one array with a row for each seat, and a sequence has a seat for as long as it lives. For a batch the rows
of its sequences are copied together, and what the model makes of them is copied back when the batch is answered, so
that a run that fails changes nothing. Runs may go on at the same time in several threads: the front-end never has two
batches under way that hold steps of one sequence, so they touch different rows, and nothing needs a lock.
"""

from collections.abc import Container, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from appliance.errors import InvalidManifest, InvalidRequest
from appliance.types import TensorSpec
from appliance.wire.worker import RUN_HEADER, STEP, STEP_END, STEP_START
from appliance.worker.literals import tensor_of
from appliance.worker.tensors import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import SequenceSection, StateEntry
    from appliance.worker.model import ServedModel

_FLAGS: Final = frozenset({"FP32", "INT32", "BOOL"})
_IDS: Final = frozenset({"UINT64", "INT64", "UINT32", "INT32"})
_STEP: Final = np.dtype([("seat", "<u4"), ("flags", "<u4"), ("id", "<u8")])


class State(NamedTuple):
    """One state of a model.

    Attributes:
        input: The session input that takes it.
        output: The session output it is taken from.
        initial: What a sequence starts with, without the batch dimension.
        rows: What each seat keeps.
    """

    input: TensorSpec
    output: TensorSpec
    initial: "NDArray[Any]"
    rows: "NDArray[Any]"


class States:
    """The states of all sequences of one model.

    Attributes:
        inputs: Session inputs that are filled here.
        outputs: Session outputs that states are taken from.
    """

    def __init__(
        self,
        section: "SequenceSection",
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        max_batch_size: int,
    ) -> None:
        """Make room for the states; memory is taken when a seat is used first.

        Raises:
            InvalidManifest: The section does not fit the session; every problem is listed.
        """
        self.inputs = made_inputs(section)
        self.outputs = tuple(entry.output for entry in section.state)
        check_sequence(section, inputs, outputs, max_batch_size)
        takers = {spec.name: spec for spec in inputs}
        givers = {spec.name: spec for spec in outputs}
        self._is_batched = max_batch_size > 0
        self._is_direct = section.strategy == "direct"
        self._seats = section.max_sequences
        self._states = [
            _state(entry, takers[entry.input], givers[entry.output], self._seats, self._is_batched)
            for entry in section.state
        ]
        controls = section.controls
        self._controls = [
            (takers[name], tell)
            for name, tell in (
                (controls.start, _starts),
                (controls.end, _ends),
                (controls.ready, _ready),
                (controls.correlation_id, _ids),
            )
            if name
        ]
        self._is_taken = np.zeros(self._seats, dtype=np.bool_)  # seats that keep a state

    def split(self, packet: memoryview) -> "tuple[memoryview, NDArray[Any]]":
        """A RUN packet without its steps, and the steps, one for each row.

        Raises:
            ValueError: The packet is truncated, or names a seat that there is not, or twice.
        """
        if len(packet) < RUN_HEADER.size:
            raise ValueError("cannot run a batch: its packet is truncated")
        rows = RUN_HEADER.unpack_from(packet)[3]
        end = len(packet) - rows * STEP.size
        if rows < 1 or end < RUN_HEADER.size:
            raise ValueError(f"cannot run a batch: it has no steps for its {rows} rows")
        steps = np.frombuffer(packet[end:].tobytes(), dtype=_STEP)
        seats = steps["seat"].tolist()
        if max(seats) >= self._seats or len(set(seats)) != rows:
            raise ValueError(
                f"cannot run a batch: each of its steps must have one of the {self._seats} seats of its own"
            )
        return packet[:end], steps

    def complete(self, feeds: "Mapping[str, NDArray[Any]]", steps: "NDArray[Any]") -> "dict[str, NDArray[Any]]":
        """The feeds of a batch with states and controls.

        Raises:
            ValueError: A step goes on where nothing was kept.
        """
        seats = steps["seat"]
        starts = _starts(steps)
        if not (starts | self._is_taken[seats]).all():
            raise ValueError("cannot run a batch: it goes on with a sequence that nothing was kept of")
        complete = dict(feeds)
        for state in self._states:
            rows = state.rows[seats]
            rows[starts] = state.initial
            complete[state.input.name] = rows if self._is_batched else rows[0]
        for spec, tell in self._controls:
            values = tell(steps).astype(DTYPES[spec.datatype])
            complete[spec.name] = values.reshape((len(steps), *spec.shape[1:]) if self._is_batched else spec.shape)
        return complete

    def spread(self, feeds: "Mapping[str, NDArray[Any]]", steps: "NDArray[Any]") -> "Mapping[str, NDArray[Any]]":
        """Where every sequence has a row of its own, the feeds with each row there, and zeros in those between."""
        if not self._is_direct:
            return feeds
        seats = steps["seat"]
        height = int(seats.max()) + 1
        spread = {}
        for name, array in feeds.items():
            nothing: Any = b"" if array.dtype == object else 0
            spread[name] = np.full((height, *array.shape[1:]), nothing, dtype=array.dtype)
            spread[name][seats] = array
        return spread

    def gather(self, results: "Mapping[str, NDArray[Any]]", steps: "NDArray[Any]") -> "Mapping[str, NDArray[Any]]":
        """The rows that hold a step, of what a session gave for feeds that were `spread`."""
        if not self._is_direct:
            return results
        seats = steps["seat"]
        height = int(seats.max()) + 1
        # An array of another height breaks the session's contract; whoever checks it shall see it as it is.
        return {
            name: array[seats] if array.ndim and array.shape[0] == height else array for name, array in results.items()
        }

    def check(self, model: "ServedModel", results: "Mapping[str, NDArray[Any]]", rows: int) -> None:
        """See that the session gave every state.

        Raises:
            ContractBroken: One is missing, or of another datatype or shape than promised.
        """
        for state in self._states:
            model.check_output(state.output, results.get(state.output.name), rows)

    def keep(
        self, results: "Mapping[str, NDArray[Any]]", steps: "NDArray[Any]", failed: Container[int] | None = None
    ) -> None:
        """Keep the states that a run gave, which `check` has seen.

        Args:
            results: What the session gave, `gather` done.
            steps: The batch's.
            failed: Rows that failed, whose sequences stay as they were.
        """
        good: NDArray[Any] | slice = slice(None)
        if failed:
            good = np.array([row not in failed for row in range(len(steps))], dtype=np.bool_)
        seats = steps["seat"][good]
        for state in self._states:
            array = results[state.output.name]
            state.rows[seats] = array[good] if self._is_batched else array[np.newaxis][good]
        self._is_taken[seats] = ~_ends(steps)[good]


def _starts(steps: "NDArray[Any]") -> "NDArray[Any]":
    starts: NDArray[Any] = (steps["flags"] & STEP_START) != 0
    return starts


def _ends(steps: "NDArray[Any]") -> "NDArray[Any]":
    ends: NDArray[Any] = (steps["flags"] & STEP_END) != 0
    return ends


def _ready(steps: "NDArray[Any]") -> "NDArray[Any]":
    return np.ones(len(steps), dtype=np.bool_)


def _ids(steps: "NDArray[Any]") -> "NDArray[Any]":
    ids: NDArray[Any] = steps["id"]
    return ids


def made_inputs(section: "SequenceSection") -> frozenset[str]:
    """Session inputs that no client sends."""
    controls = section.controls
    names = (controls.start, controls.end, controls.ready, controls.correlation_id)
    return frozenset((*(entry.input for entry in section.state), *names)) - {""}


def first_step(section: "SequenceSection", inputs: Mapping[str, TensorSpec]) -> "dict[str, NDArray[Any]]":
    """What the inputs that no client sends hold in the first step of a sequence.

    Args:
        section: The manifest's.
        inputs: The session's by name, shapes of one row.
    """
    feeds = {entry.input: _initial(entry, inputs[entry.input]) for entry in section.state}
    controls = section.controls
    for name, value in ((controls.start, 1), (controls.end, 0), (controls.ready, 1), (controls.correlation_id, 1)):
        if name:
            feeds[name] = np.full(inputs[name].shape, value, dtype=DTYPES[inputs[name].datatype])
    return feeds


def _state(entry: "StateEntry", taker: TensorSpec, giver: TensorSpec, seats: int, is_batched: bool) -> State:
    one = TensorSpec(taker.name, taker.datatype, taker.shape[1:] if is_batched else taker.shape)
    try:
        return State(taker, giver, _initial(entry, one), np.zeros((seats, *one.shape), dtype=DTYPES[one.datatype]))
    except InvalidRequest as error:
        raise InvalidManifest(f"cannot start a sequence with 'initial' of state {entry.input!r}: {error}") from error
    except (MemoryError, ValueError) as error:
        nbytes = seats * prod(one.shape) * DTYPES[one.datatype].itemsize
        raise InvalidManifest(
            f"cannot keep state {entry.input!r} of {seats} sequences: they need {nbytes} bytes"
        ) from error


def _initial(entry: "StateEntry", spec: TensorSpec) -> "NDArray[Any]":
    """What a state begins with; `spec` is of one row.

    Raises:
        InvalidRequest: The manifest's numbers do not fit.
    """
    value = entry.initial
    if isinstance(value, list):
        return tensor_of(value, spec)
    if value == 0:  # of every datatype, BOOL too
        return np.zeros(spec.shape, dtype=DTYPES[spec.datatype])
    one = tensor_of(value, TensorSpec(spec.name, spec.datatype, ()))
    return np.full(spec.shape, one, dtype=one.dtype)


def check_sequence(
    section: "SequenceSection", inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch_size: int | None
) -> None:
    """Refuse a section that does not fit the session; `max_batch_size` is None while nobody knows it.

    Raises:
        InvalidManifest: With every problem.
    """
    takers = {spec.name: spec for spec in inputs}
    givers = {spec.name: spec for spec in outputs}
    skipped = 0 if max_batch_size == 0 else 1
    problems: list[str] = []
    for entry in section.state:
        taker, giver = takers.get(entry.input), givers.get(entry.output)
        if taker is None:
            problems.append(f"state input {entry.input!r} is not one of the model's: {', '.join(takers)}")
        if giver is None:
            problems.append(f"state output {entry.output!r} is not one of the model's: {', '.join(givers)}")
        if taker is not None and giver is not None:
            problems += _problems_of_state(taker, giver, skipped)
    controls = section.controls
    for word, name, datatypes in (
        ("start", controls.start, _FLAGS),
        ("end", controls.end, _FLAGS),
        ("ready", controls.ready, _FLAGS),
        ("correlation_id", controls.correlation_id, _IDS),
    ):
        if name:
            problems += _problems_of_control(word, name, takers, datatypes, skipped)
    if section.strategy == "direct" and max_batch_size is not None and section.max_sequences > max_batch_size:
        problems.append(
            f"with strategy 'direct' every sequence has a row of its own, so max_sequences ({section.max_sequences}) "
            f"must not exceed max_batch_size ({max_batch_size})"
        )
    if not takers.keys() - made_inputs(section):
        problems.append("no input is left that a client could send")
    if problems:
        raise InvalidManifest(f"cannot use the manifest's sequence section: {'; '.join(problems)}")


def _problems_of_state(taker: TensorSpec, giver: TensorSpec, skipped: int) -> list[str]:
    problems = []
    for spec in (taker, giver):
        if any(size < 0 for size in spec.shape[skipped:]):
            problems.append(
                f"state {spec.name!r} has shape {list(spec.shape)}, and but for the batch dimension all must be fixed: "
                "in the model, or by [[inputs]] and [[outputs]]"
            )
    if taker.datatype == "BYTES":
        problems.append(f"state {taker.name!r} must hold numbers, not BYTES")
    if (taker.datatype, taker.shape[skipped:]) != (giver.datatype, giver.shape[skipped:]):
        problems.append(
            f"state input {taker.name!r} is {taker.datatype} {list(taker.shape)} and its output {giver.name!r} is "
            f"{giver.datatype} {list(giver.shape)}"
        )
    return problems


def _problems_of_control(
    word: str, name: str, takers: Mapping[str, TensorSpec], datatypes: frozenset[str], skipped: int
) -> list[str]:
    spec = takers.get(name)
    if spec is None:
        return [f"control {word} {name!r} is not one of the model's inputs: {', '.join(takers)}"]
    problems = []
    if spec.datatype not in datatypes:
        problems.append(f"control {word} {name!r} is {spec.datatype} and must be one of {', '.join(sorted(datatypes))}")
    if any(size != 1 for size in spec.shape[skipped:]):
        problems.append(f"control {word} {name!r} has shape {list(spec.shape)} and must have one element a row")
    return problems
