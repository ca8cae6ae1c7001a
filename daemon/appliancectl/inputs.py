"""Values for a model's inputs from the command line: text, pictures, .npy files, JSON. Brings numpy; loaded late."""

import json
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance_client import InvalidRequest, Tensor
from appliance_client.tensors import DTYPES
from appliancectl.failure import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance_client.calls import ModelMetadata, TensorMetadata

#: Length of a made-up tensor where the model leaves one open that is not the batch.
_SAMPLE_LENGTH = 16

_SAMPLE_TEXT = "The quick brown fox jumps over the lazy dog."

_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")


def gather_inputs(metadata: "ModelMetadata", given: Sequence[str], is_image: bool) -> dict[str, Tensor]:
    """Tensors from ``--input`` options.

    Each is ``NAME=VALUE`` or, where the model has one input only, VALUE: ``-`` for standard input, a file, or the value
    itself. For a BYTES input a picture goes as it is and anything else as text; for others the value is a .npy file or
    JSON. Several for one input become rows of one batch.

    Raises:
        InputError: An input is unknown, missing, or its value does not fit.
    """
    specs = {spec.name: spec for spec in metadata.inputs}
    values: dict[str, list[str]] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or name not in specs:
            if len(specs) != 1:
                raise InputError(
                    f"cannot tell which input {text[:40]!r} is for: write NAME=VALUE, NAME one of {_names(specs)}"
                )
            name, value = next(iter(specs)), text
        values.setdefault(name, []).append(value)
    missing = [name for name in specs if name not in values]
    if missing:
        raise InputError(f"cannot call {metadata.name}: no --input for {', '.join(missing)}")
    return {name: _tensor(specs[name], texts, is_image) for name, texts in values.items()}


def _names(specs: dict[str, Any]) -> str:
    return ", ".join(specs)


def _read(value: str) -> bytes | None:
    """The bytes of standard input or of a file; None where `value` is no file."""
    if value == "-":
        return sys.stdin.buffer.read()
    try:
        path = Path(value)
        return path.read_bytes() if path.is_file() else None
    except ValueError:  # a zero byte: no file's name
        return None
    except OSError as error:
        if len(value) > 255:
            return None  # too long for a name: it is text
        raise InputError(f"cannot read {value!r}: {(error.strerror or 'unreadable').lower()}") from error


def _tensor(spec: "TensorMetadata", texts: list[str], is_image: bool) -> Tensor:
    if spec.datatype == "BYTES":
        elements = [_element(text, is_image) for text in texts]
        return Tensor(np.array(elements, dtype=object).reshape([len(elements)] + [1] * (len(spec.shape) - 1)), "BYTES")
    rows = [_array(spec, text) for text in texts]
    try:
        whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return Tensor(_convert(whole, spec), spec.datatype)
    except (ValueError, TypeError, InvalidRequest) as error:
        raise InputError(f"cannot use the value of {spec.name}: {error}") from error


def _element(text: str, is_image: bool) -> bytes:
    content = _read(text)
    if content is None:
        if is_image:
            raise InputError(f"cannot read {text[:80]!r}: the model takes pictures, and there is no such file")
        return text.encode("utf-8", "surrogateescape")
    if is_image or content.startswith(_PICTURE_MAGIC):
        return content
    return content.removesuffix(b"\n").removesuffix(b"\r")


def _array(spec: "TensorMetadata", text: str) -> "NDArray[Any]":
    content = _read(text)
    try:
        if content is not None and content.startswith(b"\x93NUMPY"):
            from io import BytesIO

            array: NDArray[Any] = np.load(BytesIO(content), allow_pickle=False)
        else:
            array = np.asarray(json.loads(text if content is None else content))
    except (ValueError, TypeError, EOFError, RecursionError) as error:
        is_lost = content is None and not text.lstrip().startswith(("[", "{"))
        reason = (
            "there is no such file, and it is no JSON" if is_lost else f"it is neither .npy nor JSON lists: {error}"
        )
        raise InputError(f"cannot use {text[:80]!r} for {spec.name}: {reason}") from error
    return array[np.newaxis] if array.ndim == len(spec.shape) - 1 and spec.shape[0] == -1 else array


def _convert(array: "NDArray[Any]", spec: "TensorMetadata") -> "NDArray[Any]":
    """`array` in the model's type; numbers may lose precision, and never their kind or their value's size."""
    if spec.datatype == "BF16":
        bits: NDArray[Any] = (array.astype("<f4").view("<u4") >> 16).astype("<u2")
        return bits
    wanted = DTYPES[spec.datatype]
    if array.dtype.kind in "iuf" and wanted.kind == "f":
        return array.astype(wanted)
    return array


def sample_inputs(metadata: "ModelMetadata", is_image: bool) -> dict[str, Tensor]:
    """Made-up inputs of one row, for measuring: a sentence, a grey picture, zeros."""
    return {spec.name: _sample(spec, is_image) for spec in metadata.inputs}


def _sample(spec: "TensorMetadata", is_image: bool) -> Tensor:
    rest = [_SAMPLE_LENGTH if length < 0 else length for length in spec.shape[1:]]
    shape = [abs(spec.shape[0]), *rest] if spec.shape else []
    if spec.datatype == "BYTES":
        element = grey_png(224, 224) if is_image else _SAMPLE_TEXT.encode()
        return Tensor(np.full(shape, element, dtype=object), "BYTES")
    return Tensor(np.zeros(shape, DTYPES[spec.datatype]), spec.datatype)


def grey_png(width: int, height: int) -> bytes:
    """A grey picture as PNG (ISO/IEC 15948): 8-bit greyscale, no interlacing, one data chunk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + b"\x80" * width) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
