"""The HTTP/2 server, frame by frame (numbers in names' comments are sections of RFC 9113)."""

import asyncio
import inspect
import random
import struct
import sys
from pathlib import Path

import pytest
from hpack import Decoder, Encoder

from appliance.errors import ModelNotFound
from appliance.server.h2 import frames
from appliance.server.h2.fields import MAX_BLOCK_BYTES, FieldBlocks, encode_fields
from appliance.server.h2.frames import Code
from appliance.server.h2.inflow import FIRST_WINDOW, Inflow
from appliance.server.h2.stream import Stream
from appliance.wire import open_inference_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.h2 import OIP, Client, data, goaway, message, turn

DEADLINE_S = 30
FLAGS_END = frames.END_HEADERS | frames.END_STREAM


def within(test):
    """Run a test that is a coroutine."""

    def run(**arguments):
        async def bounded():
            async with asyncio.timeout(DEADLINE_S):
                await test(**arguments)

        asyncio.run(bounded())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = inspect.signature(test)
    return run


def body(model="echo", content=b"1234", **options):
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[content], **options)
    request.inputs.add(name="x", datatype="UINT8", shape=(len(content),))
    return request.SerializeToString()


def answer_of(client, answer):
    """The parsed message of a whole answer: HEADERS, DATA, HEADERS with END_STREAM."""
    first, *contents, last = answer
    assert client.fields(first)[":status"] == "200"
    assert client.fields(last)["grpc-status"] == "0"
    assert last.flags == FLAGS_END
    content = b"".join(frame.payload for frame in contents)
    assert {frame.kind for frame in contents} == {frames.DATA}
    flag, length = struct.unpack_from(">BI", content)
    assert (flag, length) == (0, len(content) - 5)
    return pb.ModelInferResponse.FromString(content[5:])


async def still_serves(client, stream):
    client.read()
    client.send(client.call(stream, body()))
    await turn()
    assert answer_of(client, client.read()).raw_output_contents[0] == b"1234"


async def ends_connection(client, code, *parts):
    client.read()
    client.send(*parts)
    last = client.read()[-1]
    assert goaway(last)[1] is code
    assert client.transport.is_closed


async def ends_stream(client, stream, code, *parts):
    client.read()
    client.send(*parts)
    (reset,) = [frame for frame in client.read() if frame.kind == frames.RST_STREAM]
    assert (reset.stream, reset.payload) == (stream, struct.pack(">I", code))
    assert not client.transport.is_closed


# ------------------------------------------------------------------ 3.4 the preface


@within
async def test_the_server_announces_its_limits_and_a_wide_window_and_acknowledges():
    client = Client(limits={"max_requests_in_flight": 7})
    settings, window, ack = client.greeting
    announced = dict(frames.SETTING.iter_unpack(settings.payload))
    assert announced == {
        frames.MAX_CONCURRENT_STREAMS: 7, frames.INITIAL_WINDOW_SIZE: FIRST_WINDOW,
        frames.MAX_FRAME_SIZE: 1 << 20, frames.MAX_HEADER_LIST_SIZE: MAX_BLOCK_BYTES,
    }  # fmt: skip
    assert (window.kind, window.stream) == (frames.WINDOW_UPDATE, 0)
    assert (ack.kind, ack.flags) == (frames.SETTINGS, frames.ACK)


@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3", bytes(30), b"PRI * HTTP/2.0\r\n\r\nSX"]
)
@within
async def test_who_does_not_speak_http2_is_hung_up_on(opening):
    client = Client(greet=False)
    client.send(opening)
    assert client.transport.is_aborted


@within
async def test_everything_may_come_byte_by_byte():
    client = Client(greet=False)
    for byte in frames.PREFACE + frames.settings({}) + client.call(1, body()):
        client.send(bytes((byte,)))
    await turn()
    assert answer_of(client, client.read()[3:]).raw_output_contents[0] == b"1234"


@pytest.mark.parametrize(
    "first", [frames.frame(frames.PING, 0, 0, bytes(8)), frames.frame(frames.SETTINGS, frames.ACK, 0, b"")]
)
@within
async def test_the_first_frame_must_be_settings(first):
    client = Client(greet=False)
    await ends_connection(client, Code.PROTOCOL_ERROR, frames.PREFACE, first)


