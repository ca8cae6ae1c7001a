"""Configuration and manifests: the defaults, and every problem at once, with a suggestion."""

import contextlib
import json
import math
import os
import random
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from appliance.artifacts import resolve_inside, verify_digest
from appliance.config import Config, LimitsSection, parse_config, read_config, split_address
from appliance.errors import ArtifactCorrupt, ConfigError, InvalidManifest, InvalidRequest
from appliance.manifest import QueuePolicy, check_model_name, parse_manifest, read_manifest
from appliance.types import Role

REPOSITORY = Path(__file__).parents[2]
CONFIG = (REPOSITORY / "config.toml").read_text(encoding="utf-8")
SHA256 = "0" * 64


# ---------------------------------------------------------------- config.toml


def sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def test_the_file_in_the_repository_equals_the_defaults():
    assert parse_config(CONFIG) == Config() == parse_config("") == read_config(None)


def test_the_file_has_every_key_and_each_has_a_comment():
    written = tomllib.loads(CONFIG)
    assert {name: set(values) for name, values in written.items()} == {
        name: set(section.model_fields) for name, section in sections().items()
    }
    lines = CONFIG.splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
            assert lines[number - 1].endswith("."), line


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[limit]\n", "limit: unknown key, did you mean 'limits'?"),
        ("[clients]\nmax_requests_in_flight = 0", "clients.max_requests_in_flight: "),
        ("[clients]\nmax_bytes_in_flight = -1", "clients.max_bytes_in_flight: "),
        ("[clients]\nweight = {}", "clients.weight: unknown key, did you mean 'weights'?"),
        ("[clients.weights]\nalice = 0", "clients.weights.alice: "),
        ("[clients.weights]\nalice = -1.0", "clients.weights.alice: "),
        ("[clients.weights]\nalice = inf", "clients.weights.alice: "),
        ("[clients.weights]\nalice = nan", "clients.weights.alice: "),
        ('[clients.weights]\nalice = "much"', "clients.weights.alice: "),
        ('[clients.weights]\n"" = 1', "clients.weights"),
        ("[limits]\nmax_conections = 1", "limits.max_conections: unknown key, did you mean 'max_connections'?"),
        ("[log]\nlevle = 'info'", "log.levle: unknown key, did you mean 'level'?"),
        ("[backends.openvino]\nenable = false", "backends.openvino.enable: unknown key, did you mean 'enabled'?"),
        ("[listen]\nzzz = 1", "listen.zzz: unknown key"),
        ("[limits]\nmax_request_bytes = 1", "limits.max_request_bytes: "),
        ("[limits]\nmax_request_bytes = 4294967296", "limits.max_request_bytes: "),
        ("[limits]\nheader_seconds = 0", "limits.header_seconds: "),
        ("[limits]\nheader_seconds = nan", "limits.header_seconds: "),
        ("[limits]\nheader_seconds = inf", "limits.header_seconds: "),
        ("[limits]\nmax_connections = 'many'", "limits.max_connections: "),
        ("[access]\ntcp_role = 'root'", "access.tcp_role: "),
        ("[access]\nadmin_uids = [-1]", "access.admin_uids.0: "),
        ("[log]\nlevel = 'INFO'", "log.level: "),
        ("[listen]\ngrpc_tcp = '0.0.0.0:1'", "listen.grpc_tcp: '0.0.0.0:1' must be a loopback address"),
        ("[listen]\nhttp_tcp = 'localhost'", "listen.http_tcp: 'localhost' must be host:port"),
    ],
)
def test_a_problem_is_named_with_its_key_and_a_suggestion(text, says):
    message = problems(text)
    assert message.startswith("cannot use the configuration: ")
    assert says in message


def test_all_problems_are_reported_at_once():
    message = problems(
        "[limts]\n[log]\nlevel='x'\njson='y'\n[listen]\ngrpc_tcp='[::]:1'\nhttp_tcp='example.com:80'\n"
        "[workers]\nload_seconds=-1\n[shutdown]\ngrace_seconds=-1\n"
    )
    for key in (
        "limts", "log.level", "log.json", "listen.grpc_tcp", "listen.http_tcp", "workers.load_seconds",
        "shutdown.grace_seconds",
    ):  # fmt: skip
        assert f"{key}: " in message
    assert message.count(";") == 6


