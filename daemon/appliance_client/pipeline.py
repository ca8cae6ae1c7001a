"""Requests in flight on one connection, answered in any order and given in the order they were sent."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from appliance_client.connection import Connection
from appliance_client.errors import ApplianceError, InvalidRequest, several_answers
from appliance_client.retry import microseconds

if TYPE_CHECKING:
    from appliance_client.answer import Answer, Parameter
    from appliance_client.messages import Codec


class Pipeline:
    """A queue whose entries are requests on their way in and outcomes on their way out.

    Args:
        connection: Used by nobody else.
        codec: Encodes and decodes.
        timeout: Seconds each request may take.
    """

    def __init__(self, connection: Connection, codec: "Codec", timeout: float | None) -> None:
        self._connection = connection
        self._codec = codec
        self._timeout = timeout
        self._order: deque[tuple[int, float]] = deque()
        self._due: set[int] = set()
        self._done: dict[int, Answer | ApplianceError] = {}
        self._refused = 0

    def __len__(self) -> int:
        return len(self._order)

    def send(
        self,
        model: str,
        values: Mapping[str, Any],
        outputs: Sequence[str],
        version: str,
        parameters: "Mapping[str, Parameter] | None" = None,
    ) -> None:
        """Send one request; one that cannot be encoded takes its place in the order as an error.

        Raises:
            ApplianceError: What became of the connection.
        """
        deadline = self._connection.begin(self._timeout)
        try:
            request = self._codec.request(model, values, outputs, version, parameters)
            identifier = self._connection.send(self._codec, request, microseconds(self._timeout), deadline)
            self._due.add(identifier)
        except InvalidRequest as error:
            if self._connection.is_closed:
                raise
            self._refused -= 1  # ids on the wire are positive
            identifier = self._refused
            self._done[identifier] = error
        self._order.append((identifier, deadline))

    def is_ready(self) -> bool:
        """True where the oldest request has its outcome; receives what has come, and waits for nothing."""
        if not self._order:
            return False
        while self._order[0][0] not in self._done:
            received = self._connection.receive_if_any(self._codec, self._due)
            if received is None:
                return False
            self._settle(*received)
        return True

    def take(self) -> "Answer | ApplianceError":
        """The outcome of the oldest request, waiting for it.

        Raises:
            ApplianceError: What became of the connection.
        """
        identifier, deadline = self._order.popleft()
        while identifier not in self._done:
            self._settle(*self._connection.receive(self._codec, self._due, deadline))
        return self._done.pop(identifier)

    def _settle(self, identifier: int, outcome: "Answer | ApplianceError", has_more: bool) -> None:
        if has_more:
            raise several_answers()
        self._due.discard(identifier)
        self._done[identifier] = outcome
