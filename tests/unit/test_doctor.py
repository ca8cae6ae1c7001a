"""The doctor names each seeded fault rightly, says what helps, and finds nothing else; a healthy machine has none."""

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.backend import Variant
from appliance.config import Config
from appliance.doctor import Severity
from appliance.doctor.diagnosis import CHECKS, diagnose, is_healthy
from appliance.doctor.facts import Directory, Environment, Facts, ModelFacts
from appliance.doctor.gathering import directory_facts, gather_facts
from appliance.doctor.surroundings import RUNTIME_VARIABLES
from appliance.errors import ArtifactCorrupt
from appliance.inventory import Device, Inventory, Memory, Rung, Step
from appliance.inventory.ladder import climb, failed, passed
from appliance.inventory.nvidia_trouble import refusal_trouble
from appliance.inventory.survey import survey
from appliance.inventory.system import Identity
from appliance.measurement import VariantKey, key_of
from appliance.plugins import BackendRecord, PluginStatus
from appliance.registry import RegistryHealth
from appliance.types import ModelState, ModelStatus
from appliancectl.doctor import RUNTIME_VARIABLES as SENT_VARIABLES
from support.machine import DIRECTORIES, MACHINES, Replay

GIB = 1 << 30
LADDER = climb(passed(Step.PRESENT), passed(Step.DRIVER), passed(Step.OPENABLE))
CPU = Device("cpu", "cpu", "A CPU", 16 * GIB, ("avx2",), "GenuineIntel", cores=8, ladder=climb(passed(Step.PRESENT)))
GPU = Device("nvidia0", "gpu", "RTX 4090", 24 * GIB, ("sm_89",), "nvidia", "580.65", "GPU-1", ladder=LADDER)
IGPU = Device("intel-gpu0", "gpu", "Iris Xe", 16 * GIB, (), "intel", is_integrated=True, ladder=LADDER)

ONNX = BackendRecord("onnxruntime", PluginStatus.AVAILABLE, devices=("cpu", "nvidia0"), python="/env/bin/python")
OPENVINO = BackendRecord("openvino", PluginStatus.AVAILABLE, devices=("cpu", "intel-gpu0"), python="/env/bin/python")

STATUS = ModelStatus(
    "digits",
    "1",
    ModelState.READY,
    variant="onnxruntime-nvidia0-fp16",
    requested_device="nvidia0",
    device="nvidia0",
    provider="CUDAExecutionProvider",
    runtime="onnxruntime 1.31",
    pid=7,
    resident_bytes=GIB,
)
MODEL = ModelFacts(STATUS, ways=4)

HEALTHY = Facts(
    inventory=Inventory((CPU, GPU, IGPU), 8, 16 * GIB, host={"architecture": "x86_64"}),
    backends={"onnxruntime": ONNX, "openvino": OPENVINO},
    models=(MODEL, ModelFacts(ModelStatus("spare", "1", ModelState.UNLOADED))),
    registry=RegistryHealth(schema="1", rows={"measurements": 4}),
    registry_moved_aside="",
    directories=tuple(Directory(purpose, path, "", 500 * GIB, 90 * GIB) for purpose, path in DIRECTORIES.items()),
    environments=(Environment("/env/bin/python", frozenset({"onnxruntime-gpu", "openvino"})),),
    memory=Memory(16 * GIB, 16 * GIB, 0, 9 * GIB),
    cpu_quota=None,
    descriptors=65536,
    max_connections=4096,
    service=Identity(990, "appliance", ("appliance",), ("appliance",)),
    is_unit=True,
    service_environment={"OMP_NUM_THREADS": "4"},
    caller_environment={"OMP_NUM_THREADS": "4"},
)


def devices(*found: Device) -> dict:
    return {"inventory": replace(HEALTHY.inventory, devices=(CPU, *found))}


def ladder(device: Device, rung: Rung) -> Device:
    below = [each for each in LADDER if list(Step).index(each.step) < list(Step).index(rung.step)]
    return replace(device, ladder=climb(*(each for each in below if each.passed), rung))


def model(**changes) -> dict:
    return {"models": (replace(MODEL, status=replace(STATUS, **changes)),)}


def facts_of_model(**changes) -> dict:
    return {"models": (replace(MODEL, **changes),)}


