"""Whatever bytes a server sends, the client ends in an answer or an error of its own, and never beyond its bounds."""

import json
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from appliance_client import ProtocolError
from appliance_client.frames import BUFFER_BYTES, FrameReader
from appliance_client.messages import Codec
from appliance_client.wire import native

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "native.json").read_text())["vectors"]
FRAMES = [bytes.fromhex(vector["hex"]) for vector in VECTORS if vector["from"] == "server"]


def read_all(stream, chunks, limit=200_000):
    """Feed a reader in chunks of given sizes and take everything as a client would; gives what it took."""
    reader, codec, taken, position = FrameReader(limit), Codec(), [], 0
    while position < len(stream):
        space = reader.space()
        assert len(space) > 0
        count = min(len(space), next(chunks), len(stream) - position)
        space[:count] = stream[position : position + count]
        position += count
        reader.received(count)
        while (frame := reader.next()) is not None:
            assert len(frame.body) <= limit
            taken.append((frame.kind, frame.identifier, bytes(frame.body)))
            try:
                if frame.kind == native.RESULT:
                    codec.answer(frame.head, frame.body, frame.is_owned)
                elif frame.kind == native.ERROR:
                    native.unpack_error(frame.body)
                elif frame.kind == native.WELCOME:
                    native.unpack_welcome(frame.body)
            except ProtocolError:
                continue
    return taken


def sizes(generator, largest):
    while True:
        yield generator.randint(1, largest)


@pytest.mark.parametrize("largest", [1, 7, 100, BUFFER_BYTES * 2])
def test_however_a_stream_is_cut_the_same_frames_come_out(largest):
    generator = random.Random(largest)
    frames = [
        struct.pack("<IBBHQII", size, generator.choice([17, 19]), 0, 0, number, 0, 0) + generator.randbytes(size)
        for number, size in enumerate(
            [0, 1, 24, 3000, BUFFER_BYTES - 24, BUFFER_BYTES - 23, 65_512, 5, 150_000, 40_000, 0]
        )
    ]
    if largest == 1:
        frames = frames[:4]
    taken = read_all(b"".join(frames), sizes(generator, largest))
    assert [native.HEADER.pack(len(body), kind, 0, 0, number, 0, 0) + body for kind, number, body in taken] == frames


@pytest.mark.parametrize("seed", range(40))
def test_damaged_frames_raise_only_errors_of_the_library(seed):
    generator = random.Random(seed)
    for _ in range(50):
        stream = bytearray(b"".join(generator.choices(FRAMES, k=3)))
        for _ in range(generator.randint(1, 6)):
            stream[generator.randrange(len(stream))] = generator.randrange(256)
        if generator.random() < 0.3:
            del stream[generator.randrange(len(stream)) :]
        with suppress(ProtocolError):
            read_all(bytes(stream), sizes(generator, 200))


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_raise_only_errors_of_the_library(seed):
    generator = random.Random(seed)
    for _ in range(100):
        with suppress(ProtocolError):
            read_all(generator.randbytes(generator.randint(1, 500)), sizes(generator, 64))


@pytest.mark.parametrize("seed", range(20))
def test_random_heads_and_tails_raise_only_errors_of_the_library(seed):
    generator = random.Random(seed)
    original = next(frame for frame in FRAMES if frame[4] == native.RESULT)[native.HEADER.size :]
    for _ in range(200):
        body = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            body[generator.randrange(native.TIMINGS.size, len(body))] = generator.randrange(256)
        with suppress(ProtocolError):
            Codec().answer(generator.randint(0, len(body)), memoryview(bytes(body)), generator.random() < 0.5)
