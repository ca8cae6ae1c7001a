"""Bytes that requests may hold before they are admitted, all connections of a transport together."""

from appliance.errors import Overloaded


class BodyBudget:
    """Bytes of request bodies that all connections together may hold; taken as they arrive, without waiting."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._taken = 0

    def take(self, count: int) -> None:
        """Take `count` bytes.

        Raises:
            Overloaded: Too many bytes are held already.
        """
        if self._taken + count > self._limit:
            raise Overloaded(f"cannot take the request: bodies of all requests may hold {self._limit} bytes together")
        self._taken += count

    def give(self, count: int) -> None:
        """Give back what was taken."""
        self._taken -= count
