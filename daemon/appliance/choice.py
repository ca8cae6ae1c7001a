"""Which candidate serves: by objective among those measured, and only if its outputs stay close to the reference's.

Pure: values in, a verdict on every candidate out. Accuracy is asked for lazily: candidates are gone through from the
best score down, the first that passes wins, and what is slower than the winner need not be checked at all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from appliance.candidates import Candidate
from appliance.measurement import Measurement
from appliance.quality import Evidence

#: A challenger must be this much better than what serves, or the swap is not worth it; more so where a measurement was
#: disturbed by other programs.
MARGIN: Final = 0.05
DISTURBED_MARGIN: Final = 0.25

#: Rows a second that count of several streams: their threads share a worker's interpreter, which answers about as many
#: batches, so what a model of microseconds reaches beyond that in measuring nobody gets.
_STREAMED_ROWS: Final = 25_000.0


class Verdict(StrEnum):
    """What became of a candidate."""

    CHOSEN = "chosen"
    SLOWER = "slower"
    REFUSED = "refused"
    FAILED = "failed"
    UNMEASURED = "unmeasured"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class Considered:
    """One candidate with its numbers and what became of it.

    Attributes:
        candidate: Which.
        measurement: Its numbers; None before it was measured.
        evidence: Its comparison with the reference; None where there was none.
        score: What the objective makes of it, less is better; None without a measurement.
        verdict: What became of it.
        reason: Why, in a sentence.
    """

    candidate: Candidate
    measurement: Measurement | None
    evidence: Evidence | None
    score: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome.

    Attributes:
        winner: Who serves; None where nothing measured passed.
        considered: Every candidate, best score first, those without one last.
        unchecked: The candidate whose accuracy decides next; None once the choice is settled.
        objective: What it went by, in words.
    """

    winner: Candidate | None
    considered: tuple[Considered, ...]
    unchecked: Candidate | None
    objective: str


def choose(
    objective: str,
    candidates: Sequence[Candidate],
    measurement: Callable[[Candidate], Measurement | None],
    evidence: Callable[[Candidate], Evidence | None],
    reference: Candidate,
    incumbent: Candidate | None = None,
) -> Choice:
    """Choose among `candidates`.

    Args:
        objective: ``latency``, ``throughput``, ``memory``, ``energy`` or ``balanced``.
        candidates: In the order of the rule.
        measurement: What is known of a candidate's speed.
        evidence: What is known of its accuracy.
        reference: Needs no evidence, and neither does what differs from it in how cores are split alone.
        incumbent: Serves now, and keeps serving unless another is better by a margin.
    """
    measured = {one.name: found for one in candidates if (found := measurement(one)) is not None}
    score, words = _scoring(objective, [found for found in measured.values() if found.points])
    ranked = sorted(
        (one for one in candidates if one.name in measured and measured[one.name].points),
        key=lambda one: _handicapped(score(measured[one.name]), measured[one.name], one, incumbent),
    )
    considered: list[Considered] = []
    winner: Candidate | None = None
    unchecked: Candidate | None = None
    for one in ranked:
        found, proof = measured[one.name], evidence(one)
        value = score(found)
        if winner is not None or unchecked is not None:
            best = winner or unchecked
            reason = _compare(one, best, measured, score, incumbent) if best is not None else ""
            if proof is not None and proof.refusal:
                considered.append(Considered(one, found, proof, value, Verdict.REFUSED, proof.refusal))
            else:
                considered.append(Considered(one, found, proof, value, Verdict.SLOWER, reason))
        elif one.computation == reference.computation:
            winner = one
            itself = "the reference" if one.name == reference.name else "computes as the reference does"
            considered.append(Considered(one, found, None, value, Verdict.CHOSEN, f"best by {words}; {itself}"))
        elif proof is None:
            unchecked = one
            reason = f"best by {words}, but its accuracy is not checked yet"
            considered.append(Considered(one, found, None, value, Verdict.UNCHECKED, reason))
        elif proof.refusal:
            considered.append(Considered(one, found, proof, value, Verdict.REFUSED, proof.refusal))
        else:
            winner = one
            considered.append(Considered(one, found, proof, value, Verdict.CHOSEN, f"best by {words}{_shown(proof)}"))
    for one in candidates:
        found = measured.get(one.name)
        if found is None:
            considered.append(Considered(one, None, evidence(one), None, Verdict.UNMEASURED, "not measured yet"))
        elif not found.points:
            reason = found.problem or "measuring gave no result"
            considered.append(Considered(one, found, evidence(one), None, Verdict.FAILED, reason))
    return Choice(winner, tuple(considered), unchecked, words)


def _shown(proof: Evidence) -> str:
    found = proof.comparison
    if found is None:
        return ""
    on = "made-up inputs, since the model has no sample" if found.is_synthetic else f"{found.count} rows of the sample"
    return f"; {found.metric} {found.value:.4f} against {found.reference:.4f} on {on}"


def _handicapped(value: float, found: Measurement, one: Candidate, incumbent: Candidate | None) -> float:
    if incumbent is None or one.name == incumbent.name:
        return value
    return value * (1 + (DISTURBED_MARGIN if found.is_disturbed else MARGIN))


def _compare(
    one: Candidate,
    best: Candidate,
    measured: Mapping[str, Measurement],
    score: Callable[[Measurement], float],
    incumbent: Candidate | None,
) -> str:
    ratio = score(measured[one.name]) / score(measured[best.name])
    if ratio < 1 and incumbent is not None and best.name == incumbent.name:
        return f"only {1 / ratio:.2f} times as good as what serves: not worth a swap"
    return f"{ratio:.2f} times the cost of {best.name}"


def _scoring(objective: str, measured: Sequence[Measurement]) -> tuple[Callable[[Measurement], float], str]:
    """The function an objective minimises, and its name for people."""
    if objective == "latency":
        return (lambda found: found.latency_us), "latency of one row"
    if objective == "throughput":
        return (lambda found: 1e6 / _throughput(found)), "throughput at the best batch size"
    if objective == "memory":
        return (lambda found: float(max(found.peak_bytes, 1))), "peak memory of the process"
    if objective == "energy" and measured and all(found.energy_mj for found in measured):
        return (lambda found: found.energy_mj or math.inf), "energy of a row"
    words = "latency and throughput alike"
    if objective == "energy":
        words += ", since this machine has no energy counter for every candidate"
    return (lambda found: math.sqrt(found.latency_us / _throughput(found))), words


def _throughput(found: Measurement) -> float:
    """Rows a second, as far as they can be served."""
    return found.rows_per_second if found.streams == 1 else min(found.rows_per_second, _STREAMED_ROWS)
