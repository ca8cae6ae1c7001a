"""Requests that crash workers, remembered by fingerprint, so that one client cannot keep a model down by retrying.

A request that was in flight when a worker died is a suspect and runs alone from then on; a suspect that crashes a
worker alone is refused. While there are no suspects, no request is fingerprinted.
"""

import hashlib
from collections import OrderedDict
from typing import Final

from appliance.call import Call
from appliance.errors import InvalidRequest

_MAX_REMEMBERED: Final = 256
_REMEMBERED_NS: Final = 600_000_000_000


class Suspects:
    """Fingerprints of one model's requests that were in flight during crashes, forgotten after ten minutes."""

    def __init__(self) -> None:
        self._crashes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._crashes)

    @staticmethod
    def fingerprint(call: Call) -> bytes:
        """Digest of a call's head and tensors; its contents must still be there."""
        digest = hashlib.blake2b(repr(call.plan.signature).encode(), digest_size=16)
        for content in call.contents:
            digest.update(content)
        return digest.digest()

    def blame(self, call: Call, was_alone: bool, now_ns: int) -> None:
        """`call` was in flight when a worker crashed; a second time, alone, condemns it."""
        fingerprint = self.fingerprint(call)
        known = self._crashes.pop(fingerprint, (0, 0))[0]
        self._crashes[fingerprint] = (2 if known and was_alone else 1, now_ns)
        while len(self._crashes) > _MAX_REMEMBERED:
            self._crashes.popitem(last=False)

    def absolve(self, call: Call) -> None:
        """`call` was answered, so it is no suspect any more."""
        self._crashes.pop(self.fingerprint(call), None)

    def judge(self, call: Call, now_ns: int) -> None:
        """Let an unsuspected call pass, make a suspect run alone, refuse a condemned one.

        Raises:
            InvalidRequest: The same request crashed a worker twice.
        """
        while self._crashes and now_ns - next(iter(self._crashes.values()))[1] > _REMEMBERED_NS:
            self._crashes.popitem(last=False)
        crashes = self._crashes.get(self.fingerprint(call), (0, 0))[0]
        if crashes >= 2:
            raise InvalidRequest("cannot run the request: the same input crashed the model's worker twice")
        call.is_alone = crashes == 1