@pytest.mark.parametrize("text", ["[", "a = ", "= 1", "[a]\n[a]", "\x00", "x = " + "[" * 10_000])
def test_what_is_no_toml_is_refused(text):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        parse_config(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            read_config(path)


def test_the_command_line_is_checked_like_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[listen]\ngrpc_tcp = '127.0.0.1:1'\n[log]\nlevel = 'debug'\n")
    config = read_config(path, {"listen": {"http_tcp": "[::1]:2"}})
    assert (config.listen.grpc_tcp, config.listen.http_tcp, config.log.level) == ("127.0.0.1:1", "[::1]:2", "debug")
    with pytest.raises(ConfigError, match=r"cannot use the command line: listen\.http_tcp"):
        read_config(path, {"listen": {"http_tcp": "0.0.0.0:2"}})


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.9.1:65535", "[::1]:80", "localhost:1"])
def test_loopback_addresses_are_taken(address):
    config = parse_config(f"[listen]\ngrpc_tcp = '{address}'\nhttp_tcp = '{address}'")
    assert config.listen.grpc_tcp == address


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1", "[::]:1", "10.0.0.1:1", "128.0.0.1:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1", "localhost.:1", ":1",
        "*:1", "127.1:1", "0:1", "2130706433:1", "localhost.example.com:1", "127.0.0.1.example.com:1", "127.0.0.1",
        "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:x", "127.0.0.1:\u00b2", " 127.0.0.1:1",
    ],
)  # fmt: skip
def test_every_other_address_is_refused(address):
    for key in ("grpc_tcp", "http_tcp"):
        assert f"listen.{key}: " in problems(f"[listen]\n{key} = '{address}'")


def test_nobody_over_tcp_is_an_administrator_unless_the_configuration_says_so():
    assert Config().access.tcp_role is Role.INFER
    assert (Config().listen.grpc_tcp, Config().listen.http_tcp, Config().access.admin_uids) == ("", "", [])


def test_limits_fit_the_fields_that_tell_clients_of_them():
    """WELCOME has 32 bits for each, and 64 for a region."""
    largest = {}
    for name, field in LimitsSection.model_fields.items():
        bounds = [rule.le for rule in field.metadata if hasattr(rule, "le")]
        largest[name] = min(bounds, default=None)
    for name in ("max_request_bytes", "max_requests_in_flight", "max_regions"):
        assert largest[name] < 2**32
    assert largest["max_region_bytes"] < 2**64


