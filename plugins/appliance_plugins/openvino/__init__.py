"""Backend ``openvino``: ONNX models and OpenVINO IR on CPUs, Intel GPUs and Intel NPUs.

Options: ``threads`` (cores of one run, by default all that the inventory counts), ``streams`` (without it the LATENCY
hint chooses), ``float`` (``"f32"`` or ``"bf16"``: what a quantised model leaves in floating point), ``static`` (how
many input shapes get a compilation of their own, see `shapes`), ``cache_dir`` (keeps compiled models).

The CPU plugin computes INT64 in INT32, and UINT64 and FP64 in narrower types too, and its string tensors lose trailing
NULs; what would be silently wrong is refused here. What is written for GPUs and NPUs follows the runtime's
documentation; none has been seen by it yet.
"""

from appliance_plugins.openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
