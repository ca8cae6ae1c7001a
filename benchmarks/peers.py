"""What our figures are compared with: the barest server of each kind. Each runs in a process of its own.

``python -m benchmarks.peers KIND ADDRESS`` serves until it is ended.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


async def _serve_frames(path: str) -> None:
    """An asyncio protocol on uvloop that answers each frame of the native protocol with one as large as ours."""
    from appliance.wire.native import HEADER, TIMINGS, WELCOME, Frame

    answer = b"\0" * (TIMINGS.size + 28 + 64)

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, content: bytes) -> None:
            _, kind, _, _, number, _, _ = HEADER.unpack_from(content)
            is_hello = kind == Frame.HELLO
            body = b"\0" * WELCOME.size if is_hello else answer
            self.transport.write(
                HEADER.pack(len(body), Frame.WELCOME if is_hello else Frame.RESULT, 0, 0, number, 28, 0) + body
            )

    await asyncio.get_running_loop().create_unix_server(Echo, path)
    await asyncio.Event().wait()


async def _serve_grpc(address: str) -> None:
    """grpc.aio with one generic handler that returns what it got."""
    import grpc

    async def echo(request: bytes, _: object) -> bytes:
        return request

    server = grpc.aio.server()
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    server.add_insecure_port(address)
    await server.start()
    await asyncio.Event().wait()


@contextlib.contextmanager
def peer(kind: str, address: str) -> Iterator[None]:
    """Run a peer until the block ends."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.peers", kind, address])
    try:
        _await_listener(address)
        yield
    finally:
        process.kill()
        process.wait()


def _await_listener(address: str) -> None:
    path = address.removeprefix("unix:")
    for _ in range(2000):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(path)
            return
        time.sleep(0.005)
    raise TimeoutError(f"the peer does not listen on {path}")


if __name__ == "__main__":
    import uvloop

    serve = {"frames": _serve_frames, "grpc": _serve_grpc}[sys.argv[1]]
    Path(sys.argv[2].removeprefix("unix:")).unlink(missing_ok=True)
    uvloop.run(serve(sys.argv[2]))
