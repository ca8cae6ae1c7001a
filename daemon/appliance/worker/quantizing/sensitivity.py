"""Finds the layers of a quantised transformer that lose too much, so that they can stay in floating point.

In models like BERT a few tokens (separators, punctuation) have activations a hundred times larger than all others in
the second matrix product of some feed-forward layers. One range for a whole tensor then leaves the other tokens
few of the 256 steps. The error over the whole tensor hides that, since the few large values dominate its norm; the
error of each token's vector shows it.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.worker.quantizing.toolkits import import_openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The most that rounding may change a token's vector on average, relative to its length. On a real MiniLM the worst
#: four of 36 matrix products lie at 0.035 and more, all of them second products of feed-forward layers: splitting
#: those takes its mean cosine from 0.997 to 0.999 and costs speed. What lies above this bound costs more accuracy.
MAX_ERROR: Final = 0.05

#: What passes values on without computing; the layer behind is the one that reads the rounded values.
_VIEWS: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_CONSTANTS: Final = frozenset({"Constant", "Convert"})


def sensitive_layers(model: Any, rows: "Iterable[Mapping[str, NDArray[Any]]]") -> list[str]:
    """Names of the matrix products of `model` whose inputs are rounded too coarsely.

    Args:
        model: An OpenVINO model with FakeQuantize in front of what is quantised.
        rows: Inputs, each a whole run.
    """
    openvino = import_openvino()
    watched = model.clone()
    readers = []
    ports = []
    for node in watched.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        given = node.input_value(0)
        names = _matrix_products(node)
        if names and given.get_node().get_type_name() not in _CONSTANTS:
            readers.append(names)
            ports += [given, node.output(0)]
    if not readers:
        return []
    own = len(watched.outputs)
    watched.add_outputs(ports)
    request = openvino.Core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    errors = np.zeros(len(readers))
    count = 0
    for feeds in rows:
        request.infer(dict(feeds), share_inputs=True)
        count += 1
        for place in range(len(readers)):
            exact, rounded = (request.get_output_tensor(own + 2 * place + side).data for side in (0, 1))
            errors[place] += _mean_error(exact, rounded)
    return sorted(
        {name for names, error in zip(readers, errors, strict=True) if error > MAX_ERROR * count for name in names}
    )


def _matrix_products(node: Any) -> list[str]:
    """Names of the MatMul nodes that read what `node` gives, directly or through views."""
    found = []
    ahead = [node]
    while ahead:
        for target in ahead.pop().output(0).get_target_inputs():
            reader = target.get_node()
            if reader.get_type_name() == "MatMul":
                found.append(reader.get_friendly_name())
            elif reader.get_type_name() in _VIEWS:
                ahead.append(reader)
    return found


def _mean_error(exact: "NDArray[Any]", rounded: "NDArray[Any]") -> float:
    lengths = np.linalg.norm(exact, axis=-1)
    errors = np.linalg.norm(rounded - exact, axis=-1)
    return float(np.mean(errors[lengths > 0] / lengths[lengths > 0])) if (lengths > 0).any() else 0.0
