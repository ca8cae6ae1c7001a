"""``model.toml``: what a model is, and the model directory it stands in.

Almost everything has a default, so a bare ``<name>/<version>/model.onnx`` is a model too.
"""

import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from appliance.errors import InvalidManifest, InvalidRequest
from appliance.problems import describe_problems
from appliance.types import ITEM_BYTES

#: Triton CVE-2026-24208 and Ollama's path traversals came from names used as paths; ours never hold a separator.
MODEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
VERSION_NAME: Final = re.compile(r"[1-9][0-9]{0,17}")

#: File looked for in a version directory without a manifest, by format.
BARE_ARTIFACTS: Final = {"onnx": "model.onnx", "openvino-ir": "model.xml"}

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]


def check_model_name(name: str) -> str:
    """Return `name` if it can be a model's name.

    Raises:
        InvalidRequest: It does not match ``[a-z0-9][a-z0-9._-]{0,62}``.
    """
    if not MODEL_NAME.fullmatch(name):
        shown = repr(name[:64]) + ("..." if len(name) > 64 else "")
        raise InvalidRequest(f"cannot use {shown} as a model name: the rule is [a-z0-9][a-z0-9._-]{{0,62}}")
    return name


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("must be a path below the model's directory")
    return path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArtifactEntry(_Section):
    """One artifact: path below the model's directory (its first part is the version), format, precision, digest."""

    path: str
    format: str
    precision: str = "FP32"
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _path_has_version(self) -> Self:
        _relative(self.path)
        if not VERSION_NAME.fullmatch(PurePosixPath(self.path).parts[0]):
            raise ValueError("path must begin with a version number, such as 1/model.onnx")
        return self

    @property
    def version(self) -> str:
        """The version the artifact belongs to."""
        return PurePosixPath(self.path).parts[0]


class TensorEntry(_Section):
    """One tensor, shape without the batch dimension, -1 for any length."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    datatype: str
    shape: list[Annotated[int, Field(ge=-1)]]

    @model_validator(mode="after")
    def _known_datatype(self) -> Self:
        if self.datatype not in ITEM_BYTES:
            raise ValueError(f"datatype {self.datatype!r} is none of {', '.join(ITEM_BYTES)}")
        return self


class TextSection(_Section):
    """Turns a BYTES input of UTF-8 texts into token ids, in the front-end.

    Attributes:
        input: The BYTES input clients send, one text per row.
        ids: The session input that takes token ids, INT64 [batch, tokens].
        mask: The session input that takes 1 for a token and 0 for padding, or empty.
        tokenizer: A ``tokenizer.json`` of the tokenizers library, below the model's directory.
        max_tokens: Longer texts are cut to this many tokens.
        buckets: Lengths that texts are padded to; requests of one bucket share batches.
        pad_id: The id that fills up.
    """

    input: str = "text"
    ids: str = "input_ids"
    mask: str = "attention_mask"
    tokenizer: str = "tokenizer.json"
    tokenizer_sha256: Sha256 | None = None
    max_tokens: Annotated[int, Field(ge=1, le=65536)] = 256
    buckets: list[Count] = [16, 32, 64, 128, 256]
    pad_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _buckets_ascend(self) -> Self:
        _relative(self.tokenizer)
        if not self.buckets or sorted(set(self.buckets)) != self.buckets:
            raise ValueError("buckets must ascend")
        if self.buckets[-1] < self.max_tokens:
            raise ValueError(f"the last bucket must hold max_tokens ({self.max_tokens})")
        return self


class ImageSection(_Section):
    """Turns a BYTES input of PNG or JPEG pictures into a tensor, in the worker.

    The session's input `tensor` gets FP32 ``(value * scale - mean) / std`` in `layout`, value being 0..255.
    """

    input: str = "image"
    tensor: str
    width: Annotated[int, Field(ge=1, le=8192)]
    height: Annotated[int, Field(ge=1, le=8192)]
    channels: Literal[1, 3] = 3
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    scale: float = 1 / 255
    mean: list[float] = [0.0]
    std: list[float] = [1.0]
    resize: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    max_pixels: Annotated[int, Field(ge=1, le=268435456)] = 33554432

    @model_validator(mode="after")
    def _per_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} needs 1 or {self.channels} values, not {len(values)}")
        if any(value == 0 for value in self.std):
            raise ValueError("std must not be 0")
        return self


class ClassificationSection(_Section):
    """Adds outputs ``label`` (BYTES [k]) and ``score`` (FP32 [k], softmax) made from `logits`, in the worker."""

    logits: str = "logits"
    labels: str = "labels.txt"
    labels_sha256: Sha256 | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] = 1
    label_output: str = "label"
    score_output: str = "score"

    @model_validator(mode="after")
    def _labels_below(self) -> Self:
        _relative(self.labels)
        return self


class SampleReference(_Section):
    """What the model's maker measured on the evaluation sample."""

    accuracy: Annotated[float, Field(ge=0, le=1)]
    count: Count


class SamplesSection(_Section):
    """Held-out inputs with labels, and inputs to calibrate with.

    One JSON object a line: ``{"inputs": {NAME: TEXT or {"base64": ...} or nested lists of numbers}, "label": ...}``;
    the label may be left out.

    Attributes:
        evaluation: Inputs that variants of lower precision are judged by; they took part in neither training nor
            calibration.
        calibration: Inputs that quantisation learns ranges from.
        reference: What the model's maker measured on the evaluation sample.
        record: Rows of live requests to keep as calibration inputs, on this machine and readable by the daemon alone;
            0 for none.
    """

    evaluation: str | None = None
    evaluation_sha256: Sha256 | None = None
    calibration: str | None = None
    calibration_sha256: Sha256 | None = None
    reference: SampleReference | None = None
    record: Annotated[int, Field(ge=0, le=100_000)] = 0

    @model_validator(mode="after")
    def _samples_below(self) -> Self:
        for path in (self.evaluation, self.calibration):
            if path is not None:
                _relative(path)
        return self


