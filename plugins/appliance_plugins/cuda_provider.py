"""What ONNX Runtime's CUDA provider needs, and why it is not there where it is not.

The runtime falls back to the CPU without raising anything when the provider's library cannot be loaded, so the loader
is asked itself. Written after the runtime's documentation; what a missing library looks like has been seen, a
computation on a GPU has not.
"""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PROVIDER: Final = "CUDAExecutionProvider"

_NOT_BUILT_IN: Final = (
    "this build of onnxruntime has no CUDA provider: install onnxruntime-gpu in an environment of its own"
)
_SHARED: Final = "libonnxruntime_providers_shared.so"
_CUDA: Final = "libonnxruntime_providers_cuda.so"
_INDEX: Final = re.compile(r"nvidia(\d+)")

#: dlopen(3) on a library, or one that it needs, that is nowhere.
_MISSING: Final = "cannot open shared object file"


def why_absent(runtime: Any) -> str:
    """Why `runtime`, the imported onnxruntime, cannot use NVIDIA devices; empty where nothing stands against it."""
    if PROVIDER not in runtime.get_available_providers():
        return _NOT_BUILT_IN
    _preload(runtime)
    trouble = _loader_says(runtime)
    return _cannot_load(trouble) if _MISSING in trouble else ""


def why_unused(runtime: Any) -> str:
    """Why a session that was to run on CUDA has no CUDA provider."""
    if PROVIDER not in runtime.get_available_providers():
        return _NOT_BUILT_IN
    trouble = _loader_says(runtime)
    if trouble:
        return _cannot_load(trouble)
    return "the CUDA provider was loaded and refused the device: its log and the driver's version say more"


def options(device_id: str, uuid: str) -> dict[str, str]:
    """The provider's options for one device; chooses it for this process, before CUDA is initialised.

    NVML numbers GPUs by bus address and CUDA by speed, so a device is named by its uuid, the only way to a MIG instance
    too (CUDA programming guide, "CUDA Environment Variables").

    Raises:
        ValueError: `device_id` is a MIG instance of unknown uuid, or no NVIDIA device.
    """
    index = "0"
    if uuid.startswith(("GPU-", "MIG-")):
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    else:
        match = _INDEX.fullmatch(device_id)
        if match is None:
            raise ValueError(f"device {device_id!r} is no NVIDIA GPU, and no uuid of it is known")
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        index = match.group(1)
    # TF32 is no FP32. Searching the fastest convolution anew for every shape takes seconds each time.
    return {"device_id": index, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def nodes_by_provider(session: Any) -> Mapping[str, int]:
    """How many of the graph's nodes each provider took; empty where the runtime is too old to say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def _cannot_load(trouble: str) -> str:
    fix = "; install onnxruntime-gpu[cuda,cudnn] in the backend's environment" if _MISSING in trouble else ""
    return f"the CUDA provider cannot be loaded: {trouble}{fix}"


def _preload(runtime: Any) -> None:
    """Load CUDA and cuDNN from the packages of this environment, where they are; the runtime looks nowhere else."""
    if hasattr(runtime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()


def _loader_says(runtime: Any) -> str:
    """What dlopen(3) says of the provider's library, cut to the library's name; empty where it can be loaded."""
    directory = Path(runtime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(directory / _SHARED), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(directory / _CUDA))
    except OSError as error:
        return str(error).replace(f"{directory}{os.sep}", "")
    return ""
