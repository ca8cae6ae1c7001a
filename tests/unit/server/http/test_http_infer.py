"""Inference over HTTP: JSON, binary tensors, compression, and a client that leaves."""

import asyncio
import gzip
import json
import os
import struct
import time
import zlib

import pytest

from appliance.types import RequestOptions, SequenceStep

INPUT = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.5, -2]}
INFER = "/v2/models/echo/infer"


def test_json_in_json_out(server, engine):
    answer = server.ask("POST", INFER, {"id": "mine", "inputs": [INPUT], "parameters": {"timeout": 5000000}})
    assert answer.status == 200
    assert answer.json["outputs"] == [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.5, -2.0]}]
    assert (answer.json["id"], answer.json["model_name"], answer.json["model_version"]) == ("mine", "echo", "1")
    parameters = answer.json["parameters"]
    assert (parameters["queue_us"], parameters["compute_us"], parameters["batch_rows"]) == (5, 7, 1)
    assert engine.requests[0].options.timeout_us == 5000000
    assert "inference-header-content-length" not in answer.headers


def test_parameters_and_the_connections_account_reach_the_engine(server, engine):
    parameters = {"priority": "background", "sequence_id": "s", "sequence_start": True}
    for is_tcp in (False, True):
        assert server.ask("POST", INFER, {"inputs": [INPUT], "parameters": parameters}, tcp=is_tcp).status == 200
    unix, tcp = engine.requests
    assert unix.options == tcp.options == RequestOptions(0, 3, SequenceStep("s", True, False))
    assert unix.client.key == (os.geteuid(), os.getpid())
    assert tcp.client.key[0] == "http"
    deadline = time.monotonic() + 10
    while len(engine.clients) and time.monotonic() < deadline:  # both connections are closed
        time.sleep(0.01)
    assert len(engine.clients) == 0


def test_binary_in_binary_out(server):
    raw = struct.pack("<4e", 1, 2, 3, 4)
    entry = {"name": "h", "datatype": "FP16", "shape": [4], "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    answer = server.ask("POST", INFER, head + raw, {"Inference-Header-Content-Length": str(len(head))})
    assert answer.status == 200
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.raw[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert answer.raw[length:] == raw
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_large_answer_arrives_whole(server):
    raw = bytes(range(256)) * 4096
    entry = {"name": "b", "datatype": "UINT8", "shape": [len(raw)], "parameters": {"binary_data_size": len(raw)}}
    for wants_binary in (True, False):
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": wants_binary}}).encode()
        answer = server.ask("POST", INFER, head + raw, {"Inference-Header-Content-Length": str(len(head))})
        if wants_binary:
            assert answer.raw.endswith(raw)
        else:
            assert bytes(answer.json["outputs"][0]["data"]) == raw


def test_the_binary_answer_alone_may_be_mixed_with_json(server, engine):
    entries = [INPUT, {**INPUT, "name": "y"}]
    outputs = [{"name": "x", "parameters": {"binary_data": True}}, {"name": "y"}]
    answer = server.ask("POST", INFER, {"inputs": entries, "outputs": outputs})
    length = int(answer.headers["inference-header-content-length"])
    x, y = json.loads(answer.raw[:length])["outputs"]
    assert (x["parameters"], y["data"]) == ({"binary_data_size": 8}, [1.5, -2.0])
    assert answer.raw[length:] == struct.pack("<2f", 1.5, -2)
    assert engine.requests[0].outputs == ["x", "y"]


@pytest.mark.parametrize("length", ["x", "-1", "9" * 30, "100000", "1 "])
def test_a_wrong_header_length_is_refused(server, length):
    answer = server.ask("POST", INFER, b"{}", {"Inference-Header-Content-Length": length})
    assert answer.status == 400
    assert answer.json["kind"] == "invalid-request"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"inputs": NaN}', b'{"inputs": ' + b"[" * 5000, b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(server, body):
    answer = server.ask("POST", INFER, body)
    assert (answer.status, answer.json["kind"]) == (400, "invalid-request")
    assert answer.json["error"].startswith("cannot ")


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("elements", [1, 100_000])
def test_compressed_requests(server, encoding, pack, elements):
    body = json.dumps({"inputs": [{"name": "x", "datatype": "INT8", "shape": [elements], "data": [7] * elements}]})
    answer = server.ask("POST", INFER, pack(body.encode()), {"Content-Encoding": encoding})
    assert answer.status == 200
    assert answer.json["outputs"][0]["data"] == [7] * elements


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no"),
        ("gzip", gzip.compress(b"{}")[:-4]),
        ("deflate", zlib.compress(b"{}") + b"more"),
        ("br", b"{}"),
        ("gzip, gzip", b"{}"),
    ],
)
def test_wrong_compression_is_refused(server, encoding, body):
    answer = server.ask("POST", INFER, body, {"Content-Encoding": encoding})
    assert (answer.status, answer.json["kind"]) == (400, "invalid-request")


