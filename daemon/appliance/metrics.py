"""Counters of each model, in the words of Triton's statistics extension. Owned by the event loop; no locks."""

from dataclasses import dataclass, field

from appliance.types import Timings


@dataclass(slots=True)
class Duration:
    """How often something happened and how many nanoseconds it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` occurrences that took `ns` together."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchStatistics:
    """Durations of batches of one size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one model version since the daemon started.

    Attributes:
        inference_count: Rows run; those answered from the cache are not among them, as with Triton.
        execution_count: Batches run.
        last_inference_ms: Wall-clock milliseconds since 1970 of the last answer; shown, never computed with.
        success: Requests answered, with their time from admission to answer.
        fail: Requests failed after admission, likewise.
        queue: Time answered requests spent waiting.
        decode: Image decoding, by batch.
        tokenise: Tokenising, by request.
        compute_input: Copying into slabs and decoding, by batch.
        compute_infer: The backend's runs, by batch.
        compute_output: Post-processing and copying out, by batch.
        postprocess: Labels and scores, by batch.
        cancelled: Requests withdrawn or expired before they ran.
        refused: Requests not admitted, by error kind.
        fallbacks: Loads that ended on another device than the first choice.
        cache_hit: Requests answered from the cache, with the time of looking them up.
        cache_miss: Requests looked up in vain that ran, likewise.
        cache_joined: Requests that waited for an equal one in flight and got its answer, or its error.
        cache_evictions: Answers dropped from the cache for their age, or for room.
        batches: Durations by number of rows.
    """

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    tokenise: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    postprocess: Duration = field(default_factory=Duration)
    cancelled: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    fallbacks: int = 0
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    cache_joined: int = 0
    cache_evictions: int = 0
    batches: dict[int, BatchStatistics] = field(default_factory=dict)

    def refuse(self, kind: str) -> None:
        """Count a request that was not admitted."""
        self.refused[kind] = self.refused.get(kind, 0) + 1

    def ran(self, rows: int, timings: Timings, wall_ms: int) -> None:
        """Count one batch of `rows` rows that ran."""
        self.execution_count += 1
        self.inference_count += rows
        self.last_inference_ms = wall_ms
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStatistics()
        made_ready = timings.copy_ns + timings.decode_ns
        for total in (self, batch):
            total.compute_input.add(made_ready)
            total.compute_infer.add(timings.compute_ns)
            total.compute_output.add(timings.postprocess_ns)
        self.decode.add(timings.decode_ns)
        self.postprocess.add(timings.postprocess_ns)