@pytest.mark.parametrize(
    "owed",
    [
        b"", frames.PREFACE[:10], frames.PREFACE, frames.PREFACE + b"\0\0",
        frames.PREFACE + frames.settings({}) + b"\0\0\x08\6",
        frames.PREFACE + frames.settings({}) + frames.frame(frames.HEADERS, 0, 1, b""),
        frames.PREFACE + frames.settings({}) + frames.HEADER.pack(1, 0, 0x55, 0, 0) + b"part",
    ],
)  # fmt: skip
@within
async def test_a_handshake_a_frame_or_a_header_block_that_stays_incomplete_ends_the_connection(owed):
    client = Client(greet=False)
    client.send(owed)
    now = asyncio.get_running_loop().time()
    client.connection.sweep(now + 9, 10)
    assert not client.transport.is_closed
    client.connection.sweep(now + 11, 10)
    assert client.transport.is_aborted


@within
async def test_a_client_that_owes_nothing_may_stay():
    client = Client()
    client.send(client.headers(1) + data(1, b"\0"))  # a message may take its time
    client.connection.sweep(asyncio.get_running_loop().time() + 1000, 10)
    assert not client.transport.is_closed


# ------------------------------------------------------------------ calls


@within
async def test_calls_are_answered_in_one_write_and_their_streams_forgotten():
    client = Client()
    client.send(client.call(1, body(id="a")), client.call(3, body(content=b"xyz")))
    await turn()
    answers = client.read()
    assert answer_of(client, answers[:3]).id == "a"
    assert answer_of(client, answers[3:]).raw_output_contents[0] == b"xyz"
    assert client.connection.streams == {}


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
@within
async def test_a_message_may_come_in_many_frames_with_padding_and_an_empty_last(size):
    client = Client()
    content = message(body(content=b"abcd" * 20))
    client.send(client.headers(1))
    for start in range(0, len(content), size):
        part = content[start : start + size]
        client.send(data(1, b"\x03" + part + bytes(3), frames.PADDED) if start % 2 else data(1, part))
    client.send(data(1, b"\0", frames.END_STREAM | frames.PADDED))
    await turn()
    assert answer_of(client, client.read()).raw_output_contents[0] == b"abcd" * 20


@within
async def test_trailers_of_the_client_end_its_side():
    client = Client()
    trailers = frames.frame(frames.HEADERS, FLAGS_END, 1, client.encoder.encode([("x", "y")]))
    client.send(client.headers(1) + data(1, message(body())) + trailers)
    await turn()
    assert answer_of(client, client.read()).raw_output_contents[0] == b"1234"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({":method": "GET"}, "405"), ({"content-type": "text/plain"}, "415"), ({"content-type": None}, "415"),
        ({"content-type": "application/grpc+json"}, "415"),
    ],
)  # fmt: skip
@within
async def test_what_is_not_grpc_gets_an_http_status(changes, status):
    client = Client()
    client.send(client.headers(1, FLAGS_END, **changes))
    (answer,) = client.read()
    assert client.fields(answer)[":status"] == status
    await still_serves(client, 3)


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc;charset=x"])
@within
async def test_content_types_of_grpc(content_type):
    client = Client()
    client.send(client.call(1, body(), **{"content-type": content_type}))
    await turn()
    assert answer_of(client, client.read())


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({":path": OIP + "Nope"}, 12), ({":path": "/other.Service/ModelInfer"}, 12), ({":path": "*"}, 12),
        ({"grpc-timeout": "5"}, 13), ({"grpc-timeout": "123456789S"}, 13), ({"grpc-encoding": "snappy"}, 12),
    ],
)  # fmt: skip
@within
async def test_headers_that_cannot_be_served(changes, status):
    client = Client()
    client.send(client.call(1, body(), **changes))
    answer, *reset = client.read()
    assert client.fields(answer)["grpc-status"] == str(status)
    assert client.fields(answer)["grpc-accept-encoding"] == "identity,deflate,gzip"
    assert [frame.kind for frame in reset] == [frames.RST_STREAM]  # it was answered before its message came
    await still_serves(client, 3)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 12), (b"\0\0", 12), (message(body())[:-1], 12), (message(body()) * 2, 12), (b"\2\0\0\0\0", 13),
        (message(body(), is_compressed=True), 13), (b"\0\x7f\xff\xff\xff", 8), (message(b""), 5), (message(b"\xff"), 3),
    ],
)  # fmt: skip
@within
async def test_messages_that_cannot_be_taken(content, status):
    client = Client()

    def refuse(*head):
        raise ModelNotFound("cannot find it")

    client.engine.plan = refuse
    client.send(client.headers(1) + data(1, content, frames.END_STREAM))
    while not (answer := client.read()):  # noqa: ASYNC110 decompression has a thread, which tells nobody
        await asyncio.sleep(0)
    assert client.fields(answer[-1])["grpc-status"] == str(status)
    assert client.connection.streams == {}
    assert client.server.budget._taken == 0