def test_a_decompression_bomb_is_refused(serve):
    server = serve(limits={"max_request_bytes": 65536})
    answer = server.ask("POST", INFER, gzip.compress(bytes(10_000_000)), {"Content-Encoding": "gzip"})
    assert (answer.status, answer.json["kind"]) == (429, "overloaded")


def test_a_body_over_the_limit_is_refused_and_the_connection_lives_on(serve):
    server = serve(limits={"max_request_bytes": 65536})
    connection = server.connect()
    connection.request("POST", INFER, bytes(65537))
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["kind"]) == (429, "overloaded")
    connection.request("GET", "/v2/health/live")
    assert connection.getresponse().status == 200


def test_a_chunked_body_over_the_limit_is_refused(serve):
    server = serve(limits={"max_request_bytes": 65536})
    connection = server.connect()
    connection.request("POST", INFER, iter([bytes(40000)] * 2), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 429


def test_bodies_of_all_requests_share_a_budget(serve, engine):
    server = serve(limits={"max_request_bytes": 65536})
    body = json.dumps({"inputs": [], "parameters": {"pad": "." * 60000}})
    release = asyncio.Event()
    engine.before_answer = release.wait
    waiting = [server.connect() for _ in range(4)]
    for connection in waiting:
        engine.arrived.clear()
        connection.request("POST", INFER, body)
        assert engine.arrived.wait(10)
    answer = server.ask("POST", INFER, body)
    assert (answer.status, answer.json["kind"]) == (429, "overloaded")
    server.loop.call_soon_threadsafe(release.set)
    assert [connection.getresponse().status for connection in waiting] == [200] * 4
    assert server.ask("POST", INFER, body).status == 200


@pytest.mark.parametrize("pad", [0, 200_000])
def test_a_client_that_leaves_withdraws_its_request(server, engine, pad):
    engine.before_answer = asyncio.Event().wait
    connection = server.connect()
    connection.request("POST", INFER, json.dumps({"inputs": [], "parameters": {"pad": "." * pad}}))
    assert engine.arrived.wait(10)
    connection.close()
    assert engine.cancelled.wait(10)


def test_stopping_answers_what_is_in_flight(server, engine):
    release = asyncio.Event()
    engine.before_answer = release.wait
    connection = server.connect()
    connection.request("POST", INFER, json.dumps({"inputs": [INPUT]}))
    assert engine.arrived.wait(10)
    stopping = asyncio.run_coroutine_threadsafe(server.server.stop(10), server.loop)
    server.loop.call_soon_threadsafe(release.set)
    assert connection.getresponse().status == 200
    stopping.result(10)


def test_stopping_cuts_off_what_does_not_finish(server, engine):
    engine.before_answer = asyncio.Event().wait
    connection = server.connect()
    connection.request("POST", INFER, json.dumps({"inputs": [INPUT]}))
    assert engine.arrived.wait(10)
    server.stop()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["kind"]) == (503, "shutting-down")
    assert engine.cancelled.is_set()


def test_pipelined_requests_are_answered_in_order(server):
    bodies = [json.dumps({"id": f"r{i}", "inputs": [INPUT]}).encode() for i in range(5)]
    sock = server.raw()
    sock.sendall(
        b"".join(
            b"POST /v2/models/echo/infer HTTP/1.1\r\nhost:\r\ncontent-length: %d\r\n\r\n" % len(b) + b for b in bodies
        )
    )
    received = b""
    while received.count(b"batch_rows") < 5:
        received += sock.recv(65536)
    positions = [received.index(b'"id":"r%d"' % i) for i in range(5)]
    assert positions == sorted(positions)
