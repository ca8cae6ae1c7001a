"""Why a model runs as it does: every candidate with its numbers and what became of it, as JSON values."""

from typing import Any

from appliance.choice import Choice, Considered
from appliance.chooser import Options
from appliance.measurement import Measurement
from appliance.quality import Evidence
from appliance.types import CostStatus, ModelStatus


def explain(options: Options, choice: Choice, status: ModelStatus) -> dict[str, Any]:
    """The document behind ``appliancectl explain``.

    Args:
        options: What the model can be run as.
        choice: What is made of them now.
        status: What serves.
    """
    quality = options.manifest.quality
    reference = options.candidates.reference
    return {
        "model": options.manifest.name,
        "version": options.version,
        "objective": options.manifest.objective,
        "judged_by": choice.objective,
        "fallback_policy": options.manifest.fallback,
        "metric": options.metric,
        "bound": quality.bound,
        "has_sample": options.sample_path is not None,
        "reference": reference.name,
        "serving": {
            "state": status.state,
            "variant": status.variant,
            "chosen_by": status.chosen_by,
            "requested_device": status.requested_device,
            "device": status.device,
            "provider": status.provider,
            "precision": status.precision,
            "runtime": status.runtime,
            "fallback": status.fallback,
            "costs": [_cost(each) for each in status.costs],
        },
        "winner": choice.winner.name if choice.winner is not None else None,
        "candidates": [_considered(options, each) for each in choice.considered],
        "barred": [{"name": each.name, "reason": each.reason} for each in options.candidates.barred],
    }


def explain_instances(options: Options, choice: Choice, status: ModelStatus) -> dict[str, Any]:
    """The document behind ``appliancectl instances``: how what serves uses its device, and how else it could.

    Args:
        options: What the model can be run as.
        choice: What is made of them now.
        status: What serves.
    """
    serving = options.candidates.named(status.variant)
    alike = [each for each in choice.considered if serving and each.candidate.computation == serving.computation]
    wish = options.manifest.instances
    return {
        "model": options.manifest.name,
        "version": options.version,
        "state": status.state,
        "variant": status.variant,
        "chosen_by": status.chosen_by,
        "device": status.device,
        "cores": serving.device.cores if serving else 0,
        "streams": status.streams,
        "threads": serving.threads if serving else 0,
        "weight": wish.weight,
        "manifest": {"streams": wish.streams, "threads": wish.threads},
        "splits": [_split(each) for each in sorted(alike, key=lambda each: each.candidate.streams)],
    }


def _split(each: Considered) -> dict[str, Any]:
    found = each.measurement if each.measurement and each.measurement.points else None
    return {
        "variant": each.candidate.name,
        "streams": each.candidate.streams,
        "threads": each.candidate.threads,
        "verdict": each.verdict,
        "latency_us": round(found.latency_us, 1) if found else None,
        "rows_per_second": round(found.rows_per_second, 1) if found else None,
        "disturbed": bool(found and found.is_disturbed),
    }


def _considered(options: Options, each: Considered) -> dict[str, Any]:
    candidate = each.candidate
    return {
        "name": candidate.name,
        "backend": candidate.variant.backend,
        "runtime": candidate.runtime,
        "device": candidate.variant.device,
        "device_name": candidate.device.name,
        "precision": candidate.variant.precision,
        "options": dict(candidate.variant.options),
        "streams": candidate.streams,
        "threads": candidate.threads,
        "key": options.keys[candidate.name].id,
        "verdict": each.verdict,
        "reason": each.reason,
        "score": each.score,
        "measurement": _measurement(each.measurement) if each.measurement and each.measurement.points else None,
        "evidence": _evidence(each.evidence) if each.evidence is not None else None,
    }


def _cost(cost: CostStatus) -> dict[str, Any]:
    return {
        "units": cost.units,
        "slope_us": round(cost.slope_us, 1),
        "intercept_us": round(cost.intercept_us, 1),
        "spread": round(cost.spread, 3),
        "setup_share": round(cost.setup_share, 3),
        "efficient_rows": cost.efficient_rows,
        "samples": cost.samples,
        "scale": round(cost.scale, 3) if cost.scale is not None else None,
    }


def _measurement(found: Measurement) -> dict[str, Any]:
    slope, intercept = found.line
    return {
        "latency_us": round(found.latency_us, 1),
        "rows_per_second": round(found.rows_per_second, 1),
        "best_rows": found.best_rows,
        "streams": found.streams,
        "slope_us": round(slope, 1),
        "intercept_us": round(intercept, 1),
        "spread_us": round(found.points[0].spread_us, 1),
        "load_ms": round(found.load_ms, 1),
        "peak_bytes": found.peak_bytes,
        "energy_mj": found.energy_mj,
        "tokens": found.tokens,
        "disturbed": found.is_disturbed,
        "measured_at": found.measured_at,
        "points": [
            {
                "rows": p.rows,
                "median_us": round(p.median_us, 1),
                "spread_us": round(p.spread_us, 1),
                "samples": p.samples,
                "disturbed": p.is_disturbed,
                "energy_mj": p.energy_mj,
                "alone_us": None if p.alone_us is None else round(p.alone_us, 1),
            }
            for p in found.points
        ],
    }


def _evidence(found: Evidence) -> dict[str, Any]:
    compared = found.comparison
    numbers = (
        {}
        if compared is None
        else {
            "metric": compared.metric,
            "value": compared.value,
            "reference": compared.reference,
            "worst": compared.worst,
            "count": compared.count,
            "loss": compared.loss,
            "not_finite": compared.not_finite,
            "synthetic": compared.is_synthetic,
        }
    )
    return {**numbers, "bound": found.bound, "refusal": found.refusal, "judged_at": found.judged_at}
