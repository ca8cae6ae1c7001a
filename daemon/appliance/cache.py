"""Answers kept for requests that come again, bounded by bytes; those used longest ago go first.

A cache belongs to one instance and is emptied when its worker is replaced, so an answer is only ever given for the
artifact, the variant and the session that computed it. Keys are cryptographic digests: no client can make a request
that takes another's answer. The module knows no clock and no loop.
"""

import hashlib
from array import array
from collections import OrderedDict
from typing import Final, Self

from appliance.call import Call, OutputTable, Plan
from appliance.manifest import CacheSection
from appliance.metrics import ModelStatistics
from appliance.wire.worker import TensorLayout

#: Digests of request heads kept; all are dropped when there are more.
_MAX_HEADS: Final = 512
_DIGEST_BYTES: Final = 32
#: What an answer costs beside its tensors' bytes: key, places in dictionaries, the objects around it; and each output.
#: A test measures that no answer takes more than it is charged.
_ANSWER_BYTES: Final = 1200
_OUTPUT_BYTES: Final = 480
_DIMENSION_BYTES: Final = 48


class Answer:
    """The outputs of one request, in memory of their own; read as row 0 of `table`.

    Attributes:
        table: Where the outputs lie.
        memory: Their bytes.
        nbytes: What the answer is charged in the cache.
        kept_ns: When it was computed; set by the cache that keeps it.
    """

    __slots__ = ("kept_ns", "memory", "nbytes", "table")

    def __init__(self, table: OutputTable, memory: memoryview, nbytes: int) -> None:
        self.table = table
        self.memory = memory
        self.nbytes = nbytes
        self.kept_ns = 0

    @classmethod
    def copy(cls, plan: Plan, table: OutputTable, memory: memoryview, row: int) -> Self:
        """Take the outputs that `plan` wants out of a batch whose rows from `row` on are the request's."""
        rows = plan.rows
        parts: list[bytes | memoryview] = []
        tensors: dict[int, TensorLayout] = {}
        offset = 0
        nbytes = _ANSWER_BYTES
        for place in sorted(plan.outputs):
            shape, content = table.view(place, memory, row, rows)
            datatype = table.tensors[place].datatype
            size = len(content)
            if datatype == "BYTES":
                starts = table.starts(place, memory)[row : row + rows + 1]
                index = array("Q", [start - starts[0] for start in starts]).tobytes()
                parts.append(index)
                size += len(index)
            parts.append(content)
            tensors[place] = TensorLayout(place, datatype, shape, 0, offset, size)
            offset += size
            nbytes += _OUTPUT_BYTES + _DIMENSION_BYTES * len(shape)
        skip = 1 if table.is_batched else 0
        signature = tuple((layout.place, layout.datatype, layout.shape[skip:]) for layout in tensors.values())
        kept = OutputTable(signature, tensors, table.names, table.is_batched)
        return cls(kept, memoryview(b"".join(parts)), nbytes + offset)


class ResponseCache:
    """Answers by the digest of their requests.

    Attributes:
        nbytes: What the answers are charged together, at most the section's `max_bytes`.
    """

    def __init__(self, section: CacheSection, statistics: ModelStatistics) -> None:
        self._max_bytes = section.max_bytes
        self._max_age_ns = int(section.max_age_seconds * 1e9)
        self._statistics = statistics
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._heads: dict[tuple[object, ...], tuple[hashlib.blake2b, tuple[int, ...]]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, call: Call) -> bytes:
        """Digest of what `call` asks for: rows, outputs, datatypes, shapes and every byte of its tensors.

        Neither the order of its inputs nor that of its outputs matters. Its contents must not change any more.
        """
        plan = call.plan
        head = (plan.tensors, plan.rows, plan.outputs)
        kept = self._heads.get(head)
        if kept is None:
            order = tuple(sorted(range(len(plan.tensors)), key=lambda number: plan.tensors[number].place))
            shapes = [plan.tensors[number][:3] for number in order]
            begun = hashlib.blake2b(repr((plan.rows, sorted(plan.outputs), shapes)).encode(), digest_size=_DIGEST_BYTES)
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            kept = self._heads[head] = (begun, order)
        begun, order = kept
        digest = begun.copy()
        for number in order:
            content = call.contents[number]
            if plan.tensors[number].byte_length < 0:
                digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.digest()

    def get(self, key: bytes, now_ns: int) -> Answer | None:
        """The answer to a request, or None."""
        answer = self._answers.get(key)
        if answer is None:
            return None
        if self._max_age_ns and now_ns - answer.kept_ns > self._max_age_ns:
            self._drop(key)
            return None
        self._answers.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: Answer, now_ns: int) -> None:
        """Keep an answer, in the place of those used longest ago; one larger than the whole cache is not kept."""
        if key in self._answers:
            self.nbytes -= self._answers.pop(key).nbytes
        if answer.nbytes > self._max_bytes:
            return
        while self.nbytes + answer.nbytes > self._max_bytes:
            self._drop(next(iter(self._answers)))
        answer.kept_ns = now_ns
        self._answers[key] = answer
        self.nbytes += answer.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()
        self._heads.clear()
        self.nbytes = 0

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._answers.pop(key).nbytes
        self._statistics.cache_evictions += 1
