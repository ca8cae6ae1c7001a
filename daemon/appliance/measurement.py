"""What measuring found out about a variant, and the key it is good for. Values only."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from appliance.backend import SPLIT, Variant

#: A point with fewer runs than this says nothing.
MIN_SAMPLES: Final = 5

#: Options that name a place and change nothing else.
_PLACES: Final = frozenset({"cache_dir"})


@dataclass(frozen=True, slots=True)
class VariantKey:
    """What a measurement and a piece of evidence are good for; with any part changed they are neither.

    Attributes:
        artifact: Hex sha256 of the artifact's contents.
        backend: Entry-point name.
        runtime: Name and version of the vendor runtime.
        device: The device's own identity (`appliance.inventory.Device.identity`), not its place in a list.
        driver: The device's driver version; for a CPU the features that decide on kernels.
        precision: Precision of the computation.
        options: The variant's options as JSON with sorted keys, directories left out; of a model of texts also the name
            of the sample, whose lengths it is measured with.
    """

    artifact: str
    backend: str
    runtime: str
    device: str
    driver: str
    precision: str
    options: str

    @property
    def computation(self) -> "VariantKey":
        """The same without `SPLIT`: what accuracy depends on."""
        options = json.loads(self.options)
        return replace(self, options=canonical_options({k: v for k, v in options.items() if k not in SPLIT}))

    @property
    def id(self) -> str:
        """16 hex digits that stand for the key."""
        text = "\0".join(getattr(self, each.name) for each in fields(self))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def canonical_options(options: Mapping[str, str]) -> str:
    """Options as they stand in a `VariantKey`."""
    return json.dumps({name: value for name, value in options.items() if name not in _PLACES}, sort_keys=True)


def key_of(digest: str, variant: Variant, runtime: str, device: str, driver: str, workload: str = "") -> VariantKey:
    """The key of `variant` of the artifact whose contents have the sha256 `digest`.

    `workload` names the inputs it is measured with, where their lengths are not fixed.
    """
    options = {**variant.options, "workload": workload} if workload else variant.options
    return VariantKey(
        artifact=digest,
        backend=variant.backend,
        runtime=runtime,
        device=device,
        driver=driver,
        precision=variant.precision,
        options=canonical_options(options),
    )


@dataclass(frozen=True, slots=True)
class Point:
    """Latency of batches of one size.

    Attributes:
        rows: Rows of the batch; 0 for a model without batch dimension.
        median_us: Median time of one run while all streams of the session run such batches.
        spread_us: 1.4826 times the median absolute deviation, which equals the standard deviation of normal noise.
        samples: Runs timed.
        is_disturbed: True where other programs kept the cores busy in every attempt.
        energy_mj: Millijoules of one run, where the device has a counter.
        alone_us: Median time of one run while nothing else runs; of the smallest batch alone, and only where the
            session has several streams. With one it is `median_us`.
    """

    rows: int
    median_us: float
    spread_us: float
    samples: int
    is_disturbed: bool = False
    energy_mj: float | None = None
    alone_us: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One variant, measured.

    Attributes:
        key: What it is good for.
        points: By number of rows, ascending.
        load_ms: Reading, compiling and warming up.
        peak_bytes: Peak resident memory of the process that measured.
        device: Device that executed, as the session reported it.
        provider: The runtime's own name of the executor.
        tokens: Length that dynamic dimensions had, such as tokens of a text; 0 where there are none.
        units: Elements of a row's dynamic dimensions, those of the largest input; 0 where there are none, or where it
            was measured before this was kept.
        measured_at: ISO 8601 in UTC, for people.
        problem: Why there are no points: the variant cannot be loaded or run. Empty where it can.
        streams: Runs that went on at the same time.
    """

    key: VariantKey
    points: tuple[Point, ...] = ()
    load_ms: float = 0.0
    peak_bytes: int = 0
    device: str = ""
    provider: str = ""
    tokens: int = 0
    measured_at: str = ""
    problem: str = ""
    streams: int = 1
    units: int = 0

    @property
    def row_units(self) -> int:
        """Elements of a row's dynamic dimensions as the batcher counts them; 1 where there are none."""
        return max(self.units, self.tokens, 1)

    @property
    def is_disturbed(self) -> bool:
        """True where a point is."""
        return any(point.is_disturbed for point in self.points)

    @property
    def latency_us(self) -> float:
        """Median time of the smallest batch while nothing else runs."""
        smallest = self.points[0]
        return smallest.median_us if smallest.alone_us is None else smallest.alone_us

    @property
    def rows_per_second(self) -> float:
        """Throughput of all streams together, at the batch size where it is highest."""
        return max(self.streams * max(point.rows, 1) * 1e6 / point.median_us for point in self.points)

    @property
    def best_rows(self) -> int:
        """The batch size where throughput is highest."""
        return max(self.points, key=lambda point: max(point.rows, 1) / point.median_us).rows

    @property
    def energy_mj(self) -> float | None:
        """Millijoules of one row at the batch size where a row costs least, or None without a counter."""
        costs = [point.energy_mj / max(point.rows, 1) for point in self.points if point.energy_mj is not None]
        return min(costs) if costs else None

    @property
    def line(self) -> tuple[float, float]:
        """Slope and intercept in µs: while all streams run, a batch of n rows takes about slope times n + intercept."""
        return fit_line([(point.rows, point.median_us) for point in self.points])

    def as_json(self) -> dict[str, Any]:
        """As the registry keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Measurement":
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError: `document` is something else.
        """
        values = dict(document)
        key = VariantKey(**values.pop("key"))
        points = tuple(Point(**point) for point in values.pop("points"))
        return cls(key=key, points=points, **values)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept by Theil and Sen: the median of all pairs' slopes, so that one bad point moves nothing.

    The intercept is never negative. A single point has the slope 0.
    """
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for index, earlier in enumerate(points)
        for later in points[index + 1 :]
        if later[0] != earlier[0]
    ]
    slope = max(statistics.median(slopes), 0.0) if slopes else 0.0
    return slope, max(statistics.median(y - slope * x for x, y in points), 0.0)