@pytest.mark.parametrize("timeout", ["1H", "1M", "1S", "1000m", "100000u", "99999999n"])
@within
async def test_every_unit_of_a_timeout(timeout):
    client = Client()
    client.send(client.call(1, body("hang"), grpc_timeout=timeout))
    (made,) = client.engine.requests
    unit = {"H": 3600e6, "M": 60e6, "S": 1e6, "m": 1e3, "u": 1, "n": 1e-3}[timeout[-1]]
    assert 0 < made.timeout_us <= int(timeout[:-1]) * unit
    client.engine.release.set()
    await turn()


@within
async def test_an_error_message_is_percent_encoded_and_bounded():
    client = Client()
    client.send(client.call(1, body("conflict")))
    (answer,) = client.read()
    fields = client.fields(answer)
    assert fields["grpc-status"] == "10"
    assert fields["appliance-kind"] == "conflict"
    assert fields["grpc-message"].startswith("cannot do it: conflict %0A%1B%E2%98%83xxx")
    assert len(answer.payload) < 8192


# ------------------------------------------------------------------ 5.1, 6.1 streams


@within
async def test_stream_numbers_are_odd_and_grow():
    await ends_connection(Client(), Code.PROTOCOL_ERROR, Client().headers(2))
    await ends_connection(Client(), Code.PROTOCOL_ERROR, Client().headers(0))
    client = Client()
    client.send(client.call(5, body()))
    await turn()
    await ends_connection(client, Code.STREAM_CLOSED, client.headers(3))
    client = Client()
    client.send(client.call(1, body()))
    await turn()
    await ends_connection(client, Code.STREAM_CLOSED, client.headers(1))


@pytest.mark.parametrize(
    "frame",
    [data(1, b"x"), frames.rst_stream(1, Code.CANCEL), frames.window_update(1, 1), data(2, b"x"), data(0, b"x")],
)
@within
async def test_frames_for_idle_streams_end_the_connection(frame):
    await ends_connection(Client(), Code.PROTOCOL_ERROR, frame)


@within
async def test_frames_behind_the_end_of_a_stream():
    client = Client()
    client.send(client.call(1, body("hang")))
    await ends_stream(client, 1, Code.STREAM_CLOSED, data(1, b"x"))
    assert client.engine.ended.get_nowait() == "hang"
    client.send(client.call(3, body()))
    await turn()
    client.send(frames.window_update(3, 5), frames.rst_stream(3, Code.CANCEL))  # may cross our answer
    assert not client.transport.is_closed
    await ends_connection(client, Code.STREAM_CLOSED, data(3, b"x"))


@within
async def test_what_a_client_had_already_sent_when_its_stream_was_refused_is_borne():
    client = Client()
    client.send(client.headers(1, method="Nope"))
    answer, reset = client.read()
    assert client.fields(answer)["grpc-status"] == "12"
    assert (reset.kind, reset.payload) == (frames.RST_STREAM, struct.pack(">I", Code.NO_ERROR))
    client.send(data(1, message(body())), data(1, b"", frames.END_STREAM), frames.rst_stream(1, Code.CANCEL))
    await still_serves(client, 3)


@within
async def test_streams_beyond_the_limit_are_refused_and_may_be_tried_again():
    client = Client(limits={"max_requests_in_flight": 2})
    client.send(client.call(1, body("hang")), client.call(3, body("hang")))
    await ends_stream(client, 5, Code.REFUSED_STREAM, client.call(5, body()))
    client.engine.release.set()
    await turn()
    await still_serves(client, 7)


@within
async def test_resetting_a_stream_withdraws_its_call():
    client = Client()
    client.send(client.call(1, body("hang")), client.headers(3, method="ModelStreamInfer"), client.headers(5))
    client.send(*(frames.rst_stream(number, Code.CANCEL) for number in (1, 3, 5)))
    assert client.engine.ended.get_nowait() == "hang"
    assert client.connection.streams == {}
    client.engine.release.set()
    await turn()
    assert client.read() == []


