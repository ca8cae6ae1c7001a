"""Accounts of clients: who shares one, what they bound, and that they come out even."""

import os
import pwd

import pytest

from appliance.clients import Clients
from appliance.config import ClientsSection
from appliance.errors import Overloaded
from appliance.types import Peer, Role


def peer(uid: int | None = 1000, pid: int | None = 1, transport: str = "native") -> Peer:
    return Peer(transport, Role.INFER, uid, 1000, pid)


def test_a_process_is_one_client_on_all_its_connections_and_sockets():
    clients = Clients(ClientsSection())
    first = clients.enter(peer())
    assert clients.enter(peer(transport="grpc")) is first
    assert clients.enter(peer(pid=2)) is not first
    assert clients.enter(peer(uid=1001)) is not first
    assert len(clients) == 3


def test_over_tcp_each_connection_is_its_own():
    clients = Clients(ClientsSection())
    assert clients.enter(peer(None, None, "grpc"), "127.0.0.1:1") is not clients.enter(
        peer(None, None, "grpc"), "127.0.0.1:2"
    )


def test_processes_of_another_pid_namespace_are_told_apart_by_their_connections():
    clients = Clients(ClientsSection())
    first, second = clients.enter(peer(pid=0)), clients.enter(peer(pid=0))
    assert first is not second
    clients.leave(first)
    clients.leave(second)
    assert len(clients) == 0


def test_an_account_goes_with_its_last_connection():
    clients = Clients(ClientsSection())
    client = clients.enter(peer())
    clients.enter(peer())
    clients.leave(client)
    assert clients.enter(peer()) is client
    clients.leave(client)
    clients.leave(client)
    assert len(clients) == 0
    assert clients.enter(peer()) is not client


def test_ten_thousand_clients_leave_nothing_behind():
    clients = Clients(ClientsSection())
    accounts = [clients.enter(peer(pid=number)) for number in range(10_000)]
    assert len(clients) == 10_000
    for account in accounts:
        clients.leave(account)
    assert len(clients) == 0


def test_requests_and_bytes_are_bounded_and_come_out_even():
    clients = Clients(ClientsSection(max_requests_in_flight=3, max_bytes_in_flight=5000))
    client, other = clients.enter(peer()), clients.enter(peer(pid=2))
    client.take(2000)
    client.take(2000)
    with pytest.raises(Overloaded, match="more in flight than the 5000"):
        client.take(1001)
    client.take(1000)
    with pytest.raises(Overloaded, match="has 3 in flight and the limit of a client is 3"):
        client.take(0)
    other.take(5000)
    client.give_back(2000)
    client.take(2000)
    for nbytes in (2000, 2000, 1000):
        client.give_back(nbytes)
    assert (client.requests, client.bytes) == (0, 0)


def test_weights_go_by_user_name_or_number(caplog):
    name = pwd.getpwuid(os.getuid()).pw_name
    clients = Clients(ClientsSection(weights={name: 4.0, "4242": 0.5, "nobody-here": 2.0}))
    assert clients.enter(peer(os.getuid())).weight == 4.0
    assert clients.enter(peer(4242)).weight == 0.5
    assert clients.enter(peer(4243)).weight == 1.0
    assert clients.enter(peer(None, None), "127.0.0.1:9").weight == 1.0
    assert "nobody-here" in caplog.text
