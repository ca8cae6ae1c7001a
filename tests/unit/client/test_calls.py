"""Methods other than inference, over both clients."""

import asyncio

import numpy as np
import pytest

from appliance.wire import open_inference_pb2 as pb
from appliance.wire.native import Frame
from appliance_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    ModelNotFound,
    PermissionDenied,
    ProtocolError,
    Unimplemented,
)
from appliance_client.calls import (
    Duration,
    ModelIndex,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
)


def blocking(path, method, *arguments, **options):
    with Client(path) as client:
        return getattr(client, method)(*arguments, **options)


def concurrent(path, method, *arguments, **options):
    async def run():
        async with AsyncClient(path) as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(run())


both = pytest.mark.parametrize("call", [blocking, concurrent])

STATISTICS = pb.ModelStatistics(
    name="m",
    version="1",
    last_inference=5,
    inference_count=7,
    execution_count=3,
    inference_stats={
        "success": {"count": 7, "ns": 70},
        "queue": {"count": 7, "ns": 10},
        "cache_hit": {"count": 4, "ns": 8},
    },
    batch_stats=[{"batch_size": 4, "compute_infer": {"count": 2, "ns": 20}}],
)

CASES = [
    ("server_live", (), "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse(live=True), True),
    ("server_ready", (), "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse(), False),
    (
        "model_ready",
        ("m", "2"),
        "ModelReady",
        pb.ModelReadyRequest(name="m", version="2"),
        pb.ModelReadyResponse(ready=True),
        True,
    ),
    (
        "server_metadata",
        (),
        "ServerMetadata",
        pb.ServerMetadataRequest(),
        pb.ServerMetadataResponse(name="a", version="1", extensions=["x", "y"]),
        ServerMetadata("a", "1", ("x", "y")),
    ),
    (
        "model_metadata",
        ("m",),
        "ModelMetadata",
        pb.ModelMetadataRequest(name="m"),
        pb.ModelMetadataResponse(
            name="m",
            versions=["1"],
            platform="p",
            inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            outputs=[{"name": "y", "datatype": "BYTES", "shape": [-1]}],
        ),
        ModelMetadata(
            "m", ("1",), "p", (TensorMetadata("x", "FP32", (-1, 4)),), (TensorMetadata("y", "BYTES", (-1,)),)
        ),
    ),
    (
        "statistics",
        ("m",),
        "ModelStatistics",
        pb.ModelStatisticsRequest(name="m"),
        pb.ModelStatisticsResponse(model_stats=[STATISTICS]),
        (
            ModelStatistics(
                name="m",
                version="1",
                last_inference_ms=5,
                inference_count=7,
                execution_count=3,
                success=Duration(7, 70),
                fail=Duration(0, 0),
                queue=Duration(7, 10),
                compute_input=Duration(0, 0),
                compute_infer=Duration(0, 0),
                compute_output=Duration(0, 0),
                cache_hit=Duration(4, 8),
                cache_miss=Duration(0, 0),
                executions_by_rows={4: Duration(2, 20)},
            ),
        ),
    ),
    (
        "repository_index",
        (),
        "RepositoryIndex",
        pb.RepositoryIndexRequest(),
        pb.RepositoryIndexResponse(models=[{"name": "m", "version": "1", "state": "READY"}]),
        (ModelIndex("m", "1", "READY", ""),),
    ),
    (
        "load",
        ("m",),
        "RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(model_name="m"),
        pb.RepositoryModelLoadResponse(),
        None,
    ),
    (
        "unload",
        ("m",),
        "RepositoryModelUnload",
        pb.RepositoryModelUnloadRequest(model_name="m"),
        pb.RepositoryModelUnloadResponse(),
        None,
    ),
]


@both
@pytest.mark.parametrize(
    ("name", "arguments", "method", "request_", "reply", "value"), CASES, ids=[c[0] for c in CASES]
)
def test_a_method_sends_its_message_and_reads_its_reply(peer, call, name, arguments, method, request_, reply, value):
    seen = []

    def respond(session, identifier, message):
        seen.append(type(request_).FromString(message))
        session.send(Frame.REPLY, identifier, reply.SerializeToString())

    peer.methods[method] = respond
    assert call(peer.path, name, *arguments) == value
    assert seen == [request_]


@both
def test_only_ready_models_are_listed_on_request(peer, call):
    seen = []
    peer.methods["RepositoryIndex"] = lambda session, identifier, message: (
        seen.append(pb.RepositoryIndexRequest.FromString(message).ready),
        session.send(Frame.REPLY, identifier),
    )
    assert call(peer.path, "repository_index", ready=True) == ()
    assert seen == [True]


@both
@pytest.mark.parametrize(
    ("kind", "error"),
    [("model-not-found", ModelNotFound), ("permission-denied", PermissionDenied), ("unimplemented", Unimplemented)],
)
def test_a_refused_call_raises_its_kind(peer, call, kind, error):
    peer.methods["RepositoryModelLoad"] = lambda session, identifier, message: session.error(identifier, kind)
    with pytest.raises(error):
        call(peer.path, "load", "m")


@both
def test_a_reply_that_is_no_message_is_refused(peer, call):
    peer.methods["ServerMetadata"] = lambda session, identifier, _: session.send(Frame.REPLY, identifier, b"\xff\xff")
    with pytest.raises(ProtocolError, match="the reply to ServerMetadata: it is no ServerMetadataResponse"):
        call(peer.path, "server_metadata")


@both
def test_a_call_without_reply_is_given_up_after_the_timeout(peer, call):
    peer.methods["ServerReady"] = lambda session, identifier, message: None
    with pytest.raises(DeadlineExceeded):
        call(peer.path, "server_ready", timeout=0.05)


def test_calls_and_inferences_share_a_connection(peer):
    peer.methods["ServerReady"] = lambda session, identifier, _: session.send(
        Frame.REPLY, identifier, pb.ServerReadyResponse(ready=True).SerializeToString()
    )

    async def run():
        async with AsyncClient(peer.path) as client:
            calls = [client.server_ready() if n % 2 else client.infer("m", {"x": np.array([n])}) for n in range(20)]
            answers = await asyncio.gather(*calls)
            assert [a if n % 2 else int(a["x"][0]) for n, a in enumerate(answers)] == [
                True if n % 2 else n for n in range(20)
            ]

    asyncio.run(run())
    with Client(peer.path) as client:
        assert client.server_ready()
        assert client.infer("m", {"x": np.array([1])})["x"].tolist() == [1]
    assert len(peer.sessions) == 2
