"""A loaded model as the worker serves it: the backend's session and what stands before and behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appliance.backend import Session
from appliance.types import TensorSpec
from appliance.worker.classification import Classifier
from appliance.worker.image import Decoder
from appliance.worker.state import States
from appliance.worker.tensors import DTYPES, fits

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ContractBroken(Exception):
    """The backend gave something else than its session promises; the message says what."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The image input of a model and what becomes of it.

    Attributes:
        spec: The BYTES input clients may send.
        tensor: The session's input that is made from it.
        decoder: Makes it.
        is_batched: True where the session's input has a dimension for the rows.
    """

    spec: TensorSpec
    tensor: str
    decoder: Decoder
    is_batched: bool


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What one worker serves.

    Attributes:
        session: The backend's.
        inputs: The session's inputs, narrowed by the manifest.
        outputs: The session's outputs, likewise.
        max_batch_size: Rows of a batch at most; 0 for a model without batch dimension.
        pictures: Set where the manifest has an image section.
        classifier: Set where the manifest has a classification section.
        length: What dynamic dimensions had in the first run that worked; of no meaning where there are none.
        streams: Runs that the session takes at the same time.
        states: Set where the manifest has a sequence section.
    """

    session: Session
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch_size: int
    pictures: Pictures | None = None
    classifier: Classifier | None = None
    length: int = 0
    streams: int = 1
    states: States | None = None

    @property
    def edge_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs made into session inputs here; in RUN they follow the session's."""
        return (self.pictures.spec,) if self.pictures else ()

    @property
    def edge_outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs made from session outputs here; in DONE they follow the session's."""
        return self.classifier.outputs if self.classifier else ()

    def check_output(self, spec: TensorSpec, array: "NDArray[Any] | None", rows: int) -> "NDArray[Any]":
        """Return `array` if it is what the session promises for `spec` and a batch of `rows` rows.

        Raises:
            ContractBroken: It is missing, or has another datatype or shape.
        """
        if array is None:
            raise ContractBroken(f"output {spec.name!r} is missing")
        dtype = DTYPES[spec.datatype]
        if getattr(array, "dtype", None) != dtype:
            raise ContractBroken(f"output {spec.name!r} is {getattr(array, 'dtype', 'no array')} and must be {dtype}")
        if not fits(array.shape, spec) or (self.max_batch_size and array.shape[0] != rows):
            raise ContractBroken(
                f"output {spec.name!r} has shape {list(array.shape)} and must have {list(spec.shape)}"
                + (f" with {rows} rows" if self.max_batch_size else "")
            )
        return array
