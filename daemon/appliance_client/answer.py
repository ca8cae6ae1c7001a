"""What an inference gives back."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from appliance_client.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Value of a parameter of a request or an answer.
Parameter = bool | int | float | str


class Timings(NamedTuple):
    """Where the daemon spent the time of one request; a stage that did not run is 0.

    Attributes:
        decode_us: Decoding and resizing images.
        tokenise_us: Turning text into token ids.
        queue_us: Waiting for a batch to take the request.
        copy_us: Copying into and out of the batch.
        compute_us: The model's run, for the whole batch.
        postprocess_us: Labels, scores and the like.
        batch_rows: Rows of the batch the request ran in; 0 for an answer from the model's cache.
    """

    decode_us: int
    tokenise_us: int
    queue_us: int
    copy_us: int
    compute_us: int
    postprocess_us: int
    batch_rows: int


class Answer(Mapping[str, "NDArray[Any]"]):
    """Outputs by name, in the model's order; arrays are the caller's own and may be written to.

    BYTES outputs are object arrays of bytes (`text` decodes them), BF16 outputs are float32.

    Attributes:
        model: The model that answered.
        version: Its version.
        parameters: What the daemon said beside the tensors; mostly empty.
    """

    __slots__ = ("_arrays", "_timings", "model", "parameters", "version")

    def __init__(
        self,
        model: str,
        version: str,
        arrays: "dict[str, NDArray[Any]]",
        timings: tuple[int, ...],
        parameters: Mapping[str, Parameter],
    ) -> None:
        self.model = model
        self.version = version
        self.parameters = parameters
        self._arrays = arrays
        self._timings = timings

    @property
    def timings(self) -> Timings:
        """Where the time went."""
        return Timings._make(self._timings)

    def __getitem__(self, name: str) -> "NDArray[Any]":
        try:
            return self._arrays[name]
        except KeyError:
            raise KeyError(f"no output {name!r}; there are {', '.join(self._arrays) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def text(self, name: str) -> Any:
        """A BYTES output as str in nested lists of the output's shape; one str where the shape is empty.

        Raises:
            KeyError: No such output.
            InvalidRequest: The output is not BYTES.
        """
        array = self[name]
        if array.dtype.kind != "O":
            raise InvalidRequest(f"cannot read output {name!r} as text: it holds {array.dtype.name}, not BYTES")
        return _decoded(array.tolist())

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self._arrays.items())
        return f"<Answer of {self.model} {self.version}: {outputs}>"


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode("utf-8", "replace")
