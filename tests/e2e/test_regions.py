"""Shared memory from clients: what is no sealed memfd is refused, what is one cannot hurt, and nothing is left."""

import asyncio
import contextlib
import fcntl
import os
import resource
import select
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from appliance.clients import Clients
from appliance.config import ClientsSection, LimitsSection
from appliance.server import listen
from appliance.server.native import NativeServer
from appliance.wire import native
from appliance.wire.elements import join_elements
from appliance.wire.native import Frame
from appliance.wire.open_inference_pb2 import ModelInferRequest
from appliance_client import Client
from support.daemon import FAKE_BACKEND, open_descriptors, start_daemon, wait_until
from support.errors import check_message
from support.models import Gate, write_fake
from support.native import HELLO, Memory, Native, frame, infer_frame, request

REPOSITORY = Path(__file__).parents[2]
ROW_BYTES = 64
WAIT = 116  # what the fake backend's MAGIC says for `wait`; test_the_number_of_wait holds it
MIB = 1 << 20


class Daemon:
    def __init__(self, running, gate: Gate) -> None:
        self.running = running
        self.gate = gate

    def native(self) -> Native:
        return Native(self.running.infer_socket)

    @property
    def descriptors(self) -> int:
        return open_descriptors(self.running.pid)

    def mappings(self) -> int:
        """Regions mapped by the daemon and its workers."""
        pids = [self.running.pid, *self.running.workers()]
        return sum(Path(f"/proc/{pid}/maps").read_text().count("memfd:test") for pid in pids)

    def wait_until_running(self, count: int, model: str = "echo") -> None:
        wait_until(lambda: self.running.model(model)["running"] == count, f"{count} requests run")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    models = tmp_path_factory.mktemp("models")
    gate = Gate(tmp_path_factory.mktemp("gate") / "open")
    gate.open()
    write_fake(models / "echo", run_gate=str(gate))
    write_fake(models / "words", inputs=[["x", "BYTES", [-1, 2]]], outputs=[["y", "BYTES", [-1, 2]]])
    write_fake(
        models / "any",
        "max_batch_size = 0",
        inputs=[["x", "FP32", [-1, -1]], ["n", "INT64", [-1]]],
        outputs=[["y", "FP32", [-1, -1]], ["m", "INT64", [-1]]],
    )
    ids = [["input_ids", "INT64", [-1, -1]], ["attention_mask", "INT64", [-1, -1]], ["extra", "FP32", [-1, 16]]]
    write_fake(
        models / "text",
        inputs=ids,
        run_gate=str(gate),
        batch={"max_queue_size": 1},
        outputs=[["a", "INT64", [-1, -1]], ["b", "INT64", [-1, -1]], ["c", "FP32", [-1, 16]]],
    )
    with (models / "text" / "model.toml").open("a") as manifest:
        manifest.write("\n[text]\n")
    shutil.copy(REPOSITORY / "models" / "language-id" / "tokenizer.json", models / "text")
    with start_daemon(tmp_path_factory.mktemp("run"), models, environment=FAKE_BACKEND) as running:
        yield Daemon(running, gate)


@pytest.fixture(autouse=True)
def nothing_left(served):
    """Every test gives back all it took: descriptors and mappings, in the daemon and in its workers."""
    before = served.descriptors
    yield
    served.gate.open()
    wait_until(lambda: served.mappings() == 0, "no region is mapped any more")
    wait_until(lambda: served.descriptors <= before, "no descriptor is left")


def test_the_number_of_wait(monkeypatch):
    monkeypatch.syspath_prepend(FAKE_BACKEND["PYTHONPATH"])
    from fake_backend import MAGIC

    assert MAGIC["wait"] == WAIT


def echo(region: int, offset: int = 0, size: int = ROW_BYTES, rows: int = 1) -> ModelInferRequest:
    return request("echo", ("x", "FP32", (rows, 16), (region, offset, size)))


