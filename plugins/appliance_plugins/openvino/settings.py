"""What is offered for an artifact on a device, and what a variant's options mean to the runtime."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from appliance.backend import MAX_STREAMS, MAX_THREADS, Variant
from appliance.inventory import Device
from appliance_plugins.splits import splits

_OPTIONS: Final = ("threads", "streams", "float", "static", "cache_dir")

#: The runtime's words for the precision of what is computed in floating point.
_HINTS: Final = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}

#: Artifacts whose weights are floating point: the runtime makes any other floating point of them.
_FLOATS: Final = ("FP32", "FP16", "BF16")
_QUANTISED: Final = ("INT8", "INT8-WEIGHTS", "INT4-WEIGHTS")

#: CPU features that multiply in a precision natively; anywhere else it is slower than FP32.
_BF16_FEATURES: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_FP16_FEATURES: Final = frozenset({"amx_fp16", "asimdhp"})

#: Shapes of which an NPU keeps compilations. On the CPU ``static`` is not offered: it gains a few percent, costs the
#: packed weights once more for each shape, and a model of many lengths would compile without end. A manifest may ask.
_NPU_SHAPES: Final = "4"
_MAX_STATIC: Final = 64


def offers(precision: str, device: Device) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Precision and options of each way to run an artifact whose weights are in `precision`, full precision first."""
    hints = _hints_on(device)
    if precision in _FLOATS:
        plain: list[tuple[str, Mapping[str, str]]] = [(hint, {}) for hint in hints]
    elif precision in _QUANTISED and device.kind != "npu":
        plain = [(precision, {"float": _HINTS[hint]}) for hint in hints]
    else:
        return
    if device.kind == "npu":  # it compiles single shapes only
        yield from ((offered, {**options, "static": _NPU_SHAPES}) for offered, options in plain)
        return
    yield from plain
    if device.kind == "cpu":
        yield from ((offered, {**options, **split}) for offered, options in plain for split in splits(device.cores))


def _hints_on(device: Device) -> list[str]:
    """Precisions that a device computes floating point in, widest first."""
    if device.kind == "npu":
        return ["FP16"]
    if device.kind == "gpu":
        return ["FP32", "FP16"]
    found = ["FP32"]
    if not _BF16_FEATURES.isdisjoint(device.features):
        found.append("BF16")
    if not _FP16_FEATURES.isdisjoint(device.features):
        found.append("FP16")
    return found


@dataclass(frozen=True, slots=True)
class Settings:
    """A variant's options, read.

    Attributes:
        hint: The runtime's word for the precision of floating point.
        threads: Cores of all runs together; 0 for all there are.
        streams: Runs that may go on at the same time; 0 for one, as the LATENCY hint has it.
        static: How many input shapes get a compilation of their own.
        cache_dir: Where compiled models are kept; empty for nowhere.
        needs_static: True where the device compiles single shapes only.
    """

    hint: str
    threads: int = 0
    streams: int = 0
    static: int = 0
    cache_dir: str = ""
    needs_static: bool = False

    @classmethod
    def of(cls, variant: Variant, artifact_precision: str) -> "Settings":
        """Read the options of a variant.

        Raises:
            ValueError: An option is unknown, out of its range or at odds with another, or the precision is not to be
                had of the artifact.
        """
        options = variant.options
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            known = ", ".join(map(repr, _OPTIONS))
            raise ValueError(f"option {unknown[0]!r} is unknown; there are {known}")
        streams, static = _count(options, "streams", MAX_STREAMS), _count(options, "static", _MAX_STATIC)
        needs_static = variant.device.startswith("intel-npu")
        if streams > 1 and (static or needs_static):
            raise ValueError(f"option 'streams' is {streams}, and compilations for single shapes have one stream")
        return cls(
            hint=_hint(variant, artifact_precision),
            threads=_count(options, "threads", MAX_THREADS) * max(streams, 1),
            streams=streams,
            static=static,
            cache_dir=options.get("cache_dir", ""),
            needs_static=needs_static,
        )

    def properties(self, is_cached: bool = True) -> dict[str, Any]:
        """The runtime's properties; without the cache where `is_cached` is False."""
        # Explicit, since a processor with BF16 would otherwise use it unasked.
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.hint}
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        if self.streams:
            properties["NUM_STREAMS"] = self.streams
        else:
            properties["PERFORMANCE_HINT"] = "LATENCY"
        if self.cache_dir and is_cached:
            properties["CACHE_DIR"] = self.cache_dir
        return properties


def _hint(variant: Variant, artifact_precision: str) -> str:
    wished = variant.options.get("float")
    if artifact_precision in _QUANTISED:
        if variant.precision != artifact_precision:
            raise ValueError(
                f"precision {variant.precision} is not on offer for an artifact in {artifact_precision}, only "
                f"{artifact_precision}"
            )
        if wished not in (None, *_HINTS.values()):
            raise ValueError(f"option 'float' is {wished!r} and must be one of {', '.join(_HINTS.values())}")
        return wished or _HINTS["FP32"]
    if variant.precision not in _HINTS:
        raise ValueError(
            f"precision {variant.precision} is not on offer for an artifact in {artifact_precision}, only "
            f"{', '.join(_HINTS)}"
        )
    if wished is not None:
        raise ValueError("option 'float' is for quantised artifacts; of others the precision says it")
    return _HINTS[variant.precision]


def _count(options: Mapping[str, str], name: str, most: int) -> int:
    text = options.get(name)
    if not text:
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ValueError(f"option {name!r} is {text!r} and must be a number from 1 to {most}")
    return int(text)
