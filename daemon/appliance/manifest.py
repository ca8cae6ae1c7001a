"""``model.toml``: what a model is, and the model directory it stands in.

Almost everything has a default, so a bare ``<name>/<version>/model.onnx`` is a model too.
"""

import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from appliance.errors import InvalidManifest, InvalidRequest
from appliance.problems import describe_problems
from appliance.types import ITEM_BYTES

#: Triton CVE-2026-24208 and Ollama's path traversals came from names used as paths; ours never hold a separator.
MODEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
VERSION_NAME: Final = re.compile(r"[1-9][0-9]{0,17}")

#: File looked for in a version directory without a manifest, by format.
BARE_ARTIFACTS: Final = {"onnx": "model.onnx", "openvino-ir": "model.xml"}

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TensorName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1)]
QueueSize = Annotated[int, Field(ge=1, le=1_000_000)]
TimeoutMs = Annotated[int, Field(ge=0, le=86_400_000)]

#: Priority levels of a model that says nothing of them: interactive, default and background.
CLASSES: Final = 3
DEFAULT_CLASS: Final = 2


def _level(key: object) -> object:
    """A key of a table is a string; written in another way it would name a level twice."""
    if isinstance(key, str) and not re.fullmatch(r"[1-9][0-9]?", key):
        raise ValueError("a level of priority is a number from 1 to 64")
    return key


Level = Annotated[int, BeforeValidator(_level), Field(ge=1, le=64)]


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

    name: TensorName
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


class QueuePolicySection(_Section):
    """How calls of one priority level queue; what is unset is as in `BatchSection`, which explains the words.

    Attributes:
        max_queue_size: Requests of this level that may wait, besides the bound on all together.
        default_timeout_ms: As there.
        timeout_action: As there.
        allow_timeout_override: As there.
    """

    max_queue_size: QueueSize | None = None
    default_timeout_ms: TimeoutMs | None = None
    timeout_action: Literal["reject", "delay"] | None = None
    allow_timeout_override: bool | None = None


class QueuePolicy(NamedTuple):
    """How calls of one priority level queue, everything set.

    Attributes:
        max_queue_size: Requests of this level that may wait.
        default_timeout_us: Deadline of requests that bring none; 0 for none.
        is_delayed: True where a request past its deadline goes behind the others rather than being refused.
        allows_override: False where the ``timeout`` parameter of a request is ignored.
    """

    max_queue_size: int
    default_timeout_us: int
    is_delayed: bool
    allows_override: bool


