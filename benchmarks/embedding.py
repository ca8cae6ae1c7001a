"""Budget 9: a real sentence encoder served as the daemon chooses by measuring, against ONNX Runtime in FP32.

One model directory for each bound: at 0.001 INT8 does not pass and BF16 may serve, at 0.01 INT8 may. The daemon
quantises, measures, judges and chooses by itself; nothing here names a variant but the FP32 one that is compared with.
"""

import asyncio
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from appliance_client import AdminClient, AsyncClient
from benchmarks.report import Line, median, median_ratio
from support.daemon import RunningDaemon

REPOSITORY = Path(__file__).parents[1]
#: Where ``make minilm`` leaves the model.
SOURCE = REPOSITORY / "build" / "minilm"

ROUNDS = 5
_SECONDS = 3.0
_ROWS = 32

#: Model by what it is to show: the bound of its manifest.
MODELS = {"minilm-fp32": 0.01, "minilm-exact": 0.001, "minilm-int8": 0.01}

_MANIFEST = """
schema = 1
name = "{name}"
task = "embedding"
objective = "throughput"
max_batch_size = 32
[[artifacts]]
path = "1/model.onnx"
format = "onnx"
[text]
max_tokens = 128
buckets = [16, 32, 64, 128]
[quality]
bound = {bound}
[samples]
evaluation = "evaluation.jsonl"
calibration = "calibration.jsonl"
"""


def sentences() -> list[str]:
    """English sentences: those of this repository's own documentation, each once, in order."""
    pages = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "recipes" / "README.md"])
    found: dict[str, None] = {}
    for page in pages:
        text = re.sub(r"```.*?```", "\n\n", page.read_text(), flags=re.DOTALL)
        text = re.sub(r"^(?:    |\||#).*$", "\n\n", text, flags=re.MULTILINE)
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.:;!?])\s+", " ".join(paragraph.split())):
                if 25 <= len(sentence) <= 300:
                    found[sentence.lstrip("- ")] = None
    return list(found)


def write_models(models: Path) -> None:
    """The encoder three times, with every other sentence to judge by and the rest to calibrate with."""
    texts = sentences()
    for name, bound in MODELS.items():
        directory = models / name
        (directory / "1").mkdir(parents=True)
        shutil.copyfile(SOURCE / "tokenizer.json", directory / "tokenizer.json")
        shutil.copyfile(SOURCE / "model.onnx", directory / "1" / "model.onnx")
        (directory / "model.toml").write_text(_MANIFEST.format(name=name, bound=bound))
        for part, chosen in (("evaluation", texts[::2]), ("calibration", texts[1::2])):
            rows = [json.dumps({"inputs": {"text": text}}) for text in chosen]
            (directory / f"{part}.jsonl").write_text("\n".join(rows))


def choose(daemon: RunningDaemon) -> tuple[dict[str, Any], list[Line]]:
    """Have the daemon quantise, measure and choose; gives what serves each model, and what accuracy it kept."""
    admin = AdminClient(daemon.http_socket, timeout=600)
    for name in MODELS:
        admin.post(f"/v2/repository/models/{name}/load", {})
    admin.post("/admin/models/minilm-fp32/pin", {"variant": _reference(admin)})
    finish(admin, admin.post("/admin/models/minilm-exact/tune", {}))
    made = finish(admin, admin.post("/admin/models/minilm-int8/quantize", {"method": "int8"}))
    finish(admin, admin.get(f"/admin/jobs/{made['result']['tune_job']}"))
    served: dict[str, Any] = {}
    lines = []
    for name in MODELS:
        answer = admin.get(f"/admin/models/{name}/explain")
        served[name] = answer["serving"]
        winner = next(one for one in answer["candidates"] if one["name"] == answer["serving"]["variant"])
        proof = winner["evidence"]
        if proof:
            what = f"{name}: mean cosine with FP32 on {proof['count']} sentences, served as {winner['name']}"
            bound = 1 - MODELS[name]
            lines.append(Line("9", what, proof["value"], "", f">= {bound:g}", proof["value"] >= bound))
    return served, lines


def _reference(admin: AdminClient) -> str:
    name: str = admin.get("/admin/models/minilm-fp32/explain")["reference"]
    return name


