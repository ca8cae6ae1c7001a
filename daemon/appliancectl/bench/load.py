"""What is asked again and again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from appliance_client import Answer, AsyncClient, Client, Tensor
    from appliance_client.calls import ModelMetadata
    from appliancectl.target import Target

_METADATA_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """One request, and how long and over how many connections it is repeated.

    Attributes:
        target: The daemon.
        model: The model's name.
        inputs: Its inputs, the same every time.
        duration_s: Seconds that count.
        clients: Connections.
        timeout_s: Deadline of each request, from the moment it is due; None for none.
        priority: As of `Client.infer`.
    """

    target: "Target"
    model: str
    inputs: "dict[str, Tensor]"
    duration_s: float
    clients: int = 1
    timeout_s: float | None = None
    priority: int | str = 0

    def ask(self, client: "Client") -> "Answer":
        """Send the request and wait for its answer."""
        return client.infer(self.model, self.inputs, timeout=self.timeout_s, priority=self.priority)

    async def send(self, client: "AsyncClient", timeout_s: float | None) -> "Answer":
        """Send the request and wait for its answer; `timeout_s` is what is left of the deadline."""
        return await client.infer(self.model, self.inputs, timeout=timeout_s, priority=self.priority)


def request_inputs(target: "Target", model: str, given: tuple[str, ...]) -> "dict[str, Tensor]":
    """Inputs of the request that is repeated: those `given` as for ``infer``, else made-up ones.

    Raises:
        InputError: They do not fit the model.
        ApplianceError: The daemon does not say what the model takes.
    """
    from appliancectl.inputs import gather_inputs, sample_inputs

    metadata, is_image = _signature(target, model)
    return gather_inputs(metadata, given, is_image) if given else sample_inputs(metadata, is_image)


def sample_library(target: "Target", model: str, given: tuple[str, ...]) -> "list[dict[str, Tensor]]":
    """Samples to draw requests from: where the model has one input, each of the values `given` is a sample of its own.

    Raises:
        InputError: They do not fit the model.
        ApplianceError: The daemon does not say what the model takes.
    """
    from appliancectl.inputs import gather_inputs, sample_inputs

    metadata, is_image = _signature(target, model)
    if not given:
        return [sample_inputs(metadata, is_image)]
    groups = [(value,) for value in given] if len(metadata.inputs) == 1 else [given]
    return [gather_inputs(metadata, group, is_image) for group in groups]


def _signature(target: "Target", model: str) -> "tuple[ModelMetadata, bool]":
    """What the model takes, and whether that is pictures."""
    with target.client() as client:
        metadata = client.model_metadata(model, timeout=_METADATA_SECONDS)
    task = target.admin(_METADATA_SECONDS).get(f"/admin/models/{metadata.name}")["task"]
    return metadata, task == "image-classification"
