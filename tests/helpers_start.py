"""Predictions in a process of their own, and what it has imported at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NEVER = (
    "accelerate", "captum", "datasets", "deepspeed", "fastapi", "huggingface_hub", "jinja2", "matplotlib", "onnx",
    "onnxscript", "pandas", "PIL.JpegImagePlugin", "ray", "scipy", "sklearn", "sympy", "tensorboard",
    "torch._dynamo.eval_frame", "torch._inductor.config", "torch.distributed.tensor", "torch.onnx", "torchvision",
    "transformers",
)  # fmt: skip
"""Modules that no prediction of an encoder with heads needs; some take a second to import."""

PREDICT = f"""
import sys
from comoe.commands.main import main
main(sys.argv[2:])
heavy = set({NEVER!r}) | set(sys.argv[1].split())
print(len(sys.modules), *sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""

LOAD = f"""
import sys
from comoe.serving.limits import Limits
from comoe.serving.metrics import Metrics
from comoe.serving.models import Models, read_source
options = dict(device="cpu", verify=True, backend=sys.argv[3], threads=1)
models = Models([read_source(sys.argv[2])], limits=Limits(), metrics=Metrics(), **options)
(served,) = models
assert "mood" in served.predictor(["good day"])[0] and len(served.predictor.embed(["good day"])) == 1
heavy = set({NEVER!r}) - {{"fastapi"}} | set(sys.argv[1].split())
print(len(sys.modules), *sorted(heavy & sys.modules.keys()), file=sys.stderr)
models.close()
"""


def heavy_modules(script: str, more: str, *words: str | Path, folder: Path) -> list[str]:
    """Modules of ``NEVER``, and of ``more``, that a fresh process has imported at its end."""
    command = [sys.executable, "-c", script, more, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    number, *found = done.stderr.splitlines()[-1].split()
    assert 100 < int(number) < 2000
    return found


def predict_words(export: Path, folder: Path, *more: str) -> list[str | Path]:
    """The command that predicts three posts."""
    (folder / "posts.txt").write_text("good day\nthe sun is bad\nrain\n")
    return ["predict", "--model", export, "--input", "posts.txt", "--output", "found.jsonl", *more]
