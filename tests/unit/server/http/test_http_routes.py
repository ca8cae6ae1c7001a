"""What each path answers."""

import os

import pytest

from appliance import __version__
from appliance.errors import KINDS, ApplianceError, NoPlacement
from appliance.manifest import BatchSection
from appliance.server.access import METHOD_ROLE
from appliance.server.status import HTTP_STATUS
from appliance.types import ModelState, Role


def test_server_metadata_names_version_and_extensions(server):
    answer = server.ask("GET", "/v2")
    assert answer.status == 200
    assert answer.json["version"] == __version__
    assert "binary_tensor_data" in answer.json["extensions"]


def test_live_and_ready(server, engine):
    assert server.ask("GET", "/v2/health/live").json == {"live": True}
    assert server.ask("GET", "/v2/health/ready").json == {"ready": True}
    engine.ready = False
    answer = server.ask("GET", "/v2/health/ready")
    assert (answer.status, answer.json["ready"], answer.json["kind"]) == (503, False, "model-not-ready")


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_model_paths_with_and_without_version(server, version):
    metadata = server.ask("GET", f"/v2/models/echo{version}").json
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["versions"] == ["1"]
    config = server.ask("GET", f"/v2/models/echo{version}/config").json
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_STRING", "dims": []}]
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["priority_levels"] == 3
    assert server.ask("GET", f"/v2/models/echo{version}/ready").status == 200
    statistics = server.ask("GET", f"/v2/models/echo{version}/stats").json["model_stats"]
    assert [row["name"] for row in statistics] == ["echo"]


def test_the_configuration_has_the_policy_of_each_level(server, engine):
    engine.batch = BatchSection(priority_queue_policy={3: {"timeout_action": "delay"}})
    batching = server.ask("GET", "/v2/models/echo/config").json["dynamic_batching"]
    policy = {
        "timeout_action": "DELAY",
        "default_timeout_microseconds": 0,
        "allow_timeout_override": True,
        "max_queue_size": 4096,
    }
    assert batching["priority_queue_policy"] == {"3": policy}
    assert batching["default_queue_policy"] == policy | {"timeout_action": "REJECT"}


def test_a_model_that_is_not_ready_answers_503(server):
    answer = server.ask("GET", "/v2/models/idle/ready")
    assert (answer.status, answer.json["kind"]) == (503, "model-not-ready")


@pytest.mark.parametrize("path", ["/v2/models/none", "/v2/models/echo/versions/7", "/v2/models/none/stats"])
def test_unknown_models_and_versions_are_404(server, path):
    answer = server.ask("GET", path)
    assert (answer.status, answer.json["kind"]) == (404, "model-not-found")


def test_statistics_of_all_models(server, engine):
    engine.counters.success.add(1000)
    rows = server.ask("GET", "/v2/models/stats").json["model_stats"]
    assert [row["name"] for row in rows] == ["echo", "idle"]
    assert rows[0]["inference_stats"]["success"] == {"count": 1, "ns": 1000}


def test_repository_index_filters_ready(server):
    everything = server.ask("POST", "/v2/repository/index").json
    assert [(row["name"], row["state"]) for row in everything] == [("echo", "READY"), ("idle", "UNAVAILABLE")]
    assert [row["name"] for row in server.ask("POST", "/v2/repository/index", {"ready": True}).json] == ["echo"]
    assert server.ask("POST", "/v2/repository/index", {"ready": 1}).status == 400


def test_load_and_unload(server, engine):
    answer = server.ask("POST", "/v2/repository/models/idle/load", {})
    assert (answer.status, answer.json["state"]) == (200, "ready")
    answer = server.ask("POST", "/v2/repository/models/idle/unload", {"parameters": {"unload_dependents": False}})
    assert (answer.status, engine.model_states["idle"]) == (200, ModelState.UNLOADED)


def test_loading_with_an_inline_configuration_is_not_offered(server):
    answer = server.ask("POST", "/v2/repository/models/idle/load", {"parameters": {"config": "{}"}})
    assert (answer.status, answer.json["kind"]) == (501, "unimplemented")


def test_tcp_may_not_load_unless_configured(serve):
    answer = serve().ask("POST", "/v2/repository/models/idle/load", {}, tcp=True)
    assert (answer.status, answer.json["kind"]) == (403, "permission-denied")
    admin = serve(access={"tcp_role": "admin"})
    assert admin.ask("POST", "/v2/repository/models/idle/load", {}, tcp=True).status == 200


