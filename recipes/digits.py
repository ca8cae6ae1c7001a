"""Train the `digits` sample model: handwritten digits of 8x8 pixels, a small convolutional net.

    python recipes/digits.py models/digits

The pictures come with scikit-learn, so nothing is fetched.
"""

import argparse
import base64
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from model_directory import Manifest, Sample, Tensor, write_labels, write_manifest, write_onnx, write_samples
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

SEED = 20240229
EVALUATION_COUNT = 360
CALIBRATION_COUNT = 200
EPOCHS = 150
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
LABELS = tuple(str(digit) for digit in range(10))

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class DigitNet(nn.Module):
    """Three convolutions and two dense layers: FP32 [batch, 1, 8, 8] in 0..1 to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.dense1 = nn.Linear(64 * 4 * 4, 96)
        self.dense2 = nn.Linear(96, len(LABELS))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10] of pictures [batch, 1, 8, 8]."""
        hidden = functional.relu(self.conv1(pixels))
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        hidden = functional.dropout(functional.relu(self.conv3(hidden)).flatten(1), 0.3, self.training)
        hidden = functional.dropout(functional.relu(self.dense1(hidden)), 0.3, self.training)
        return self.dense2(hidden)


def grey_levels() -> tuple[npt.NDArray[np.uint8], Ints]:
    """All pictures as 8-bit grey levels [1797, 8, 8], and their digits.

    Training starts from the 8-bit values too, so that it sees exactly what a client's PNG carries.
    """
    digits = load_digits()
    return np.rint(digits.images / 16 * 255).astype(np.uint8), digits.target.astype(np.int64)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shear, shift and dim each picture [batch, 1, 8, 8] a little.

    Scaling goes down to 0.65 because a drawing program leaves a margin around the digit and this data set does not.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(pixels), generator=generator) * (high - low) + low

    angle, shear = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    zoom_x, zoom_y = 1 / uniform(0.65, 1.1), 1 / uniform(0.65, 1.1)
    rows = [
        torch.stack([zoom_x * angle.cos(), zoom_x * (shear - angle.sin()), uniform(-0.25, 0.25)], 1),
        torch.stack([zoom_y * angle.sin(), zoom_y * angle.cos(), uniform(-0.25, 0.25)], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, align_corners=False)
    return (moved * uniform(0.7, 1.3)[:, None, None, None]).clamp(0, 1)


def train(pixels: Floats, digits: Ints) -> DigitNet:
    """Fit a net to pictures [count, 1, 8, 8] and their digits."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    inputs, targets = torch.from_numpy(pixels), torch.from_numpy(digits)
    net = DigitNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    steps = EPOCHS * (len(inputs) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs), generator=generator)
        # Every other picture stays as it is: those are what the held-out set looks like.
        for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE):
            half = BATCH_SIZE // 2
            batch = torch.cat([inputs[chosen[:half]], augment(inputs[chosen[half:]], generator)])
            loss = functional.cross_entropy(net(batch), targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def onnx_graph(net: DigitNet) -> onnx.GraphProto:
    """The net as an ONNX graph: `pixels` FP32 [batch, 1, 8, 8] to `logits` FP32 [batch, 10]."""
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in net.state_dict().items()]
    padding = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["pixels", "conv1.weight", "conv1.bias"], ["conv1"], pads=padding),
        helper.make_node("Relu", ["conv1"], ["relu1"]),
        helper.make_node("Conv", ["relu1", "conv2.weight", "conv2.bias"], ["conv2"], pads=padding),
        helper.make_node("Relu", ["conv2"], ["relu2"]),
        helper.make_node("MaxPool", ["relu2"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pooled", "conv3.weight", "conv3.bias"], ["conv3"], pads=padding),
        helper.make_node("Relu", ["conv3"], ["relu3"]),
        helper.make_node("Flatten", ["relu3"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["dense1"], transB=1),
        helper.make_node("Relu", ["dense1"], ["relu4"]),
        helper.make_node("Gemm", ["relu4", "dense2.weight", "dense2.bias"], ["logits"], transB=1),
    ]
    return helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        weights,
    )


def as_sample(grey: npt.NDArray[np.uint8], digit: int) -> Sample:
    """A picture [8, 8] as a request with a PNG."""
    png = io.BytesIO()
    Image.fromarray(grey).save(png, format="PNG")
    return Sample({"image": {"base64": base64.b64encode(png.getvalue()).decode()}}, LABELS[digit])


def as_pixels(grey: npt.NDArray[np.uint8]) -> Floats:
    """Grey levels [count, 8, 8] as the net's input [count, 1, 8, 8] in 0..1."""
    return (grey[:, None] / 255).astype(np.float32)


def accuracy(model: Path, pixels: Floats, digits: Ints) -> float:
    """Share of right answers of the written artifact under onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels})
    return float(np.mean(logits.argmax(1) == digits))


def main() -> None:
    """Train, write the model directory, print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="model directory to write, e.g. models/digits")
    directory: Path = parser.parse_args().directory
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)

    grey, digits = grey_levels()
    rest, evaluation = train_test_split(
        np.arange(len(digits)), test_size=EVALUATION_COUNT, stratify=digits, random_state=SEED
    )
    training, calibration = train_test_split(
        rest, test_size=CALIBRATION_COUNT, stratify=digits[rest], random_state=SEED
    )
    net = train(as_pixels(grey[training]), digits[training])

    write_onnx(directory / "1" / "model.onnx", onnx_graph(net))
    write_labels(directory / "labels.txt", LABELS)
    for name, chosen in (("evaluation", evaluation), ("calibration", calibration)):
        samples = [as_sample(grey[index], digits[index]) for index in chosen]
        write_samples(directory / "samples" / f"{name}.jsonl", samples)
    score = accuracy(directory / "1" / "model.onnx", as_pixels(grey[evaluation]), digits[evaluation])
    write_manifest(directory, manifest(score))
    print(f"held-out accuracy {score:.4f} on {EVALUATION_COUNT} pictures")


def manifest(score: float) -> Manifest:
    """The manifest, with the accuracy measured on the evaluation samples."""
    return Manifest(
        name="digits",
        task="image-classification",
        description="Handwritten digits 0 to 9, light on dark, 8x8 grey pixels: a small convolutional net",
        license="CC-BY-4.0",
        source=(
            "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
            "CC BY 4.0, as bundled with scikit-learn; trained by recipes/digits.py"
        ),
        inputs=(Tensor("pixels", "FP32", (1, 8, 8)),),
        outputs=(Tensor("logits", "FP32", (len(LABELS),)),),
        adapter_kind="image",
        adapter={
            "input": "image",
            "tensor": "pixels",
            "width": 8,
            "height": 8,
            "channels": 1,
            "scale": 1 / 255,
            "mean": [0.0],
            "std": [1.0],
            "resize": "bilinear",
        },
        accuracy=round(score, 4),
        count=EVALUATION_COUNT,
    )


if __name__ == "__main__":
    main()
