"""Train the `language-id` sample model: which language a text is in.

    python recipes/language_id.py models/language-id --packages ../recipe-packages

A byte-level BPE tokenizer, an embedding per token, one convolution over neighbouring tokens, the mean over the real
tokens, one dense layer. Needs `apt-get` and `dpkg-deb` of Debian 12; see `catalogues.py` for the texts.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import catalogues
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from catalogues import LANGUAGES, Text
from model_directory import Manifest, Sample, Tensor, sha256, write_labels, write_manifest, write_onnx, write_samples
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

SEED = 20240229
HELD_OUT = frozenset({"aptitude", "pidgin", "wesnoth-dw", "wesnoth-tb", "wget"})
"""Catalogues kept out of training: evaluation is on documents never seen, in prose, chat and system messages."""
EVALUATION_PER_LANGUAGE = 28
CALIBRATION_PER_LANGUAGE = 10
EVALUATION_CHARACTERS = 40

VOCABULARY = 12288
TOKENIZER_CHARACTERS = 400_000
PAD, PAD_ID = "<pad>", 0
MAX_TOKENS = 256
BUCKETS = (16, 32, 64, 128, 256)

EMBEDDING, HIDDEN = 64, 128
STEPS = 4000
BATCH_SIZE = 256
LEARNING_RATE = 4e-3
SHORTEST, LONGEST = 6, 240
"""Characters of a training excerpt."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class LanguageNet(nn.Module):
    """Embedding, convolution, masked mean, dense: ids and mask [batch, sequence] to logits [batch, languages]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.conv = nn.Conv1d(EMBEDDING, HIDDEN, 3, padding=1)
        self.dense = nn.Linear(HIDDEN, len(LANGUAGES))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits that do not depend on what stands at masked positions, nor on how many there are."""
        real = mask.float()[:, None, :]
        embedded = functional.dropout(self.embedding(ids), 0.2, self.training).transpose(1, 2) * real
        hidden = functional.relu(self.conv(embedded)) * real
        mean = hidden.sum(2) / real.sum(2).clamp(min=1)
        return self.dense(functional.dropout(mean, 0.2, self.training))


def split(texts: Iterable[Text]) -> tuple[list[Text], list[Text], list[Text]]:
    """Texts for training, calibration and evaluation; evaluation is every usable text of the held-out catalogues."""
    training, calibration, evaluation = [], [], []
    taken: Counter[str] = Counter()
    for text in texts:
        is_long = len(text.text) >= EVALUATION_CHARACTERS
        if text.catalogue in HELD_OUT:
            evaluation += [text] if is_long else []
        elif is_long and taken[text.language] < CALIBRATION_PER_LANGUAGE:
            taken[text.language] += 1
            calibration.append(text)
        else:
            training.append(text)
    return training, calibration, evaluation


def balanced(texts: Iterable[Text], per_language: int) -> list[Text]:
    """The first so many texts of each language, in the order given."""
    taken: Counter[str] = Counter()
    chosen = []
    for text in texts:
        if taken[text.language] < per_language:
            taken[text.language] += 1
            chosen.append(text)
    return chosen


def train_tokenizer(training: Sequence[Text]) -> Tokenizer:
    """A byte-level BPE over an equal amount of text of each language; it has no unknown token and needs none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_equal_amounts(training), trainer)
    return tokenizer


def train(training: Sequence[Text], tokenizer: Tokenizer) -> LanguageNet:
    """Fit a net to excerpts of the texts, each language equally often."""
    torch.manual_seed(SEED)
    chance = random.Random(SEED)
    texts: dict[str, list[str]] = defaultdict(list)
    for text in training:
        texts[text.language].append(text.text)
    net = LanguageNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        targets = [chance.randrange(len(LANGUAGES)) for _ in range(BATCH_SIZE)]
        excerpts = [_excerpt(chance.choice(texts[LANGUAGES[target]]), chance) for target in targets]
        ids, mask = encode(tokenizer, excerpts)
        logits = net(torch.from_numpy(ids), torch.from_numpy(mask))
        loss = functional.cross_entropy(logits, torch.tensor(targets), label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Ids and mask [batch, sequence] as the manifest's `[text]` table says: cut, then padded to the next bucket."""
    rows = [encoding.ids[:MAX_TOKENS] for encoding in tokenizer.encode_batch_fast(list(texts))]
    longest = max(map(len, rows))
    width = next(bucket for bucket in BUCKETS if bucket >= longest)
    ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def onnx_graph(net: LanguageNet) -> onnx.GraphProto:
    """The net as an ONNX graph: `input_ids`, `attention_mask` INT64 [batch, sequence] to `logits` FP32."""
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in net.state_dict().items()]
    constants = [
        numpy_helper.from_array(np.array([1], dtype=np.int64), "channel_axis"),
        numpy_helper.from_array(np.array([2], dtype=np.int64), "token_axis"),
        numpy_helper.from_array(np.array(1, dtype=np.float32), "one"),
    ]
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "channel_axis"], ["real"]),
        helper.make_node("Gather", ["embedding.weight", "input_ids"], ["embedded"], axis=0),
        helper.make_node("Transpose", ["embedded"], ["channels_first"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["channels_first", "real"], ["embedded_real"]),
        helper.make_node("Conv", ["embedded_real", "conv.weight", "conv.bias"], ["conv"], pads=[1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Mul", ["relu", "real"], ["hidden"]),
        helper.make_node("ReduceSum", ["hidden", "token_axis"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["real", "token_axis"], ["tokens"], keepdims=0),
        # A text without tokens has no mean; dividing by one answers with the bias instead of NaN.
        helper.make_node("Max", ["tokens", "one"], ["count"]),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("Gemm", ["mean", "dense.weight", "dense.bias"], ["logits"], transB=1),
    ]
    sequence = ["batch", "sequence"]
    return helper.make_graph(
        nodes,
        "language-id",
        [helper.make_tensor_value_info(name, TensorProto.INT64, sequence) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LANGUAGES)])],
        weights + constants,
    )