def test_the_unix_socket_knows_the_peer(server, engine):
    body = {"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}]}
    assert server.ask("POST", "/v2/models/echo/infer", body).status == 200
    peer = engine.requests[0].peer
    assert (peer.transport, peer.uid, peer.pid) == ("http", os.getuid(), os.getpid())


def test_admin_status(server):
    status = server.ask("GET", "/admin/status").json
    assert status["pid"] == os.getpid()
    assert status["rss_bytes"] > 1_000_000
    assert status["uptime_s"] >= 0
    assert status["sockets"] == {"http": "unix", "http_tcp": f"127.0.0.1:{server.port}"}
    assert [model["state"] for model in status["models"]] == ["ready", "unloaded"]


def test_admin_lists(server):
    assert server.ask("GET", "/admin/hardware").json["devices"][0]["id"] == "cpu"
    (backend,) = server.ask("GET", "/admin/backends").json["backends"]
    assert (backend["name"], backend["status"]) == ("echoes", "available")
    assert [model["name"] for model in server.ask("GET", "/admin/models").json["models"]] == ["echo", "idle"]
    assert server.ask("GET", "/admin/models/idle").json["state"] == "unloaded"
    assert server.ask("GET", "/admin/models/none").status == 404


def test_head_answers_without_a_body(server):
    answer = server.ask("HEAD", "/v2/health/live")
    assert (answer.status, answer.raw) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/", "/v3", "/v2/", "/v2/models/", "/v2/models/a/b/c", "/admin", "/%2e%2e/etc"])
def test_unknown_paths_are_json_404(server, path):
    answer = server.ask("GET", path)
    assert answer.status == 404
    assert set(answer.json) == {"error", "kind"}


def test_a_wrong_method_is_405_and_names_the_right_one(server):
    answer = server.ask("DELETE", "/v2/models/echo")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")
    assert server.ask("GET", "/v2/models/echo/infer").headers["allow"] == "POST"
    assert server.ask("PUT", "/v2/repository/index").json["kind"] == "unimplemented"


@pytest.mark.parametrize(
    "path", ["/v2/systemsharedmemory/status", "/v2/trace/setting", "/v2/models/echo/trace/setting", "/v2/logging"]
)
def test_parts_of_the_protocol_not_offered_are_501(server, path):
    assert server.ask("GET", path).status == 501


def test_every_route_needs_a_method_of_the_access_table(server):
    rows = server.server._app._table()
    assert {row.access for row in rows} <= set(METHOD_ROLE)
    assert {row.template for row in rows if METHOD_ROLE[row.access] is Role.ADMIN} == {
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/{model}/unload",
        "/admin/hardware/refresh",
        "/admin/hardware/record",
        "/admin/models/{model}/tune",
        "/admin/models/{model}/quantize",
        "/admin/models/{model}/variants/remove",
        "/admin/models/{model}/pin",
        "/admin/models/{model}/unpin",
        "/admin/models/{model}/instances",
        "/admin/jobs/{job}/cancel",
        "/admin/doctor",
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_error_kind_has_its_status(server, engine, kind):
    async def refuse():
        raise KINDS[kind]("cannot do it: because")

    engine.before_answer = refuse
    answer = server.ask("POST", "/v2/models/echo/infer", {"inputs": []})
    assert answer.status == HTTP_STATUS[kind]
    assert answer.json == {"error": "cannot do it: because", "kind": kind}


def test_an_unknown_exception_is_500_with_a_request_id_and_a_traceback_in_the_log_only(server, engine, caplog):
    async def fail():
        raise RuntimeError("secret")

    engine.before_answer = fail
    answer = server.ask("POST", "/v2/models/echo/infer", {"inputs": []}, {"x-request-id": "my-id"})
    assert (answer.status, answer.json["kind"]) == (500, ApplianceError.kind)
    assert "my-id" in answer.json["error"]
    assert "secret" not in answer.json["error"]
    assert "secret" in caplog.text
    assert "my-id" in caplog.text


def test_an_error_of_a_load_travels(server, engine):
    async def load(_):
        raise NoPlacement("cannot place: nothing fits")

    engine.load = load
    answer = server.ask("POST", "/v2/repository/models/idle/load", {})
    assert (answer.status, answer.json["kind"]) == (400, "no-placement")


def test_request_ids_are_echoed_where_harmless(server):
    assert server.ask("GET", "/v2", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = server.ask("GET", "/v2", headers={"x-request-id": "a b;<script>"}).headers["x-request-id"]
    assert made not in ("", "a b;<script>")


def test_a_connection_serves_many_requests(server):
    connection = server.connect()
    for _ in range(3):
        connection.request("GET", "/v2/health/live")
        response = connection.getresponse()
        assert response.read() == b'{"live":true}'
        assert response.headers["date"]
