"""Which words of runtimes mean that memory ran out."""

import pytest

from appliance.worker.runner import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDNN failure 2: CUDNN_STATUS_ALLOC_FAILED; CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("Failed to allocate memory for requested buffer of size 4294967296"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[GPU] clEnqueueMapBuffer, error code: -5 CL_OUT_OF_RESOURCES"),
        RuntimeError("ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    ],
)
def test_memory_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [ValueError("index 7 is out of bounds"), RuntimeError("out of range"), OSError(12, "x")]
)
def test_something_else_went_wrong(error):
    assert not is_out_of_memory(error)