class Classifier:
    """The written artifacts under onnxruntime, as the appliance runs them."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.session = onnxruntime.InferenceSession(directory / "1" / "model.onnx", providers=["CPUExecutionProvider"])

    def languages(self, texts: Sequence[str]) -> list[str]:
        """The language of each text."""
        answers: list[str] = []
        for start in range(0, len(texts), 64):
            ids, mask = encode(self.tokenizer, texts[start : start + 64])
            (logits,) = self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
            answers += [LANGUAGES[index] for index in logits.argmax(1)]
        return answers


def right_by_language(classifier: Classifier, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Right answers and samples of each language."""
    right: Counter[str] = Counter()
    count = Counter(sample.label for sample in samples)
    answers = classifier.languages([sample.inputs["text"] for sample in samples])
    for sample, answer in zip(samples, answers, strict=True):
        right[sample.label] += answer == sample.label
    return {language: (right[language], count[language]) for language in LANGUAGES}


def report(title: str, scores: dict[str, tuple[int, int]]) -> float:
    """Print right answers of each language and of all; return the share of all."""
    right, count = (sum(column) for column in zip(*scores.values(), strict=True))
    print(f"{title}: {right} of {count} right, {right / count:.4f}")
    print("  " + "  ".join(f"{language} {good}/{of}" for language, (good, of) in scores.items()))
    return right / count


def main() -> None:
    """Train, write the model directory, print the accuracy on each kind of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="model directory to write, e.g. models/language-id")
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages; gets those it lacks")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)

    training, calibration, evaluation = split(catalogues.read(catalogues.fetch(arguments.packages)))
    tokenizer = train_tokenizer(training)
    net = train(training, tokenizer)

    write_onnx(directory / "1" / "model.onnx", onnx_graph(net))
    write_labels(directory / "labels.txt", LANGUAGES)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    samples = as_samples(balanced(evaluation, EVALUATION_PER_LANGUAGE))
    write_samples(directory / "samples" / "evaluation.jsonl", samples)
    write_samples(directory / "samples" / "calibration.jsonl", as_samples(calibration))

    classifier = Classifier(directory)
    everyday = (Path(__file__).parent / "everyday.jsonl").read_text(encoding="utf-8").splitlines()
    report("held-out catalogues", right_by_language(classifier, as_samples(evaluation)))
    report("everyday sentences", right_by_language(classifier, [Sample(**json.loads(line)) for line in everyday]))
    score = report("evaluation.jsonl", right_by_language(classifier, samples))
    write_manifest(directory, manifest(score, len(samples), sha256(directory / "tokenizer.json")))


def as_samples(texts: Iterable[Text]) -> list[Sample]:
    """Texts as labelled requests."""
    return [Sample({"text": text.text}, text.language) for text in texts]


def manifest(score: float, count: int, tokenizer_sha256: str) -> Manifest:
    """The manifest, with the accuracy measured on the evaluation samples."""
    return Manifest(
        name="language-id",
        task="text-classification",
        description=f"The language of a text, one of {len(LANGUAGES)}: {', '.join(LANGUAGES)}",
        license="GPL-3.0-or-later",
        source=(
            "Translations of free software (Wesnoth, Freeciv, GnuCash, Gramps, Evolution, Pidgin, GNU and Debian "
            "tools) as packaged in Debian 12; trained by recipes/language_id.py"
        ),
        inputs=(Tensor("input_ids", "INT64", (-1,)), Tensor("attention_mask", "INT64", (-1,))),
        outputs=(Tensor("logits", "FP32", (len(LANGUAGES),)),),
        adapter_kind="text",
        adapter={
            "input": "text",
            "ids": "input_ids",
            "mask": "attention_mask",
            "tokenizer": "tokenizer.json",
            "tokenizer_sha256": tokenizer_sha256,
            "max_tokens": MAX_TOKENS,
            "buckets": list(BUCKETS),
            "pad_id": PAD_ID,
        },
        accuracy=round(score, 4),
        count=count,
    )


def _equal_amounts(training: Sequence[Text]) -> list[str]:
    used: Counter[str] = Counter()
    chosen = []
    for text in training:
        if used[text.language] < TOKENIZER_CHARACTERS:
            used[text.language] += len(text.text)
            chosen.append(text.text)
    return chosen


def _excerpt(text: str, chance: random.Random) -> str:
    """A random stretch of the text, from a word's start where there is one; short ones as likely as long ones."""
    length = int(SHORTEST * (LONGEST / SHORTEST) ** chance.random())
    if len(text) <= length:
        return text
    start = chance.randrange(len(text) - length + 1)
    space = text.find(" ", start, start + length // 2)
    return text[max(start, space + 1) :][:length]


if __name__ == "__main__":
    main()
