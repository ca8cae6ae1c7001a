"""Who may import what, and what no source file may do. Each rule has its reason, each module its place in a table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
DAEMON = REPOSITORY / "daemon"
PLUGINS = REPOSITORY / "plugins"

#: Layer of every module of `appliance`; packages stand for all their modules. Imports never lead upwards, so that what
#: decides can be tested without what transports, and what transports can be exchanged.
LAYERS = {
    0: {"", "errors", "types", "problems"},  # values and error classes: no I/O
    1: {
        "alarm", "artifacts", "backend", "child", "config", "conversation", "guardian", "heap", "hotplug", "inventory",
        "lifeline", "manifest", "measurement", "quality", "slab", "stored", "text", "wire",
    },  # read the world, describe it
    2: {
        "activity", "backlog", "batcher", "cache", "call", "candidates", "choice", "chooser", "clients", "cost_line",
        "cost_model", "crashes", "deadline", "dispatcher", "doctor", "errands", "explanation", "flights", "gather",
        "hardware", "idler", "instance", "jobs", "metrics", "models", "placement", "planner", "plugins", "poison",
        "policy", "quantizer", "region", "registry", "registry_link", "sequences", "shares", "single_flight", "split",
        "steps", "text_plans", "tuner", "waiting", "worker_link",
    },  # decide and hold state; each owns its own
    3: {"engine"},  # the one way from a validated request to a result
    4: {"server"},  # transports: decode, call the engine, encode
    5: {"main"},  # composition: start in one order, stop in the reverse
}  # fmt: skip
WORKER = "worker"
REGISTRAR = "registrar"
#: Packages that run in processes of their own: nothing else imports them, and they import layers 0 and 1.
APART = (WORKER, REGISTRAR)


class Import(NamedTuple):
    """One import; `is_checked` where type checkers alone see it, `is_late` where it happens inside a function."""

    module: str
    line: int
    is_checked: bool
    is_late: bool


def _walk(node: ast.AST, is_checked: bool, is_late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        late = is_late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        checked = is_checked or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, checked, late)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            yield Import(child.module or "", child.lineno, checked, late)
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, checked, late)
        yield from _walk(child, checked, late)


class Module(NamedTuple):
    """One source file."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    def __str__(self) -> str:
        return self.name


@cache
def modules() -> dict[str, Module]:
    """Every module of the daemon, the client, the command line and the plugins, generated ones left out."""
    found = {}
    for root in (DAEMON, PLUGINS):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if path.name.endswith("_pb2.py") or "build" in parts or not parts[0].startswith("appliance"):
                continue
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[name] = Module(name, path, tree, tuple(_walk(tree, False, False)))
    return found


def of(package: str) -> list[Module]:
    return [module for name, module in modules().items() if name == package or name.startswith(f"{package}.")]


def own_imports(module: Module, is_runtime: bool = True) -> set[str]:
    """Modules of ours that `module` imports, generated ones included."""
    known = set(modules()) | {"appliance.wire.worker_pb2", "appliance.wire.open_inference_pb2"}
    return {each.module for each in module.imports if each.module in known and not (is_runtime and each.is_checked)}


def layer_of(name: str) -> int | str:
    """Layer of a module of `appliance`, or one of APART."""
    first = name.removeprefix("appliance").removeprefix(".").partition(".")[0]
    if first in APART:
        return first
    found = [layer for layer, names in LAYERS.items() if first in names]
    assert len(found) == 1, f"{name} needs one place in the table of layers"
    return found[0]


# ---------------------------------------------------------------- layers


def test_every_name_in_the_table_is_a_module():
    known = {name.removeprefix("appliance").removeprefix(".").partition(".")[0] for name in modules()}
    assert set().union(*LAYERS.values()) <= known
    assert set(APART) <= known


