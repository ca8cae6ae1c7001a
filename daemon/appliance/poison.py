"""Requests that crash workers, remembered by fingerprint, so that one client cannot keep a model down by retrying.

A request that was in flight when a worker died is a suspect and runs alone from then on; a suspect that crashes a
worker alone is refused. While there are no suspects, no request is fingerprinted.
"""

import hashlib
from collections import Counter, OrderedDict
from typing import Final, NamedTuple

from appliance.call import Call
from appliance.errors import InvalidRequest

_MAX_REMEMBERED: Final = 256
_REMEMBERED_NS: Final = 600_000_000_000
#: Bytes of each end of a tensor that a glance takes in.
_GLANCE_BYTES: Final = 64

#: Part of what a request holds: cheap to take, and enough to tell most requests from every suspect.
_Glance = tuple[object, ...]


class _Record(NamedTuple):
    """One suspect: how often it was in flight at a crash, when last, and how it looks at a glance."""

    crashes: int
    when_ns: int
    glance: _Glance


class Suspects:
    """Fingerprints of one model's requests that were in flight during crashes, forgotten after ten minutes."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self._glances: Counter[_Glance] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    @staticmethod
    def fingerprint(call: Call) -> bytes:
        """Digest of a call's head and tensors; its contents must still be there."""
        digest = hashlib.blake2b(repr(call.plan.signature).encode(), digest_size=16)
        for content in call.contents:
            digest.update(content)
        return digest.digest()

    @staticmethod
    def _glance(call: Call) -> _Glance:
        ends = ((len(part), bytes(part[:_GLANCE_BYTES]), bytes(part[-_GLANCE_BYTES:])) for part in call.contents)
        return (call.plan.signature, *ends)

    def _forget(self, fingerprint: bytes) -> None:
        record = self._records.pop(fingerprint)
        self._glances[record.glance] -= 1
        if not self._glances[record.glance]:
            del self._glances[record.glance]

    def blame(self, call: Call, was_alone: bool, now_ns: int) -> None:
        """`call` was in flight when a worker crashed; a second time, alone, condemns it."""
        fingerprint = self.fingerprint(call)
        is_known = fingerprint in self._records
        if is_known:
            self._forget(fingerprint)
        glance = self._glance(call)
        self._records[fingerprint] = _Record(2 if is_known and was_alone else 1, now_ns, glance)
        self._glances[glance] += 1
        while len(self._records) > _MAX_REMEMBERED:
            self._forget(next(iter(self._records)))

    def absolve(self, call: Call) -> None:
        """`call` was answered, so it is no suspect any more."""
        fingerprint = self.fingerprint(call)
        if fingerprint in self._records:
            self._forget(fingerprint)

    def judge(self, call: Call, now_ns: int) -> None:
        """Let an unsuspected call pass, make a suspect run alone, refuse a condemned one.

        Raises:
            InvalidRequest: The same request crashed a worker twice.
        """
        while self._records and now_ns - next(iter(self._records.values())).when_ns > _REMEMBERED_NS:
            self._forget(next(iter(self._records)))
        call.is_alone = False
        if self._glance(call) not in self._glances:
            return
        record = self._records.get(self.fingerprint(call))
        if record is not None and record.crashes >= 2:
            raise InvalidRequest("cannot run the request: the same input crashed the model's worker twice")
        call.is_alone = record is not None