@within
async def test_losing_the_connection_withdraws_everything():
    client = Client()
    client.send(client.call(1, body("hang")), client.headers(3, method="ModelStreamInfer"), client.headers(5))
    client.send(data(3, message(body("hang"))), data(5, b"\0\0\0\1\0" + bytes(100)))
    await turn()
    client.close()
    await turn()
    assert client.engine.ended.qsize() == 2
    assert client.server.budget._taken == 0
    assert client.server._connections == {}


# ------------------------------------------------------------------ 4.2, 6 frames


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (frames.HEADER.pack(0x1000, 1, frames.DATA, 0, 1), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (frames.frame(frames.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.SETTINGS, 0, 1, b""), Code.PROTOCOL_ERROR),
        (frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        (frames.settings({frames.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
        (frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), Code.FLOW_CONTROL_ERROR),
        (frames.settings({frames.MAX_FRAME_SIZE: 16383}), Code.PROTOCOL_ERROR),
        (frames.settings({frames.MAX_FRAME_SIZE: 1 << 24}), Code.PROTOCOL_ERROR),
        (frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
        (frames.window_update(0, 0), Code.PROTOCOL_ERROR),
        (frames.window_update(0, frames.MAX_WINDOW), Code.FLOW_CONTROL_ERROR),
        (frames.frame(frames.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
        (frames.frame(frames.PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (frames.frame(frames.GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4)), Code.PROTOCOL_ERROR),
        (frames.frame(frames.CONTINUATION, 4, 1, b""), Code.PROTOCOL_ERROR),
        (frames.frame(frames.HEADERS, 4 | frames.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
        (frames.frame(frames.HEADERS, 4 | frames.PADDED, 1, b""), Code.FRAME_SIZE_ERROR),
        (frames.frame(frames.HEADERS, 4 | frames.WITH_PRIORITY, 1, b"abc"), Code.PROTOCOL_ERROR),
        (frames.frame(frames.HEADERS, 4, 1, b"\xff\xff\xff"), Code.COMPRESSION_ERROR),
        (frames.frame(frames.HEADERS, 4, 1, b"\x80"), Code.COMPRESSION_ERROR),
        (frames.frame(frames.HEADERS, 4, 1, b"\x40\x7f"), Code.COMPRESSION_ERROR),
        (frames.frame(frames.HEADERS, 4, 1, b"\x3f\xff\xff\x7f"), Code.COMPRESSION_ERROR),
        (frames.HEADER.pack(0x200, 0, frames.GOAWAY, 0, 0), Code.ENHANCE_YOUR_CALM),
    ],
)  # fmt: skip
@within
async def test_broken_frames_end_the_connection_with_their_code(frame, code):
    await ends_connection(Client(), code, frame)


@within
async def test_broken_padding_of_data():
    client = Client()
    client.send(client.headers(1))
    await ends_connection(client, Code.PROTOCOL_ERROR, data(1, b"\x04abc", frames.PADDED))


@within
async def test_frames_that_mean_nothing_here_are_ignored():
    client = Client()
    client.send(
        frames.frame(0x55, 0xFF, 3, bytes(100)),
        frames.frame(frames.PRIORITY, 0, 9, bytes(5)),
        frames.frame(frames.GOAWAY, 0, 0, bytes(20)),
        frames.settings({0x99: 1, frames.HEADER_TABLE_SIZE: 0, frames.ENABLE_PUSH: 0}),
        frames.HEADER.pack(0x800, 0, 0x56, 0, 0),
    )
    for _ in range(8):  # one large frame in parts
        client.send(bytes(0x10000))
    await still_serves(client, 1)


@within
async def test_a_ping_is_answered_with_its_bytes():
    client = Client()
    client.send(frames.frame(frames.PING, 0, 0, b"12345678"), frames.frame(frames.PING, frames.ACK, 0, bytes(8)))
    (pong,) = client.read()
    assert (pong.kind, pong.flags, pong.payload) == (frames.PING, frames.ACK, b"12345678")


# ------------------------------------------------------------------ 4.3, 8 header blocks


@within
async def test_a_block_may_be_padded_prioritised_and_continued():
    client = Client()
    block = client.block()
    first = b"\x02" + bytes(5) + block[:3] + bytes(2)
    client.send(
        frames.frame(frames.HEADERS, frames.PADDED | frames.WITH_PRIORITY, 1, first),
        frames.frame(frames.CONTINUATION, 0, 1, block[3:4]),
        frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[4:]),
        data(1, message(body()), frames.END_STREAM),
    )  # fmt: skip
    await turn()
    assert answer_of(client, client.read())


@within
async def test_nothing_may_come_between_the_parts_of_a_block():
    for frame in (frames.frame(frames.PING, 0, 0, bytes(8)), frames.frame(frames.CONTINUATION, 4, 3, b"")):
        client = Client()
        await ends_connection(client, Code.PROTOCOL_ERROR, frames.frame(frames.HEADERS, 0, 1, b"\x82"), frame)


@within
async def test_blocks_are_bounded_in_bytes_frames_and_fields():
    part = frames.frame(frames.CONTINUATION, 0, 1, bytes(8000))
    await ends_connection(Client(), Code.ENHANCE_YOUR_CALM, frames.frame(frames.HEADERS, 0, 1, b""), part * 3)
    empty = frames.frame(frames.CONTINUATION, 0, 1, b"")
    await ends_connection(Client(), Code.ENHANCE_YOUR_CALM, frames.frame(frames.HEADERS, 0, 1, b""), empty * 20)
    entry = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000  # 4000 bytes in the table, then one byte each time
    bomb = entry + b"\xbe" * 1000
    await ends_connection(Client(), Code.COMPRESSION_ERROR, frames.frame(frames.HEADERS, 4, 1, bomb))


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":scheme", "http")],
        [(":method", "POST"), (":path", "/"), ("x", "y"), (":scheme", "http")],
        [(":method", "POST"), (":path", "/"), (":path", "/"), (":scheme", "http")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":status", "200")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), ("Upper", "case")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), ("connection", "close")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), ("te", "gzip")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), ("x", "a\r\nb")],
        [(":method", "POST"), (":path", "/"), (":scheme", "http"), ("", "y")],
    ],
)  # fmt: skip
@within
async def test_malformed_requests_end_their_stream_only(fields):
    client = Client()
    block = client.encoder.encode(fields)
    await ends_stream(client, 1, Code.PROTOCOL_ERROR, frames.frame(frames.HEADERS, FLAGS_END, 1, block))
    await still_serves(client, 3)


