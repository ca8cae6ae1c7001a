"""What the registry remembers: one class for each kind of record, and the row each is kept as. Values only.

Every class has the name of its `table`, its `row_key` there, `as_row` and the inverse `from_row`. Rows hold text and
whole numbers. `from_row` raises `KeyError`, `TypeError` or `ValueError` for a row that is something else.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from appliance.measurement import Measurement
from appliance.quality import Evidence

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredMeasurement:
    """A measurement, and the model it was made for.

    Attributes:
        model: The model.
        version: Its version.
        measurement: What was found out.
        is_complete: False while points are still to come; what there is survives a restart.
    """

    table: ClassVar = "measurements"
    model: str
    version: str
    measurement: Measurement
    is_complete: bool = True

    @property
    def row_key(self) -> tuple[str, ...]:
        """The variant."""
        return (self.measurement.key.id,)

    def as_row(self) -> Row:
        """As it is kept."""
        found = self.measurement
        return {
            **asdict(found.key),
            "key": found.key.id,
            "model": self.model,
            "version": self.version,
            "is_complete": int(self.is_complete),
            "measured_at": found.measured_at,
            "document": json.dumps(found.as_json()),
        }

    @classmethod
    def from_row(cls, row: Row) -> "StoredMeasurement":
        """The inverse of `as_row`."""
        measurement = Measurement.from_json(json.loads(row["document"]))
        return cls(row["model"], row["version"], measurement, bool(row["is_complete"]))


@dataclass(frozen=True, slots=True)
class StoredEvidence:
    """A verdict, and the model it is about.

    Attributes:
        model: The model.
        version: Its version.
        metric: What they were compared by; the verdict itself does not say where there is no comparison.
        evidence: The verdict.
    """

    table: ClassVar = "evidence"
    model: str
    version: str
    metric: str
    evidence: Evidence

    @property
    def row_key(self) -> tuple[str, ...]:
        """The variant, what it was compared with, on which sample, and by which metric."""
        return self.evidence.key.id, self.evidence.reference, self.evidence.sample, self.metric

    def as_row(self) -> Row:
        """As it is kept."""
        key, reference, sample, metric = self.row_key
        return {
            "key": key,
            "reference": reference,
            "sample": sample,
            "metric": metric,
            "model": self.model,
            "version": self.version,
            "judged_at": self.evidence.judged_at,
            "document": json.dumps(self.evidence.as_json()),
        }

    @classmethod
    def from_row(cls, row: Row) -> "StoredEvidence":
        """The inverse of `as_row`."""
        evidence = Evidence.from_json(json.loads(row["document"]))
        return cls(row["model"], row["version"], row["metric"], evidence)


@dataclass(frozen=True, slots=True)
class DerivedVariant:
    """An artifact that was made from a model's own by lowering its precision.

    Attributes:
        id: Names it among those of its model; chosen by who made it.
        model: The model.
        version: Its version.
        source: Hex sha256 of the artifact it was made from.
        method: How, such as ``"int8"``.
        format: ``"onnx"`` or ``"openvino-ir"``.
        precision: Precision of its weights.
        path: Where it lies, relative to the state directory.
        sha256: Hex digest of its contents.
        bytes: What it takes on disk.
        calibration_rows: Rows of the sample that calibrated it; 0 where none were needed.
        created_at: ISO 8601 in UTC, for people.
    """

    table: ClassVar = "variants"
    id: str
    model: str
    version: str
    source: str
    method: str
    format: str
    precision: str
    path: str
    sha256: str
    bytes: int
    calibration_rows: int = 0
    created_at: str = ""

    @property
    def row_key(self) -> tuple[str, ...]:
        """The model, its version, and the id, which equal models may share."""
        return self.model, self.version, self.id

    def as_row(self) -> Row:
        """As it is kept."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Row) -> "DerivedVariant":
        """The inverse of `as_row`."""
        return cls(**row)


@dataclass(frozen=True, slots=True)
class StoredPlacement:
    """The variant that serves a model, and why.

    Attributes:
        model: The model.
        version: Its version.
        key: `VariantKey.id` of the variant.
        variant: Its name among the model's candidates.
        chosen_by: By the written rule, by measuring, or by hand.
        reason: For people.
        is_pinned: True where only a person may change it.
        at: ISO 8601 in UTC, for people.
    """

    table: ClassVar = "placements"
    model: str
    version: str
    key: str
    variant: str
    chosen_by: Literal["rule", "measured", "pinned"]
    reason: str = ""
    is_pinned: bool = False
    at: str = ""

    @property
    def row_key(self) -> tuple[str, ...]:
        """The model and its version."""
        return self.model, self.version

    def as_row(self) -> Row:
        """As it is kept."""
        return {**asdict(self), "is_pinned": int(self.is_pinned)}

    @classmethod
    def from_row(cls, row: Row) -> "StoredPlacement":
        """The inverse of `as_row`."""
        return cls(**{**row, "is_pinned": bool(row["is_pinned"])})


@dataclass(frozen=True, slots=True)
class StoredDigest:
    """The digest of an artifact that need not be read again while its fingerprint is the same.

    Attributes:
        fingerprint: Of the file's name, size, inode and modification time (`appliance.artifacts.fingerprint`).
        sha256: Hex digest of the contents.
    """

    table: ClassVar = "digests"
    fingerprint: str
    sha256: str

    @property
    def row_key(self) -> tuple[str, ...]:
        """The fingerprint."""
        return (self.fingerprint,)

    def as_row(self) -> Row:
        """As it is kept."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Row) -> "StoredDigest":
        """The inverse of `as_row`."""
        return cls(**row)


@dataclass(frozen=True, slots=True)
class WantedJob:
    """A job that was asked for and has not finished; it is resumed after a restart.

    Attributes:
        model: The model.
        kind: What is to be done.
        question: How, in values of JSON.
        requested_at: ISO 8601 in UTC, for people.
    """

    table: ClassVar = "wanted"
    model: str
    kind: Literal["tune", "quantize"]
    question: Mapping[str, Any] = field(default_factory=dict)
    requested_at: str = ""

    @property
    def row_key(self) -> tuple[str, ...]:
        """The model and what is to be done: what is asked for twice is done once, the way that was asked last."""
        return self.model, self.kind

    def as_row(self) -> Row:
        """As it is kept."""
        return {
            "model": self.model,
            "kind": self.kind,
            "question": json.dumps(self.question),
            "requested_at": self.requested_at,
        }

    @classmethod
    def from_row(cls, row: Row) -> "WantedJob":
        """The inverse of `as_row`."""
        return cls(row["model"], row["kind"], json.loads(row["question"]), row["requested_at"])


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people.

    Attributes:
        id: Unlike any other's, so that one written twice is there once.
        at: ISO 8601 in UTC.
        kind: A word for programs.
        model: The model it happened to; empty where none.
        text: What happened.
    """

    table: ClassVar = "events"
    id: str
    at: str
    kind: str
    model: str
    text: str

    @property
    def row_key(self) -> tuple[str, ...]:
        """Its id."""
        return (self.id,)

    def as_row(self) -> Row:
        """As it is kept."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Row) -> "Event":
        """The inverse of `as_row`."""
        return cls(**row)


Record = StoredMeasurement | StoredEvidence | DerivedVariant | StoredPlacement | StoredDigest | WantedJob
#: Classes of what the daemon keeps in memory, by table.
RECORDS: dict[str, type[Record]] = {
    each.table: each
    for each in (StoredMeasurement, StoredEvidence, DerivedVariant, StoredPlacement, StoredDigest, WantedJob)
}
