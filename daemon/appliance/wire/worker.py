"""Frames between the front-end and a worker, over an inherited ``SOCK_SEQPACKET`` pair.

Every packet starts with one byte, the `Kind`. Packets that happen once per load carry a protobuf message of
`worker_pb2` after it. Packets of the request path are fixed little-endian structs:

RUN (front-end to worker)::

    RUN_HEADER   kind u8, slot u8, tensors u16, rows u32, batch u64, wanted u64
    TENSOR       x tensors, each followed by ndim x i64 dimensions

``wanted`` has bit i set where output i of the model is asked for (bit 63 stands for every output from 63 on).

Of a model with sequences one step for each row follows the tensors, in the order of the rows::

    STEP         x rows: seat u32, flags u32, id u64

``seat`` is where the worker keeps the state of the row's sequence: a number below the manifest's ``max_sequences``,
another one for every row of a batch, and for every batch that runs. ``flags`` holds `STEP_START` where the state is to
begin anew and `STEP_END` where it is not needed after the run. ``id`` is what the model is told as the correlation id.
States move when a batch is answered with DONE, those of rows with an error excepted; FAULT leaves all as they were.

DONE (worker to front-end)::

    DONE_HEADER  kind u8, slot u8, tensors u16, row_errors u32, batch u64,
                 decode u64, copy_in u64, compute u64, postprocess u64, copy_out u64      (nanoseconds)
    TENSOR       x tensors, each followed by ndim x i64 dimensions
    ROW_ERROR    x row_errors: row u32, length u32, then that many bytes of UTF-8

FAULT (worker to front-end): FAULT_HEADER, then UTF-8 text; the whole batch failed, the worker lives. The header's third
field is `OUT_OF_MEMORY` where the device or the host had not enough memory for a batch of that size, else 0.

TENSOR: index u16, datatype u8, ndim u8, region u32, offset u64, byte length u64. ``region`` 0 is the slot's own slab
(the input slab in RUN, the output slab in DONE); any other number is a region named by an earlier MAP, or in DONE
`ATTACHED`: a memfd that came with the packet. An output of datatype BYTES is preceded by a table of (rows + 1) u64:
where each row's elements begin, counted from the end of the table, and the end of the last one; the table counts in
the byte length.

The layout, everything behind RUN_HEADER but the steps, repeats while the same shapes flow, so both ends may keep what
they derived from it, keyed on its bytes.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

MAX_PACKET_BYTES: Final = 131072
ATTACHED: Final = 0xFFFFFFFF

RUN_HEADER: Final = struct.Struct("<BBHIQQ")
DONE_HEADER: Final = struct.Struct("<BBHIQQQQQQ")
FAULT_HEADER: Final = struct.Struct("<BBHIQ")
#: See FAULT.
OUT_OF_MEMORY: Final = 1
TENSOR: Final = struct.Struct("<HBBIQQ")
STEP: Final = struct.Struct("<IIQ")
STEP_START: Final = 1
STEP_END: Final = 2
#: Rows of a batch with steps at most, so that they fit into a packet.
MAX_STEPS: Final = 4096
ROW_ERROR: Final = struct.Struct("<II")
SLAB: Final = struct.Struct("<BBHIQQ")
REGION: Final = struct.Struct("<BBHIQ")

#: Datatype by its code on this socket, and back.
DATATYPES: Final = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
)  # fmt: skip
DATATYPE_CODE: Final = {name: code for code, name in enumerate(DATATYPES)}


class Kind(IntEnum):
    """First byte of every packet."""

    LOAD = 1  #: to worker: worker_pb2.Load
    LOADED = 2  #: from worker: worker_pb2.Loaded
    FAILED = 3  #: from worker: worker_pb2.Failed; the worker exits
    SLAB = 4  #: to worker: kind, slot, pad, pad, input bytes, output bytes; two memfds
    RUN = 5
    DONE = 6
    FAULT = 7
    MAP = 8  #: to worker: kind, pad, pad, region, bytes; one memfd
    UNMAP = 9  #: to worker: kind, pad, pad, region, 0
    PING = 10  #: to worker: one byte
    PONG = 11  #: from worker: one byte


class TensorLayout(NamedTuple):
    """Where one tensor of a batch lies."""

    place: int
    datatype: str
    shape: tuple[int, ...]
    region: int
    offset: int
    byte_length: int


def pack_layout(tensors: Sequence[TensorLayout]) -> bytes:
    """The bytes behind RUN_HEADER or DONE_HEADER for `tensors`."""
    parts = []
    for index, datatype, shape, region, offset, byte_length in tensors:
        parts.append(TENSOR.pack(index, DATATYPE_CODE[datatype], len(shape), region, offset, byte_length))
        parts.append(struct.pack(f"<{len(shape)}q", *shape))
    return b"".join(parts)


def unpack_layout(packet: bytes | memoryview, start: int, count: int) -> tuple[list[TensorLayout], int]:
    """Read `count` tensors from `packet` at `start`; returns them and the offset behind them.

    Raises:
        ValueError: The packet is shorter than it says, or names an unknown datatype.
    """
    tensors = []
    try:
        for _ in range(count):
            index, code, ndim, region, offset, byte_length = TENSOR.unpack_from(packet, start)
            start += TENSOR.size
            shape = struct.unpack_from(f"<{ndim}q", packet, start)
            start += 8 * ndim
            tensors.append(TensorLayout(index, DATATYPES[code], shape, region, offset, byte_length))
    except (struct.error, IndexError) as error:
        raise ValueError(
            "cannot read the packet: its tensor table is truncated or names an unknown datatype"
        ) from error
    return tensors, start
