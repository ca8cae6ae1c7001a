"""Backend ``openvino``: ONNX models and OpenVINO IR on CPUs, Intel GPUs and Intel NPUs.

Options: ``streams`` (runs that may go on at the same time, by default one under the LATENCY hint; on the CPU no more
than there are cores), ``threads`` (cores of each, by default an equal part of all that the inventory counts), ``float``
(``"f32"`` or ``"bf16"``: what a quantised model leaves in floating point), ``static`` (how many input shapes get a
compilation of their own, see `shapes`), ``cache_dir`` (keeps compiled models).

The CPU plugin computes INT64 in INT32, and UINT64 and FP64 in narrower types too, and its string tensors lose trailing
NULs; what would be silently wrong is refused here. What is written for GPUs and NPUs follows the runtime's
documentation; none has been seen by it yet.
"""

from appliance_plugins.openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
