"""Open Inference Protocol REST: what models are and how they fare, as JSON values in Triton's shape."""

from collections.abc import Iterable
from typing import Any

from appliance.metrics import BatchStatistics, Duration, ModelStatistics
from appliance.server.model_config import scheduling
from appliance.server.oip import STAGES, STATE_WORDS, placement_parameters
from appliance.types import ModelDescription, ModelState, ModelStatus, TensorSpec


def _metadata_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def metadata(description: ModelDescription) -> dict[str, Any]:
    """Answer of ``GET /v2/models/{model}``."""
    return {
        "name": description.name,
        "versions": description.versions,
        "platform": description.platform,
        "inputs": [_metadata_tensor(spec) for spec in description.inputs],
        "outputs": [_metadata_tensor(spec) for spec in description.outputs],
        "parameters": placement_parameters(description.status),
    }


def _config_tensor(spec: TensorSpec, is_batched: bool) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.shape[1:] if is_batched else spec.shape}


def config(description: ModelDescription) -> dict[str, Any]:
    """Answer of ``GET /v2/models/{model}/config``: the part of Triton's ModelConfig that clients read."""
    is_batched = description.max_batch_size > 0
    fields = scheduling(description)
    if "dynamic_batching" in fields:
        levels = fields["dynamic_batching"]["priority_queue_policy"]
        fields["dynamic_batching"]["priority_queue_policy"] = {str(level): levels[level] for level in levels}
    return {
        "name": description.name,
        "platform": description.platform,
        "backend": description.status.backend,
        "version_policy": {"specific": {"versions": [int(description.version)]}},
        "max_batch_size": description.max_batch_size,
        "input": [_config_tensor(spec, is_batched) for spec in description.inputs],
        "output": [_config_tensor(spec, is_batched) for spec in description.outputs],
        "parameters": {
            name: {"string_value": value} for name, value in placement_parameters(description.status).items()
        },
        **fields,
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _batch(rows: int, batch: BatchStatistics) -> dict[str, Any]:
    return {
        "batch_size": rows,
        "compute_input": _duration(batch.compute_input),
        "compute_infer": _duration(batch.compute_infer),
        "compute_output": _duration(batch.compute_output),
    }


def _model_statistics(status: ModelStatus, statistics: ModelStatistics) -> dict[str, Any]:
    return {
        "name": status.name,
        "version": status.version,
        "last_inference": statistics.last_inference_ms,
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {stage: _duration(getattr(statistics, stage)) for stage in STAGES},
        # beside Triton's: the stages at the edge, which it has no words for
        "stage_stats": {
            stage: _duration(getattr(statistics, stage)) for stage in ("decode", "tokenise", "postprocess")
        },
        "placement": placement_parameters(status) | {"fallbacks": statistics.fallbacks},
        "batch_stats": [_batch(rows, statistics.batches[rows]) for rows in sorted(statistics.batches)],
    }


def statistics(rows: Iterable[tuple[ModelStatus, ModelStatistics]]) -> dict[str, Any]:
    """Answer of ``GET /v2/models/{model}/stats``."""
    return {"model_stats": [_model_statistics(status, counters) for status, counters in rows]}


def repository_index(statuses: Iterable[ModelStatus], ready_only: bool) -> list[dict[str, str]]:
    """Answer of ``POST /v2/repository/index``."""
    return [
        {
            "name": status.name,
            "version": status.version,
            "state": STATE_WORDS[status.state],
            "reason": status.reason or ("" if status.state is ModelState.READY else status.state.value),
        }
        for status in statuses
        if not ready_only or status.state is ModelState.READY
    ]
