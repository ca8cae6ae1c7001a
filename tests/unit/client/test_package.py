"""The package as a whole: where it looks for sockets, what it imports, what it exports."""

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import appliance_client
from appliance_client import endpoints

PACKAGE = Path(appliance_client.__file__).parent


def names(**environ):
    return endpoints.inference_socket(environ), endpoints.http_socket(environ)


def test_without_anything_set_the_service_is_meant():
    assert names() == (Path("/run/appliance/infer.sock"), Path("/run/appliance/http.sock"))


def test_the_users_own_daemon_is_meant_where_its_socket_exists(tmp_path):
    assert names(XDG_RUNTIME_DIR=str(tmp_path))[0] == Path("/run/appliance/infer.sock")
    directory = tmp_path / "appliance"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as native, socket.socket(socket.AF_UNIX) as http:
        native.bind(str(directory / "infer.sock"))
        http.bind(str(directory / "http.sock"))
        assert names(XDG_RUNTIME_DIR=str(tmp_path)) == (directory / "infer.sock", directory / "http.sock")


def test_what_the_environment_names_is_meant():
    assert names(APPLIANCE_SOCKET_DIR="/z") == (Path("/z/infer.sock"), Path("/z/http.sock"))
    assert names(APPLIANCE_SOCKET="/x/infer.sock") == (Path("/x/infer.sock"), Path("/x/http.sock"))
    assert names(APPLIANCE_SOCKET="/x/a.sock", APPLIANCE_HTTP_SOCKET="/y/b.sock") == (
        Path("/x/a.sock"),
        Path("/y/b.sock"),
    )


def modules_after(statement):
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(output.stdout.split())


def test_importing_the_package_loads_neither_numpy_nor_protobuf_nor_asyncio():
    loaded = modules_after("import appliance_client")
    assert not {"numpy", "google.protobuf", "asyncio", "http.client"} & loaded
    assert len(loaded) < 60


def test_the_administrative_client_needs_neither_numpy_nor_protobuf():
    loaded = modules_after("from appliance_client import AdminClient; AdminClient('/none')")
    assert not {"numpy", "google.protobuf", "asyncio"} & loaded


def test_calls_other_than_inference_need_no_numpy():
    assert "numpy" not in modules_after("from appliance_client import Client; Client('/none')")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_library_imports_nothing_of_the_daemon(path):
    """It is installed where no daemon is, and a daemon of another version may run beside it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
            assert node.level == 0
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            continue
        assert not any(name.split(".")[0] in ("appliance", "appliance_plugins", "appliancectl") for name in imported)


def test_every_exported_name_exists():
    for name in appliance_client.__all__:
        assert getattr(appliance_client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = appliance_client.Nothing


def test_the_example_in_the_packages_docstring_runs(peer, monkeypatch, capsys):
    def respond(session, request):
        text = request.contents[0][4:]
        session.result(request.identifier, [("label", "BYTES", [1, 1], len(text).to_bytes(4, "little") + text)])

    peer.models["language-id"] = respond
    monkeypatch.setenv("APPLIANCE_SOCKET", str(peer.path))
    lines = [line[4:] for line in (appliance_client.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(lines) <= 10
    exec("\n".join(lines), {})
    assert capsys.readouterr().out.startswith("[['Guten Morgen']] Timings(decode_us=1,")
