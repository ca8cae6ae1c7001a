"""What a connection asks of those who use it."""

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from appliance.server.h2.fields import Fields
from appliance.server.h2.stream import Stream
from appliance.types import Buffer

if TYPE_CHECKING:
    from appliance.server.h2.connection import Connection


class Application(Protocol):
    """What answers the streams of one connection."""

    def interpret(self, fields: Fields) -> Any:
        """What a request's fields mean; the result may be used for later requests too. None if they are malformed."""
        ...

    def opened(self, stream: Stream) -> None:
        """A request began; where ``stream.is_received``, it has no content."""
        ...

    def received(self, stream: Stream, content: Buffer) -> None:
        """Content came; ``stream.is_received`` tells whether it was the last."""
        ...

    def withdrawn(self, stream: Stream) -> None:
        """The client gave the stream up, or broke a rule on it; it is closed."""
        ...

    def lost(self) -> None:
        """The connection is gone, and all its streams with it."""
        ...


class Lobby(Protocol):
    """What a connection needs of the server that accepted it."""

    max_streams: int
    max_unsent_bytes: int

    def admit(self, connection: "Connection", transport: asyncio.Transport) -> Application | None:
        """Who answers on a new connection; None closes it."""
        ...

    def left(self, connection: "Connection") -> None:
        """A connection that was admitted is gone."""
        ...
