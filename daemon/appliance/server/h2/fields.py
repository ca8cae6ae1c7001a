"""Header fields: HPACK (RFC 7541) with a memory, and the rules for a request's fields (RFC 9113, section 8)."""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from appliance.server.h2.frames import Code, ConnectionBroken

Fields = list[tuple[bytes, bytes]]
T = TypeVar("T")

#: Bytes of a header block as sent, and of its fields as HPACK counts them.
MAX_BLOCK_BYTES: Final = 16384

#: Blocks remembered per connection; all are dropped when there are more.
_MAX_KNOWN: Final = 64
#: Only short blocks are remembered: those a client repeats consist of indices.
_MAX_KNOWN_BYTES: Final = 512

_STATIC_NAMES: Final = {b":status": 8, b"content-type": 31, b"allow": 22}
_OF_THE_CONNECTION: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_REQUEST_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_UPPER: Final = frozenset(range(ord("A"), ord("Z") + 1))


class _WatchedTable(HeaderTable):
    """A dynamic table that counts its changes."""

    def __init__(self) -> None:
        self.changes = 0
        super().__init__()

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, newmax: int) -> None:
        self.changes += 1
        HeaderTable.maxsize.fset(self, newmax)  # type: ignore[attr-defined]


class FieldBlocks(Generic[T]):
    """Decodes the header blocks of one connection.

    Clients repeat the same few blocks, made of indices into the dynamic table. As long as the table does not change,
    equal blocks mean equal fields, so what a block meant is found again by its bytes.

    Args:
        interpret: What a block's fields mean; called once for a block that is remembered.
    """

    def __init__(self, interpret: Callable[[Fields], T]) -> None:
        self._interpret = interpret
        self._decoder = Decoder(max_header_list_size=MAX_BLOCK_BYTES)
        self._table = _WatchedTable()
        self._decoder.header_table = self._table
        self._known: dict[bytes, T] = {}

    def read(self, block: bytes) -> T:
        """What the block means.

        Raises:
            ConnectionBroken: It cannot be decoded, or is too large.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        changes = self._table.changes
        meaning = self._interpret(self.decode(block))
        if self._table.changes != changes:
            self._known.clear()
        elif len(block) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[block] = meaning
        return meaning

    def decode(self, block: bytes) -> Fields:
        """The fields of a block.

        Raises:
            ConnectionBroken: It cannot be decoded, or is too large.
        """
        changes = self._table.changes
        try:
            return [(bytes(field[0]), bytes(field[1])) for field in self._decoder.decode(block, raw=True)]
        except (HPACKError, IndexError, ValueError) as error:
            raise ConnectionBroken(Code.COMPRESSION_ERROR, "cannot decode the header block") from error
        finally:
            if self._table.changes != changes:
                self._known.clear()


def request_is_wellformed(fields: Fields) -> bool:
    """Whether fields may be a request's: names in lower case, pseudo-header fields first, once, and complete."""
    pseudo: set[bytes] = set()
    is_regular = False
    for name, value in fields:
        if not name or not _UPPER.isdisjoint(name):
            return False
        if name.startswith(b":"):
            if is_regular or name in pseudo or name not in _REQUEST_PSEUDO:
                return False
            pseudo.add(name)
        else:
            is_regular = True
            if name in _OF_THE_CONNECTION or (name == b"te" and value != b"trailers"):
                return False
        if b"\0" in value or b"\r" in value or b"\n" in value:
            return False
    return {b":method", b":scheme", b":path"} <= pseudo


def encode_fields(*fields: tuple[bytes, bytes]) -> bytes:
    """Fields as literals that leave every table alone, so that the block is good for any connection at any time."""
    return b"".join(_encode_field(name, value) for name, value in fields)


def _encode_field(name: bytes, value: bytes) -> bytes:
    if (name, value) == (b":status", b"200"):
        return b"\x88"
    index = _STATIC_NAMES.get(name)
    named = _integer(0, 4, index) if index is not None else b"\0" + _integer(0, 7, len(name)) + name
    return named + _integer(0, 7, len(value)) + value


def _integer(first: int, prefix_bits: int, value: int) -> bytes:
    """RFC 7541, section 5.1."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((first | value,))
    parts = bytearray((first | limit,))
    value -= limit
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