def row(value: float) -> bytes:
    return struct.pack("<16f", *[value] * 16)


# ---------------------------------------------------------------- what is refused


def opened(path: str, flags: int):
    @contextlib.contextmanager
    def provide():
        fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    return provide


@contextlib.contextmanager
def regular_file():
    with tempfile.TemporaryFile() as file:
        file.truncate(MIB)
        yield file.fileno()


@contextlib.contextmanager
def shared_memory_file():
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(MIB)
        yield file.fileno()


@contextlib.contextmanager
def pipe():
    ends = os.pipe()
    yield ends[1]
    for end in ends:
        os.close(end)


@contextlib.contextmanager
def unix_socket():
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock.fileno()


@contextlib.contextmanager
def poller():
    with select.epoll() as epoll:
        yield epoll.fileno()


def memory(size: int = MIB, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, reopen: int | None = None):
    @contextlib.contextmanager
    def provide():
        with Memory(size, seals) as made:
            if reopen is None:
                yield made.fd
            else:
                with opened(f"/proc/self/fd/{made.fd}", reopen)() as fd:
                    yield fd

    return provide


BAD_DESCRIPTORS = {
    "a file": (regular_file, MIB),
    "a file in shared memory": (shared_memory_file, MIB),
    "a null device": (opened("/dev/null", os.O_RDWR), MIB),
    "a device of zeros": (opened("/dev/zero", os.O_RDWR), MIB),
    "a directory": (opened("/", os.O_RDONLY), MIB),
    "a pipe": (pipe, MIB),
    "a socket": (unix_socket, MIB),
    "an epoll": (poller, MIB),
    "a memfd without seals": (memory(seals=0), MIB),
    "a memfd that may grow": (memory(seals=fcntl.F_SEAL_SHRINK), MIB),
    "a memfd that may shrink": (memory(seals=fcntl.F_SEAL_GROW), MIB),
    "a memfd only sealed against sealing": (memory(seals=fcntl.F_SEAL_SEAL), MIB),
    "a memfd nobody may write": (memory(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE), MIB),
    "a memfd open for reading": (memory(reopen=os.O_RDONLY), MIB),
    "a memfd open for writing": (memory(reopen=os.O_WRONLY), MIB),
    "a memfd not really open": (memory(reopen=os.O_PATH), MIB),
    "a memfd smaller than declared": (memory(size=MIB - 1), MIB),
    "an empty memfd": (memory(size=0), 1),
    "no bytes of a memfd": (memory(), 0),
    "more than the limit": (memory(), (1 << 30) + 1),
    "as much as a number can say": (memory(), (1 << 64) - 1),
}


@pytest.mark.parametrize("what", BAD_DESCRIPTORS)
def test_what_is_no_sealed_memfd_is_refused_and_closed(served, what):
    provide, size = BAD_DESCRIPTORS[what]
    with served.native() as client, provide() as fd:
        before = served.descriptors
        kind, message = client.register(1, fd, size).error
        assert kind == "invalid-request"
        check_message(message)
        wait_until(lambda: served.descriptors <= before, "the descriptor is closed")
        with Memory(MIB) as good:
            assert client.register(1, good.fd, MIB).kind == Frame.REGION_READY
            good.map[:ROW_BYTES] = row(1)
            assert client.infer(2, echo(1)).tail == row(1)


