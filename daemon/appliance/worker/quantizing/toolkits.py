"""The packages that quantise: imported when needed, since they are heavy and optional, and kept from calling home."""

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType
from typing import Any, Final, cast

import numpy as np

from appliance.errors import Unimplemented
from appliance.worker.messages import presentable

_SEED: Final = 20260101


def stay_offline() -> None:
    """Keep NNCF and OpenVINO from sending usage statistics, which they do unless a file in the home directory says no.

    Both go without where their package ``openvino_telemetry`` is not installed; None in `sys.modules` is Python's way
    to say that it is not (the import statement, "The module cache"). To be called before anything imports `nncf`.
    """
    sys.modules["openvino_telemetry"] = cast("ModuleType", None)


def import_nncf() -> Any:
    """The module `nncf`, silent.

    Raises:
        Unimplemented: It is not installed.
    """
    stay_offline()
    with required():
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf


def import_openvino() -> Any:
    """The module `openvino`.

    Raises:
        Unimplemented: It is not installed.
    """
    stay_offline()
    with required():
        import openvino
    return openvino


def import_onnx() -> Any:
    """The module `onnx`.

    Raises:
        Unimplemented: It is not installed.
    """
    with required():
        import onnx
    return onnx


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        Unimplemented: It is not installed.
    """
    with required():
        import onnxruntime
    return onnxruntime


def import_onnxruntime_quantization() -> Any:
    """The module `onnxruntime.quantization`, which needs `onnx`.

    Raises:
        Unimplemented: One of both is not installed.
    """
    with required():
        import onnxruntime.quantization
        import onnxruntime.quantization.shape_inference
    return onnxruntime.quantization


@contextmanager
def required() -> Iterator[None]:
    """Around the import of what the extra ``quantize`` brings.

    Raises:
        Unimplemented: It is not installed; the message says how to install it.
    """
    try:
        yield
    except ImportError as error:
        raise Unimplemented(
            "cannot quantise the model: the backend's environment lacks what it takes "
            f"({presentable(error)}); to install it: pip install 'inference-appliance[quantize]'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Throw away what Python code prints meanwhile: progress bars and warnings that would reach nobody."""
    levels = {name: logging.getLogger(name).level for name in ("", "nncf")}
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def be_repeatable() -> None:
    """Seed what the toolkits draw random numbers from, so that equal inputs give equal files."""
    random.seed(_SEED)
    np.random.seed(_SEED)
