"""Measure comoe against what else one would use. Ratios, taken side by side in one run; starts its own ranks.

comoe bench experts --json experts.json     one layer: dense, DeepSpeed's own, the plain loop, E = 8 to 64
comoe bench train --json train.json         whole training steps: Hugging Face Trainer with ZeRO-2
comoe bench contrastive --json c.json       the loss: full matrix, open_clip's local one, reference code
comoe bench routing --json routing.json     routing by task and by token: five tasks, blocks in some layers
comoe bench updates --json u.json           what experts learn in ten steps, against a dense block
comoe bench serve --json serve.json         a server under eight clients, against batch prediction
comoe bench predict --json predict.json     prediction: a Hugging Face pipeline, bfloat16, ONNX; latency, start
"""

import importlib.util
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import need_training, new_parser, whole
from comoe.commands.guard import guarded

BENCHMARKS = {
    "experts": "comoe.benchmarks.experts",
    "train": "comoe.benchmarks.training",
    "contrastive": "comoe.benchmarks.contrastive",
    "routing": "comoe.benchmarks.routing",
    "updates": "comoe.benchmarks.updates",
    "serve": "comoe.benchmarks.serving",
    "predict": "comoe.benchmarks.prediction",
}
"""Word of the command line -> module with ``run(json_path, config=..., rounds=...)``."""


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("bench", __doc__)
    add = found.add_argument
    add("benchmark", choices=BENCHMARKS, help="what to measure")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    add("--config", type=Path, metavar="YAML", help="recipe (launch/configs/starter.yaml)")
    add("--rounds", type=whole(1), metavar="N", help="timed rounds (more: steadier medians)")
    # fmt: on
    return found


@guarded("bench")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print the table."""
    line = parser()
    given = line.parse_args(argv)
    if importlib.util.find_spec("comoe.benchmarks") is None:
        line.error("the benchmarks are no part of an installed comoe; run it in a checkout.")
    need_training("bench")

    from comoe.config.files import check_target
    from comoe.config.load import load_recipe

    if given.json is not None:
        check_target(given.json)
    if given.config is not None:
        load_recipe(given.config)  # before any rank is started
    # Its ranks must not outlive it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = importlib.import_module(BENCHMARKS[given.benchmark]).run(
        given.json, config=given.config, rounds=given.rounds
    )
    if report.missed():
        print(f"\nmissed: {', '.join(report.missed())}")