def test_a_client_cannot_shrink_what_the_daemon_has_mapped(served):
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        for size in (0, MIB - 1, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        assert client.infer(2, echo(1, offset=MIB - ROW_BYTES)).tail == bytes(ROW_BYTES)


BAD_PLACES = {
    "beyond the end": (MIB, ROW_BYTES),
    "over the end": (MIB - ROW_BYTES + 1, ROW_BYTES),
    "an offset that overflows": (2**63 - 1, ROW_BYTES),
    "an offset and a size that overflow": (2**63 - ROW_BYTES, ROW_BYTES),
    "a negative offset": (-1, ROW_BYTES),
    "a byte too few": (0, ROW_BYTES - 1),
    "a byte too many": (0, ROW_BYTES + 1),
    "no bytes": (0, 0),
    "a negative size": (0, -ROW_BYTES),
    "the largest size": (0, 2**63 - 1),
}


@pytest.mark.parametrize("what", BAD_PLACES)
def test_places_outside_a_region_are_refused(served, what):
    offset, size = BAD_PLACES[what]
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        for number in (2, 3):  # the second time the head is a known one, if it ever was
            kind, message = client.infer(number, echo(1, offset, size)).error
            assert kind == "invalid-request"
            check_message(message)
        assert client.infer(4, echo(1)).tail == bytes(ROW_BYTES)


def test_a_region_is_named_by_a_number_of_the_same_connection(served):
    with served.native() as client, served.native() as other, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        assert other.infer(2, echo(1)).error[0] == "invalid-request"
        assert client.infer(2, echo(7)).error[0] == "invalid-request"
        named = echo(1)
        for value in ("1", "", "0"):
            named.inputs[0].parameters["shared_memory_region"].string_param = value
            assert client.infer(3, named).error[0] == "invalid-request"
        for missing in ("shared_memory_region", "shared_memory_byte_size"):
            partial = echo(1)
            del partial.inputs[0].parameters[missing]
            assert client.infer(4, partial).error[0] == "invalid-request"
        strange = echo(1)
        strange.inputs[0].parameters["\x1b[2J" * 1000].int64_param = 1
        kind, message = client.infer(5, strange).error
        assert kind == "invalid-request"
        check_message(message)
        assert client.infer(6, echo(1), tail=b"\0").error[0] == "invalid-request"
        assert client.infer(7, echo(1)).tail == bytes(ROW_BYTES)


def test_numbers_are_used_once_and_released_once(served):
    with served.native() as client, Memory(MIB) as region:
        assert client.register(1, region.fd, MIB).kind == Frame.REGION_READY
        assert client.register(1, region.fd, MIB).error[0] == "invalid-request"
        client.send(frame(Frame.RELEASE, 1))
        assert (client.read()[:2]) == (Frame.RELEASED, 1)
        client.send(frame(Frame.RELEASE, 1))
        assert client.read().error[0] == "invalid-request"
        assert client.infer(2, echo(1)).error[0] == "invalid-request"
        assert client.register(1, region.fd, MIB).kind == Frame.REGION_READY
        assert client.infer(3, echo(1)).tail == bytes(ROW_BYTES)


def test_a_connection_has_so_many_regions(served):
    with served.native() as client, Memory(4096) as region:
        for number in range(1, 65):
            assert client.register(number, region.fd, 4096).kind == Frame.REGION_READY
        assert client.register(65, region.fd, 4096).error[0] == "overloaded"
        client.send(frame(Frame.RELEASE, 10))
        assert client.read().kind == Frame.RELEASED
        assert client.register(65, region.fd, 4096).kind == Frame.REGION_READY


def test_all_connections_together_have_so_many_regions(tmp_path, monkeypatch):
    """A quarter of the descriptors at most, so that enough are left for connections and models."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (80, 80))
    path = tmp_path / "infer.sock"

    def converse() -> None:
        with Native(str(path)) as one, Native(str(path)) as other, Memory(4096) as region:
            for number in range(1, 7):
                assert one.register(number, region.fd, 4096).kind == Frame.REGION_READY
            for number in range(1, 5):
                assert other.register(number, region.fd, 4096).kind == Frame.REGION_READY
            kind, message = other.register(5, region.fd, 4096).error
            assert kind == "overloaded"
            check_message(message)
            one.send(frame(Frame.RELEASE, 3))
            assert one.read().kind == Frame.RELEASED
            assert other.register(6, region.fd, 4096).kind == Frame.REGION_READY
            assert one.register(3, region.fd, 4096).error[0] == "overloaded"

    async def serve() -> None:
        engine = SimpleNamespace(accepting=True, clients=Clients(ClientsSection()))
        server = NativeServer(engine, LimitsSection(), frozenset())
        server.start(listen.unix_socket(path))
        await asyncio.to_thread(converse)
        server.stop_accepting()
        await server.stop()
        assert server.regions == 0

    asyncio.run(serve())


SIZE = native.REGION_SIZE.pack(4096)
BROKEN = {
    "no descriptor": (frame(Frame.REGION, 1, SIZE, descriptors=1), 0),
    "a descriptor that is not announced": (frame(Frame.REGION, 1, SIZE), 1),
    "two announced": (frame(Frame.REGION, 1, SIZE, descriptors=2), 1),
    "two sent": (frame(Frame.REGION, 1, SIZE, descriptors=2), 2),
    "as many as are received": (frame(Frame.REGION, 1, SIZE, descriptors=4), 4),
    "more than are received": (frame(Frame.REGION, 1, SIZE, descriptors=5), 5),
    "as many as can be sent": (frame(Frame.REGION, 1, SIZE, descriptors=253), 253),
    "a size of seven bytes": (frame(Frame.REGION, 1, SIZE[:7], descriptors=1), 1),
    "no size": (frame(Frame.REGION, 1, b"", descriptors=1), 1),
    "a descriptor with a call": (frame(Frame.CALL, 1, b"\x0aServerLive", descriptors=1), 1),
    "a descriptor with a release": (frame(Frame.RELEASE, 1, descriptors=1), 1),
    "a descriptor with a request": (infer_frame(1, request("echo", ("x", "FP32", (1, 16))), bytes(64)), 1),
    "a descriptor with a large request": (
        infer_frame(1, request("any", ("x", "FP32", (256, 256)), ("n", "INT64", (0,))), bytes(1 << 18)), 1,
    ),
    "descriptors and half a frame": (frame(Frame.REGION, 1, SIZE, descriptors=2)[:10], 2),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_descriptors_where_none_belong_end_the_connection_and_are_closed(served, what):
    content, count = BROKEN[what]
    with served.native() as client, Memory(4096) as region:
        if count:
            client.send_descriptors(content, [region.fd] * count)
        else:
            client.send(content)
        last = client.read_to_end()[-1]
        assert (last.id, last.error[0]) == (0, "invalid-request")
        check_message(last.error[1])
    assert served.running.process.poll() is None


def test_a_descriptor_before_the_greeting_ends_the_connection(served):
    with Native(served.running.infer_socket, hello=False) as client, Memory(4096) as region:
        client.send_descriptors(HELLO, [region.fd])
        assert client.read_to_end()[-1].error[0] == "invalid-request"


def test_half_a_region_frame_and_silence_leaves_nothing(served):
    with Memory(4096) as region:
        for cut in (1, 10, 24, 31):
            with served.native() as client:
                client.send_descriptors(frame(Frame.REGION, 1, SIZE, descriptors=1)[:cut], [region.fd])


# ---------------------------------------------------------------- what is used


def test_regions_in_a_batch_and_alone_give_the_same(served):
    """Twenty requests at once from one region: some run alone and in place, some share a batch and are copied."""
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        for number in range(20):
            region.map[number * ROW_BYTES : (number + 1) * ROW_BYTES] = row(number)
        client.send(b"".join(infer_frame(100 + n, echo(1, n * ROW_BYTES)) for n in range(20)))
        got = {answer.id - 100: answer.tail for answer in (client.read() for _ in range(20))}
        assert got == {number: row(number) for number in range(20)}


def test_a_tensor_larger_than_a_slab_goes_through_a_region(served):
    size = 80 * MIB
    content = np.arange(size // 4, dtype=np.float32) % 90
    with Client(served.running.infer_socket, region_threshold=1, timeout=45) as client:
        answer = client.infer("any", {"x": content.reshape(80, -1), "n": np.arange(5)})
        assert np.array_equal(answer["y"].reshape(-1), content)
        assert answer["m"].tolist() == [0, 1, 2, 3, 4]


def test_some_inputs_in_a_region_and_some_behind_the_head(served):
    floats, integers = np.linspace(0, 1, 12, dtype=np.float32).tobytes(), np.arange(7).tobytes()
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        region.map[100:148] = floats
        region.map[200:256] = integers
        x, n = ("x", "FP32", (3, 4)), ("n", "INT64", (7,))
        for number, (message, tail) in enumerate(
            [
                (request("any", (*x, (1, 100, 48)), n), integers),
                (request("any", x, (*n, (1, 200, 56))), floats),
                (request("any", (*x, (1, 100, 48)), (*n, (1, 200, 56))), b""),
                (request("any", (*n, (1, 200, 56)), x), floats),
            ],
            2,
        ):
            assert client.infer(number, message, tail).tail == floats + integers


def test_a_text_beside_a_tensor_in_a_region(served):
    """Tokens take the text's place, and the region stays with the tensor it belongs to."""
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        region.map[:ROW_BYTES] = row(3)
        text = join_elements([b"Where is the station?"])
        for number, inputs in enumerate(
            [
                [("text", "BYTES", (1, 1)), ("extra", "FP32", (1, 16), (1, 0, ROW_BYTES))],
                [("extra", "FP32", (1, 16), (1, 0, ROW_BYTES)), ("text", "BYTES", (1, 1))],
            ],
            2,
        ):
            answer = client.infer(number, request("text", *inputs, outputs=("b", "c")), text)
            mask = np.frombuffer(answer.tail[:-ROW_BYTES], np.int64)
            assert set(mask.tolist()) == {0, 1}
            assert answer.tail[-ROW_BYTES:] == row(3)


def test_a_text_withdrawn_while_it_is_tokenised_gives_its_region_back(served):
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        inputs = [("text", "BYTES", (1, 1)), ("extra", "FP32", (1, 16), (1, 0, ROW_BYTES))]
        text = join_elements([b"where " * 10_000])
        frames = [infer_frame(2, request("text", *inputs), text), frame(Frame.CANCEL, 2), frame(Frame.RELEASE, 1)]
        client.send(b"".join(frames))
        assert {client.read()[:2] for _ in range(2)} == {(Frame.ERROR, 2), (Frame.RELEASED, 1)}


def test_a_text_that_is_refused_gives_its_region_back(served):
    served.gate.shut()
    tokens = [("input_ids", "INT64", (1, 1)), ("attention_mask", "INT64", (1, 1)), ("extra", "FP32", (1, 16))]
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        for number in (2, 3, 4):
            client.send(infer_frame(number, request("text", *tokens), struct.pack("<qq", WAIT, 1) + row(0)))
            if number < 4:
                served.wait_until_running(number - 1, "text")
        wait_until(lambda: served.running.model("text")["queued"] == 1, "the queue is full")
        inputs = [("text", "BYTES", (1, 1)), ("extra", "FP32", (1, 16), (1, 0, ROW_BYTES))]
        assert client.infer(5, request("text", *inputs), join_elements([b"hello"])).error[0] == "overloaded"
        client.send(frame(Frame.RELEASE, 1))
        assert client.read()[:2] == (Frame.RELEASED, 1)
        served.gate.open()
        assert {client.read()[:2] for _ in range(3)} == {(Frame.RESULT, number) for number in (2, 3, 4)}


def test_strings_in_a_region_are_checked_on_a_copy(served):
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        good = join_elements([b"one", b"two"])

        def strings(content: bytes) -> ModelInferRequest:
            region.map[: len(content)] = content
            return request("words", ("x", "BYTES", (1, 2), (1, 0, len(content))))

        assert client.infer(2, strings(good)).tail == good
        for number, bad in enumerate([good[:-1], good + b"\0", b"\xff\xff\xff\xffone", b"\3\0\0\0one"], 3):
            kind, message = client.infer(number, strings(bad)).error
            assert kind == "invalid-request"
            check_message(message)
        assert client.infer(9, strings(good)).tail == good


def test_a_client_that_rewrites_its_region_spoils_nobody_elses_answer(served):
    """One client changes strings and numbers all the time, another asks and gets what it sent."""
    is_over = threading.Event()
    good = join_elements([b"one", b"two"])
    with Memory(MIB) as region, served.native() as hostile, served.native() as client:
        hostile.register(1, region.fd, MIB)

        def rewrite() -> None:
            while not is_over.is_set():
                region.map[: len(good)] = b"\xff" * len(good)
                region.map[: len(good)] = good

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            strings = request("words", ("x", "BYTES", (1, 2), (1, 0, len(good))))
            numbers = request("any", ("x", "FP32", (1, 2), (1, 0, 8)), ("n", "INT64", (1,), (1, 0, 8)))
            kinds = set()
            for number in range(2, 202):
                hostile.send(infer_frame(2 * number, strings) + infer_frame(2 * number + 1, numbers))
                assert client.infer(number, request("words", ("x", "BYTES", (1, 2))), good).tail == good
                for _ in range(2):
                    answer = hostile.read()
                    kinds.add("ok" if answer.kind == Frame.RESULT else answer.error[0])
        finally:
            is_over.set()
            writer.join()
    assert kinds <= {"ok", "invalid-request"}


def test_a_region_released_while_in_use_lives_until_the_answer(served):
    with served.native() as client, Memory(MIB) as region:
        client.register(1, region.fd, MIB)
        served.gate.shut()
        region.map[:ROW_BYTES] = row(WAIT)
        client.send(infer_frame(2, echo(1)))
        served.wait_until_running(1)
        client.send(frame(Frame.RELEASE, 1))
        assert client.infer(3, echo(1)).error[0] == "invalid-request"
        assert served.mappings() > 0
        served.gate.open()
        assert {client.read()[:2] for _ in range(2)} == {(Frame.RESULT, 2), (Frame.RELEASED, 1)}


def test_a_client_that_leaves_while_its_region_is_in_use_takes_nothing_with_it(served):
    served.gate.shut()
    with Memory(MIB) as region:
        region.map[:ROW_BYTES] = row(WAIT)
        region.map[ROW_BYTES : 2 * ROW_BYTES] = row(1)
        with served.native() as client:
            client.register(1, region.fd, MIB)
            client.send(infer_frame(2, echo(1)))
            served.wait_until_running(1)
            client.send(b"".join(infer_frame(number, echo(1, ROW_BYTES)) for number in range(3, 200)))
            wait_until(lambda: served.running.model("echo")["queued"] > 0, "requests wait")
    wait_until(lambda: served.running.model("echo")["queued"] == 0, "what waited is withdrawn")
    served.gate.open()
    with served.native() as client:
        assert client.infer(2, request("echo", ("x", "FP32", (1, 16))), row(5)).tail == row(5)


def test_many_clients_that_vanish_leave_nothing(served):
    with Memory(MIB) as region:
        for _ in range(200):
            with served.native() as client:
                client.register(1, region.fd, MIB)
                client.send(infer_frame(2, echo(1)) * 1 + frame(Frame.RELEASE, 1)[:11])


def test_without_regions_there_is_a_clean_error_and_inline_works(own_daemon, model_repository):
    running = own_daemon(model_repository, limits={"max_regions": 0}, repository={"load": ["identity"]})
    with Native(running.infer_socket) as client, Memory(4096) as region:
        kind, message = client.register(1, region.fd, 4096).error
        assert kind == "overloaded"
        check_message(message)
        assert client.infer(2, request("identity", ("x", "FP32", (1, 16))), row(2)).tail == row(2)
    with Client(running.infer_socket, region_threshold=1) as client:
        assert client.infer("identity", {"x": np.ones((1, 16), np.float32)})["y"].tolist() == [[1.0] * 16]
