"""Splits a matrix product in two: the few channels with outliers in floating point, all others fit for INT8.

The decomposition is that of T. Dettmers and others, LLM.int8() (2022), made once, before quantising, for channels that
the calibration inputs show. The product over the outliers is so thin that it costs little: on a real MiniLM four
products split this way lost 5 % of the speed of pure INT8, left whole in floating point 29 %, for the same cosine.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.worker.quantizing.toolkits import import_openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Channels taken out. One or two hold the outliers; more change nothing (4, 16 and 64 gave the same cosine).
CHANNELS: Final = 4


def split_outliers(model: Any, layers: Sequence[str], rows: "Iterable[Mapping[str, NDArray[Any]]]") -> list[str]:
    """Split those of `layers`, names of MatMul nodes of `model`, that multiply by constant weights.

    Returns:
        Names of the MatMul nodes to leave in floating point: the thin ones, and those of `layers` that are not split.
    """
    nodes = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "MatMul"}
    split = [name for name in layers if name in nodes and _multiplies_by_weights(nodes[name])]
    peaks = _peaks(model, split, rows)
    kept = [name for name in layers if name not in split]
    for name, peak in zip(split, peaks, strict=True):
        kept.append(_split(nodes[name], np.argsort(-peak, kind="stable")[:CHANNELS]))
    model.validate_nodes_and_infer_types()
    return kept


def _multiplies_by_weights(node: Any) -> bool:
    weights = node.input_value(1)
    return (
        weights.get_node().get_type_name() == "Constant"
        and weights.get_element_type().get_type_name() == "f32"
        and len(weights.get_shape()) == 2
        and not node.get_attributes()["transpose_a"]
        and weights.get_shape()[1 if node.get_attributes()["transpose_b"] else 0] > CHANNELS
    )


def _peaks(
    model: Any, layers: Sequence[str], rows: "Iterable[Mapping[str, NDArray[Any]]]"
) -> "list[NDArray[np.float32]]":
    """The largest absolute value that each channel of each layer's input has."""
    watched = model.clone()
    nodes = {node.get_friendly_name(): node for node in watched.get_ops() if node.get_type_name() == "MatMul"}
    own = len(watched.outputs)
    watched.add_outputs([nodes[name].input_value(0) for name in layers])
    core = import_openvino().Core()
    request = core.compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    peaks = [np.zeros(1, dtype=np.float32) for _ in layers]
    for feeds in rows:
        request.infer(dict(feeds), share_inputs=True)
        for place in range(len(layers)):
            values = request.get_output_tensor(own + place).data
            peaks[place] = np.maximum(peaks[place], np.abs(values).reshape(-1, values.shape[-1]).max(axis=0))
    return peaks


def _split(node: Any, channels: "NDArray[np.int64]") -> str:
    """Put two products and their sum in the place of `node`; returns the name of the thin one."""
    openvino = import_openvino()
    operators = openvino.opset13
    given, weights = node.input_value(0), node.input_value(1).get_node().data
    is_transposed = node.get_attributes()["transpose_b"]
    name = node.get_friendly_name()

    others = np.ones(weights.shape[1 if is_transposed else 0], dtype=np.float32)
    others[channels] = 0
    thick_weights = weights * (others[np.newaxis] if is_transposed else others[:, np.newaxis])
    masked = operators.multiply(given, operators.constant(others))
    thick = operators.matmul(masked, operators.constant(thick_weights), False, is_transposed)

    taken = operators.gather(given, operators.constant(channels), operators.constant(np.int64(-1)))
    thin_weights = np.ascontiguousarray(weights[:, channels] if is_transposed else weights[channels])
    thin = operators.matmul(taken, operators.constant(thin_weights), False, is_transposed)

    total = operators.add(thick, thin)
    readers = list(node.output(0).get_target_inputs())
    names = node.output(0).get_names()
    node.output(0).set_names(set())
    total.output(0).set_names(names)
    for part, made in (("", total), (".others", thick), (".outliers", thin)):
        made.set_friendly_name(f"{name}{part}")
    for reader in readers:
        reader.replace_source_output(total.output(0))
    return f"{name}.outliers"
