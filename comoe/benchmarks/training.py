"""``launch/bench.py train``: whole training steps of the default recipe against Hugging Face's Trainer with ZeRO-2."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch

from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.report import Report, Target
from comoe.benchmarks.timing import median, ratio

TARGETS = {"hf_over_comoe": Target(at_least=1.0)}
"""Rows without a target are for information; the one of equal length grouping shows what grouping alone is worth."""
OVERRIDES = {
    "cpu": ["data.limit_eval=50"],
    # A GPU is idle at the recipe's 32 short posts per step.
    "cuda": ["data.limit_eval=50", "data.max_length=128", "train.batch_size=512", "train.micro_batch_size=512"],
}
"""Kind of device -> changes of the default recipe."""


def run(json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None) -> Report:
    """Measure, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the default recipe.
        rounds: timed steps of each contestant instead of the usual 40.
    """
    recipe = None if config is None else str(config.resolve())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("train: whole training steps; ratios of times taken in turns", TARGETS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for ranks, suffix in ((1, ""), (2, "_2ranks")):
        if ranks > (torch.cuda.device_count() if kind == "cuda" else cores):
            continue
        measured = run_on_ranks(
            "comoe.benchmarks.train_times:measure", ranks, config=recipe, overrides=OVERRIDES[kind], rounds=rounds or 40
        )
        report.notes += measured["notes"]
        times = measured["times"]
        report.add(f"hf_over_comoe{suffix}", asdict(ratio(times, "hf", "comoe")))
        per_token = {
            name: [None if value is None else value / count for value, count in zip(times[name], tokens, strict=True)]
            for name, tokens in measured["tokens"].items()
        }
        report.add(f"hf_over_comoe_per_token{suffix}", asdict(ratio(per_token, "hf", "comoe")))
        # Length grouping hands out the longest posts first, so only per token are a few steps comparable.
        report.add(f"hf_grouped_over_comoe_per_token{suffix}", asdict(ratio(per_token, "hf grouped", "comoe")))
        if measured["mfu"] is not None:
            mfu = measured["mfu"]
            report.add(f"mfu{suffix}", {"value": mfu, "low": mfu, "high": mfu, "rounds": rounds or 40})
        for name in times:
            report.add_time(name, median(times, name), case=f"{ranks} rank(s), whole step")
            report.add_time(name, measured["optimizer"][name], case=f"{ranks} rank(s), step() within")
    print("\n".join(report.lines()))
    if json_path is not None:
        report.write(json_path)
    return report
