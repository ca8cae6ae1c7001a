"""``python -m appliance.worker --fd N``: one worker process, speaking `appliance.wire.worker` over descriptor N."""

import argparse
import faulthandler
import os
import signal
import socket
import sys
import traceback
from typing import NoReturn

# Before numpy: its own thread pool is of no use here and would cost threads and memory in every worker.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from appliance.errors import ApplianceError
from appliance.wire import worker_pb2
from appliance.wire.worker import Kind
from appliance.worker.lifeline import die_with_parent, parent_is_gone, volunteer_for_oom_kill
from appliance.worker.link import Link, LinkBroken
from appliance.worker.loading import load, manifest_of
from appliance.worker.loop import Loop
from appliance.worker.messages import presentable
from appliance.worker.recording import recorder_of


def main() -> NoReturn:
    """Load one model and serve it until the front-end is gone.

    The process ends with `os._exit`, since a vendor runtime's own clean-up may hang. Status 0: the front-end is
    gone; 1: the model could not be loaded, or the worker is at fault.
    """
    parser = argparse.ArgumentParser(prog="appliance.worker", description="serves one model; started by the daemon")
    parser.add_argument("--fd", type=int, required=True, help="inherited SOCK_SEQPACKET socket")
    arguments = parser.parse_args()
    _settle()
    status = 1
    try:
        sock = socket.socket(fileno=arguments.fd)
        status = 0 if parent_is_gone(sock) else _serve(Link(sock))
    except (BrokenPipeError, ConnectionResetError):
        status = 0
    except LinkBroken as error:
        print(f"cannot go on: {error}", file=sys.stderr)  # noqa: T201 - the front-end reads this process's stderr
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _settle() -> None:
    """Make the process a worker: dies with the daemon, deaf to the terminal, without standard input."""
    die_with_parent()
    volunteer_for_oom_kill()
    # Whoever stops the daemon may signal its whole group or control group; what is in flight here shall still finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    faulthandler.enable()


def _serve(link: Link) -> int:
    length = link.receive()
    if length == 0:
        return 0
    if link.buffer[0] != Kind.LOAD:
        raise LinkBroken("the first packet must be LOAD")
    try:
        message = worker_pb2.Load.FromString(bytes(link.buffer[1:length]))
        model, loaded = load(message)
    except Exception as error:
        if not isinstance(error, ApplianceError):
            traceback.print_exc()
        kind = error.kind if isinstance(error, ApplianceError) else ApplianceError.kind
        text = str(error) if isinstance(error, ApplianceError) else f"cannot load the model: {presentable(error)}"
        failed = worker_pb2.Failed(kind=kind, message=text)
        link.send(bytes((Kind.FAILED,)) + failed.SerializeToString())
        return 1
    link.send(bytes((Kind.LOADED,)) + loaded.SerializeToString())
    recorder = recorder_of(message.record_path, manifest_of(message), model)
    Loop(link, model, recorder).serve()
    if recorder is not None:
        recorder.close()
    return 0


if __name__ == "__main__":
    main()
