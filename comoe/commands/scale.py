"""Run one recipe over a grid of experts, k, gates, encoders, EP sizes and seeds; or plan a model on a cluster.

comoe scale smoke --experts 2,4,8 --top-k 1,2 --seeds 0,1 --output runs/scale
comoe scale --plan --encoder-shape 24,1024,4096,50265 --gpus 1..4096 model.moe.num_experts=64
The first goes on where an earlier call with the same --output stopped; an --experts of 0 is the encoder alone, and a
--top-k of all is as many as there are experts.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from comoe.commands.arguments import (
    add_experiment,
    add_recipe,
    need_training,
    new_parser,
    take_recipe,
)
from comoe.commands.guard import GOES_ON, guarded

GRID = {"experts": "experts", "top-k": "top_k", "ep": "ep_size", "encoder": "encoder", "gate": "gate",
        "seeds": "seeds"}  # fmt: skip
PLAN = {
    "encoder-shape": (None, "layers,width,feed-forward width,vocabulary, not the recipe's encoder"),
    "gpus": ("1..4096", "numbers of GPUs: 8,64 or 1..4096 (by doubling)"),
    "gpu-memory": ("80", "GB of one GPU"),
    "gpus-per-node": ("8", "GPUs of one machine"),
    "bandwidth": ("450,50", "GB/s that one GPU sends inside its machine, and to others"),
    "flops": ("990", "TFLOP/s of one GPU in bfloat16 matrix products"),
    "memory-bandwidth": ("3350", "GB/s from one GPU's memory"),
    "efficiency": ("0.4", "share of --flops that training reaches"),
    "length": ("64", "tokens per post"),
    "batch": (None, "posts per step on all GPUs; without it the batch grows with them"),
}


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("scale", __doc__)
    add = found.add_argument
    add_experiment(found, "scale", output="runs, table, plots")
    for flag, field in GRID.items():
        add(f"--{flag}", dest=field, metavar="LIST", help="with commas; the recipe's own without it")
    add("--plan", action="store_true", help="print memory, bytes and step time on a cluster; end")
    for flag, (default, text) in PLAN.items():
        add(f"--{flag}", help=text + (f" ({default})" if default else ""))
    # fmt: on
    add_recipe(found)
    return found


@guarded("scale", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    given = parser().parse_intermixed_args(argv)
    take_recipe(given)
    need_training("scale")

    from comoe.experiments.scale.command import scale_or_plan

    plan_flags = {flag: default for flag, (default, _) in PLAN.items()}
    sys.exit(1 if scale_or_plan(given, plan_flags=plan_flags) else 0)