class BatchSection(_Section):
    """Bounds of the model's queue.

    Attributes:
        max_queue_size: Requests that may wait; one more is refused.
        max_queue_bytes: Bytes of tensors that may wait.
        default_timeout_ms: Deadline of requests that bring none; 0 for no deadline. A client may shorten it, not
            lengthen.
        max_batch_seconds: A batch that runs longer means a hung worker, which is killed.
    """

    max_queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    max_queue_bytes: Annotated[int, Field(ge=1)] = 268435456
    default_timeout_ms: Annotated[int, Field(ge=0)] = 0
    max_batch_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0


class PlacementSection(_Section):
    """Pins a part of the choice that the daemon would otherwise make; unset parts stay free."""

    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    options: dict[str, str] = {}


class QualitySection(_Section):
    """What a variant of lower precision must keep.

    Attributes:
        bound: The most it may be worse than the FP32 reference, as a share: 0.01 is 1 %.
        metric: ``auto`` takes the task's: accuracy with labels, else agreement, for classifiers; mean cosine for
            embeddings; relative L2 otherwise.
        lowest: ``FP32`` keeps every lower precision out; ``BF16`` allows BF16 and FP16; ``INT4`` allows all.
        limit: Rows of the sample to use.
    """

    bound: Annotated[float, Field(ge=0, le=1)] = 0.01
    metric: Literal["auto", "accuracy", "agreement", "cosine", "relative-l2"] = "auto"
    lowest: Literal["FP32", "BF16", "INT8", "INT4"] = "INT4"
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 1000


class Manifest(_Section):
    """A model, as its directory describes it.

    Attributes:
        objective: What the choice among measured variants goes by: ``latency`` of one row, ``throughput`` at the best
            batch size, ``memory``, ``energy`` of a row, or ``balanced``: latency and throughput alike.
        fallback: What happens where the device of the first choice cannot be had: ``forbid`` fails the load, ``warn``
            takes the next, says so in the log and counts it, ``allow`` takes the next.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Annotated[str, StringConstraints(pattern=rf"^{MODEL_NAME.pattern}$")]
    task: Literal["text-classification", "image-classification", "embedding", "tensor"] = "tensor"
    description: str = ""
    license: str = ""
    source: str = ""
    max_batch_size: Annotated[int, Field(ge=0, le=65536)] | None = None
    objective: Literal["latency", "throughput", "memory", "energy", "balanced"] = "balanced"
    fallback: Literal["forbid", "warn", "allow"] = "warn"
    artifacts: list[ArtifactEntry]
    inputs: list[TensorEntry] = []
    outputs: list[TensorEntry] = []
    text: TextSection | None = None
    image: ImageSection | None = None
    classification: ClassificationSection | None = None
    samples: SamplesSection | None = None
    quality: QualitySection = QualitySection()
    batch: BatchSection = BatchSection()
    placement: PlacementSection = PlacementSection()

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _has_artifact(self) -> Self:
        if not self.artifacts:
            raise ValueError("at least one artifact is needed")
        for kind, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if len({entry.name for entry in names}) != len(names):
                raise ValueError(f"{kind} must not repeat a name")
        return self

    @property
    def versions(self) -> list[str]:
        """Versions that have an artifact, oldest first."""
        return sorted({entry.version for entry in self.artifacts}, key=int)

    def artifacts_of(self, version: str) -> list[ArtifactEntry]:
        """Artifacts of one version, in the manifest's order."""
        return [entry for entry in self.artifacts if entry.version == version]


def parse_manifest(text: str, directory_name: str) -> Manifest:
    """Read ``model.toml``.

    Raises:
        InvalidManifest: With every problem found; also where the name differs from the directory's.
    """
    try:
        manifest = Manifest.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidManifest(f"cannot read the manifest of {directory_name!r}: {error}") from error
    except ValidationError as error:
        raise InvalidManifest(
            f"cannot use the manifest of {directory_name!r}: {describe_problems(error, Manifest)}"
        ) from error
    if manifest.name != directory_name:
        raise InvalidManifest(
            f"cannot use the manifest of {directory_name!r}: its name {manifest.name!r} must equal the directory's"
        )
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a model directory, made up where it has no ``model.toml``.

    Raises:
        InvalidManifest: The file is invalid, unreadable, or the directory holds no artifact either.
    """
    try:
        return parse_manifest((directory / "model.toml").read_text(encoding="utf-8"), directory.name)
    except FileNotFoundError:
        return _bare_manifest(directory)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidManifest(f"cannot read the manifest of {directory.name!r}: {reason}") from error


def _bare_manifest(directory: Path) -> Manifest:
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise InvalidManifest(f"cannot read the directory of {directory.name!r}: {error.strerror}") from error
    versions = [entry.name for entry in entries if entry.is_dir() and VERSION_NAME.fullmatch(entry.name)]
    artifacts = [
        ArtifactEntry(path=f"{version}/{filename}", format=format_)
        for version in sorted(versions, key=int)
        for format_, filename in BARE_ARTIFACTS.items()
        if (directory / version / filename).is_file()
    ]
    if not artifacts:
        wanted = " or ".join(f"<version>/{name}" for name in BARE_ARTIFACTS.values())
        raise InvalidManifest(f"cannot serve {directory.name!r}: it has neither model.toml nor {wanted}")
    try:
        return Manifest(name=directory.name, artifacts=artifacts)
    except ValidationError as error:
        raise InvalidManifest(f"cannot serve {directory.name!r}: {describe_problems(error, Manifest)}") from error
