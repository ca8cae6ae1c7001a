"""What `make demo` sends, what comes back, and whether that is right."""

import base64
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transports import TRANSPORTS

#: How far below the manifest's accuracy a model may stay: other processors round differently.
TOLERANCE: Final = 0.005


@dataclass(frozen=True)
class Sample:
    """A held-out input and the label it should get."""

    content: bytes
    label: str


@dataclass(frozen=True)
class SampleModel:
    """A model of the repository that brings inputs to try it with.

    Attributes:
        name: The model.
        input: Name of the BYTES input the samples are for.
        is_image: True where the samples are pictures, else they are texts.
        reference: Accuracy the manifest states for the samples.
        samples: All of them.
    """

    name: str
    input: str
    is_image: bool
    reference: float
    samples: Sequence[Sample]


@dataclass
class Outcome:
    """What a model answered over one transport.

    Attributes:
        transport: The transport's name in `TRANSPORTS`.
        labels: One for each sample, in order.
        latencies_s: Seconds each request took, seen from the client, in order.
    """

    transport: str
    labels: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A model, how the daemon placed it, and what it answered over each transport."""

    model: SampleModel
    status: dict[str, Any]
    outcomes: Sequence[Outcome]


def read_models(repository: Path) -> list[SampleModel]:
    """Every model of `repository` that has evaluation samples, by name."""
    found = []
    for manifest in sorted(repository.glob("*/model.toml")):
        entry = tomllib.loads(manifest.read_text(encoding="utf-8"))
        samples = entry.get("samples", {})
        kind = next((kind for kind in ("image", "text") if kind in entry), None)
        if kind is None or "evaluation" not in samples:
            continue
        name = entry[kind].get("input", kind)
        lines = (manifest.parent / samples["evaluation"]).read_text(encoding="utf-8").splitlines()
        found.append(
            SampleModel(
                name=entry["name"],
                input=name,
                is_image=kind == "image",
                reference=samples["reference"]["accuracy"],
                samples=[_sample(json.loads(line), name) for line in lines],
            )
        )
    return found


def _sample(line: dict[str, Any], name: str) -> Sample:
    value = line["inputs"][name]
    content = base64.b64decode(value["base64"]) if isinstance(value, dict) else value.encode()
    return Sample(content, line["label"])


def accuracy(outcome: Outcome, samples: Sequence[Sample]) -> float:
    """Part of the samples that got the right label."""
    right = sum(label == sample.label for label, sample in zip(outcome.labels, samples, strict=True))
    return right / len(samples)


def percentile_ms(latencies_s: Sequence[float], percent: int) -> float:
    """A percentile by nearest rank, in milliseconds."""
    rank = math.ceil(len(latencies_s) * percent / 100)
    return sorted(latencies_s)[max(rank, 1) - 1] * 1e3


def problems_of(trial: Trial) -> list[str]:
    """What is wrong with a model's answers, a sentence each; empty where they are right."""
    model = trial.model
    found = []
    if len(trial.outcomes) != len(TRANSPORTS):
        found.append(f"{model.name} was tried over {len(trial.outcomes)} of {len(TRANSPORTS)} transports")
    for outcome in trial.outcomes:
        if len(outcome.labels) != len(model.samples):
            found.append(
                f"{model.name} over {outcome.transport}: {len(outcome.labels)} answers to {len(model.samples)} requests"
            )
            continue
        reached = accuracy(outcome, model.samples)
        if reached < model.reference - TOLERANCE:
            found.append(
                f"{model.name} over {outcome.transport}: accuracy is {reached:.4f}, "
                f"and the manifest says {model.reference:.4f}"
            )
    for index, labels in enumerate(zip(*(outcome.labels for outcome in trial.outcomes), strict=False)):
        if len(set(labels)) > 1:
            answers = ", ".join(
                f"{label!r} over {outcome.transport}" for label, outcome in zip(labels, trial.outcomes, strict=True)
            )
            found.append(f"{model.name}: the transports disagree on input {index + 1}: {answers}")
            break
    return found