def backend(record: BackendRecord, **changes) -> dict:
    return {"backends": {**HEALTHY.backends, record.name: replace(record, **changes)}}


def directory(purpose: str, **changes) -> dict:
    return {
        "directories": tuple(
            replace(each, **changes) if each.purpose == purpose else each for each in HEALTHY.directories
        )
    }


NO_CUDA = "this build of onnxruntime has no CUDA provider: install onnxruntime-gpu in an environment of its own"
TENSORRT = BackendRecord("tensorrt", PluginStatus.FAILED, python="/trt/bin/python", distribution="trt-plugin 2.0")
LOST = {"state": ModelState.QUARANTINED, "reason": "quarantined for 60 s: its worker crashed 3 times within a minute"}

#: Fault: what is changed, the check that must find it, how bad it is, and words of its title, reason or fix.
FAULTS: dict[str, tuple[dict, str, Severity, list[str]]] = {
    "driver upgraded under its kernel module": (
        devices(ladder(GPU, refusal_trouble({"code": 18, "message": "mismatch"}, "570.1")), IGPU),
        "device",
        Severity.ERROR,
        ["nvidia0", "restart required", "570.1", "restart the machine"],
    ),
    "no driver": (
        devices(ladder(GPU, failed(Step.DRIVER, "no driver is bound", "sudo ubuntu-drivers install")), IGPU),
        "device",
        Severity.ERROR,
        ["no working driver", "ubuntu-drivers"],
    ),
    "user not in the render group": (
        devices(
            GPU,
            ladder(
                IGPU,
                failed(
                    Step.OPENABLE,
                    "user appliance may not open /dev/dri/renderD128",
                    "sudo usermod -aG render appliance, then restart the daemon",
                ),
            ),
        ),
        "device",
        Severity.WARNING,
        ["may not be opened", "user appliance", "usermod -aG render appliance"],
    ),
    "driver refuses without naming the user": (
        devices(ladder(GPU, failed(Step.OPENABLE, "NVML refuses", "ls -l /dev/nvidia*")), IGPU),
        "device",
        Severity.ERROR,
        ["runs as appliance", "/dev/nvidia*"],
    ),
    "device that computes wrongly": (
        devices(ladder(GPU, failed(Step.SMOKE, "it answered 3 instead of 4", "")), IGPU),
        "device",
        Severity.ERROR,
        ["computes wrongly", "appliancectl hardware"],
    ),
    "NVIDIA GPU and the CPU build of ONNX Runtime": (
        backend(ONNX, devices=("cpu",), unlisted={"nvidia0": NO_CUDA}),
        "unused-device",
        Severity.WARNING,
        ["nvidia0 (RTX 4090)", "no CUDA provider", "onnxruntime-gpu", "[backends.onnxruntime]"],
    ),
    "Intel GPU without its OpenCL driver": (
        backend(OPENVINO, devices=("cpu",), unlisted={"intel-gpu0": "install the package intel-opencl-icd"}),
        "unused-device",
        Severity.WARNING,
        ["intel-gpu0", "OpenVINO", "intel-opencl-icd"],
    ),
    "Ascend NPU without a plugin": (
        devices(GPU, IGPU, Device("ascend0", "npu", "910B", GIB, (), "huawei", "24.1", ladder=LADDER)),
        "unused-device",
        Severity.WARNING,
        ["ascend0", "no installed backend serves", "CANN", "onnxruntime-cann"],
    ),
    "plugin that crashes": (
        backend(TENSORRT, reason="cannot probe 'tensorrt': it was killed by SIGSEGV"),
        "backend",
        Severity.ERROR,
        ["tensorrt is broken", "SIGSEGV", "trt-plugin 2.0", "/trt/bin/python", "enabled = false"],
    ),
    "plugin without its library": (
        backend(TENSORRT, status=PluginStatus.UNSUPPORTED, reason="libnvinfer.so.10 is missing"),
        "backend",
        Severity.WARNING,
        ["libnvinfer.so.10", "[backends.tensorrt]"],
    ),
    "disabled plugin": (
        backend(TENSORRT, status=PluginStatus.DISABLED, reason="the configuration disables it"),
        "backend",
        Severity.NOTE,
        ["tensorrt is disabled", "enabled = true"],
    ),
    "two builds of ONNX Runtime in one environment": (
        {"environments": (Environment("/env/bin/python", frozenset({"onnxruntime", "onnxruntime-gpu", "openvino"})),)},
        "runtime-clash",
        Severity.WARNING,
        ["onnxruntime and onnxruntime-gpu", "/env/bin/python -m pip uninstall -y onnxruntime onnxruntime-gpu"],
    ),
    "survey that failed": (
        {"inventory": replace(HEALTHY.inventory, problems=("cannot survey the hardware: no answer within 2 s",))},
        "survey",
        Severity.WARNING,
        ["no answer within 2 s", "appliancectl hardware --refresh"],
    ),
    "model that cannot be loaded": (
        model(state=ModelState.FAILED, reason="cannot load 'digits': model.onnx is cut short", pid=None),
        "model",
        Severity.ERROR,
        ["model digits cannot be loaded", "cut short", "appliancectl load digits"],
    ),
    "model in quarantine": (
        model(**LOST, last_crash="was killed by SIGSEGV", pid=None),
        "model",
        Severity.ERROR,
        ["quarantined", "SIGSEGV", "journalctl -u applianced", "appliancectl pin digits"],
    ),
    "model that restarts": (
        model(state=ModelState.RESTARTING, reason="restarting: its worker was killed by SIGKILL", pid=None),
        "model",
        Severity.WARNING,
        ["restarting", "SIGKILL"],
    ),
    "model that crashed and came back": (
        model(restarts=2, last_crash="was killed by SIGBUS"),
        "crashes",
        Severity.WARNING,
        ["2 times", "SIGBUS", "nvidia0", "journalctl"],
    ),
    "session that silently runs on the CPU": (
        model(device="cpu", fallback="onnxruntime-nvidia0-fp16 ran on 'cpu': cannot load libcudnn.so.9"),
        "placement",
        Severity.WARNING,
        ["was to run on nvidia0 and runs on cpu", "libcudnn.so.9", 'fallback = "forbid"'],
    ),
    "model on its second choice": (
        model(requested_device="cpu", device="cpu", fallback="onnxruntime-nvidia0-fp16: the device is out of memory"),
        "fallback",
        Severity.WARNING,
        ["runs on cpu as a fallback", "out of memory", "appliancectl load digits"],
    ),
    "fallback that the manifest allows": (
        facts_of_model(
            status=replace(STATUS, requested_device="cpu", device="cpu", fallback="out of memory"),
            fallback_policy="allow",
        ),
        "fallback",
        Severity.NOTE,
        ["as a fallback"],
    ),
    "pinned variant that is not to be had": (
        facts_of_model(pinned="openvino-cpu-int8"),
        "pin",
        Severity.WARNING,
        ["openvino-cpu-int8", "appliancectl explain digits", "appliancectl unpin digits"],
    ),
    "measurements of another driver": (
        facts_of_model(unmeasured=4, outdated=4),
        "measurements",
        Severity.WARNING,
        ["out of date", "driver", "appliancectl tune digits"],
    ),
    "no measurements yet": (
        facts_of_model(unmeasured=3),
        "measurements",
        Severity.NOTE,
        ["3 of 4", "appliancectl tune digits"],
    ),
    "model on the swap": (
        facts_of_model(swapped_bytes=GIB // 2),
        "swapped",
        Severity.WARNING,
        ["512 MiB", "MemorySwapMax=0"],
    ),
    "state directory of another user": (
        directory("state", problem="its mode forbids it"),
        "directory",
        Severity.ERROR,
        ["state directory cannot be written", "runs as appliance", f"-o appliance {DIRECTORIES['state']}"],
    ),
    "no model repository": (
        directory("models", problem="it does not exist"),
        "directory",
        Severity.ERROR,
        ["models directory cannot be read", "repository.path"],
    ),
    "full disk": (
        directory("state", free_bytes=1 << 20),
        "disk-space",
        Severity.ERROR,
        ["disk of state is full", "1 of 512000 MiB", "du -xh"],
    ),
    "nearly full disk of everything": (
        {"directories": tuple(replace(each, free_bytes=6 * GIB) for each in HEALTHY.directories)},
        "disk-space",
        Severity.WARNING,
        ["models and cache and state", "nearly full"],
    ),
    "registry that was moved aside": (
        {"registry_moved_aside": "registry.db.damaged-1"},
        "registry",
        Severity.WARNING,
        ["began anew", "registry.db.damaged-1", "appliancectl tune"],
    ),
    "registry that was moved aside long ago": (
        {"registry": replace(HEALTHY.registry, moved_aside=("registry.db.damaged-1",))},
        "registry",
        Severity.NOTE,
        [f"rm {DIRECTORIES['state']}/registry.db.damaged-1"],
    ),
    "registry that is locked": (
        {"registry": RegistryHealth("cannot use the registry: it is locked by another process")},
        "registry",
        Severity.ERROR,
        ["locked", "fuser -v"],
    ),
    "registry of a newer version": (
        {"registry": RegistryHealth("cannot use the registry: its schema is '9'; a newer version has used it")},
        "registry",
        Severity.ERROR,
        ["install the newer version"],
    ),
    "registry of another program": (
        {"registry": RegistryHealth("cannot use the registry: the file is another program's database")},
        "registry",
        Severity.ERROR,
        ["repository.state"],
    ),
    "registry on a full disk": (
        {"registry": RegistryHealth("cannot write the registry: the disk is full")},
        "registry",
        Severity.ERROR,
        ["make room", "df -h"],
    ),
    "registry that may not be written": (
        {"registry": RegistryHealth("cannot write the registry: its directory is read-only, or another user's")},
        "registry",
        Severity.ERROR,
        ["read-only", "ls -ld"],
    ),
    "registry that fails its integrity check": (
        {"registry": replace(HEALTHY.registry, problems=("row 3 missing from index",))},
        "registry",
        Severity.ERROR,
        ["row 3 missing", "registry.db away"],
    ),
    "too few descriptors": (
        {"descriptors": 1024},
        "descriptors",
        Severity.WARNING,
        ["1024", "LimitNOFILE=65536", "limits.max_connections"],
    ),
    "tight memory limit": (
        {"memory": Memory(GIB, 16 * GIB, GIB, GIB // 2)},
        "memory-limit",
        Severity.WARNING,
        ["1024 MiB", "MemoryMax=1536M"],
    ),
    "no memory left": (
        {"memory": Memory(16 * GIB, 16 * GIB, 0, GIB // 4)},
        "memory",
        Severity.WARNING,
        ["256 of 16384 MiB", "digits", "appliancectl unload"],
    ),
    "less than a core": (
        {"cpu_quota": 0.5},
        "cpu-quota",
        Severity.WARNING,
        ["0.5 of a core", "CPUQuota="],
    ),
    "CPU without AVX2": (
        {"inventory": replace(HEALTHY.inventory, devices=(replace(CPU, features=()), GPU, IGPU))},
        "cpu-features",
        Severity.WARNING,
        ["AVX2", "host-passthrough"],
    ),
    "arm64 CPU without NEON": (
        {"inventory": replace(HEALTHY.inventory, host={"architecture": "aarch64"})},
        "cpu-features",
        Severity.WARNING,
        ["ASIMD"],
    ),
    "variable that the daemon lacks": (
        {"caller_environment": {"LD_LIBRARY_PATH": "/opt/cuda/lib64"}},
        "environment",
        Severity.NOTE,
        ["LD_LIBRARY_PATH", "lacks it", "systemctl edit applianced", "Environment=LD_LIBRARY_PATH=/opt/cuda/lib64"],
    ),
    "variable that the daemon has otherwise": (
        {"caller_environment": {"OMP_NUM_THREADS": "8"}},
        "environment",
        Severity.NOTE,
        ["differently", "'4'", "'8'"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(fault):
    changes, check, severity, words = FAULTS[fault]
    (finding,) = diagnose(replace(HEALTHY, **changes))
    assert (finding.check, finding.severity) == (check, severity)
    text = f"{finding.title}. {finding.reason}. {finding.fix}"
    assert [word for word in words if word not in text] == [], text
    assert is_healthy([finding]) is (severity is Severity.NOTE)


def test_a_healthy_installation_has_no_findings():
    assert diagnose(HEALTHY) == []
    assert is_healthy([])


def test_a_daemon_without_any_backend_is_told_so_and_not_only_that_devices_are_idle():
    found = diagnose(replace(HEALTHY, backends={}))
    assert found[0].check == "no-backend"
    assert {finding.check for finding in found} == {"no-backend", "unused-device"}


def test_every_check_is_seeded():
    assert set(CHECKS) == {check for _, check, _, _ in FAULTS.values()} | {"no-backend"}


def test_the_worst_comes_first():
    changes = {}
    for fault in ("no measurements yet", "too few descriptors", "full disk"):
        changes.update(FAULTS[fault][0])
    found = [finding.severity for finding in diagnose(replace(HEALTHY, **changes))]
    assert found == [Severity.ERROR, Severity.WARNING, Severity.NOTE]


def test_a_library_path_is_suspect_where_a_runtime_finds_nothing():
    """The commonest fault of all: it works in the shell, which has the path, and not in the unit, which lacks it."""
    changes = FAULTS["NVIDIA GPU and the CPU build of ONNX Runtime"][0]
    caller = {"LD_LIBRARY_PATH": "/opt/cuda/lib64", "CUDA_HOME": "/opt/cuda", "ZE_AFFINITY_MASK": "0"}
    found = diagnose(replace(HEALTHY, **changes, caller_environment=caller))
    severities = {finding.title.split()[0]: finding.severity for finding in found if finding.check == "environment"}
    assert severities == {
        "LD_LIBRARY_PATH": Severity.WARNING,
        "CUDA_HOME": Severity.WARNING,
        "ZE_AFFINITY_MASK": Severity.NOTE,
    }


def test_variables_of_hardware_that_is_not_there_are_left_alone():
    caller = {"CUDA_HOME": "/opt/cuda", "ASCEND_HOME_PATH": "/opt/ascend", "PATH": "/bin", "HOME": "/home"}
    facts = replace(HEALTHY, **devices(IGPU), caller_environment=caller)
    assert diagnose(facts) == []


def test_a_daemon_of_a_user_s_own_is_not_told_of_units():
    for changes in (FAULTS["too few descriptors"][0], {"caller_environment": {"LD_PRELOAD": "x y"}}):
        (finding,) = diagnose(replace(HEALTHY, **changes, is_unit=False))
        assert "systemctl" not in finding.fix
        assert re.search("ulimit -n 65536|export LD_PRELOAD='x y'", finding.fix)


def test_a_small_share_of_a_large_disk_is_enough():
    assert diagnose(replace(HEALTHY, **directory("state", total_bytes=8000 * GIB, free_bytes=21 * GIB))) == []


def test_the_command_line_sends_what_the_daemon_compares():
    assert set(SENT_VARIABLES) == set(RUNTIME_VARIABLES)


@pytest.mark.parametrize("machine", sorted(path.stem for path in MACHINES.glob("*.json")))
def test_every_unusable_device_of_a_recorded_machine_is_named_with_a_fix(machine):
    inventory = survey(Replay.of(machine), DIRECTORIES)
    usable = tuple(device.id for device in inventory.devices if device.is_usable)
    record = BackendRecord("all", PluginStatus.AVAILABLE, devices=usable)
    facts = replace(HEALTHY, inventory=inventory, backends={"all": record}, models=())
    named = {finding.title.split()[0]: finding for finding in diagnose(facts) if finding.check == "device"}
    assert set(named) == {device.id for device in inventory.devices} - set(usable)
    for finding in named.values():
        assert finding.reason
        assert finding.fix


# ---------------------------------------------------------------- gathering


def test_a_directory_that_is_still_to_be_made_is_fine_where_it_can_be(tmp_path):
    found = directory_facts("cache", tmp_path / "a" / "b")
    assert (found.problem, found.total_bytes > 0) == ("", True)


@pytest.mark.parametrize(
    ("purpose", "name", "problem"),
    [
        ("state", "file", "a file stands in its place"),
        ("state", "file/below", "is a file"),
        ("models", "missing", "it does not exist"),
        ("models", "file", "a file stands in its place"),
    ],
)
def test_what_cannot_be_a_directory_is_said(tmp_path, purpose, name, problem):
    (tmp_path / "file").touch()
    assert problem in directory_facts(purpose, tmp_path / name).problem


def test_modes_that_forbid_are_said():
    with tempfile.TemporaryDirectory() as name, without_powers():
        place = Path(name)
        assert directory_facts("state", place).problem == "its mode forbids it"
        assert "does not let the daemon in" in directory_facts("state", place / "new").problem
        assert "allows no new one" in directory_facts("state", Path("/none")).problem
        assert directory_facts("models", place).problem == "its mode does not allow it"


@contextlib.contextmanager
def without_powers():
    """Root, whom no mode binds, becomes nobody; and nobody may enter a temporary directory of root's."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def a_key(precision: str, streams: int = 1, driver: str = "new") -> VariantKey:
    options = {"streams": str(streams), "threads": "1"} if streams > 1 else {}
    return key_of("digest", Variant("ort", "cpu", precision, options), "ort 1", "cpu", driver)


class _Registry:
    """A registry in which nothing is wrong, with a pin and the measurements of some variants."""

    moved_aside = ""

    def __init__(self, *measured: tuple[str, VariantKey]) -> None:
        self._measured = measured

    async def check(self):
        return RegistryHealth()

    def placement(self, model, version):
        return SimpleNamespace(is_pinned=True, variant="pinned-one")

    def measurements(self, model):
        return [
            SimpleNamespace(version=version, measurement=SimpleNamespace(key=key)) for version, key in self._measured
        ]


class _Tuner:
    """Knows two ways to run a model, of which one is measured; or, of one without files, nothing."""

    async def options(self, name):
        if name == "gone":
            raise ArtifactCorrupt("cannot read 'model.onnx': no such file")
        keys = {precision: a_key(precision) for precision in ("FP32", "BF16")}
        return SimpleNamespace(version="2", keys=keys, candidates=SimpleNamespace(found=list(keys)))

    def missing(self, options):
        return options.candidates.found[1:]


def a_model(**changes):
    status = replace(STATUS, version="2", pid=os.getpid(), **changes)
    return SimpleNamespace(status=lambda: status, manifest=SimpleNamespace(fallback="allow"))


def gather(tmp_path, backends=None, environment=None, models=(), registry=None) -> Facts:
    document = {name: str(tmp_path / name) for name in ("cache", "state")} | {"path": str(tmp_path)}
    config = Config.model_validate({"repository": document})
    return asyncio.run(
        gather_facts(
            HEALTHY.inventory, backends or {}, models, _Tuner(), registry or _Registry(), config, environment or {}
        )
    )


def test_measurements_of_this_version_that_fit_no_way_to_run_it_are_outdated(tmp_path):
    """Those of another version are not, nor those of streams tried for a while: both are good for what they were."""
    old = a_key("FP32", driver="old")
    registry = _Registry(("2", a_key("FP32")), ("2", old), ("1", old), ("2", a_key("FP32", streams=3)))
    (found,) = gather(tmp_path, models=[a_model()], registry=registry).models
    assert (found.ways, found.unmeasured, found.outdated) == (2, 1, 1)
    assert (found.pinned, found.fallback_policy) == ("pinned-one", "allow")


def test_of_a_model_that_does_not_serve_or_has_lost_its_files_no_measurements_are_asked_for(tmp_path):
    models = [a_model(state=ModelState.FAILED), a_model(name="gone")]
    failed_one, gone = gather(tmp_path, models=models).models
    assert (failed_one.ways, gone.ways, gone.unmeasured) == (0, 0, 0)
    assert (failed_one.pinned, gone.pinned) == ("", "pinned-one")


def test_gathering_reads_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    monkeypatch.setenv("INVOCATION_ID", "0")
    facts = gather(tmp_path, {}, {"LD_PRELOAD": "x", "SECRET": "y"})
    assert {each.purpose for each in facts.directories} == {"models", "cache", "state"}
    assert [each.problem for each in facts.directories] == ["", "", ""]
    assert facts.memory.total > facts.memory.available > 0
    assert facts.service.uid == os.geteuid()
    assert facts.is_unit
    assert facts.service_environment["KMP_BLOCKTIME"] == "1"
    assert facts.caller_environment == {"LD_PRELOAD": "x"}
    (environment,) = facts.environments
    assert (environment.python, "onnxruntime" in environment.distributions) == (sys.executable, True)


def test_distributions_of_another_environment_are_read_without_starting_it(tmp_path):
    """Names are compared as pip compares them."""
    packages = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    for name in ("onnxruntime", "onnxruntime_gpu", "numpy"):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        (packages / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n")
    python = str(tmp_path / "env" / "bin" / "python")
    facts = gather(tmp_path, {"onnxruntime": replace(ONNX, python=python)}, {})
    found = {environment.python: environment.distributions for environment in facts.environments}
    assert found[python] == {"onnxruntime", "onnxruntime-gpu"}