@within
async def test_blocks_of_refused_and_malformed_requests_still_count_for_the_table():
    client = Client(limits={"max_requests_in_flight": 1})
    client.send(client.headers(1))
    client.send(client.headers(3, x_first="added to the table by a refused request"))
    client.send(client.headers(5, x_second="and again"))
    client.send(data(1, message(body()), frames.END_STREAM))
    await turn()
    client.read()
    client.send(client.call(7, body(), x_first="added to the table by a refused request", x_second="and again"))
    await turn()
    assert answer_of(client, client.read())


def test_a_repeated_block_is_decoded_once_until_the_table_changes():
    read = []
    blocks = FieldBlocks(lambda fields: read.append(dict(fields)) or len(read))
    encoder = Encoder()
    first = encoder.encode([("a", "1"), ("b", "2")])
    again = encoder.encode([("a", "1"), ("b", "2")])
    assert [blocks.read(first), blocks.read(again), blocks.read(again)] == [1, 2, 2]
    assert blocks.read(encoder.encode([("c", "3")])) == 3
    assert blocks.read(again) == 4  # the indices mean other fields now
    assert read[3] == {b"b": b"2", b"c": b"3"}
    encoder.header_table_size = 0
    blocks.read(encoder.encode([]))
    with pytest.raises(frames.ConnectionBroken):
        blocks.read(again)


def test_encoded_fields_mean_the_same_to_every_decoder():
    fields = ((b":status", b"200"), (b"content-type", b"x" * 500), (b"y" * 300, b""), (b"grpc-status", b"0"))
    decoder = Decoder()
    for _ in range(2):
        assert tuple(decoder.decode(encode_fields(*fields), raw=True)) == fields


# ------------------------------------------------------------------ 5.2, 6.9 flow control


@within
async def test_an_answer_beyond_the_windows_is_sent_as_they_open():
    client = Client()
    content = bytes(range(256)) * 1000
    client.send(client.call(1, body(content=content)))
    await turn()
    got = client.read()
    assert sum(len(frame.payload) for frame in got if frame.kind == frames.DATA) == 65535
    assert all(len(frame.payload) <= 16384 for frame in got)
    client.send(frames.window_update(1, 1 << 20))
    assert client.read() == []  # the connection's window is closed still
    client.send(frames.window_update(0, 100))
    got += client.read()
    assert len(got[-1].payload) == 100
    client.send(frames.settings({frames.MAX_FRAME_SIZE: 65536}), frames.window_update(0, 1 << 20))
    got += [frame for frame in client.read() if frame.kind != frames.SETTINGS]
    assert len(got[-3].payload) == 65536
    assert answer_of(client, got).raw_output_contents[0] == content


