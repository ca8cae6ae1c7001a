"""Who sends requests: one account for each client, which fair shares and bounds go by.

On a Unix socket a client is a process of a user, however many connections it opens; over TCP, where nobody knows who it
is, every connection is one of its own.
"""

import logging
import pwd
from collections.abc import Callable, Mapping
from itertools import count

from appliance.config import ClientsSection
from appliance.errors import Overloaded
from appliance.types import Peer

_log = logging.getLogger("appliance.clients")


class Client:
    """One client's account.

    Attributes:
        name: For people: transport, user and process.
        weight: Its share where clients compete, beside others' 1.0.
        requests: Requests in flight, from admission until their memory is given back.
        bytes: Bytes of tensors they hold.
        connections: Open connections.
    """

    __slots__ = ("_max_bytes", "_max_requests", "bytes", "connections", "key", "name", "requests", "weight")

    def __init__(
        self,
        key: tuple[object, ...] = (),
        name: str = "",
        weight: float = 1.0,
        max_requests: int = 1 << 62,
        max_bytes: int = 1 << 62,
    ) -> None:
        self.key = key
        self.name = name
        self.weight = weight
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0
        self.connections = 0

    def take(self, nbytes: int) -> None:
        """Count a request of `nbytes` in.

        Raises:
            Overloaded: The client has as many requests or bytes in flight as it may.
        """
        if self.requests >= self._max_requests:
            raise Overloaded(
                f"cannot take the request: this client has {self.requests} in flight and the limit of a client is "
                f"{self._max_requests}"
            )
        if self.bytes + nbytes > self._max_bytes:
            raise Overloaded(
                f"cannot take the request: with its {nbytes} bytes this client would have more in flight than the "
                f"{self._max_bytes} that a client may"
            )
        self.requests += 1
        self.bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """A request of `nbytes` that was counted in is over."""
        self.requests -= 1
        self.bytes -= nbytes


#: Whose calls nobody else's are: those the daemon makes itself.
NOBODY = Client(name="the daemon")


class Clients:
    """All connected clients."""

    def __init__(self, section: ClientsSection, on_leave: Callable[[Client], None] = lambda client: None) -> None:
        """Begin with none; `on_leave` is told of each whose last connection is closed."""
        self._section = section
        self._on_leave = on_leave
        self._weights = _weights_by_uid(section.weights)
        self._clients: dict[tuple[object, ...], Client] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._clients)

    def enter(self, peer: Peer, connection: str = "") -> Client:
        """The account for a new connection.

        A process in another pid namespace has pid 0 for us, as all its like have, so each connection is one of its own.

        Args:
            peer: Who it is.
            connection: The connection's own name, such as the address of its other end, where `peer` has no uid.
        """
        if peer.uid is None:
            key: tuple[object, ...] = (peer.transport, connection)
            name = f"{peer.transport} {connection}"
        else:
            key = (peer.uid, peer.pid) if peer.pid else (peer.uid, 0, next(self._numbers))
            name = f"uid {peer.uid}, pid {peer.pid}"
        client = self._clients.get(key)
        if client is None:
            section = self._section
            weight = 1.0 if peer.uid is None else self._weights.get(peer.uid, 1.0)
            client = Client(key, name, weight, section.max_requests_in_flight, section.max_bytes_in_flight)
            self._clients[key] = client
        client.connections += 1
        return client

    def leave(self, client: Client) -> None:
        """A connection of `client` is closed; its last takes the account away."""
        client.connections -= 1
        if not client.connections:
            self._clients.pop(client.key, None)
            self._on_leave(client)


def _weights_by_uid(weights: Mapping[str, float]) -> dict[int, float]:
    """Weights by uid."""
    found = {}
    for name, weight in weights.items():
        if name.isdecimal():
            found[int(name)] = weight
        else:
            try:
                found[pwd.getpwnam(name).pw_uid] = weight
            except KeyError:
                _log.warning("[clients.weights] names the user %r, whom this machine does not know", name)
    return found