def finish(admin: AdminClient, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for a job's end.

    Raises:
        RuntimeError: It failed.
    """
    while job["state"] not in ("done", "failed", "cancelled"):
        time.sleep(0.2)
        job = admin.get(f"/admin/jobs/{job['id']}")
    if job["state"] != "done":
        raise RuntimeError(f"{job['kind']} {job['model']}: {job['error'] or job['state']}")
    return job


def _chunks() -> list[list[str]]:
    """Sentences as a program that embeds documents sends them: many in a request, of similar length."""
    texts = sorted((text for text in sentences() if len(text) > 60), key=len)
    return [texts[start : start + _ROWS] for start in range(0, len(texts) - _ROWS + 1, _ROWS)]


def throughput(daemon: RunningDaemon, served: dict[str, Any]) -> list[Line]:
    """Sentences a second, the models in turn and ONNX Runtime alone between them, everything in the same run."""
    chunks = _chunks()
    single = [[text] for chunk in chunks for text in chunk]
    loop = bare_loop(chunks)
    many: dict[str, list[float]] = {name: [] for name in MODELS}
    one: dict[str, list[float]] = {name: [] for name in MODELS}
    alone = []
    for name in MODELS:
        _rate(daemon.infer_socket, name, chunks, 4, 1.0)
    for _ in range(ROUNDS):
        for name in MODELS:
            many[name].append(_rate(daemon.infer_socket, name, chunks, 4, _SECONDS))
            one[name].append(_rate(daemon.infer_socket, name, single, 32, _SECONDS))
        alone.append(loop(_SECONDS))
    how = f"{_ROWS} a request, 4 in flight"
    lines = [
        Line("9", f"ONNX Runtime FP32 in a bare loop, the same batches of {_ROWS}, no server", median(alone), "/s"),
        Line("9", f"sentences served as {served['minilm-fp32']['variant']}, {how}", median(many["minilm-fp32"]), "/s"),
    ]
    for name, budget in (("minilm-exact", 1.9), ("minilm-int8", 3.0)):
        what = f"sentences served as {served[name]['variant']} (bound {MODELS[name]:g}), {how}"
        ratio = median_ratio(many[name], many["minilm-fp32"])
        rate = median(many[name])
        lines.append(Line("9", what, rate, "/s", f">= {budget} x", ratio >= budget, "FP32 served", ratio))
        lines.append(
            Line("9", "the same", rate, "/s", "", None, "FP32 in the bare loop", median_ratio(many[name], alone))
        )
    for name in MODELS:
        what = f"{served[name]['variant']}, 1 a request, 32 in flight"
        lines.append(
            Line(
                "9", what, median(one[name]), "/s", "", None, "FP32 served", median_ratio(one[name], one["minilm-fp32"])
            )
        )
    return lines


def _rate(socket: str, model: str, requests: list[list[str]], in_flight: int, seconds: float) -> float:
    """Sentences a second: each of the requests in flight is followed by the next as soon as it is answered."""
    return asyncio.run(_closed_loop(socket, model, requests, in_flight, seconds))


async def _closed_loop(socket: str, model: str, requests: list[list[str]], in_flight: int, seconds: float) -> float:
    turns = itertools.cycle(requests)
    answered = 0
    began = time.perf_counter()

    async with AsyncClient(socket) as client:

        async def work() -> None:
            nonlocal answered
            while time.perf_counter() - began < seconds:
                texts = next(turns)
                await client.infer(model, {"text": texts}, timeout=60)
                answered += len(texts)

        await asyncio.gather(*(work() for _ in range(in_flight)))
        return answered / (time.perf_counter() - began)


def bare_loop(chunks: list[list[str]]) -> Callable[[float], float]:
    """ONNX Runtime alone, FP32, on the same batches, tokenised before: what an FP32 server cannot exceed."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    options = onnxruntime.SessionOptions()
    # Threads that spin between runs would take the cores from what is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(SOURCE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    batches = []
    for chunk in chunks:
        ids = [each.ids for each in tokenizer.encode_batch_fast(chunk)]
        bucket = next(size for size in (16, 32, 64, 128) if size >= max(map(len, ids)))
        rows = np.zeros((len(ids), bucket), np.int64)
        for row, tokens in enumerate(ids):
            rows[row, : len(tokens)] = tokens
        batches.append({"input_ids": rows, "attention_mask": (rows != 0).astype(np.int64)})

    def run(seconds: float) -> float:
        done = 0
        began = time.perf_counter()
        for feeds in itertools.cycle(batches):
            session.run(None, feeds)
            done += len(feeds["input_ids"])
            if time.perf_counter() - began >= seconds:
                break
        return done / (time.perf_counter() - began)

    run(1.0)
    return run
