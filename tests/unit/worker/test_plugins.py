"""Discovery: every plugin becomes a record, whatever it does."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import worker_harness as harness

from appliance import plugins
from appliance.inventory import Device, Inventory, Rung, Step
from appliance.plugins import PluginStatus, discover
from support.daemon import wait_until

CPU = Device("cpu", "cpu", "a processor", 2**30, ("avx512_bf16",))
MACHINE = Inventory((CPU,), 2, 2**30)

GOOD = """
from appliance.backend import Support, Variant
class Good:
    name, formats, scope = "{name}", frozenset({{"odd"}}), "device"
    def probe(self, inventory): {probe}
    def candidates(self, artifact, device): return [Variant(self.name, device.id, "INT8", {{"k": "v"}})]
    def load(self, artifact, variant): raise NotImplementedError
"""
USABLE = 'return Support(("cpu",), "odd 2")'


def write_plugin(directory, name, source, entry="Good", module=None):
    module = module or f"plugin_{name}"
    (directory / f"{module}.py").write_text(source)
    metadata = directory / f"{name}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(f"[appliance.backends]\n{name} = {module}:{entry}\n")


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Discovers with `tmp_path` and the fakes on the path, in this process and in the probes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(harness.FAKES)]))
    monkeypatch.syspath_prepend(str(harness.FAKES))
    monkeypatch.syspath_prepend(str(tmp_path))

    def find_all(**arguments):
        return asyncio.run(discover(MACHINE, **arguments))

    return find_all


def test_in_tree_and_foreign_backends_come_through_the_same_door(find):
    records = find()
    assert set(records) == {"fake", "onnxruntime", "openvino"}
    for record in records.values():
        assert (record.status, record.reason, record.devices) == (PluginStatus.AVAILABLE, "", ("cpu",))
        assert record.python == sys.executable
    assert records["onnxruntime"].runtime.startswith("onnxruntime 1.")
    assert records["onnxruntime"].distribution.startswith("inference-appliance ")
    assert records["openvino"].formats == ("onnx", "openvino-ir")
    offered = records["openvino"].candidates("openvino-ir", "FP32", "cpu")
    assert [one.precision for one in offered] == ["FP32", "BF16"]
    assert records["openvino"].candidates("openvino-ir", "FP64", "cpu") == offered
    assert records["openvino"].candidates("openvino-ir", "FP32", "gpu0") == ()
    assert records["fake"].distribution == "fake-backend 0"


def test_a_plugin_tells_everything_placement_needs(find, tmp_path):
    write_plugin(tmp_path, "odd", GOOD.format(name="odd", probe=USABLE))
    record = find(disabled=["onnxruntime", "openvino", "fake"])["odd"]
    assert (record.status, record.runtime, record.scope, record.formats) == (
        PluginStatus.AVAILABLE,
        "odd 2",
        "device",
        ("odd",),
    )
    (variant,) = record.candidates("odd", "FP32", "cpu")
    assert (variant.backend, variant.device, variant.precision, variant.options) == ("odd", "cpu", "INT8", {"k": "v"})


CHOOSY = """
from appliance.backend import Support, Variant
class Good:
    name, formats, scope = "odd", frozenset({"onnx"}), "model"
    def probe(self, inventory):
        return Support(("cpu", "nvidia0"), "odd 2", unlisted={"nvidia1": "libodd.so.3 is missing"})
    def candidates(self, artifact, device):
        if artifact.precision == "INT8":
            return [Variant(self.name, device.id, "INT8")]
        return [Variant(self.name, device.id, "FP32")] if artifact.precision == "FP32" else []
    def load(self, artifact, variant): raise OSError("libodd.so.3: no such file")
