"""Elements of BYTES tensors: each preceded by its length as a 4-byte little-endian number, as Triton has them."""

import struct
from collections.abc import Sequence

from appliance.errors import InvalidRequest
from appliance.types import Buffer

_LENGTH = struct.Struct("<I")


def join_elements(elements: Sequence[bytes]) -> bytes:
    """Elements as the content of a BYTES tensor."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def end_of_elements(content: Buffer, start: int, count: int, name: str) -> int:
    """Where the elements that begin at `start` end.

    Raises:
        InvalidRequest: `content` ends before the last of them.
    """
    size = len(content)
    unpack = _LENGTH.unpack_from
    for found in range(count):
        if size - start < 4:
            raise InvalidRequest(f"cannot read input {name!r}: its bytes end after {found} of {count} elements")
        start += 4 + unpack(content, start)[0]
    if start > size:
        raise InvalidRequest(f"cannot read input {name!r}: its last element runs past the end")
    return start


def check_elements(content: Buffer, count: int, name: str) -> None:
    """Check that `content` holds exactly `count` elements.

    Raises:
        InvalidRequest: It does not.
    """
    end = end_of_elements(content, 0, count, name)
    if end != len(content):
        raise InvalidRequest(f"cannot read input {name!r}: {len(content) - end} bytes follow its {count} elements")


def split_elements(content: Buffer, count: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor's content.

    Raises:
        InvalidRequest: It does not hold exactly `count` elements.
    """
    check_elements(content, count, name)
    elements = []
    position = 0
    for _ in range(count):
        length = _LENGTH.unpack_from(content, position)[0]
        elements.append(bytes(content[position + 4 : position + 4 + length]))
        position += 4 + length
    return elements
