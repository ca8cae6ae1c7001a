"""What NVIDIA's management library says, as plain values. Runs in a process of its own: the library may hang or crash.

The one module that imports NVML's binding.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pynvml

#: NVML's "not available" where a process's memory cannot be told (nvml.h, NVML_VALUE_NOT_AVAILABLE).
_UNKNOWN_BYTES = (1 << 64) - 1


def ask(daemon: str) -> dict[str, Any]:
    """Every GPU NVML knows.

    Args:
        daemon: Process id whose children are ours; others that use a GPU are named.

    Returns:
        ``{"driver", "cuda", "devices": [...]}``; of each device what could be read (`appliance.inventory.nvidia` says
        what it is). Where NVML refuses, of a device or at all: ``{"refused": {"code", "message"}}``.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"refused": _refusal(error)}
    answer: dict[str, Any] = {}
    _note(answer, "driver", pynvml.nvmlSystemGetDriverVersion)
    _note(answer, "cuda", lambda: _cuda(pynvml.nvmlSystemGetCudaDriverVersion()))
    try:
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return answer | {"refused": _refusal(error)}
    answer["devices"] = [_device(index, int(daemon)) for index in range(count)]
    return answer


def _refusal(error: pynvml.NVMLError) -> dict[str, Any]:
    return {"code": int(error.value), "message": str(error)}


def _note(answer: dict[str, Any], name: str, read: Callable[[], Any]) -> None:
    """Add what `read` gives, unless NVML does not tell."""
    try:
        answer[name] = read()
    except pynvml.NVMLError:
        return


def _cuda(version: int) -> str:
    """12040 is 12.4 (nvml.h, NVML_CUDA_DRIVER_VERSION_MAJOR)."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _device(index: int, daemon: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"index": index}
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        return answer | {"refused": _refusal(error)}
    _note(answer, "bus", lambda: _text(pynvml.nvmlDeviceGetPciInfo(handle).busId))
    _note(answer, "minor", lambda: pynvml.nvmlDeviceGetMinorNumber(handle))
    try:
        answer |= _named(handle)
    except pynvml.NVMLError as error:
        return answer | {"refused": _refusal(error)}
    _note(answer, "capability", lambda: list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
    _note(answer, "temperature_c", lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    _note(answer, "power_mw", lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    _note(answer, "power_limit_mw", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    _note(answer, "processes", lambda: _processes(handle, daemon))
    _note(answer, "is_mig", lambda: pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    if answer.get("is_mig"):
        answer["instances"] = _instances(handle)
    return answer


def _named(handle: Any) -> dict[str, Any]:
    """Without these a device is of no use.

    Raises:
        NVMLError: One of them cannot be read.
    """
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "uuid": _text(pynvml.nvmlDeviceGetUUID(handle)),
        "memory_bytes": int(memory.total),
        "used_bytes": int(memory.used),
    }


def _instances(handle: Any) -> list[dict[str, Any]]:
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError:
            continue  # a place without an instance
        answer: dict[str, Any] = {"index": index}
        try:
            answer |= _named(instance)
        except pynvml.NVMLError as error:
            answer["refused"] = _refusal(error)
        _note(answer, "gpu_instance", partial(pynvml.nvmlDeviceGetGpuInstanceId, instance))
        _note(answer, "compute_instance", partial(pynvml.nvmlDeviceGetComputeInstanceId, instance))
        found.append(answer)
    return found


def _processes(handle: Any, daemon: int) -> list[dict[str, Any]]:
    """Processes that use the device and are none of ours; what is used is 0 where NVML does not tell."""
    used: dict[int, int] = {}
    for list_of in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for each in list_of(handle):
            known = each.usedGpuMemory not in (None, _UNKNOWN_BYTES)
            used[each.pid] = max(used.get(each.pid, 0), int(each.usedGpuMemory) if known else 0)
    others = sorted((pid for pid in used if _parent(pid) != daemon), key=lambda pid: -used[pid])
    return [{"pid": pid, "name": _name(pid), "used_bytes": used[pid]} for pid in others]


def _parent(pid: int) -> int:
    """Parent of a process, from the fourth field of /proc/PID/stat; 0 where it cannot be seen."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(words[1])
    except (OSError, ValueError, IndexError):
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _text(value: str | bytes) -> str:
    """Older releases of the binding return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
