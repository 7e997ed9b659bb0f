"""Print how far ONNX files are from PyTorch, for each encoder family: the table of docs/results/speed.md.

    python tests/onnx_parity.py

Small random weights, two layers, an expert layer, a task of posts and one of words; the norms drawn
too. Largest differences of logits, of 8 bits beside the standard deviation of the logits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from helpers_export import MOOD, WORDS  # noqa: E402
from helpers_model import HALVES, HF_CONFIGS, VARIANTS, moe_config  # noqa: E402

from comoe.config.recipe import ModelConfig  # noqa: E402
from comoe.inference import onnx_export  # noqa: E402
from comoe.inference.onnx_model import OnnxModel  # noqa: E402
from comoe.models.build import build_model  # noqa: E402


def measure(family: str, folder: Path) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    config = ModelConfig(dropout=0.0, projection_width=8, moe=moe_config(layers="top-1"))
    encoder = (HF_CONFIGS | VARIANTS | HALVES)[family].to_dict()
    model = build_model(config, (MOOD, WORDS), encoder_config=encoder).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=0.5)
    batches = onnx_export.sample_batches(model, 16)
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
    path = folder / f"{family}.onnx"
    onnx_export.write_onnx(model, path, batches[0], 16)
    fine = onnx_export.largest_difference(OnnxModel(path, threads=1), batches, expected)
    onnx_export.quantize(model, path)
    coarse = onnx_export.largest_difference(OnnxModel(path, threads=1), batches, expected)
    spread = torch.cat([logits.flatten() for one in expected for logits in one.logits.values()])
    return f"| {family} | {fine:.1e} | {coarse:.1e} | {spread[spread.isfinite()].std():.2f} |"


if __name__ == "__main__":
    print("| family | float32 | 8 bits | spread of the logits |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for family in [*HF_CONFIGS, *HALVES, "deberta-v2 with a convolution"]:
            print(measure(family, Path(name)), flush=True)
