"""One request, sent over each transport by the barest client there is; says which kind of error came back."""

import http.client
import json
import socket
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote

import grpc

from appliance.wire.native import Frame
from appliance.wire.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from support.daemon import PATIENCE_SECONDS
from support.native import Native, infer_frame

OK = "ok"


class Input(NamedTuple):
    """One input; `content` is what the client sends, whatever the shape says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes


@dataclass
class Request:
    """An inference request as a client might send it, right or wrong."""

    model: str
    inputs: list[Input]
    outputs: list[str] = field(default_factory=list)
    version: str = ""
    parameters: dict[str, bool | int | float | str] = field(default_factory=dict)
    input_parameters: dict[str, int | str] = field(default_factory=dict)
    id: str = ""

    def message(self) -> ModelInferRequest:
        """The request as the protocol's message, without its tensors."""
        message = ModelInferRequest(model_name=self.model, model_version=self.version, id=self.id)
        _set(message.parameters, self.parameters)
        for entry in self.inputs:
            tensor = message.inputs.add(name=entry.name, datatype=entry.datatype, shape=entry.shape)
            _set(tensor.parameters, self.input_parameters)
        for name in self.outputs:
            message.outputs.add(name=name)
        return message


def _set(parameters, values: dict[str, bool | int | float | str]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            parameters[key].bool_param = value
        elif isinstance(value, str):
            parameters[key].string_param = value
        elif isinstance(value, float):
            parameters[key].double_param = value
        elif value >= 2**63:
            parameters[key].uint64_param = value
        else:
            parameters[key].int64_param = value


class Outcome(NamedTuple):
    """What came of a request.

    `kind` is OK or the error's; `code` the transport's own word for it; `outputs` content by name.
    """

    kind: str
    message: str
    code: object = None
    outputs: dict[str, bytes] | None = None


class NativeTransport:
    """infer.sock, tensors behind the head."""

    name = "native"

    def __init__(self, daemon) -> None:
        self.connection = Native(daemon.infer_socket)
        self.number = 0

    def close(self) -> None:
        self.connection.close()

    def send(self, request: Request) -> Outcome:
        self.number += 1
        tail = b"".join(entry.content for entry in request.inputs)
        self.connection.send(infer_frame(self.number, request.message(), tail))
        answer = self.connection.read()
        assert answer.id == self.number
        if answer.kind == Frame.ERROR:
            return Outcome(*answer.error)
        return Outcome(OK, "", outputs=_split(answer.response, answer.tail))


def _split(response: ModelInferResponse, tail: bytes) -> dict[str, bytes]:
    """Outputs of a native answer; one of BYTES must be the only one."""
    item = {"FP32": 4, "INT64": 8, "UINT8": 1}
    outputs, start = {}, 0
    for output in response.outputs:
        size = len(tail) - start
        if output.datatype != "BYTES":
            size = item[output.datatype]
            for dimension in output.shape:
                size *= dimension
        outputs[output.name] = tail[start : start + size]
        start += size
    assert start == len(tail)
    return outputs


class InlineTransport(NativeTransport):
    """infer.sock, tensors inside the message."""

    name = "inline"

    def send(self, request: Request) -> Outcome:
        self.number += 1
        message = request.message()
        message.raw_input_contents.extend(entry.content for entry in request.inputs)
        answer = self.connection.infer(self.number, message)
        if answer.kind == Frame.ERROR:
            return Outcome(*answer.error)
        return Outcome(OK, "", outputs=_split(answer.response, answer.tail))


class GrpcTransport:
    """gRPC on the Unix socket."""

    name = "grpc"

    def __init__(self, daemon) -> None:
        self.channel = grpc.insecure_channel(f"unix:{daemon.grpc_socket}")
        self.call = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

    def close(self) -> None:
        self.channel.close()

    def send(self, request: Request) -> Outcome:
        message = request.message()
        message.raw_input_contents.extend(entry.content for entry in request.inputs)
        try:
            response = self.call(message, timeout=PATIENCE_SECONDS)
        except grpc.RpcError as error:
            kind = dict(error.trailing_metadata() or ()).get("appliance-kind", "")
            return Outcome(kind, error.details() or "", error.code().name)
        names = [output.name for output in response.outputs]
        return Outcome(OK, "", "OK", dict(zip(names, response.raw_output_contents, strict=True)))


class HttpTransport:
    """HTTP on the Unix socket, tensors as binary data."""

    name = "http"

    def __init__(self, daemon) -> None:
        self.connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_SECONDS)
        self.connection.sock = socket.socket(socket.AF_UNIX)
        self.connection.sock.settimeout(PATIENCE_SECONDS)
        self.connection.sock.connect(daemon.http_socket)

    def close(self) -> None:
        self.connection.close()

    def send(self, request: Request) -> Outcome:
        inputs = []
        for entry in request.inputs:
            parameters = {**request.input_parameters, "binary_data_size": len(entry.content)}
            inputs.append(
                {"name": entry.name, "datatype": entry.datatype, "shape": entry.shape, "parameters": parameters}
            )
        document = {"inputs": inputs, "parameters": {**request.parameters, "binary_data_output": True}}
        if request.outputs:
            document["outputs"] = [{"name": name} for name in request.outputs]
        if request.id:
            document["id"] = request.id
        head = json.dumps(document).encode()
        body = head + b"".join(entry.content for entry in request.inputs)
        version = f"/versions/{quote(request.version, safe='')}" if request.version else ""
        path = f"/v2/models/{quote(request.model, safe='')}{version}/infer"
        self.connection.request("POST", path, body, {"Inference-Header-Content-Length": str(len(head))})
        response = self.connection.getresponse()
        content = response.read()
        if response.status != 200:
            error = json.loads(content)
            return Outcome(error["kind"], error["error"], response.status)
        size = int(response.headers["Inference-Header-Content-Length"])
        outputs, start = {}, size
        for output in json.loads(content[:size])["outputs"]:
            end = start + output["parameters"]["binary_data_size"]
            outputs[output["name"]] = content[start:end]
            start = end
        return Outcome(OK, "", 200, outputs)


TRANSPORTS = (NativeTransport, InlineTransport, GrpcTransport, HttpTransport)
