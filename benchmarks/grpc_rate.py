"""Budget 4: gRPC."""

from pathlib import Path

from benchmarks.load import h2load
from benchmarks.peers import peer
from benchmarks.report import Line, median
from support.daemon import RunningDaemon

ROUNDS = 5


def sixteen_in_flight(daemon: RunningDaemon, scratch: Path) -> list[Line]:
    """Budget 4, against a grpc.aio server that returns what it got, under the same load client."""
    ours, bare = [], []
    grpc_socket = daemon.grpc_socket
    before = _answered(daemon)
    echo = str(scratch / "grpc-echo.sock")
    with peer("grpc", f"unix:{echo}"):
        h2load(grpc_socket, scratch, 16, 2000)
        for _ in range(ROUNDS):
            ours.append(h2load(grpc_socket, scratch, 16, 10000))
            bare.append(h2load(echo, scratch, 16, 10000))
    answered = _answered(daemon) - before
    if answered != 2000 + ROUNDS * 10000:  # h2load looks at HTTP's status only, so the daemon's own count decides
        raise RuntimeError(f"{answered} requests were answered and {2000 + ROUNDS * 10000} sent")
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


def _answered(daemon: RunningDaemon) -> int:
    """Requests to ``identity`` that succeeded since the daemon started."""
    statistics = daemon.get("/v2/models/identity/stats")["model_stats"][0]
    count: int = statistics["inference_stats"]["success"]["count"]
    return count