@pytest.mark.parametrize("module", of("appliance"), ids=str)
def test_imports_lead_to_the_same_layer_or_a_lower_one(module):
    layer = layer_of(module.name)
    for imported in own_imports(module):
        if imported == "appliance":
            continue
        other = layer_of(imported)
        if layer in APART:
            assert other == layer or other in (0, 1), f"{module} imports {imported}"
        else:
            assert other not in APART, f"{module} imports {imported}: its modules run in processes of their own only"
            assert other <= layer, f"{module} (layer {layer}) imports {imported} (layer {other})"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: own_imports(module) - {name} for name, module in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name in done or name not in graph:
            return
        for imported in graph[name]:
            if not name.startswith(f"{imported}."):  # a package is not what its modules import
                visit(imported, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


# ---------------------------------------------------------------- who may use what

#: Packages, who may import them at run time, and why nobody else.
ALLOWED = {
    "numpy": (
        {"appliance.worker", "appliance_plugins", "appliance_client", "appliancectl"},
        "the front-end stays small and computes nothing",
    ),
    "onnxruntime": (
        {"appliance_plugins", "appliance.worker.quantizing"},
        "vendor runtimes are a plugin's business, in a worker; quantising is theirs too, in a task of its own",
    ),
    "openvino": (
        {"appliance_plugins", "appliance.worker.quantizing"},
        "vendor runtimes are a plugin's business, in a worker; quantising is theirs too, in a task of its own",
    ),
    "nncf": ({"appliance.worker.quantizing"}, "it is heavy, optional, and asked in a task of its own"),
    "openvino_telemetry": (set(), "the appliance calls nobody"),
    "openvino_genai": ({"appliance_plugins"}, "vendor runtimes are a plugin's business, in a worker"),
    "tensorrt": ({"appliance_plugins"}, "vendor runtimes are a plugin's business, in a worker"),
    "pynvml": (
        {"appliance.inventory.nvml", "appliance.worker.energy"},
        "NVML may hang or crash; short-lived processes of their own ask it",
    ),
    "torch": (set(), "nothing needs it, and loading it costs seconds"),
    "onnx": ({"appliance.worker.quantizing"}, "models are opened by the runtime that serves them"),
    "PIL": ({"appliance.worker"}, "pictures come from strangers; they are decoded where a crash costs a worker"),
    "tokenizers": ({"appliance.text"}, "it costs memory, which machines without text models need not pay"),
    "grpc": (set(), "the server speaks gRPC itself: one that knows who calls"),
    "uvicorn": ({"appliance.server"}, "transports stop at the server's door"),
    "starlette": ({"appliance.server"}, "transports stop at the server's door"),
    "httptools": ({"appliance.server"}, "transports stop at the server's door"),
    "hpack": ({"appliance.server"}, "transports stop at the server's door"),
    "orjson": ({"appliance.server"}, "transports stop at the server's door"),
    "sqlite_utils": ({"appliance.registrar"}, "it costs 25 MB; the process that has them is there while it is needed"),
    "sqlite3": ({"appliance.registrar"}, "one process owns the registry"),
    "uvloop": ({"appliance.main"}, "which loop runs is the composition's choice"),
    "pydantic": (
        {"appliance.config", "appliance.manifest", "appliance.problems"},
        "it checks what people write; values of the program are dataclasses, and workers start without it",
    ),
    "click": ({"appliancectl"}, "only the command line has commands"),
    "rich": ({"appliancectl"}, "only the command line has a screen"),
    "asyncio": (
        {"appliance", "appliance_client", "appliancectl"},
        "a plugin knows no asyncio",
    ),
}  # fmt: skip


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_stay_where_they_belong(package):
    allowed, reason = ALLOWED[package]
    for module in modules().values():
        for each in module.imports:
            if each.module.partition(".")[0] == package and not each.is_checked:
                may = any(module.name == name or module.name.startswith(f"{name}.") for name in allowed)
                assert may, f"{module}, line {each.line}, imports {package}: {reason}"


#: Modules and what they know nothing of, so that they can be tested with values alone.
IGNORANT = {
    "appliance.worker": ({"asyncio"}, "a worker does one thing at a time"),
    "appliance.batcher": ({"asyncio", "socket", "time"}, "the queue knows no clock and no connection"),
    "appliance.cost_line": ({"asyncio", "socket", "time", "os"}, "what batches cost is arithmetic"),
    "appliance.cost_model": ({"asyncio", "socket", "time", "os"}, "what batches cost is arithmetic"),
    "appliance.sequences": ({"asyncio", "socket", "time"}, "who is next depends on no clock and no connection"),
    "appliance.planner": ({"asyncio", "socket", "time", "os"}, "checking a head is arithmetic"),
    "appliance.gather": ({"asyncio", "socket", "time", "os"}, "laying out a batch is arithmetic"),
    "appliance.call": ({"asyncio", "socket", "os"}, "a call is a value with a state"),
    "appliance.cache": ({"asyncio", "socket", "time", "os"}, "what is kept, and for how long, knows no clock"),
    "appliance.single_flight": ({"asyncio", "socket", "os"}, "who waits for whom is bookkeeping"),
    "appliance.errors": ({"os", "socket", "logging"}, "errors are values"),
    "appliance.types": ({"os", "socket", "logging"}, "values have no effects"),
    "appliance.wire": ({"asyncio", "socket", "time", "os"}, "frames are bytes"),
    "appliance.backend": ({"asyncio", "socket"}, "the contract is one of values"),
    "appliance.registrar": ({"asyncio", "socket"}, "the registrar does one thing at a time"),
    "appliance.stored": ({"asyncio", "socket", "time", "os"}, "records are values"),
}


@pytest.mark.parametrize("name", IGNORANT)
def test_some_modules_know_nothing_of_the_world(name):
    forbidden, reason = IGNORANT[name]
    for module in of(name):
        used = {each.module.partition(".")[0] for each in module.imports if not each.is_checked} & forbidden
        assert not used, f"{module} imports {', '.join(used)}: {reason}"


def test_the_client_library_stands_on_its_own():
    """It is what other programs install; it shares the protocol's documents with the daemon, not its code."""
    for module in of("appliance_client"):
        used = {
            each.module for each in module.imports if each.module.partition(".")[0] in ("appliance", "appliancectl")
        }
        assert not used, f"{module} imports {used}"


def test_the_command_line_goes_through_the_client_library():
    """Whatever it does anybody's program can do."""
    for module in of("appliancectl"):
        used = {each.module for each in module.imports if each.module.partition(".")[0] == "appliance"}
        assert not used, f"{module} imports {used}"


def test_plugins_use_the_contract_alone():
    """In-tree backends get no privilege: what they import, any plugin may."""
    contract = {"appliance.backend", "appliance.inventory", "appliance.types", "appliance.errors"}
    for module in of("appliance_plugins"):
        used = {each for each in own_imports(module) if each.partition(".")[0] == "appliance"}
        assert used <= contract, f"{module} imports {used - contract}"


def test_vendor_runtimes_are_imported_late():
    """A plugin's module can be imported where its runtime is not installed."""
    for module in of("appliance_plugins"):
        for each in module.imports:
            if each.module.partition(".")[0] in ("onnxruntime", "openvino", "openvino_genai", "tensorrt"):
                assert each.is_late or each.is_checked, f"{module}, line {each.line}"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement, in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(ended.stdout.split())


HEAVY = {
    "numpy", "onnxruntime", "pynvml", "openvino", "torch", "PIL", "onnx", "scipy", "pandas", "tokenizers", "grpc",
    "sqlite_utils",
}  # fmt: skip


def test_the_front_end_loads_nothing_heavy_whatever_its_dependencies_import():
    loaded = loaded_by("import appliance.main")
    assert "appliance" in loaded
    assert not loaded & HEAVY


def test_a_worker_loads_neither_servers_nor_configuration():
    loaded = loaded_by("import appliance.worker.loop, appliance.worker.loading")
    assert "numpy" in loaded
    assert not loaded & {"pydantic", "uvicorn", "uvloop", "asyncio", "onnxruntime", "openvino", "torch", "grpc"}


def test_importing_the_client_alone_loads_next_to_nothing():
    assert not loaded_by("import appliance_client") & (HEAVY | {"google", "asyncio", "appliance", "pydantic"})


# ---------------------------------------------------------------- what nobody does

#: Modules that turn bytes into code or objects (CVE-2024-2912, CVE-2025-32434, CVE-2026-7301): no peer gets that far.
CODE_FROM_BYTES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "code",
    "codeop", "jsonpickle", "yaml", "xmlrpc",
}  # fmt: skip
#: Functions that do the same, or hand words to a shell.
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "torch.load", "np.load"}
#: The wall clock jumps: intervals and deadlines are CLOCK_MONOTONIC. These show a date to people.
WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}
SHOWN_TO_PEOPLE = {
    "appliance.dispatcher",
    "appliance.quantizer",
    "appliance.tuner",
    "appliance.server.http_app",
    "appliance.registry",
}


def calls_of(module: Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_no_bytes_become_code_and_no_words_reach_a_shell(module):
    for each in module.imports:
        assert each.module.partition(".")[0] not in CODE_FROM_BYTES, f"line {each.line} imports {each.module}"
    for name, call in calls_of(module):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "np.load":
            assert keywords.get("allow_pickle") == "False", f"line {call.lineno}: arrays of objects are pickles"
            continue
        assert name not in CALLS, f"line {call.lineno} calls {name}"
        assert keywords.get("shell", "False") == "False", f"line {call.lineno} uses a shell"
        assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno} allows pickles"
        if name.endswith(("extractall", ".extract")):
            assert keywords.get("filter") == "'data'", f"line {call.lineno} unpacks an archive without a filter"


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_nothing_is_measured_with_the_wall_clock(module):
    used = {name for name, _ in calls_of(module)} & WALL_CLOCK
    assert not used or module.name in SHOWN_TO_PEOPLE, used


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_no_class_or_module_is_named_for_nothing(module):
    names = [module.name.rpartition(".")[2].title().replace("_", "")]
    names += [node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    bad = [name for name in names if name.endswith(("Manager", "Helper", "Helpers", "Util", "Utils", "Info", "Data"))]
    assert not bad