def test_sockets_go_where_the_user_keeps_such_things(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/somewhere")
    assert Config().socket_directory() == Path("/somewhere/appliance")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Config().socket_directory() == Path("/run/appliance")
    assert parse_config("[listen]\ndirectory = 'here'").socket_directory() == Path("here")


def test_addresses_are_taken_apart():
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("a:0") == ("a", 0)


# ---------------------------------------------------------------- model.toml

ARTIFACT = '[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\n'
MODEL = f'schema = 1\nname = "m"\n{ARTIFACT}'
STATEFUL = MODEL + "[sequence]\nstate = [{input = 'a', output = 'b'}]\n"


def manifest_problems(text: str, name: str = "m") -> str:
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(text, name)
    return str(caught.value)


def test_almost_everything_has_a_default():
    manifest = parse_manifest(MODEL, "m")
    assert (manifest.versions, manifest.task, manifest.max_batch_size) == (["1"], "tensor", None)


def test_versions_are_numbers_and_ordered_as_such():
    text = 'name = "m"\n' + "".join(ARTIFACT.replace("1/", f"{version}/") for version in (10, 9, 2))
    assert parse_manifest(text, "m").versions == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "m"\n', "artifacts: "),
        ('name = "m"\nartifacts = []', "at least one artifact"),
        (MODEL.replace('"m"', '"n"'), "its name 'n' must equal the directory's"),
        (MODEL.replace("schema = 1", "schema = 2"), "schema: "),
        (MODEL.replace("1/model", "model"), "path must begin with a version number"),
        (MODEL.replace("1/model", "0/model"), "version number"),
        (MODEL.replace("1/model", "01/model"), "version number"),
        (MODEL.replace("1/model", "1/../../model"), "below the model's directory"),
        (MODEL.replace("1/model", "/1/model"), "below the model's directory"),
        (MODEL.replace("1/model", "1/a\\u0000"), "below the model's directory"),
        (MODEL + f'sha256 = "{SHA256[:-1]}"', "artifacts.0.sha256: "),
        (MODEL + f'sha256 = "{SHA256.replace("0", "A")}"', "artifacts.0.sha256: "),
        (MODEL + 'sha256 = ""', "artifacts.0.sha256: "),
        (MODEL + 'pth = "x"', "artifacts.0.pth: unknown key, did you mean 'path'?"),
        (MODEL + "[batch]\nmax_queue_sise = 1", "batch.max_queue_sise: unknown key, did you mean 'max_queue_size'?"),
        (MODEL + "[batch]\nmax_queue_size = 0", "batch.max_queue_size: "),
        (MODEL + "[batch]\nmax_queue_delay_us = -1", "batch.max_queue_delay_us: "),
        (MODEL + "[batch]\nmax_queue_delay_us = 60_000_001", "batch.max_queue_delay_us: "),
        (MODEL + "[batch]\npreferred_batch_sizes = [4, 2]", "preferred_batch_sizes must ascend"),
        (MODEL + "[batch]\npreferred_batch_sizes = [2, 2]", "preferred_batch_sizes must ascend"),
        (MODEL + "[batch]\npreferred_batch_sizes = [0, 2]", "batch.preferred_batch_sizes.0: "),
        ("max_batch_size = 4\n" + MODEL + "[batch]\npreferred_batch_sizes = [2, 8]", "and max_batch_size is 4"),
        ("max_batch_size = 0\n" + MODEL + "[batch]\npreferred_batch_sizes = [1]", "holds 1, and max_batch_size is 0"),
        (MODEL + "[batch]\ndefault_timeout_ms = 86_400_001", "batch.default_timeout_ms: "),
        (MODEL + '[batch]\ntimeout_action = "DELAY"', "batch.timeout_action: "),
        (MODEL + "[batch]\npriority_levels = -1", "batch.priority_levels: "),
        (MODEL + "[batch]\npriority_levels = 65", "batch.priority_levels: "),
        (MODEL + "[batch]\npriority_levels = 5", "default_priority_level must say which of the 5 priority_levels"),
        (
            MODEL + "[batch]\npriority_levels = 2\ndefault_priority_level = 3",
            "default_priority_level (3) must be from 1 to 2",
        ),
        (MODEL + "[batch]\ndefault_priority_level = 4", "default_priority_level (4) must be from 1 to 3"),
        (MODEL + "[batch.priority_queue_policy.4]", "priority_queue_policy.4 must be a level from 1 to 3"),
        (MODEL + "[batch.priority_queue_policy.0]", "a level of priority is a number from 1 to 64"),
        (MODEL + "[batch.priority_queue_policy.01]", "a level of priority is a number from 1 to 64"),
        (MODEL + "[batch.priority_queue_policy.interactive]", "a level of priority is a number from 1 to 64"),
        (MODEL + "[batch.priority_queue_policy.1]\nmax_queue_size = 0", "priority_queue_policy.1.max_queue_size: "),
        (
            MODEL + "[batch.priority_queue_policy.1]\nmax_queue_siz = 1",
            "batch.priority_queue_policy.1.max_queue_siz: unknown key, did you mean 'max_queue_size'?",
        ),
        (MODEL + "[text]\nbuckets = [32, 16]", "buckets must ascend"),
        (MODEL + "[text]\nbuckets = [16]\nmax_tokens = 17", "the last bucket must hold max_tokens (17)"),
        (MODEL + '[text]\ntokenizer = "../tokenizer.json"', "below the model's directory"),
        (MODEL + '[image]\ntensor = "x"\nwidth = 8\nheight = 8\nmean = [0, 0]', "mean needs 1 or 3 values, not 2"),
        (MODEL + '[image]\ntensor = "x"\nwidth = 8\nheight = 8\nstd = [0]', "std must not be 0"),
        (MODEL + '[image]\ntensor = "x"\nwidth = 100000\nheight = 8', "image.width: "),
        (MODEL + '[classification]\nlabels = "/etc/passwd"', "below the model's directory"),
        (MODEL + '[[inputs]]\nname = "x"\ndatatype = "FP8"\nshape = [1]', "datatype 'FP8' is none of"),
        (MODEL + '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-2]', "inputs.0.shape.0: "),
        (MODEL + '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [1]\n' * 2, "inputs must not repeat a name"),
        ('max_batch_size = 99999\n' + MODEL, "max_batch_size: "),
        (MODEL + "[sequence]", "sequence.state: "),
        (MODEL + "[sequence]\nstate = []", "sequence.state: "),
        (STATEFUL + "max_sequences = 0", "sequence.max_sequences: "),
        (STATEFUL + "idle_seconds = 0", "sequence.idle_seconds: "),
        (STATEFUL + 'strategy = "newest"', "sequence.strategy: "),
        (STATEFUL + "[sequence.controls]\nstrat = 's'", "sequence.controls.strat: unknown key, did you mean 'start'?"),
        (STATEFUL + "[sequence.controls]\nstart = 's'\nend = 's'", "must not name an input twice"),
        (STATEFUL + "[sequence.controls]\nready = 'a'", "must not name an input twice"),
        (MODEL + "[sequence]\nstate = [{input = 'a', output = 'b', initial = [[1, nan]]}]", "must not hold nan"),
        (MODEL + "[sequence]\nstate = [{input = '', output = 'b'}]", "sequence.state.0.input: "),
        (
            MODEL + "[sequence]\nstate = [{input = 'a', output = 'b'}, {input = 'c', output = 'b'}]",
            "must not name an output twice",
        ),
        (STATEFUL + "[text]", "sequence does not go with text"),
        (STATEFUL + "[cache]\nmax_bytes = 1", "sequence does not go with cache"),
        (STATEFUL + '[image]\ntensor = "a"\nwidth = 8\nheight = 8', "must not both fill 'a'"),
        ("[", "cannot read the manifest of 'm'"),
        ("a = " + "[" * 10_000, "cannot read the manifest of 'm'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_manifest_is_named(text, says):
    message = manifest_problems(text)
    assert message.startswith("cannot ")
    assert says in message


def test_all_problems_of_a_manifest_are_reported_at_once():
    message = manifest_problems(
        MODEL + 'sha256 = "x"\n[batch]\nmax_queue_size = 0\nmax_batch_secs = 1\n[text]\npad_id = -1\n[samples]\nx = 1\n'
    )
    for key in ("artifacts.0.sha256", "batch.max_queue_size", "batch.max_batch_secs", "text.pad_id", "samples.x"):
        assert f"{key}: " in message


def test_a_model_that_says_nothing_of_priorities_has_three_levels_with_one_policy():
    batch = parse_manifest(MODEL, "m").batch
    assert (batch.levels, batch.default_level) == (3, 2)
    policies = batch.policies()
    assert set(policies) == {0, 1, 2, 3}
    assert set(policies.values()) == {QueuePolicy(4096, 0, False, True)}


def test_a_state_may_begin_with_infinity_and_workers_read_it_so():
    text = MODEL + "[sequence]\nstate = [{input = 'a', output = 'b', initial = [-inf, 2]}]"
    manifest = parse_manifest(text, "m")
    assert manifest == parse_manifest(text, "m")
    read = json.loads(manifest.model_dump_json(by_alias=True))
    assert read["sequence"]["state"][0]["initial"] == [-math.inf, 2]


def test_a_levels_policy_takes_what_it_does_not_say_from_the_model():
    text = """
        [batch]
        max_queue_size = 100
        default_timeout_ms = 40
        allow_timeout_override = false
        priority_levels = 4
        default_priority_level = 3
        [batch.priority_queue_policy.1]
        max_queue_size = 7
        default_timeout_ms = 0
        [batch.priority_queue_policy.3]
        timeout_action = "delay"
        allow_timeout_override = true
    """
    policies = parse_manifest(MODEL + text, "m").batch.policies()
    assert policies[1] == QueuePolicy(7, 0, False, False)
    assert policies[2] == policies[4] == QueuePolicy(100, 40_000, False, False)
    assert policies[0] == policies[3] == QueuePolicy(100, 40_000, True, True)


@pytest.mark.parametrize("name", ["m", "0", "a.b-c_d", "x" * 63])
def test_names_of_models(name):
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "A",
        "a ",
        "a/b",
        "../a",
        "..",
        ".",
        ".a",
        "-a",
        "_a",
        "a\n",
        "a\0",
        "x" * 64,
        "\u0430",
        "a\u0301",
        "%61",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(InvalidRequest, match="as a model name"):
        check_model_name(name)


@pytest.mark.parametrize("seed", range(10))
def test_random_files_are_read_or_refused_and_nothing_else(seed):
    """The files of the repository with bytes changed, cut out and doubled."""
    chance = random.Random(seed)
    sources = [CONFIG, *(path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("models/*/model.toml")))]
    for _ in range(100):
        text = chance.choice(sources)
        for _ in range(chance.randrange(1, 6)):
            start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
            change = chance.randrange(4)
            if change == 0:
                text = text[:start] + chr(chance.choice([0, 10, 34, 39, 45, 61, 91, 93, 0xE9, 0x2028])) + text[start:]
            elif change == 1:
                text = text[:start] + text[min(end, start + 30) :]
            elif change == 2:
                text = text[:end] + text[start:end][:200] + text[end:]
            else:
                value = chance.choice(["-1", "1e400", "nan", "[]", "{}", '""', "2**63", "9" * 400])
                text = text[:start] + value + text[start:]
        with contextlib.suppress(ConfigError):
            parse_config(text)
        with contextlib.suppress(InvalidManifest):
            parse_manifest(text, "digits")


# ---------------------------------------------------------------- the directory


def make(directory: Path, *files: str) -> Path:
    for file in files:
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    return directory


def test_a_bare_artifact_is_a_model_and_odd_versions_are_ignored(tmp_path):
    directory = make(tmp_path / "m", "1/model.onnx", "12/model.onnx", "3/model.xml")
    make(directory, "0/model.onnx", "01/model.onnx", "abc/model.onnx", f"{2**63}/model.onnx", "-1/model.onnx", "4/x")
    assert read_manifest(directory).versions == ["1", "3", "12"]


def test_a_directory_without_anything_to_serve_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(InvalidManifest, match=r"neither model\.toml nor"):
        read_manifest(tmp_path / "m")


def test_a_manifest_that_cannot_be_read_is_refused_without_its_path(tmp_path):
    directory = make(tmp_path / "m", "1/model.onnx")
    (directory / "model.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidManifest) as caught:
        read_manifest(directory)
    assert str(tmp_path) not in str(caught.value)
    (directory / "model.toml").unlink()
    (directory / "model.toml").mkdir()
    with pytest.raises(InvalidManifest) as caught:
        read_manifest(directory)
    assert str(tmp_path) not in str(caught.value)


def test_links_lead_nowhere_outside(tmp_path):
    directory = make(tmp_path / "m", "1/model.onnx")
    make(tmp_path, "outside/secret")
    (directory / "1" / "out").symlink_to(tmp_path / "outside" / "secret")
    (directory / "2").symlink_to(tmp_path / "outside")
    (directory / "in").symlink_to(directory / "1")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "1" / "broken").symlink_to(directory / "nothing")
    assert resolve_inside(directory, "1/model.onnx") == resolve_inside(directory, "in/model.onnx")
    for bad in (
        "1/out",
        "2/secret",
        "../outside/secret",
        "1/../../outside/secret",
        "loop",
        "loop/x",
        "1/broken",
        "1/no",
    ):
        with pytest.raises(InvalidManifest) as caught:
            resolve_inside(directory, bad)
        assert str(tmp_path) not in str(caught.value)


def test_a_repository_may_itself_be_reached_through_a_link(tmp_path):
    make(tmp_path / "real", "1/model.onnx")
    (tmp_path / "m").symlink_to(tmp_path / "real")
    assert resolve_inside(tmp_path / "m", "1/model.onnx").name == "model.onnx"


def test_digests_are_compared(tmp_path):
    path = make(tmp_path, "file") / "file"
    verify_digest(path, None, "file")
    verify_digest(path, "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73", "file")
    for digest in (SHA256, "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f74"):
        with pytest.raises(ArtifactCorrupt, match="cannot use 'file': its sha256 is ed7002b439e9"):
            verify_digest(path, digest, "file")
    with pytest.raises(ArtifactCorrupt) as caught:
        verify_digest(tmp_path / "missing", SHA256, "missing")
    assert str(tmp_path) not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")