class BatchSection(_Section):
    """Bounds and policy of the model's queue, in Triton's words. The daemon needs none of them to do well.

    Words and meanings follow Triton's model_config.proto: ModelDynamicBatching, ModelQueuePolicy.

    Attributes:
        max_queue_delay_us: A request may be held this long for others to share its batch; 0 leaves it to the daemon.
        preferred_batch_sizes: Batches of these many rows are sent at once when they can be formed; others wait for
            max_queue_delay_us. Empty leaves it to the daemon.
        max_queue_size: Requests that may wait; one more is refused.
        max_queue_bytes: Bytes of tensors that may wait.
        default_timeout_ms: Deadline of requests that bring none; 0 for no deadline. A client may shorten it, not
            lengthen.
        timeout_action: ``reject`` refuses a request whose deadline has passed while it waited; ``delay`` runs it after
            those of the same or a more urgent level whose deadlines have not.
        allow_timeout_override: False ignores the ``timeout`` parameter of requests.
        priority_levels: Levels of priority, 1 being the most urgent; 0 for three: 1 interactive, 2 default,
            3 background.
        default_priority_level: The level of requests that name none, or one that there is not; 0 for 2, default, where
            priority_levels is 0 too.
        priority_queue_policy: By level, what is to differ from the above.
        max_batch_seconds: A batch that runs longer means a hung worker, which is killed.
    """

    max_queue_delay_us: Annotated[int, Field(ge=0, le=60_000_000)] = 0
    preferred_batch_sizes: Annotated[list[Count], Field(max_length=1024)] = []
    max_queue_size: QueueSize = 4096
    max_queue_bytes: Annotated[int, Field(ge=1)] = 268435456
    default_timeout_ms: TimeoutMs = 0
    timeout_action: Literal["reject", "delay"] = "reject"
    allow_timeout_override: bool = True
    priority_levels: Annotated[int, Field(ge=0, le=64)] = 0
    default_priority_level: Annotated[int, Field(ge=0, le=64)] = 0
    priority_queue_policy: dict[Level, QueuePolicySection] = {}
    max_batch_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0

    @model_validator(mode="after")
    def _sizes_ascend(self) -> Self:
        if sorted(set(self.preferred_batch_sizes)) != self.preferred_batch_sizes:
            raise ValueError("preferred_batch_sizes must ascend")
        return self

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        if self.priority_levels and not self.default_priority_level:
            raise ValueError(
                f"default_priority_level must say which of the {self.priority_levels} priority_levels is the default"
            )
        if self.default_priority_level > self.levels:
            raise ValueError(f"default_priority_level ({self.default_priority_level}) must be from 1 to {self.levels}")
        for level in self.priority_queue_policy:
            if level > self.levels:
                raise ValueError(f"priority_queue_policy.{level} must be a level from 1 to {self.levels}")
        return self

    @property
    def levels(self) -> int:
        """How many levels of priority there are."""
        return self.priority_levels or CLASSES

    @property
    def default_level(self) -> int:
        """The level of requests that name none."""
        return self.default_priority_level or DEFAULT_CLASS

    def policy(self, level: int = 0) -> QueuePolicy:
        """How calls of a level queue; 0 for a level that nothing is said of."""
        own = self.priority_queue_policy.get(level, QueuePolicySection())
        timeout_ms = self.default_timeout_ms if own.default_timeout_ms is None else own.default_timeout_ms
        allows = self.allow_timeout_override if own.allow_timeout_override is None else own.allow_timeout_override
        return QueuePolicy(
            own.max_queue_size or self.max_queue_size,
            timeout_ms * 1000,
            (own.timeout_action or self.timeout_action) == "delay",
            allows,
        )

    def policies(self) -> dict[int, QueuePolicy]:
        """The policy of each level, and under 0 that of requests that name none."""
        return {level: self.policy(level or self.default_level) for level in range(self.levels + 1)}


class CacheSection(_Section):
    """Answers kept for requests that come again, word for word, and equal requests in flight, which run once.

    Attributes:
        max_bytes: Memory of the front-end for answers, with all that goes with them; 0 keeps none and shares no run.
        max_age_seconds: An older answer is computed anew; 0 for any age.
        max_request_bytes: Requests with more bytes of tensors run as if there were no cache: looking one up means
            reading every byte of it on the event loop, about 1 ms for a megabyte.
    """

    max_bytes: Annotated[int, Field(ge=0, le=1 << 36)] = 0
    max_age_seconds: Annotated[float, Field(ge=0, le=31_536_000)] = 0.0
    max_request_bytes: Annotated[int, Field(ge=0, le=1 << 30)] = 1048576


class StateEntry(_Section):
    """A tensor that a sequence keeps from one request to the next.

    Attributes:
        input: The session input that takes it.
        output: The session output that gives what the next request takes; of the same datatype and shape.
        initial: What it is when a sequence starts: one number for all elements, or nested lists of numbers in the
            state's shape, without the batch dimension.
    """

    input: TensorName
    output: TensorName
    initial: bool | int | float | list[Any] = 0

    @model_validator(mode="after")
    def _is_comparable(self) -> Self:
        if _has_nan(self.initial):
            raise ValueError("initial must not hold nan")
        return self


def _has_nan(value: Any) -> bool:
    return any(map(_has_nan, value)) if isinstance(value, list) else value != value


