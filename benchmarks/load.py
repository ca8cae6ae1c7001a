"""Load clients: our own in C for the native protocol, h2load for gRPC."""

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

from appliance.wire import native
from appliance.wire.open_inference_pb2 import ModelInferRequest

HERE = Path(__file__).parent


def identity_message() -> ModelInferRequest:
    """A request of 64 bytes to the model ``identity``."""
    message = ModelInferRequest(model_name="identity")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 16])
    return message


def build(name: str, directory: Path) -> Path | None:
    """Compile the load client `name`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    program = directory / name
    subprocess.run([compiler, "-O2", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


def write_frames(directory: Path) -> tuple[Path, Path]:
    """Files with the HELLO frame and an INFER frame of 64 bytes."""
    return write_hello(directory), write_infer(directory / "infer.bin", identity_message(), 64)


def write_hello(directory: Path) -> Path:
    """A file with the HELLO frame."""
    path = directory / "hello.bin"
    greeting = native.HELLO.pack(native.MAGIC, native.VERSION, 0)
    path.write_bytes(native.HEADER.pack(len(greeting), native.Frame.HELLO, 0, 0, 0, 0, 0) + greeting)
    return path


def write_infer(path: Path, message: ModelInferRequest, tail: int) -> Path:
    """A file with an INFER frame whose tail is `tail` bytes of zeros."""
    head = message.SerializeToString()
    header = native.HEADER.pack(len(head) + tail, native.Frame.INFER, 0, 0, 1, len(head), 0)
    path.write_bytes(header + head + bytes(tail))
    return path


def native_load(
    program: Path, path: str, frames: tuple[Path, Path], connections: int, seconds: float
) -> dict[str, float]:
    """One run of the native load client."""
    command = [str(program), path, str(frames[0]), str(frames[1]), str(connections), str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    if result["errors"]:
        raise RuntimeError(f"{result['errors']} of {result['requests']} answers were errors")
    return result


def h2load(path: str, directory: Path, streams: int, requests: int) -> float:
    """Requests a second of unary gRPC calls over a Unix socket, `streams` in flight on one connection.

    Raises:
        RuntimeError: A call failed.
    """
    message = identity_message()
    message.raw_input_contents.append(bytes(64))
    body = message.SerializeToString()
    data = directory / "grpc.bin"
    data.write_bytes(struct.pack(">BI", 0, len(body)) + body)
    done = subprocess.run(
        ["h2load", "-n", str(requests), "-c", "1", "-m", str(streams), "-d", str(data),
         "-H", "content-type: application/grpc", "-H", "te: trailers", "-B", f"unix:{path}",
         "http://localhost/inference.GRPCInferenceService/ModelInfer"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    succeeded = re.search(r"(\d+) succeeded", done.stdout)
    rate = re.search(r"([\d.]+) req/s", done.stdout)
    if succeeded is None or rate is None or int(succeeded.group(1)) != requests:
        raise RuntimeError(f"h2load: {done.stdout}")
    return float(rate.group(1))