@within
async def test_a_changed_initial_window_counts_for_open_streams_and_may_make_windows_negative():
    client = Client(settings=frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 10))
    client.send(client.call(1, body("hang", bytes(1000))))
    client.engine.release.set()
    await turn()
    got = client.read()
    assert sum(len(frame.payload) for frame in got if frame.kind == frames.DATA) == 10
    client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), frames.window_update(1, 10))
    assert [frame.kind for frame in client.read()] == [frames.SETTINGS]
    client.send(frames.window_update(1, 1))
    (one,) = client.read()
    got.append(one)
    assert len(one.payload) == 1
    client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
    ack, *rest = client.read()
    assert (ack.kind, ack.flags) == (frames.SETTINGS, frames.ACK)  # the new window holds behind it only
    assert answer_of(client, got + rest).raw_output_contents[0] == bytes(1000)


@within
async def test_blocked_answers_share_the_connection_window():
    client = Client(settings=frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1 << 30))
    client.send(client.call(1, body(content=bytes(65_000))))
    await turn()
    client.send(*(client.call(number, body(content=bytes(200_000))) for number in (3, 5, 7)))
    await turn()
    client.read()
    client.send(frames.window_update(0, 6 * 16384))
    assert {frame.stream for frame in client.read() if frame.kind == frames.DATA} == {3, 5, 7}
    client.send(frames.rst_stream(3, Code.CANCEL), frames.rst_stream(5, Code.CANCEL), frames.rst_stream(7, Code.CANCEL))
    assert client.connection.outflow._pending_bytes == 0


@within
async def test_windows_that_overflow():
    client = Client()
    client.send(client.headers(1))
    await ends_stream(client, 1, Code.FLOW_CONTROL_ERROR, frames.window_update(1, frames.MAX_WINDOW))
    client.send(client.headers(3))
    await ends_stream(client, 3, Code.PROTOCOL_ERROR, frames.window_update(3, 0))
    client.send(client.headers(5), frames.window_update(5, frames.MAX_WINDOW - 65535))
    await ends_connection(client, Code.FLOW_CONTROL_ERROR, frames.settings({frames.INITIAL_WINDOW_SIZE: 65536}))


@within
async def test_a_client_that_ignores_its_window_loses_the_stream():
    client = Client()
    client.send(client.headers(1), data(1, b"\0\0\0\0\5abcde" + bytes(100_000)))
    client.send(data(1, bytes(100_000)))
    await ends_stream(client, 1, Code.FLOW_CONTROL_ERROR, data(1, bytes(100_000)))


@within
async def test_a_large_message_gets_its_window_and_the_next_when_it_is_done():
    client = Client(limits={"max_request_bytes": 1_000_000})
    size = 1_000_000
    windows = {}

    def note():
        for frame in client.read():
            if frame.kind == frames.WINDOW_UPDATE:
                windows[frame.stream] = frame.payload

    for number in (1, 3, 5):
        client.send(client.headers(number), data(number, b"\0" + struct.pack(">I", size)))
        note()
    assert set(windows) == {1, 3}  # two of the largest requests at a time
    client.send(frames.rst_stream(1, Code.CANCEL))
    note()
    assert set(windows) == {1, 3, 5}
    assert struct.unpack(">I", windows[5])[0] == size - (FIRST_WINDOW - 5)


def test_windows_are_lent_in_the_order_of_asking():
    given = []
    inflow = Inflow(100, lambda stream, size: given.append((stream.id, size)))
    first, second, third, fourth = (Stream(number, None, 0, 0, False) for number in (1, 3, 5, 7))
    inflow.want(first, 500)  # larger than all there is, and alone
    inflow.want(second, 60)
    inflow.want(second, 60)
    inflow.want(third, 60)
    inflow.want(fourth, 10)
    assert given == [(1, 500)]
    third.is_open = False
    inflow.release(first)
    assert given == [(1, 500), (3, 60), (7, 10)]


@within
async def test_the_connections_window_is_kept_wide():
    client = Client()
    client.send(client.headers(1, method="Nope"))
    client.read()
    for _ in range(513):  # 513 MiB, of which nothing is kept
        client.send(frames.HEADER.pack(0x1000, 0, frames.DATA, 0, 1))
        client.connection._left = 0
    (update,) = client.read()
    assert (update.kind, update.stream) == (frames.WINDOW_UPDATE, 0)
    assert not client.transport.is_closed


