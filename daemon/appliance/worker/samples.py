"""Samples: rows of inputs, some with labels, that a model is judged by, calibrated with or measured on.

A sample is a ``.jsonl`` file (`appliance.manifest.SamplesSection` has its form), an ``.npz`` file of arrays by session
input whose first dimension counts the rows (BF16 as the upper halves of FP32 in UINT16, BYTES as numpy strings), or a
directory of such files, of ``.txt`` files with a text a line for text models, and of PNG and JPEG files for image
models. Everything is read as a stream, since a sample's tensors may be larger than the memory.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from appliance.artifacts import resolve_inside, verify_digest
from appliance.errors import ApplianceError, ArtifactCorrupt, InvalidRequest
from appliance.text import TextEncoder
from appliance.types import TensorSpec
from appliance.worker.image import Decoder, UndecodableImage
from appliance.worker.literals import array_of, bytes_of, tensor_of
from appliance.worker.state import first_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import Manifest

#: Bytes of one line of a ``.jsonl`` or ``.txt`` file, or of one picture.
MAX_ITEM_BYTES: Final = 64 << 20

_PICTURES: Final = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a sample.

    Attributes:
        feeds: Every session input by name, with a leading dimension of 1 where the model has a batch dimension.
        label: What the row is, or None.
        digest: sha256 of what the sample says of the inputs; the same whatever becomes of them.
    """

    feeds: "dict[str, NDArray[Any]]"
    label: str | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of equal shapes, put together.

    Attributes:
        places: Where each row stands in the sample, from 0.
        rows: The rows.
        feeds: Every session input by name, the rows one below the other.
    """

    places: tuple[int, ...]
    rows: tuple[Row, ...]
    feeds: "dict[str, NDArray[Any]]"


class SampleReader:
    """Reads samples for one model."""

    def __init__(
        self, inputs: Sequence[TensorSpec], manifest: "Manifest", directory: Path, *, is_batched: bool
    ) -> None:
        """Prepare what turns texts and pictures into tensors.

        Args:
            inputs: The session's inputs, full shapes.
            manifest: The model's.
            directory: The model's.
            is_batched: True where the first dimension of every input counts rows.

        Raises:
            InvalidManifest, ArtifactCorrupt: The tokenizer cannot be used.
        """
        self._inputs = {spec.name: _of_one_row(spec, is_batched) for spec in inputs}
        self._is_batched = is_batched
        self._manifest = manifest
        self._directory = directory
        self._encoder = _encoder(manifest, directory) if manifest.text else None
        self._decoder = Decoder(manifest.image) if manifest.image else None

    def rows(self, path: Path, limit: int | None = None) -> Iterator[Row]:
        """The first `limit` rows of the sample at `path`, at least one.

        Raises:
            InvalidRequest: It cannot be read, or says something else than the model takes; the message has the place.
            ArtifactCorrupt: The manifest gives it another sha256.
        """
        self._check_digest(path)
        for file, place, item in self._read(path, limit):
            try:
                yield self._row(item)
            except ApplianceError as error:
                raise InvalidRequest(f"cannot use the sample {file.name!r}: {place}: {error}") from error

    def count(self, path: Path, limit: int | None = None) -> int:
        """How many rows `rows` gives, if nothing is wrong with them.

        Raises:
            InvalidRequest: The sample cannot be read, or has no rows.
        """
        return sum(1 for _ in self._read(path, limit))

    def row(self, values: Mapping[str, Any], label: str | None = None) -> Row:
        """A row of `values`, which are written as in a ``.jsonl`` file.

        Raises:
            InvalidRequest: They are something else than the model takes.
        """
        return self._row(_Item(values, label, json.dumps(values, sort_keys=True).encode()))

    def _read(self, path: Path, limit: int | None) -> Iterator[tuple[Path, str, "_Item"]]:
        count = 0
        for file in self._files(path):
            for place, item in self._items(file):
                if limit is not None and count >= limit:
                    return
                count += 1
                yield file, place, item
        if count == 0:
            raise InvalidRequest(f"cannot use the sample {path.name!r}: it has no rows")

    def _check_digest(self, path: Path) -> None:
        samples = self._manifest.samples
        if samples is None:
            return
        for relative, sha256 in (
            (samples.evaluation, samples.evaluation_sha256),
            (samples.calibration, samples.calibration_sha256),
        ):
            if relative and sha256 and path.is_file() and (self._directory / relative).resolve() == path.resolve():
                verify_digest(path, sha256, relative)

    def _files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        wanted = {".jsonl", ".npz"}
        wanted.update([".txt"] if self._encoder else [], _PICTURES if self._decoder else [])
        try:
            return sorted(one for one in path.iterdir() if one.suffix.lower() in wanted and one.is_file())
        except OSError as error:
            raise InvalidRequest(f"cannot read the sample {path.name!r}: {error.strerror}") from error

    def _items(self, file: Path) -> Iterator[tuple[str, "_Item"]]:
        suffix = file.suffix.lower()
        try:
            if suffix == ".npz":
                yield from self._arrays(file)
                return
            with file.open("rb") as stream:
                if suffix == ".jsonl":
                    yield from _json_lines(stream, file.name)
                elif suffix == ".txt" and self._manifest.text:
                    for place, line in _lines(stream, file.name):
                        yield place, _Item({self._manifest.text.input: line}, None, line)
                elif suffix in _PICTURES and self._manifest.image:
                    content = stream.read(MAX_ITEM_BYTES + 1)
                    yield "it", _Item({self._manifest.image.input: content}, None, content)
                else:
                    raise InvalidRequest(
                        f"cannot use the sample {file.name!r}: it is none of .jsonl, .npz, for text models .txt, for "
                        "image models .png and .jpg, and no directory"
                    )
        except OSError as error:
            raise InvalidRequest(f"cannot read the sample {file.name!r}: {error.strerror or 'damaged'}") from error

    def _arrays(self, file: Path) -> Iterator[tuple[str, "_Item"]]:
        try:
            with file.open("rb") as stream:  # numpy leaves a damaged file open that it opened itself
                archive = np.load(stream, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise InvalidRequest(f"cannot read the sample {file.name!r}: it is no .npz archive")
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
            raise InvalidRequest(f"cannot read the sample {file.name!r}: it is damaged, or holds objects") from error
        counts = {array.shape[0] if array.ndim else None for array in arrays.values()}
        if not counts:
            return
        if len(counts) != 1 or None in counts:
            raise InvalidRequest(f"cannot use the sample {file.name!r}: its arrays differ in their first dimension")
        for row in range(counts.pop() or 0):
            values = {name: np.asarray(array[row]) for name, array in arrays.items()}
            described = [f"{name} {values[name].dtype} {values[name].shape} ".encode() for name in sorted(values)]
            contents = [values[name].tobytes() for name in sorted(values)]
            yield f"row {row}", _Item(values, None, b"".join((*described, *contents)))

    def _row(self, item: "_Item") -> Row:
        feeds: dict[str, NDArray[Any]] = {}
        manifest = self._manifest
        for name, value in item.values.items():
            spec = self._inputs.get(name)
            if spec is not None:
                made = {name: array_of(value, spec) if isinstance(value, np.ndarray) else tensor_of(value, spec)}
            elif self._encoder is not None and manifest.text and name == manifest.text.input:
                made = self._tokens(_content(value))
            elif self._decoder is not None and manifest.image and name == manifest.image.input:
                made = self._picture(_content(value), manifest.image.tensor)
            else:
                raise InvalidRequest(f"the model has no input {name!r}; its inputs are {', '.join(self._names())}")
            if repeated := made.keys() & feeds.keys():
                raise InvalidRequest(f"input {min(repeated)!r} is given twice")
            feeds.update(made)
        if manifest.sequence is not None:
            feeds = {**first_step(manifest.sequence, self._inputs), **feeds}
        if missing := [name for name in self._inputs if name not in feeds]:
            raise InvalidRequest(f"input {missing[0]!r} is missing")
        if self._is_batched:
            feeds = {name: array[np.newaxis] for name, array in feeds.items()}
        return Row(feeds, item.label, hashlib.sha256(item.source).digest())

    def _names(self) -> list[str]:
        manifest = self._manifest
        edges = [section.input for section in (manifest.text, manifest.image) if section is not None]
        return [*edges, *self._inputs]

    def _tokens(self, text: bytes) -> "dict[str, NDArray[Any]]":
        section = self._manifest.text
        if self._encoder is None or section is None:
            raise InvalidRequest("the model takes no text")
        tokens = self._encoder.encode([text])
        made = {section.ids: tokens.ids, **({section.mask: tokens.mask} if section.mask else {})}
        feeds = {}
        for name, content in made.items():
            spec = self._inputs.get(name)
            array = np.frombuffer(content, dtype="<i8")
            if spec is None:
                raise InvalidRequest(f"the model has no input {name!r} for the tokens")
            # A model without batch dimension may still have one of length 1 in its shape.
            shape = (1, tokens.length) if len(spec.shape) == 2 else (tokens.length,)
            feeds[name] = array_of(array.reshape(shape), spec)
        return feeds

    def _picture(self, content: bytes, tensor: str) -> "dict[str, NDArray[Any]]":
        spec = self._inputs.get(tensor)
        if self._decoder is None or spec is None:
            raise InvalidRequest(f"the model has no input {tensor!r} for the picture")
        if len(content) > MAX_ITEM_BYTES:
            raise InvalidRequest(f"it is longer than {MAX_ITEM_BYTES} bytes")
        pixels = np.empty(self._decoder.shape, dtype=np.float32)
        try:
            self._decoder.decode(content, pixels)
        except UndecodableImage as error:
            raise InvalidRequest(str(error)) from error
        return {tensor: array_of(pixels[np.newaxis] if len(spec.shape) == pixels.ndim + 1 else pixels, spec)}


@dataclass(frozen=True, slots=True)
class _Item:
    """A row as the sample has it: values by input, the label, and bytes that stand for the values."""

    values: Mapping[str, Any]
    label: str | None
    source: bytes


def batches(rows: Iterator[Row], size: int) -> Iterator[Batch]:
    """Put rows of equal shapes together, `size` at most; 0 leaves each alone, without a batch dimension.

    Batches come as they fill up, not in the order of the rows.
    """
    pending: dict[tuple[tuple[int, ...], ...], list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        key = tuple(array.shape for _, array in sorted(row.feeds.items()))
        waiting = pending.setdefault(key, [])
        waiting.append((place, row))
        if len(waiting) >= max(size, 1):
            yield _joined(pending.pop(key), size)
    for waiting in pending.values():
        yield _joined(waiting, size)


def _joined(waiting: Sequence[tuple[int, Row]], size: int) -> Batch:
    places, rows = zip(*waiting, strict=True)
    if size:
        feeds = {name: np.concatenate([row.feeds[name] for row in rows]) for name in rows[0].feeds}
    else:
        feeds = rows[0].feeds
    return Batch(places, rows, feeds)


def _of_one_row(spec: TensorSpec, is_batched: bool) -> TensorSpec:
    return TensorSpec(spec.name, spec.datatype, spec.shape[1:]) if is_batched else spec


def _encoder(manifest: "Manifest", directory: Path) -> TextEncoder:
    section = manifest.text
    if section is None:
        raise InvalidRequest("cannot tokenise: the model takes no text")
    path = resolve_inside(directory, section.tokenizer)
    verify_digest(path, section.tokenizer_sha256, section.tokenizer)
    try:
        return TextEncoder(section, path.read_bytes(), manifest.name)
    except OSError as error:
        raise ArtifactCorrupt(f"cannot read {section.tokenizer!r}: {error.strerror}") from error


def _content(value: Any) -> bytes:
    """The text or picture that a value is; a list of one is one."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, bytes) else bytes_of(value)


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, with their place in words."""
    number = 0
    while line := stream.readline(MAX_ITEM_BYTES + 1):
        number += 1
        if len(line) > MAX_ITEM_BYTES:
            raise InvalidRequest(f"cannot use the sample {name!r}: line {number} is longer than {MAX_ITEM_BYTES} bytes")
        if stripped := line.strip():
            yield f"line {number}", stripped


def _json_lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, _Item]]:
    for place, line in _lines(stream, name):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"cannot use the sample {name!r}: {place} is not JSON") from error
        inputs = document.get("inputs") if isinstance(document, dict) else None
        if not isinstance(inputs, dict):
            raise InvalidRequest(f'cannot use the sample {name!r}: {place} has no object "inputs"')
        label = document.get("label")
        if label is not None and not isinstance(label, (str, int)):
            raise InvalidRequest(
                f"cannot use the sample {name!r}: {place} has a label that is neither text nor integer"
            )
        source = json.dumps(inputs, sort_keys=True).encode()
        yield place, _Item(inputs, None if label is None else str(label), source)
