"""Priority, timeout policy and clients' bounds over the wire: what requests and manifests can say of scheduling."""

import struct
import subprocess
import sys
from statistics import median

import pytest

from appliance_client import Client, InvalidRequest, Overloaded
from support.daemon import FAKE_BACKEND, start_daemon, wait_until
from support.models import Gate, write_fake
from support.native import Native, infer_frame, request
from support.transports import OK, TRANSPORTS, Input, Request

WAIT = 116.0  # the fake backend's MAGIC for `wait`


def row(value: float) -> bytes:
    return struct.pack("<16f", *[value] * 16)


def head(model: str, **parameters: int | str):
    """A request's head; words become string parameters."""
    message = request(model, ("x", "FP32", (1, 16)))
    for name, value in parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        else:
            message.parameters[name].uint64_param = value
    return message


class Daemon:
    """A daemon whose models do nothing while `gate` is shut."""

    def __init__(self, running, gate: Gate) -> None:
        self.running = running
        self.gate = gate

    def fill(self, client: Native, model: str) -> set[int]:
        """Keep a worker busy until the gate opens, and its place for the next batch; returns the requests' ids."""
        self.gate.shut()
        message = request(model, ("x", "FP32", (1, 16)))
        client.send(infer_frame(1, message, row(WAIT)))
        wait_until(lambda: self.running.model(model)["running"] == 1, "a request runs")
        client.send(infer_frame(2, message, row(WAIT)))
        self.holds(model, 2)
        return {1, 2}

    def holds(self, model: str, count: int) -> None:
        """Wait until so many requests are running or waiting."""
        wait_until(lambda: sum(self.running.model(model)[key] for key in ("queued", "running")) == count, f"{count}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    models = tmp_path_factory.mktemp("models")
    gate = Gate(tmp_path_factory.mktemp("gate") / "open")
    gate.open()
    write_fake(models / "three", "max_batch_size = 1", run_gate=str(gate))
    levels = "{ 1 = { allow_timeout_override = false }, 4 = { max_queue_size = 1 }, 5 = { timeout_action = 'delay' } }"
    batch = {"priority_levels": 5, "default_priority_level": 3, "priority_queue_policy": levels}
    write_fake(models / "five", "max_batch_size = 1", batch=batch, run_gate=str(gate))
    limits = {"max_requests_in_flight": 17, "max_bytes_in_flight": 4096, "weights": {"0": 2.0}}
    with start_daemon(tmp_path_factory.mktemp("run"), models, environment=FAKE_BACKEND, clients=limits) as running:
        yield Daemon(running, gate)


@pytest.fixture(autouse=True)
def open_gate(served):
    yield
    served.gate.open()


def answered_in_order(served: Daemon, model: str, *asked: dict) -> list[int]:
    """Places in `asked` of requests that waited together, in the order they were answered."""
    with Native(served.running.infer_socket) as client:
        busy = served.fill(client, model)
        for number, parameters in enumerate(asked, 10):
            client.send(infer_frame(number, head(model, **parameters), row(number)))
        served.holds(model, 2 + len(asked))
        served.gate.open()
        answers = [client.read() for _ in range(len(busy) + len(asked))]
        for answer in answers:
            assert answer.tail == (row(WAIT) if answer.id in busy else row(answer.id))
        return [answer.id - 10 for answer in answers if answer.id not in busy]


@pytest.mark.parametrize("words", [False, True])
def test_the_most_urgent_level_goes_first_by_number_and_by_word(served, words):
    """In the main: whoever is passed over for long enough has a turn, so that nobody starves."""
    levels = ["background", "default", "interactive"] if words else [3, 2, 1]
    asked = [{"priority": level} for level in levels for _ in range(5)]
    order = answered_in_order(served, "three", *asked)
    places = [[order.index(number) for number in range(start, start + 5)] for start in (0, 5, 10)]
    background, default, interactive = map(median, places)
    assert interactive < default < background
    assert all(sorted(of_a_level) == of_a_level for of_a_level in places)


def test_metrics_say_what_waits_at_each_level(served):
    with Native(served.running.infer_socket) as client:
        served.fill(client, "three")
        for number, priority in enumerate(("interactive", "background", "background"), 10):
            client.send(infer_frame(number, head("three", priority=priority), row(number)))
        served.holds("three", 5)
        lines = served.running.http("GET", "/metrics")[2].decode().splitlines()
        served.gate.open()
        assert {client.read().id for _ in range(5)} == {1, 2, 10, 11, 12}
    metric = 'appliance_requests_queued_by_priority{model="three",version="1",priority="%d"} %d'
    assert all(metric % of_level in lines for of_level in ((1, 1), (3, 2)))


def test_numbers_beyond_the_levels_and_zero_mean_the_default(served):
    asked = [{"priority": 2}, {"priority": 4}, {"priority": 0}, {"priority": 2**64 - 1}, {}]
    assert answered_in_order(served, "three", *asked) == [0, 1, 2, 3, 4]
    asked = [{"priority": 3}, {"priority": 6}, {"priority": 0}, {"priority": 2**64 - 1}, {}]
    assert answered_in_order(served, "five", *asked) == [0, 1, 2, 3, 4]


def test_a_level_has_a_bound_of_its_own(served):
    with Native(served.running.infer_socket) as client:
        served.fill(client, "five")
        for number in (10, 11):
            client.send(infer_frame(number, head("five", priority=4), row(0)))
        refused = client.read()
        assert (refused.id, refused.error[0]) == (11, "overloaded")
        assert "max_queue_size is 1" in refused.error[1]
        client.send(infer_frame(12, head("five", priority=2), row(0)))
        served.gate.open()
        assert {client.read().id for _ in range(4)} == {1, 2, 10, 12}


def test_a_level_may_ignore_the_timeout_parameter_but_not_the_frames_own(served):
    with Native(served.running.infer_socket) as client:
        served.fill(client, "five")
        client.send(infer_frame(10, head("five", priority=1, timeout=20_000), row(0)))
        client.send(infer_frame(11, head("five", priority=2, timeout=40_000), row(0)))
        client.send(infer_frame(12, head("five", priority=1), row(0), timeout_us=60_000))
        late = [client.read(), client.read()]  # by then the first one's time is over too
        assert [(answer.id, answer.error[0]) for answer in late] == [
            (11, "deadline-exceeded"),
            (12, "deadline-exceeded"),
        ]
        served.gate.open()
        assert {client.read().id for _ in range(3)} == {1, 2, 10}


def test_a_request_whose_level_delays_is_answered_after_its_time(served):
    with Native(served.running.infer_socket) as client:
        served.fill(client, "five")
        client.send(infer_frame(10, head("five", priority=5, timeout=20_000), row(10)))
        client.send(infer_frame(11, head("five", priority=5), row(11)))
        client.send(infer_frame(12, head("five", priority=2, timeout=60_000), row(0)))
        assert client.read().error[0] == "deadline-exceeded"  # now the first one's time is over
        served.gate.open()
        answers = [client.read() for _ in range(4)]
        assert [answer.id for answer in answers if answer.id >= 10] == [11, 10]
        assert answers[-1].tail == row(10)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
def test_every_transport_carries_priorities(served, transport):
    """Whatever is waited for, the most urgent level has a place, and the one that is full refuses."""
    opened = transport(served.running)
    try:
        with Native(served.running.infer_socket) as client:
            served.fill(client, "five")
            client.send(infer_frame(10, head("five", priority=4), row(0)))
            served.holds("five", 3)
            x = Input("x", "FP32", (1, 16), row(1))
            outcome = opened.send(Request("five", [x], parameters={"priority": 4}))
            assert (outcome.kind, "of priority 4" in outcome.message) == ("overloaded", True)
            served.gate.open()
            assert {client.read().id for _ in range(3)} == {1, 2, 10}
        for priority in (0, 1, 5, 6, 2**63 - 1, 2**63, 2**64 - 1, "interactive", "default", "background"):
            assert opened.send(Request("five", [x], parameters={"priority": priority})).kind == OK
    finally:
        opened.close()


def test_the_configuration_is_what_clients_see(served):
    batching = served.running.get("/v2/models/five/config")["dynamic_batching"]
    assert (batching["priority_levels"], batching["default_priority_level"]) == (5, 3)
    assert batching["priority_queue_policy"]["5"]["timeout_action"] == "DELAY"
    assert {"schedule_policy", "sequence"} <= set(served.running.get("/v2")["extensions"])


# ---------------------------------------------------------------- clients


def test_a_clients_connections_share_its_bound_and_others_have_their_own(served):
    one, other = Native(served.running.infer_socket), Native(served.running.infer_socket)
    with one, other:
        served.fill(one, "three")
        for number in range(10, 25):
            (one if number % 2 else other).send(infer_frame(number, head("three"), row(number)))
        served.holds("three", 17)
        kind, message = other.infer(30, head("five"), row(0)).error  # whatever the model
        assert (kind, "limit of a client is 17" in message) == ("overloaded", True)
        refused = 'appliance_requests_refused_total{model="five",version="1",kind="overloaded"} '
        assert refused in served.running.http("GET", "/metrics")[2].decode()
        # another process is another client
        program = (
            "import sys, numpy; from appliance_client import Client\n"
            "print(Client(sys.argv[1]).infer('five', {'x': numpy.ones((1, 16), 'f4')})['y'][0, 0])"
        )
        command = [sys.executable, "-c", program, served.running.infer_socket]
        assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == "1.0\n"
        served.gate.open()
        assert {one.read().id for _ in range(9)} == {1, 2, *range(11, 25, 2)}
        assert {other.read().id for _ in range(8)} == set(range(10, 25, 2))
        assert other.infer(31, head("five"), row(31)).tail == row(31)


def test_a_clients_bytes_are_bounded_and_come_back(served):
    with Native(served.running.infer_socket) as client:
        wide = request("three", ("x", "FP32", (1, 16)))
        for _ in range(100):  # 64 bytes each: 4096 would be reached, were they not given back
            assert client.infer(1, wide, row(1)).tail == row(1)
        for _ in range(70):
            refused = client.infer(2, request("three", ("x", "FP32", (2, 16))), row(1) * 2)
            assert refused.error[0] == "invalid-request"
        for _ in range(70):
            assert client.infer(3, head("three", timeout=-1 % 2**64, priority=1), row(1)).tail == row(1)


def test_what_a_lost_connection_had_in_flight_is_given_back(served):
    with Native(served.running.infer_socket) as keeper:  # keeps the account
        for _ in range(3):
            with Native(served.running.infer_socket) as client:
                served.fill(client, "three")
                client.send(infer_frame(10, head("three", priority="background"), row(1)))
                served.holds("three", 3)
            served.gate.open()
            served.holds("three", 0)
        assert keeper.infer(1, head("three"), row(5)).tail == row(5)


# ---------------------------------------------------------------- the client library


def test_the_client_library_says_priorities_and_sequences(served):
    import numpy as np

    value = {"x": np.ones((1, 16), np.float32)}
    with Client(served.running.infer_socket) as client, Native(served.running.infer_socket) as other:
        for priority in (0, 3, "interactive", 2**64 - 1):
            assert client.infer("five", value, priority=priority)["y"].sum() == 16
        assert [answer["y"].sum() for answer in client.stream("five", [value] * 3, priority=1)] == [16] * 3
        with pytest.raises(InvalidRequest, match="priority: it must not be negative"):
            client.infer("five", value, priority=-1)
        with pytest.raises(InvalidRequest, match="'urgent' as the parameter priority"):
            client.infer("five", value, priority="urgent")
        for sequence in (7, 2**64 - 1, "a"):
            with pytest.raises(InvalidRequest, match="not stateful"):
                client.infer("five", value, sequence_id=sequence, sequence_start=True)
        with pytest.raises(InvalidRequest, match="cannot start or end a sequence"):
            client.infer("five", value, sequence_end=True)
        served.fill(other, "five")
        other.send(infer_frame(10, head("five", priority=4), row(0)))
        served.holds("five", 3)
        with pytest.raises(Overloaded, match="of priority 4"):
            client.infer("five", value, priority=4)