@within
async def test_unfinished_messages_of_all_connections_together_are_bounded():
    first = Client(limits={"max_request_bytes": 100_000})
    clients = [first, *(Client(first.server) for _ in range(7))]
    refused = 0
    for client in clients:
        client.send(client.headers(1), data(1, b"\0" + struct.pack(">I", 90_000) + bytes(80_000)))
        refused += any(
            frame.kind == frames.HEADERS and client.fields(frame)["grpc-status"] == "8" for frame in client.read()
        )
    assert refused == 4
    for client in clients:
        client.close()
    assert first.server.budget._taken == 0


@within
async def test_a_client_that_reads_nothing_is_not_read_from_and_then_cut_off():
    client = Client(
        settings=frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1 << 30), limits={"max_unsent_bytes": 300_000}
    )
    client.send(frames.window_update(0, 1 << 30))
    client.transport.unread = 200_000
    client.connection.pause_writing()
    assert not client.transport.is_reading
    client.connection.sweep(asyncio.get_running_loop().time() + 30, 10)
    client.connection.resume_writing()
    assert client.transport.is_reading
    client.connection.pause_writing()
    client.transport.unread = 400_000
    client.connection.flush()
    assert client.transport.is_aborted


@within
async def test_answers_that_wait_for_windows_count_as_unread():
    client = Client(limits={"max_unsent_bytes": 300_000})
    client.send(client.call(1, body(content=bytes(200_000))))
    await turn()
    assert not client.transport.is_closed
    client.send(client.call(3, body(content=bytes(200_000))))
    await turn()
    assert client.transport.is_aborted


@within
async def test_a_client_that_takes_nothing_for_a_minute_is_cut_off():
    client = Client()
    client.send(client.call(1, body(content=bytes(100_000))))
    await turn()
    client.connection.sweep(0, 10)
    client.connection.sweep(50, 10)
    client.send(frames.window_update(0, 10), frames.window_update(1, 10))
    client.connection.sweep(70, 10)
    client.connection.sweep(129, 10)
    assert not client.transport.is_closed
    client.connection.sweep(131, 10)
    assert client.transport.is_aborted


# ------------------------------------------------------------------ 10.5 floods


@pytest.mark.parametrize(
    ("frame", "count", "word"),
    [
        (frames.frame(frames.PING, 0, 0, bytes(8)), 65, "too_many_pings"),
        (frames.settings({}), 65, "too_many_settings"),
        (frames.frame(frames.PRIORITY, 0, 1, bytes(5)), 4097, "too_many_empty_frames"),
        (frames.frame(0x77, 0, 0, b""), 4097, "too_many_empty_frames"),
    ],
)
@within
async def test_floods_are_told_to_be_calm(frame, count, word):
    client = Client()
    client.connection.sweep(0, 10)
    client.send(frame * (count - 1))
    assert not client.transport.is_closed
    client.connection.sweep(0, 10)  # and again, a second later
    client.send(frame * (count - 1))
    assert not client.transport.is_closed
    client.send(frame)
    assert goaway(client.read()[-1])[1:] == (Code.ENHANCE_YOUR_CALM, word)


@within
async def test_a_flood_of_empty_data():
    client = Client()
    client.send(client.headers(1))
    await ends_connection(client, Code.ENHANCE_YOUR_CALM, data(1, b"") * 5000)


@within
async def test_a_flood_of_resets():
    client = Client(limits={"max_requests_in_flight": 10})
    made = 0
    for number in range(1, 2001, 2):
        client.send(client.call(number, body("hang")), frames.rst_stream(number, Code.CANCEL))
        made += 1
        if client.transport.is_closed:
            break
    assert made < 100
    assert goaway(client.read()[-1])[2] == "too_many_resets"


# ------------------------------------------------------------------ 6.8 the end


@within
async def test_draining_lets_open_streams_finish_ignores_new_ones_and_closes():
    client = Client()
    client.send(client.call(1, body("hang")))
    client.connection.drain()
    assert goaway(client.read()[-1])[:2] == (1, Code.NO_ERROR)
    client.send(client.call(3, body()), data(3, b""), frames.rst_stream(3, Code.CANCEL))
    assert client.read() == []
    assert not client.transport.is_closed
    client.engine.release.set()
    await turn()
    assert answer_of(client, client.read())
    assert client.transport.is_closed


