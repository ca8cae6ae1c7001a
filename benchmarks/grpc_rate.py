"""Budget 4: gRPC."""

from pathlib import Path

from benchmarks.load import h2load
from benchmarks.peers import peer
from benchmarks.report import Line, median

ROUNDS = 5


def sixteen_in_flight(grpc_socket: str, scratch: Path) -> list[Line]:
    """Budget 4, against a grpc.aio server that returns what it got, under the same load client."""
    ours, bare = [], []
    echo = str(scratch / "grpc-echo.sock")
    with peer("grpc", f"unix:{echo}"):
        h2load(grpc_socket, scratch, 16, 2000)
        for _ in range(ROUNDS):
            ours.append(h2load(grpc_socket, scratch, 16, 10000))
            bare.append(h2load(echo, scratch, 16, 10000))
    rate, floor = median(ours), median(bare)
    return [
        Line(
            "4",
            "gRPC, 64 bytes, 16 in flight",
            rate,
            "/s",
            ">= 6,000/s",
            rate >= 6000,
            f"bare grpc.aio echo {floor:,.0f}/s",
            rate / floor,
        ),
    ]
