"""Live inputs, kept on this machine as calibration inputs where the manifest opts in (``samples.record``).

What a session was fed in batches that ran goes into ``.npz`` files of arrays by session input whose first dimension
counts the rows, each file of rows of equal shapes; `appliance.worker.samples` reads them. The files are the daemon's
alone (0600 in a directory of 0700). Recording never fails a batch and never makes one wait for the disk: where the
writer falls behind, rows are left out.
"""

import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.worker.model import ServedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import Manifest

#: Rows of a full file.
SHARD_ROWS: Final = 64

#: The directory does not grow beyond this, whatever the manifest asks for.
MAX_BYTES: Final = 1 << 30

#: Bytes that may wait for the writer.
_MAX_WAITING_BYTES: Final = 64 << 20

#: Rows wait as long at most for others of their shapes.
_FLUSH_SECONDS: Final = 30.0

#: Place in the order of files, rows, and what tells two workers' files apart.
_SHARD: Final = re.compile(r"([0-9]{6})-([0-9]+)-[0-9a-f]{8}\.npz")

_Rows = dict[str, "NDArray[Any]"]
_Shapes = tuple[tuple[int, ...], ...]


class Recorder:
    """Keeps the first `limit` rows, those of earlier workers counted. `take` may be called from any thread."""

    def __init__(self, directory: Path, limit: int, *, is_batched: bool, flush_seconds: float = _FLUSH_SECONDS) -> None:
        """Count what is there and start the writer.

        Raises:
            OSError: The directory cannot be made or read.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        self._directory = directory
        self._limit = limit
        self._is_batched = is_batched
        self._flush_seconds = flush_seconds
        self._queue: queue.SimpleQueue[tuple[_Rows, int] | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()  # for the counts: threads that run batches add, the writer takes away
        self._left = limit - _rows_in(directory)
        self._writer = threading.Thread(target=self._write_all, name="record", daemon=True)
        if self._left > 0:
            self._writer.start()

    def take(self, feeds: "Mapping[str, NDArray[Any]]", rows: int) -> None:
        """Copy the feeds of a batch that ran; does nothing once there are enough rows.

        Args:
            feeds: Every session input by name.
            rows: Rows of the batch.
        """
        if self._left <= 0:
            return
        size = sum(array.nbytes for array in feeds.values())
        with self._lock:
            wanted = min(rows if self._is_batched else 1, self._left)
            if wanted <= 0 or self._waiting_bytes + size > _MAX_WAITING_BYTES:
                return
            self._left -= wanted
            self._waiting_bytes += size
        try:
            if self._is_batched:
                taken = {name: array[:wanted].copy() for name, array in feeds.items()}
            else:
                taken = {name: array[np.newaxis].copy() for name, array in feeds.items()}
        except MemoryError:
            with self._lock:
                self._left += wanted
                self._waiting_bytes -= size
            return
        self._queue.put((taken, size))

    def close(self) -> None:
        """Write what waits, and stop."""
        self._left = 0
        self._queue.put(None)
        if self._writer.is_alive():
            self._writer.join()

    def _write_all(self) -> None:
        shards: dict[_Shapes, list[_Rows]] = {}
        began = 0.0
        try:
            while True:
                timeout = max(began + self._flush_seconds - time.monotonic(), 0.0) if shards else None
                try:
                    item = self._queue.get(timeout=timeout)
                except queue.Empty:
                    self._write_each(shards)
                    continue
                if item is None:
                    self._write_each(shards)
                    return
                taken, size = item
                with self._lock:
                    self._waiting_bytes -= size
                began = began if shards else time.monotonic()
                shapes = tuple(array.shape[1:] for _, array in sorted(taken.items()))
                shard = shards.setdefault(shapes, [])
                shard.append(taken)
                if sum(_count(one) for one in shard) >= SHARD_ROWS:
                    self._write(shards.pop(shapes))
                if self._left <= 0 and self._queue.empty():
                    self._write_each(shards)
        except (OSError, MemoryError) as error:
            self._left = 0
            reason = getattr(error, "strerror", None) or "memory is short"
            print(f"cannot record inputs: {reason}; no more are recorded", file=sys.stderr)  # noqa: T201

    def _write_each(self, shards: dict[_Shapes, list[_Rows]]) -> None:
        for shapes in list(shards):
            self._write(shards.pop(shapes))

    def _write(self, parts: list[_Rows]) -> None:
        """Write one file, whole or not at all; nothing where the directory holds enough already.

        Raises:
            OSError: The disk is full, or the like.
        """
        # Counted anew, since another worker of the model may record beside this one.
        room = self._limit - _rows_in(self._directory)
        size = sum(array.nbytes for part in parts for array in part.values())
        if room <= 0 or _bytes_in(self._directory) + size > MAX_BYTES:
            self._left = 0
            return
        arrays = {name: np.concatenate([part[name] for part in parts])[:room] for name in parts[0]}
        token = secrets.token_hex(4)
        temporary = self._directory / f".{token}.part"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._directory / f"{_next_place(self._directory):06d}-{_count(arrays)}-{token}.npz")
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def recorder_of(path: str, manifest: "Manifest", model: ServedModel) -> Recorder | None:
    """A recorder that writes to `path`, or None where the manifest asks for none or nothing could be learnt from it.

    Models that take BYTES are not recorded: ranges are learnt from numbers.
    """
    limit = manifest.samples.record if manifest.samples else 0
    if not path or not limit or any(spec.datatype == "BYTES" for spec in model.inputs):
        return None
    try:
        return Recorder(Path(path), limit, is_batched=model.max_batch_size > 0)
    except OSError as error:
        print(f"cannot record inputs: {error.strerror}", file=sys.stderr)  # noqa: T201
        return None


def _shards(directory: Path) -> list[re.Match[str]]:
    return [found for name in os.listdir(directory) if (found := _SHARD.fullmatch(name))]


def _rows_in(directory: Path) -> int:
    return sum(int(found[2]) for found in _shards(directory))


def _bytes_in(directory: Path) -> int:
    return sum((directory / found[0]).stat().st_size for found in _shards(directory))


def _next_place(directory: Path) -> int:
    return max((int(found[1]) for found in _shards(directory)), default=0) + 1


def _count(arrays: _Rows) -> int:
    return len(next(iter(arrays.values())))
