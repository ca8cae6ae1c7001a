"""One inference of a one-input FP32 model over each transport, as plain as it gets; for tests of what clients see."""

import http.client
import json
import socket

import grpc
import numpy as np

from appliance.wire import open_inference_pb2 as pb


class HttpInfer:
    """A connection that is kept."""

    def __init__(self, running) -> None:
        self._path = running.http_socket
        self._connection = None

    def __call__(self, model: str, value: float) -> float | str:
        """The first element of the answer, or what went wrong, as ``"503 model-not-ready"``."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection("localhost", timeout=60)
            self._connection.sock = socket.socket(socket.AF_UNIX)
            self._connection.sock.connect(self._path)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [value] * 16}
        self._connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
        response = self._connection.getresponse()
        document = json.loads(response.read())
        if response.headers.get("connection") == "close":
            self.close()
        if response.status != 200:
            return f"{response.status} {document['kind']}"
        return document["outputs"][0]["data"][0]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class GrpcInfer:
    """A channel on the Unix socket."""

    def __init__(self, running) -> None:
        self._channel = grpc.insecure_channel(f"unix:{running.grpc_socket}")
        self._call = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

    def __call__(self, model: str, value: float) -> float | str:
        """The first element of the answer, or the status' name."""
        request = pb.ModelInferRequest(model_name=model)
        request.inputs.add(name="x", datatype="FP32", shape=[1, 16])
        request.raw_input_contents.append(np.full(16, value, np.float32).tobytes())
        try:
            answer = self._call(request, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
        return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])

    def close(self) -> None:
        self._channel.close()
