"""The four ways to ask the daemon for a label, each with the client side's usual means and no more.

Each connects once and then answers one call after another.
"""

import base64
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Final

import grpc

from appliance_client import Client
from appliance_client.wire.open_inference_pb2 import ModelInferRequest, ModelInferResponse

#: The daemon's endpoints.json: addresses by name.
Endpoints = dict[str, str]

#: Label for (model, input name, whether the content is a picture, content).
Ask = Callable[[str, str, bool, bytes], str]

_TIMEOUT_SECONDS: Final = 10.0


class RefusedError(Exception):
    """The daemon did not answer a request; the message holds what it said."""


@contextmanager
def native(endpoints: Endpoints) -> Iterator[Ask]:
    """The client library on ``infer.sock``."""
    with Client(endpoints["infer"], timeout=_TIMEOUT_SECONDS) as client:

        def ask(model: str, name: str, is_picture: bool, content: bytes) -> str:
            label: str = client.infer(model, {name: [[content]]}, outputs=["label"]).text("label")[0][0]
            return label

        yield ask


@contextmanager
def _grpc_at(target: str) -> Iterator[Ask]:
    with grpc.insecure_channel(target) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

        def ask(model: str, name: str, is_picture: bool, content: bytes) -> str:
            request = ModelInferRequest(model_name=model)
            request.inputs.add(name=name, datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(content)
            request.outputs.add(name="label")
            try:
                response = infer(request, timeout=_TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                raise RefusedError(f"{error.code().name}: {error.details()}") from None
            # A raw BYTES element stands behind its length of four bytes.
            label: str = response.raw_output_contents[0][4:].decode()
            return label

        yield ask


def grpc_tcp(endpoints: Endpoints) -> AbstractContextManager[Ask]:
    """A loopback port, by gRPC."""
    return _grpc_at(endpoints["grpc_tcp"])


def grpc_unix(endpoints: Endpoints) -> AbstractContextManager[Ask]:
    """The socket ``grpc.sock``, by gRPC."""
    return _grpc_at(f"unix:{endpoints['grpc']}")


@contextmanager
def http_unix(endpoints: Endpoints) -> Iterator[Ask]:
    """JSON over ``http.sock``, pictures in base64."""
    connection = http.client.HTTPConnection("localhost", timeout=_TIMEOUT_SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(_TIMEOUT_SECONDS)
    connection.sock.connect(endpoints["http"])

    def ask(model: str, name: str, is_picture: bool, content: bytes) -> str:
        tensor: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [1, 1]}
        if is_picture:
            tensor |= {"data": [base64.b64encode(content).decode()], "parameters": {"content_encoding": "base64"}}
        else:
            tensor["data"] = [content.decode()]
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]})
        connection.request("POST", f"/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != http.client.OK:
            raise RefusedError(f"{response.status}: {answer.get('error')}")
        label: str = answer["outputs"][0]["data"][0]
        return label

    with closing(connection):
        yield ask


#: How to connect, by the name the table shows.
TRANSPORTS: Final[dict[str, Callable[[Endpoints], AbstractContextManager[Ask]]]] = {
    "native": native,
    "gRPC TCP": grpc_tcp,
    "gRPC Unix": grpc_unix,
    "HTTP Unix": http_unix,
}
