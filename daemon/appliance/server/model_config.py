"""How a model's requests are scheduled, in the words and values of Triton's ModelConfig.

After triton-inference-server/common protobuf/model_config.proto. What a manifest leaves to the daemon is shown as what
holds without it, where Triton has a word for that.
"""

from typing import Any, Final

from appliance.manifest import BatchSection, Manifest, QueuePolicy, SequenceSection
from appliance.types import ModelDescription

#: Triton's word for each control of a sequence, by the manifest's.
_CONTROLS: Final = {
    "start": "CONTROL_SEQUENCE_START",
    "ready": "CONTROL_SEQUENCE_READY",
    "end": "CONTROL_SEQUENCE_END",
    "correlation_id": "CONTROL_SEQUENCE_CORRID",
}


def scheduling(description: ModelDescription) -> dict[str, Any]:
    """The fields of ModelConfig that say how requests come together, as values that protobuf and JSON take alike."""
    manifest = description.manifest
    fields: dict[str, Any] = {}
    if manifest.sequence is not None:
        fields["sequence_batching"] = _sequence_batching(manifest, manifest.sequence)
    elif description.max_batch_size:
        fields["dynamic_batching"] = _dynamic_batching(manifest.batch)
    if manifest.cache.max_bytes:
        fields["response_cache"] = {"enable": True}
    return fields


def _dynamic_batching(batch: BatchSection) -> dict[str, Any]:
    policies = batch.policies()
    return _waiting(batch) | {
        "priority_levels": batch.levels,
        "default_priority_level": batch.default_level,
        "default_queue_policy": _queue_policy(batch.policy()),
        "priority_queue_policy": {level: _queue_policy(policies[level]) for level in batch.priority_queue_policy},
    }


def _waiting(batch: BatchSection) -> dict[str, Any]:
    return {
        "preferred_batch_size": batch.preferred_batch_sizes,
        "max_queue_delay_microseconds": batch.max_queue_delay_us,
    }


def _queue_policy(policy: QueuePolicy) -> dict[str, Any]:
    return {
        "timeout_action": "DELAY" if policy.is_delayed else "REJECT",
        "default_timeout_microseconds": policy.default_timeout_us,
        "allow_timeout_override": policy.allows_override,
        "max_queue_size": policy.max_queue_size,
    }


def _sequence_batching(manifest: Manifest, sequence: SequenceSection) -> dict[str, Any]:
    if sequence.strategy == "direct":
        strategy: dict[str, Any] = {"direct": {"max_queue_delay_microseconds": manifest.batch.max_queue_delay_us}}
    else:
        strategy = {"oldest": _waiting(manifest.batch) | {"max_candidate_sequences": sequence.max_sequences}}
    controls = {word: getattr(sequence.controls, name) for name, word in _CONTROLS.items()}
    return strategy | {
        "max_sequence_idle_microseconds": int(sequence.idle_seconds * 1e6),
        "control_input": [{"name": tensor, "control": [{"kind": word}]} for word, tensor in controls.items() if tensor],
        "state": [{"input_name": each.input, "output_name": each.output} for each in sequence.state],
    }
