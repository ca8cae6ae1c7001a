"""Budget 9: a real sentence encoder served as the daemon chooses by measuring, against ONNX Runtime in FP32.

One model directory for each bound: at 0.001 INT8 does not pass and BF16 may serve, at 0.01 INT8 may. The daemon
quantises, measures, judges and chooses by itself; nothing here names a variant but the FP32 one that is compared with.
"""

import itertools
import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from appliance_client import AdminClient, Client
from benchmarks.report import Line, median
from support.daemon import RunningDaemon

REPOSITORY = Path(__file__).parents[1]
#: Where ``make minilm`` leaves the model.
SOURCE = REPOSITORY / "build" / "minilm"

ROUNDS = 7
_SECONDS = 3.0
_CLIENTS = 32

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
    _finish(admin, admin.post("/admin/models/minilm-exact/tune", {}))
    made = _finish(admin, admin.post("/admin/models/minilm-int8/quantize", {"method": "int8"}))
    _finish(admin, admin.get(f"/admin/jobs/{made['result']['tune_job']}"))
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


def _finish(admin: AdminClient, job: dict[str, Any]) -> dict[str, Any]:
    while job["state"] not in ("done", "failed", "cancelled"):
        time.sleep(0.2)
        job = admin.get(f"/admin/jobs/{job['id']}")
    if job["state"] != "done":
        raise RuntimeError(f"{job['kind']} {job['model']}: {job['error'] or job['state']}")
    return job


def throughput(daemon: RunningDaemon, served: dict[str, Any]) -> list[Line]:
    """Sentences a second with 32 clients' requests in flight, the models in turn; against FP32 in the same run."""
    texts = [text for text in sentences() if len(text) > 60]
    rates: dict[str, list[float]] = {name: [] for name in MODELS}
    for name in MODELS:
        _rate(daemon.infer_socket, name, texts, 1.0)
    for _ in range(ROUNDS):
        for name, found in rates.items():
            found.append(_rate(daemon.infer_socket, name, texts, _SECONDS))
    base = median(rates["minilm-fp32"])
    lines = [Line("9", f"sentences served as {served['minilm-fp32']['variant']}", base, "/s")]
    for name, budget in (("minilm-exact", 1.9), ("minilm-int8", 3.0)):
        ratio = median([a / b for a, b in zip(rates[name], rates["minilm-fp32"], strict=True)])
        what = f"sentences served as {served[name]['variant']} (bound {MODELS[name]:g})"
        lines.append(Line("9", what, median(rates[name]), "/s", f">= {budget} x", ratio >= budget, "FP32", ratio))
    return lines


def _rate(socket: str, model: str, texts: list[str], seconds: float) -> float:
    """Answers a second: each of the requests in flight is followed by the next as soon as it is answered."""
    turns = itertools.cycle(texts)
    lock = threading.Lock()
    answered = 0
    end = time.perf_counter() + seconds

    def work() -> None:
        nonlocal answered
        with Client(socket) as client:
            while time.perf_counter() < end:
                with lock:
                    text = next(turns)
                client.infer(model, {"text": [text]}, timeout=60)
                with lock:
                    answered += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered / (time.perf_counter() - began)


def bare(rounds: int = 5) -> list[Line]:
    """The same sentences in ONNX Runtime alone, FP32, in batches of 32 of one length: what a server cannot exceed."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(str(SOURCE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    texts = [text for text in sentences() if len(text) > 60]
    batches = []
    for bucket in (16, 32, 64, 128):
        shortest = bucket // 2 + 1 if bucket > 16 else 0
        ids = [each.ids for each in tokenizer.encode_batch_fast(texts) if shortest <= len(each.ids) <= bucket]
        for start in range(0, len(ids) - 31, 32):
            rows = np.zeros((32, bucket), np.int64)
            for row, tokens in enumerate(ids[start : start + 32]):
                rows[row, : len(tokens)] = tokens
            batches.append({"input_ids": rows, "attention_mask": (rows != 0).astype(np.int64)})
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        for feeds in batches:
            session.run(None, feeds)
        rates.append(32 * len(batches) / (time.perf_counter() - began))
    return [
        Line("9", "ONNX Runtime FP32 in a bare loop, batches of 32, spinning threads, no server", median(rates), "/s")
    ]