class ControlsSection(_Section):
    """Session inputs of one element a row that the daemon fills; empty for none.

    Attributes:
        start: 1 for the first request of a sequence, else 0; FP32, INT32 or BOOL.
        end: 1 for the last, likewise.
        ready: 1 for a row that holds a request, 0 for one that does not (``direct``), likewise.
        correlation_id: The sequence's id as the client wrote it; UINT64, INT64, UINT32 or INT32, the lower bits.
    """

    start: Annotated[str, StringConstraints(max_length=256)] = ""
    end: Annotated[str, StringConstraints(max_length=256)] = ""
    ready: Annotated[str, StringConstraints(max_length=256)] = ""
    correlation_id: Annotated[str, StringConstraints(max_length=256)] = ""


class SequenceSection(_Section):
    """Makes the model one of sequences: requests that share an id, whose state the worker keeps.

    Words and meanings follow Triton's model_config.proto, ModelSequenceBatching.

    Attributes:
        strategy: ``oldest`` puts steps of different sequences together as they come; ``direct`` gives every sequence a
            row of its own, and a batch all rows up to the highest that it has a step for.
        max_sequences: Sequences that live at a time; one more waits in the queue.
        idle_seconds: A sequence with no request for so long ends. Triton's default is 1 s.
        state: What is kept.
        controls: What else the model is told of a sequence.
    """

    strategy: Literal["oldest", "direct"] = "oldest"
    max_sequences: Annotated[int, Field(ge=1, le=65536)] = 64
    idle_seconds: Annotated[float, Field(gt=0, le=86400)] = 60.0
    state: Annotated[list[StateEntry], Field(min_length=1, max_length=256)]
    controls: ControlsSection = ControlsSection()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        controls = [name for name in self.controls.model_dump().values() if name]
        for kind, names in (
            ("input", [*(each.input for each in self.state), *controls]),
            ("output", [each.output for each in self.state]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"state and controls must not name an {kind} twice")
        return self

    @property
    def inputs(self) -> frozenset[str]:
        """Session inputs that no client sends."""
        return frozenset((*(each.input for each in self.state), *self.controls.model_dump().values())) - {""}

    @property
    def outputs(self) -> frozenset[str]:
        """Session outputs that become states."""
        return frozenset(each.output for each in self.state)


class PlacementSection(_Section):
    """Pins a part of the choice that the daemon would otherwise make; unset parts stay free."""

    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    options: dict[str, str] = {}


class InstancesSection(_Section):
    """How a model uses its device; what is unset is measured.

    Attributes:
        streams: Batches that run at the same time.
        threads: Threads of each.
        weight: The model's part of a device that several models use, beside the others' 1.0.
    """

    streams: Annotated[int, Field(ge=1, le=64)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0


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
    sequence: SequenceSection | None = None
    cache: CacheSection = CacheSection()
    placement: PlacementSection = PlacementSection()
    instances: InstancesSection = InstancesSection()

    # JSON has no infinity, which a state may well begin with; workers read Python's way to write it.
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, ser_json_inf_nan="constants")

    @model_validator(mode="after")
    def _has_artifact(self) -> Self:
        if not self.artifacts:
            raise ValueError("at least one artifact is needed")
        for kind, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if len({entry.name for entry in names}) != len(names):
                raise ValueError(f"{kind} must not repeat a name")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        sizes = self.batch.preferred_batch_sizes
        if sizes and self.max_batch_size is not None and sizes[-1] > self.max_batch_size:
            raise ValueError(
                f"batch.preferred_batch_sizes holds {sizes[-1]}, and max_batch_size is {self.max_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _sequence_goes_with_the_rest(self) -> Self:
        if self.sequence is None:
            return self
        if self.text is not None:
            raise ValueError("sequence does not go with text: texts are tokenised in any order, and steps have one")
        if self.cache.max_bytes:
            raise ValueError("sequence does not go with cache: an answer depends on the requests before it")
        if self.image is not None and self.image.tensor in self.sequence.inputs:
            raise ValueError(f"sequence and image must not both fill {self.image.tensor!r}")
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
