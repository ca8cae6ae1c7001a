"""The inventory's devices and OpenVINO's: which is which, and why one is missing from the runtime's list."""

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.inventory import Device

#: OpenVINO's names begin with these, by kind of device.
_PREFIXES: Final = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}

#: Where OpenCL drivers enter themselves (Khronos, cl_khr_icd).
_OPENCL_VENDORS: Final = Path("/etc/OpenCL/vendors")

#: Names of one GPU differ in these between lspci's, Intel's and OpenVINO's spelling.
_NOISE: Final = re.compile(r"\((?:r|tm|c|igpu|dgpu)\)|[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Listed:
    """A device that the runtime lists.

    Attributes:
        name: OpenVINO's own, such as ``"GPU.1"``.
        full_name: Such as ``"Intel(R) Arc(TM) A770 Graphics (dGPU)"``; empty where the runtime does not say.
        uuid: DEVICE_UUID as text; empty likewise.
    """

    name: str
    full_name: str = ""
    uuid: str = ""

    @classmethod
    def of(cls, core: Any, name: str) -> "Listed":
        """Ask a core about one of its devices."""
        return cls(name, _property(core, name, "FULL_DEVICE_NAME"), _property(core, name, "DEVICE_UUID"))

    @property
    def prefix(self) -> str:
        """The plugin's name."""
        return self.name.partition(".")[0]


def _property(core: Any, name: str, key: str) -> str:
    try:
        return str(core.get_property(name, key))
    except Exception:  # whatever a plugin raises for a property it does not know
        return ""


def is_served(device: Device) -> bool:
    """True for devices that OpenVINO has a plugin for."""
    return device.kind == "cpu" or (device.kind in ("gpu", "npu") and device.vendor == "intel")


def match(devices: Sequence[Device], listed: Sequence[Listed]) -> dict[str, str]:
    """OpenVINO's name of each device that the runtime lists, by the inventory's id.

    By uuid, then by a full name that only one pair has, then by order, since both number devices of a kind by their
    place on the bus.
    """
    names: dict[str, str] = {}
    for kind, prefix in _PREFIXES.items():
        ours = [device for device in devices if device.kind == kind]
        theirs = [one for one in listed if one.prefix == prefix]
        for is_same in (_same_uuid, _same_name):
            for device in ours:
                fits = [one for one in theirs if is_same(device, one)]
                if len(fits) == 1 and sum(is_same(other, fits[0]) for other in ours) == 1:
                    names[device.id] = fits[0].name
                    theirs.remove(fits[0])
            ours = [device for device in ours if device.id not in names]
        names.update({device.id: one.name for device, one in zip(ours, theirs, strict=False)})
    return names


def _same_uuid(device: Device, listed: Listed) -> bool:
    return bool(listed.uuid) and device.uuid.lower() == listed.uuid.lower()


def _same_name(device: Device, listed: Listed) -> bool:
    ours, theirs = (_NOISE.sub("", name.lower()) for name in (device.name, listed.full_name))
    return bool(ours and theirs) and (ours in theirs or theirs in ours)


def id_of(name: str, names: Mapping[str, str]) -> str:
    """The inventory's id of what EXECUTION_DEVICES calls `name`, such as ``"(CPU)"`` or ``"GPU"`` for ``"GPU.0"``."""
    bare = name.strip("()")
    for device_id, known in names.items():
        if bare == known or bare == f"{known}.0" or known == f"{bare}.0":
            return device_id
    return bare.lower()


def why_unlisted(device: Device) -> str:
    """Why the runtime does not list a device of a kind it serves, naming the library or package that is missing.

    Package names are Debian's and Ubuntu's.
    """
    if device.kind == "gpu":
        if not _can_load("libOpenCL.so.1"):
            return (
                "openvino's GPU plugin cannot load libOpenCL.so.1: install the packages ocl-icd-libopencl1 and "
                "intel-opencl-icd"
            )
        if not any(_OPENCL_VENDORS.glob("*intel*.icd")):
            return "no OpenCL driver for Intel GPUs is installed: install the package intel-opencl-icd"
        return "openvino's GPU plugin does not list it: its OpenCL driver (package intel-opencl-icd) may be too old"
    if device.kind == "npu":
        if not _can_load("libze_loader.so.1"):
            return (
                "openvino's NPU plugin cannot load libze_loader.so.1: install the package libze1 (Level Zero), "
                "intel-level-zero-npu and intel-driver-compiler-npu"
            )
        if not _can_load("libze_intel_npu.so.1"):
            return (
                "the NPU's user-space driver libze_intel_npu.so.1 is missing: install the packages "
                "intel-level-zero-npu and intel-driver-compiler-npu"
            )
        return "openvino's NPU plugin does not list it: its driver (package intel-level-zero-npu) may be too old"
    return "this build of openvino has no CPU plugin"


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
