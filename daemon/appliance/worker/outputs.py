"""What a model gave for the rows of a sample, kept in an ``.npz`` file so that variants can be compared with it."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.errors import ArtifactCorrupt, InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs that matter, row by row.

    Attributes:
        rows: One vector for each row: its outputs one after the other, FP32 or FP64. Lengths may differ.
        inputs: 32 bytes for each row that stand for what went in.
        classes: Length of the last dimension of the first output, whose greatest element is a row's class.
        length: Of the dynamic dimensions of made-up inputs.
    """

    rows: "Sequence[NDArray[Any]]"
    inputs: Sequence[bytes]
    classes: int
    length: int

    def save(self, path: Path) -> None:
        """Write to `path`, in place of what is there: whole or, whatever happens, not at all.

        Raises:
            OSError: It cannot be written.
        """
        dtype = np.result_type(np.float32, *{row.dtype for row in self.rows})
        values = np.concatenate([np.empty(0, dtype), *self.rows]).astype(dtype, copy=False)
        offsets = np.cumsum([0, *(row.size for row in self.rows)], dtype=np.int64)
        digests = np.frombuffer(b"".join(self.inputs), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
        fixed = np.array([self.classes, self.length], dtype=np.int64)
        partial = path.with_name(f".{path.name}.part")  # always the same, so that a kill leaves one at most
        try:
            with partial.open("wb") as file:  # a file, since numpy adds .npz to names without it
                np.savez(file, values=values, offsets=offsets, inputs=digests, fixed=fixed)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: Path) -> "Outputs":
        """What `save` wrote.

        Raises:
            ArtifactCorrupt: The file is something else, or damaged.
            InvalidRequest: It cannot be read.
        """
        try:
            with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
                archive = np.load(file, allow_pickle=False)
                values, offsets, digests, fixed = (archive[name] for name in ("values", "offsets", "inputs", "fixed"))
            bounds = offsets.tolist()
            if (
                digests.dtype != np.uint8
                or digests.shape != (len(bounds) - 1, _DIGEST_BYTES)
                or values.ndim != 1
                or values.dtype.kind != "f"
                or bounds[0] != 0
                or bounds != sorted(bounds)
                or bounds[-1] != values.size
            ):
                raise ValueError("its arrays do not belong together")
            classes, length = map(int, fixed)
        except OSError as error:
            raise InvalidRequest(f"cannot read the reference {path.name!r}: {error.strerror or 'damaged'}") from error
        except (ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ArtifactCorrupt(f"cannot read the reference {path.name!r}: it is damaged") from error
        rows = [values[begin:end] for begin, end in pairwise(bounds)]
        return cls(rows, [digest.tobytes() for digest in digests], classes, length)
