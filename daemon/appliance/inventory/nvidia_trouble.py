"""Why an NVIDIA GPU cannot be used, in words, and what helps. Codes are those of nvml.h's nvmlReturn_t."""

from collections.abc import Mapping
from typing import Any, Final

from appliance.inventory import Rung, Step
from appliance.inventory.ladder import failed

_NO_PERMISSION: Final = 4
_DRIVER_NOT_LOADED: Final = 9
_LIBRARY_NOT_FOUND: Final = 12
_GPU_IS_LOST: Final = 15
_RESET_REQUIRED: Final = 16
_VERSION_MISMATCH: Final = 18

_INSTALL: Final = "sudo ubuntu-drivers install, or your distribution's package nvidia-driver, then restart the machine"

#: Reason and fix of a GPU with a driver that NVML does not list.
UNLISTED: Final = (
    "the driver is bound, and NVML does not list this GPU: either the driver gave up on it, or this container was not "
    "given it",
    "look for NVRM and Xid in the kernel's log: sudo dmesg; in a container: --gpus all",
)


def unbound(driver: str) -> Rung:
    """The rung DRIVER of a GPU that another driver has, or none."""
    if driver == "nouveau":
        return failed(Step.DRIVER, "the driver nouveau is bound, which cannot compute; nvidia is needed", _INSTALL)
    if driver.startswith("vfio"):
        reason = f"the driver {driver} is bound: the GPU is set aside for a virtual machine"
        return failed(Step.DRIVER, reason, "take it out of the vfio-pci ids of the kernel's command line and restart")
    what = f"the driver {driver} is bound" if driver else "no driver is bound"
    return failed(
        Step.DRIVER,
        f"{what}; nvidia is needed",
        f"{_INSTALL}; where it is installed: sudo modprobe nvidia, and sudo dmesg says why that fails (Secure Boot "
        "asks for a signed module)",
    )


def library_trouble(silence: str) -> Rung:
    """The rung DRIVER where NVML gave no answer.

    Args:
        silence: What became of it: ``"it gave no answer within 1.0 s"``, ``"its process was killed by SIGABRT"``.
    """
    if "no answer within" in silence:
        return failed(
            Step.DRIVER,
            f"the driver does not answer: {silence}",
            "where the machine has many GPUs or they sleep: sudo systemctl enable --now nvidia-persistenced, then "
            "appliancectl hardware --refresh; else look for NVRM and Xid in sudo dmesg, and restart the machine",
        )
    if "pynvml" in silence:
        return failed(
            Step.DRIVER, "the driver cannot be asked: the package nvidia-ml-py is missing", "pip install nvidia-ml-py"
        )
    return failed(
        Step.DRIVER,
        f"the driver's library NVML crashes: {silence}",
        "install the driver again, so that library and kernel module are of one version, and restart the machine",
    )


def refusal_trouble(refused: Mapping[str, Any], module: str) -> Rung:
    """The rung that an error of NVML means.

    Args:
        refused: Its ``code`` and ``message``.
        module: Version of the kernel module; may be empty.
    """
    code = refused["code"]
    version = f" {module}" if module else ""
    if code == _VERSION_MISMATCH:
        return failed(
            Step.DRIVER,
            f"restart required: the driver was upgraded while its kernel module{version} stayed loaded, and its "
            "libraries no longer match",
            "restart the machine; or stop all that uses the GPU, then sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset "
            "nvidia && sudo modprobe nvidia",
        )
    if code == _NO_PERMISSION:
        return failed(
            Step.OPENABLE,
            "NVML refuses the service's user: it may not open /dev/nvidiactl or the GPU's node",
            "let the user read and write /dev/nvidia*: ls -l /dev/nvidia* names the group, sudo usermod -aG GROUP USER "
            "adds to it; in a systemd unit: DeviceAllow=char-nvidia rw",
        )
    if code == _DRIVER_NOT_LOADED:
        return failed(
            Step.DRIVER, "NVIDIA's kernel module is not loaded", f"sudo modprobe nvidia; where that fails: {_INSTALL}"
        )
    if code == _LIBRARY_NOT_FOUND:
        return failed(
            Step.DRIVER,
            f"the kernel module{version} is loaded and its library libnvidia-ml.so.1 is not installed",
            "install the driver's libraries of the same version (Debian, Ubuntu: libnvidia-compute); in a container: "
            "--gpus all (NVIDIA Container Toolkit)",
        )
    if code in (_GPU_IS_LOST, _RESET_REQUIRED):
        return failed(
            Step.DRIVER,
            f"the driver has lost the GPU: {refused['message']}",
            "look for Xid in sudo dmesg, then sudo nvidia-smi --gpu-reset or switch the machine off and on; if it "
            "comes back, check power supply and cooling",
        )
    return failed(
        Step.DRIVER,
        f"NVML fails: {refused['message']} (code {code})",
        "sudo nvidia-smi shows whether the driver works at all, sudo dmesg what it complains of",
    )