"""


def card(number, *rungs):
    return Device(f"nvidia{number}", "gpu", "a card", 2**30, vendor="nvidia", ladder=rungs)


def test_offers_differ_by_the_artifacts_precision_and_leave_unusable_devices_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(tmp_path, "odd", CHOOSY)
    machine = Inventory((CPU, card(0, Rung(Step.OPENABLE, False, "no group")), card(1)), 2, 2**30)
    record = asyncio.run(discover(machine, disabled=["onnxruntime", "openvino"]))["odd"]
    assert {key: [one.precision for one in value] for key, value in record.variants.items() if value} == {
        ("onnx", "FP32", "cpu"): ["FP32"],
        ("onnx", "INT8", "cpu"): ["INT8"],
    }
    assert record.candidates("onnx", "BF16", "cpu") == ()
    assert record.unlisted == {"nvidia1": "libodd.so.3 is missing"}


def test_disabled_plugins_are_not_even_imported(find, tmp_path):
    write_plugin(tmp_path, "odd", f"open({str(tmp_path / 'imported')!r}, 'w')")
    records = find(disabled=["odd", "onnxruntime", "openvino", "fake"])
    assert {record.status for record in records.values()} == {PluginStatus.DISABLED}
    assert not (tmp_path / "imported").exists()


BROKEN = {
    "raises at import": ("raise ImportError('libvendor.so.9: no such file')", "libvendor.so.9"),
    "exits at import": ("import sys; sys.exit('leaving')", "SystemExit"),
    "exits hard": ("import os; os._exit(4)", "ended with status 4 and no answer"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    "has a syntax error": ("def (", "SyntaxError"),
    "has no such class": ("x = 1", "has no attribute 'Good'"),
    "is no backend": ("class Good: name = 'odd'", "lacks a part of the contract"),
    "has another name": (GOOD.format(name="even", probe=USABLE), "calls itself 'even'"),
    "raises in probe": (GOOD.format(name="odd", probe="raise OSError('driver trouble')"), "driver trouble"),
    "answers nonsense": (GOOD.format(name="odd", probe="return 7"), "AttributeError"),
    "answers too much": (GOOD.format(name="odd", probe="return Support(('x' * 2_000_000,))"), "longer than"),
    "writes on the answer": (
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'garbage')\n  except OSError: pass\nos._exit(0)",
        "its answer is not JSON",
    ),
    "answers something else": (
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'{}')\n  except OSError: pass\nos._exit(0)",
        "not a probe's answer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that(find, tmp_path, case):
    source, words = BROKEN[case]
    write_plugin(tmp_path, "odd", source)
    records = find(disabled=["onnxruntime", "openvino"])
    assert records["odd"].status is PluginStatus.FAILED
    assert words in records["odd"].reason
    assert records["odd"].reason.startswith("cannot probe 'odd'")
    assert str(tmp_path) not in records["odd"].reason
    assert records["fake"].status is PluginStatus.AVAILABLE


def has_ended(pid: str) -> bool:
    """True where a process is gone, or a zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_plugin_that_hangs_is_killed_with_all_it_started(find, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "PROBE_SECONDS", 2.0)
    source = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    write_plugin(tmp_path, "odd", source)
    record = find(disabled=["onnxruntime", "openvino", "fake"])["odd"]
    assert record.status is PluginStatus.FAILED
    assert "no answer within 2 s" in record.reason
    wait_until(lambda: has_ended((tmp_path / "pid").read_text()), "the plugin's own process has ended")


def test_prints_of_a_plugin_do_not_spoil_its_answer(find, tmp_path):
    noisy = "import os\nprint('hello')\nos.write(1, b'native noise' * 100_000)\n"
    write_plugin(tmp_path, "odd", noisy + GOOD.format(name="odd", probe=USABLE))
    assert find(disabled=["onnxruntime", "openvino", "fake"])["odd"].status is PluginStatus.AVAILABLE


def test_no_usable_device_is_unsupported_with_the_plugins_reason(find, tmp_path):
    write_plugin(tmp_path, "odd", GOOD.format(name="odd", probe='return Support((), "odd 2", "no card")'))
    record = find(disabled=["onnxruntime", "openvino", "fake"])["odd"]
    assert (record.status, record.reason) == (PluginStatus.UNSUPPORTED, "no card")


def test_one_name_from_two_distributions_is_refused(find, tmp_path):
    write_plugin(tmp_path, "odd", GOOD.format(name="odd", probe=USABLE))
    other = tmp_path / "other-2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2\n")
    (other / "entry_points.txt").write_text("[appliance.backends]\nodd = plugin_odd:Good\n")
    record = find(disabled=["onnxruntime", "openvino", "fake"])["odd"]
    assert record.status is PluginStatus.FAILED
    assert "two distributions" in record.reason


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_a_plugin_that_others_may_write_is_refused_and_not_imported(find, tmp_path, mode):
    write_plugin(tmp_path, "odd", f"open({str(tmp_path / 'imported')!r}, 'w')")
    (tmp_path / "plugin_odd.py").chmod(mode)
    record = find(disabled=["onnxruntime", "openvino", "fake"])["odd"]
    assert record.status is PluginStatus.FAILED
    assert "writable by group or others" in record.reason
    assert not (tmp_path / "imported").exists()


def test_a_package_directory_that_others_may_write_is_refused(find, tmp_path):
    package = tmp_path / "openpack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write_plugin(package, "odd", GOOD.format(name="odd", probe=USABLE), module="inner")
    (package / "odd-1.5.dist-info").rename(tmp_path / "odd-1.5.dist-info")
    (tmp_path / "odd-1.5.dist-info" / "entry_points.txt").write_text(
        "[appliance.backends]\nodd = openpack.inner:Good\n"
    )
    assert find(disabled=["onnxruntime", "openvino", "fake"])["odd"].status is PluginStatus.AVAILABLE
    package.chmod(0o777)
    assert "writable by group or others" in find(disabled=["onnxruntime", "openvino", "fake"])["odd"].reason


def test_a_backend_with_an_interpreter_of_its_own_is_asked_there(find, tmp_path):
    missing = find(disabled=["onnxruntime", "openvino"], pythons={"fake": str(tmp_path / "nowhere")})["fake"]
    assert missing.status is PluginStatus.FAILED
    assert "No such file" in missing.reason
    elsewhere = find(disabled=["onnxruntime", "openvino", "fake"], pythons={"remote": sys.executable})["remote"]
    assert elsewhere.status is PluginStatus.FAILED
    assert "no distribution" in elsewhere.reason


def test_unreadable_metadata_does_not_take_discovery_down(find, tmp_path):
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_bytes(b"[appliance.backends]\nodd\n\xff\xfe = \n")
    find(disabled=["onnxruntime", "openvino", "fake"])


def test_the_front_end_side_of_discovery_imports_no_runtime():
    program = (
        "import sys, appliance.plugins; print([m for m in ('numpy', 'onnxruntime', 'openvino') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