@within
async def test_draining_an_idle_connection_closes_it():
    client = Client()
    client.connection.drain()
    assert goaway(client.read()[-1])[1] is Code.NO_ERROR
    assert client.transport.is_closed


@within
async def test_a_client_that_does_not_take_the_goaway_is_cut_off():
    client = Client()
    client.send(bytes(9))
    client.send(frames.frame(frames.CONTINUATION, 4, 1, b""))
    assert client.transport.is_closed
    assert not client.transport.is_aborted
    client.connection.sweep(asyncio.get_running_loop().time() + 11, 10)
    assert client.transport.is_aborted


# ------------------------------------------------------------------ anything at all


def wild_frame(source, client):
    """Nearly sound, or nonsense."""
    number = source.choice((0, 1, 3, 5, 2, client.next_stream, source.getrandbits(31)))
    kind = source.randrange(12)
    match source.randrange(6):
        case 0:
            return source.randbytes(source.randrange(40))
        case 1:
            size = source.choice((0, 4, 5, 6, 8, 30))
            return frames.frame(kind, source.getrandbits(8), number, source.randbytes(size))
        case 2:
            return frames.window_update(number, source.choice((0, 1, frames.MAX_WINDOW)))
        case 3:
            return frames.settings({source.randrange(8): source.choice((0, 1, 16384, 70_000, 0xFFFFFFFF))})
        case 4:
            return data(number, source.randbytes(source.choice((0, 3, 70_000))), source.choice((0, 1, 8, 9)))
        case _:
            return frames.frame(frames.HEADERS, source.choice((0, 4, 5, 12, 36)), number, client.block())


def sound_frames(source, client):
    """What a client may do, whole calls mostly."""
    number = client.next_stream
    older = source.randrange(1, number, 2) if number > 1 else None
    content = source.randbytes(source.choice((4, 4, 300, 70_000)))
    sent = message(body(source.choice(("echo", "echo", "hang", "bug", "conflict")), content))
    match source.randrange(10):
        case 0 if older is not None:
            return frames.window_update(older, source.choice((1, 100, 70_000)))
        case 1:
            return frames.window_update(0, source.choice((1, 100, 70_000)))
        case 2 if older is not None:
            return frames.rst_stream(older, Code.CANCEL)
        case 3:
            return frames.settings({frames.INITIAL_WINDOW_SIZE: source.choice((0, 10, 65535, 1 << 20))})
    client.next_stream += 2
    match source.randrange(6):
        case 0:
            method = source.choice(("ModelStreamInfer", "ServerLive", "Nope", "RepositoryIndex"))
            return client.headers(number, source.choice((4, 5)), method=method)
        case 1:
            return client.headers(number, method="ModelStreamInfer") + data(number, sent) + data(number, sent[:20])
        case 2:
            return client.headers(number) + data(number, sent[: source.randrange(len(sent))])
        case 3:
            return client.headers(number, grpc_encoding="gzip") + data(number, b"\1" + sent[1:], frames.END_STREAM)
    return client.headers(number) + data(number, sent, frames.END_STREAM)


@pytest.mark.timeout(300)
def test_two_thousand_random_conversations_neither_crash_nor_leak(caplog):
    """No exception leaves the connection, every conversation's memory is bounded, and nothing stays behind."""

    async def converse(seed):
        source = random.Random(seed)
        client = Client(limits={"max_request_bytes": 100_000, "max_unsent_bytes": 400_000})
        client.next_stream = 1
        largest = 0
        wildness = source.choice((0, 0.02, 0.1, 0.5))
        for _ in range(source.randrange(1, 60)):
            content = (wild_frame if source.random() < wildness else sound_frames)(source, client)
            cut = source.randrange(len(content) + 1)
            for part in (content[:cut], content[cut:]):
                if not client.transport.is_closed:
                    client.send(part)
            if source.random() < 0.3:
                await turn()
            outflow = client.connection.outflow
            largest = max(
                largest, client.server.budget._taken + outflow._pending_bytes + len(client.connection._partial)
            )
            client.read()
            if client.transport.is_closed:
                break
        client.close()
        client.engine.release.set()
        await turn()
        assert client.connection.streams == {}
        assert client.server.budget._taken == 0
        assert largest < 1_000_000
        return client.engine.requests

    async def run():
        answered = 0
        for seed in range(2000):
            answered += len(await converse(seed))
        assert answered > 2000

    asyncio.run(run())
    assert all("ZeroDivisionError" in record.exc_text for record in caplog.records if record.exc_info)
