"""``comoe bench train``: whole training steps of the default recipe against Hugging Face's Trainer with ZeRO-2,
and, on a CPU, bfloat16 against float32 (``comoe.benchmarks.precision``).

``measure_steps`` and ``measure_monitoring`` run on the ranks.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comoe.benchmarks.hugging_face import STRATEGIES, ReferenceTrainer, save_base_encoder
from comoe.benchmarks.precision import add_precision
from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.steps import WARMUP, Steps, clocked_optimizers, silence
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Target,
    machine_note,
    median,
    ratio,
    spread_of,
    take_turns,
)
from comoe.benchmarks.workload import find_posts
from comoe.distributed import sum_over_ranks, world_size
from comoe.evaluation.routing_stats import RoutingStats
from comoe.train import trainer
from comoe.train.build import build_run
from comoe.train.monitor.log_window import LogWindow
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.ds_config import ZERO_2
from comoe.train.parallel.setup import start_ranks
from comoe.train.trainer import Trainer
from comoe.train.training_run import TrainingRun

STEPS, EVAL_EVERY = 40, 20
"""Training steps of the run, and between two evaluations; the default recipe logs every tenth."""

WATCHED: dict[str, list[tuple[Any, str]]] = {
    "step": [(Trainer, "_step")],
    "evaluation": [(trainer, "evaluate_split"), (Monitor, "log_evaluation")],
    "log": [(LogWindow, "add"), (LogWindow, "reduce"), (Monitor, "log_train")],
    "statistics": [
        (RoutingStats, "update"),
        (RoutingStats, "summary"),
        (Monitor, "log_evaluation"),
    ],
}
"""Part -> methods of a class or a module, whose times are summed."""


@contextmanager
def clocked_methods(parts: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, list[float]]]:
    """Within the context each call of the methods adds its seconds to its part's list."""
    found: dict[str, list[float]] = {part: [] for part in parts}
    originals = [
        (owner, name, getattr(owner, name)) for methods in parts.values() for owner, name in methods
    ]
    for part, methods in parts.items():
        for owner, name in methods:
            setattr(owner, name, _clocked(getattr(owner, name), found[part]))
    try:
        yield found
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


def _clocked(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def measure_monitoring(config: str | None) -> dict[str, Any]:
    """Train for a while, with two evaluations.

    Args:
        config: recipe file; None is the default recipe.

    Returns:
        share: share of the training time for collecting and writing the log. evaluation_share: share
            of an evaluation's time for routing statistics, files and plots. note: what ran.
    """
    device = start_ranks(timeout_seconds=600)
    steps = {"max_steps": STEPS, "eval_every": EVAL_EVERY, "save_every": 100000}
    overrides = [f"train.{key}={value}" for key, value in steps.items()]
    source = find_posts(config, ["data.limit_eval=400", *overrides])
    with (
        tempfile.TemporaryDirectory(prefix="comoe-bench-") as name,
        open(os.devnull, "w", encoding="utf-8") as null,
    ):
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            run = build_run(source.recipe, ZERO_2, Path(name), device=device)
            with clocked_methods(WATCHED) as seconds:
                Trainer(run).train()
        run.monitor.close()
    share = sum(seconds["log"]) / sum(seconds["step"])
    evaluation = sum(seconds["statistics"]) / sum(seconds["evaluation"])
    rounds = len(seconds["step"])
    return {
        "share": asdict(spread_of([share])) | {"rounds": rounds},
        "evaluation_share": asdict(spread_of([evaluation]))
        | {"rounds": len(seconds["statistics"])},
        "note": f"monitoring: {rounds} steps of the recipe {source.recipe.run.name} on {source.name}, "
        f"{1000 * sum(seconds['step']) / rounds:.0f} ms per step; each evaluation counts, writes "
        f"and draws for {1000 * sum(seconds['statistics']) / (STEPS // EVAL_EVERY):.0f} ms",
    }


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}
"""Part of a GPU's name -> dense bfloat16 FLOP per second by its data sheet."""


def measure_steps(config: str | None, overrides: list[str], rounds: int) -> dict[str, Any]:
    """Time whole steps in turns; every rank calls it.

    Args:
        config: recipe file; None is the default recipe.
        overrides: ``key=value`` changes of it.
        rounds: timed steps of each.

    Returns:
        times: contestant -> seconds per round; contestants are comoe, hf (the Trainer's defaults:
        random order, padded to the longest of the batch) and hf grouped (group_by_length). tokens:
        contestant -> real tokens of all ranks per round. optimizer: contestant -> median seconds of
        the optimizer's step within. mfu: of comoe, None without a GPU of known peak. notes: lines.
    """
    device = start_ranks(timeout_seconds=600)
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name, silence():
        folder = Path(name)
        source = find_posts(config, overrides)
        recipe = source.recipe
        if device.type == "cuda":
            encoder = save_base_encoder(folder / "encoder", recipe.model.encoder)
            recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))
        run = build_run(recipe, ZERO_2, folder, device=device)
        ours = Steps(run)
        same: dict[str, Any] = {"folder": folder, "device": device, "bf16": run.layout.bf16}
        references = {
            label: ReferenceTrainer(recipe, run.splits["train"], strategy=strategy, **same)
            for label, strategy in STRATEGIES.items()
        }
        contestants = {"comoe": Contestant(ours.step)}
        contestants |= {
            label: Contestant(reference.held.step) for label, reference in references.items()
        }
        with clocked_optimizers() as seconds:
            times = take_turns(contestants, rounds=rounds, warmup=WARMUP, device=device)
        engines = {"comoe": run.engine.deepspeed} | {
            label: reference.engine for label, reference in references.items()
        }
        for reference in references.values():
            reference.held.stop()
        run.monitor.close()
    counts = {"comoe": ours.counts} | {
        label: reference.collator.counts for label, reference in references.items()
    }
    timed = {
        label: torch.tensor(values[WARMUP : WARMUP + rounds]) for label, values in counts.items()
    }
    tokens = {label: sum_over_ranks(values).tolist() for label, values in timed.items()}
    return {
        "times": times,
        "tokens": {label: [real for real, _ in values] for label, values in tokens.items()},
        "optimizer": {
            label: statistics.median(seconds[id(engine)][-rounds:])
            for label, engine in engines.items()
        },
        "mfu": utilization(run, tokens["comoe"], times["comoe"], device),
        "notes": _notes(run, source.name, tokens, device),
    }


def _notes(
    run: TrainingRun,
    posts: str,
    tokens: Mapping[str, Sequence[Sequence[int]]],
    device: torch.device,
) -> list[str]:
    recipe, millions = (
        run.recipe,
        {key: f"{count / 1e6:.1f}" for key, count in run.parameters.items()},
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    means = {
        label: torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        for label, values in tokens.items()
    }
    return [
        f"{world_size()} rank(s), {machine_note(name, torch.get_num_threads())}, "
        f"{'bf16' if run.layout.bf16 else 'float32'} in all contestants",
        f"recipe {recipe.run.name} on {posts}: {recipe.train.batch_size} posts per step, at most "
        f"{recipe.data.max_length} tokens each, {len(run.tasks)} tasks, {millions['total']} "
        f"million parameters ({millions['active']} active); hf: the same encoder, dense, one task",
        "tokens per step, real / with padding: "
        + "; ".join(
            f"{label} {real:.0f} / {padded:.0f}" for label, (real, padded) in means.items()
        ),
    ]


def utilization(
    run: TrainingRun,
    tokens: Sequence[Sequence[int]],
    times: Sequence[float | None],
    device: torch.device,
) -> float | None:
    """Model FLOPs utilization: arithmetic that the real tokens need, over what the GPU could do in the time.

    6 FLOPs per active parameter and token (forward 2, backward 4) without the embeddings, which are
    looked up, plus 12 L M n per token for attention over n tokens; padding and recomputation count
    as nothing. None on an unknown device, and with a decoder, whose tokens are others than the
    encoder's.

    Args:
        run: the run.
        tokens: (real, padded) tokens of all ranks, per step.
        times: seconds per step.
        device: of this rank.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    model = run.model
    if peak is None or model.decoder is not None:
        return None
    config = model.encoder.config
    per_token = 6 * (run.parameters["active"] - looked_up(model.encoder))
    length = float(run.splits["train"].lengths.mean())
    per_token += 12 * config.num_hidden_layers * config.hidden_size * length
    seconds = statistics.median(value for value in times if value is not None)
    real = statistics.mean(real for real, _ in tokens)
    return per_token * real / seconds / (peak * world_size())


def looked_up(encoder: nn.Module) -> int:
    """Numbers in an encoder's tables, of words, positions and the like: rows are selected, not multiplied."""
    tables = [module.weight for module in encoder.modules() if isinstance(module, nn.Embedding)]
    # Under ZeRO-3 a partitioned weight knows its full size; a table may have several places.
    return sum(
        getattr(weight, "ds_numel", weight.numel())
        for weight in {id(one): one for one in tables}.values()
    )


TARGETS = {"hf_over_comoe": Target(at_least=1.0)}
"""Rows without a target are informative; the row of equal length grouping shows the effect of
grouping."""

OVERRIDES = {
    "cpu": ["data.limit_eval=50"],
    # 32 short posts per step, as in the recipe, leave a GPU idle.
    "cuda": ["data.limit_eval=50", "data.max_length=128", "train.batch_size=512", "train.micro_batch_size=512"],
}  # fmt: skip
"""Kind of device -> changes of the default recipe."""


def run(
    json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None
) -> Measurements:
    """Measure, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the default recipe.
        rounds: timed steps of each contestant instead of 40.
    """
    recipe = None if config is None else str(config.resolve())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    report = Measurements("train: training steps; ratios of interleaved times", TARGETS)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for ranks, suffix in ((1, ""), (2, "_2ranks")):
        if ranks > (torch.cuda.device_count() if kind == "cuda" else cores):
            continue
        measured = run_on_ranks(
            "comoe.benchmarks.training:measure_steps",
            ranks,
            config=recipe,
            overrides=OVERRIDES[kind],
            rounds=rounds or 40,
        )
        report.notes += measured["notes"]
        times = measured["times"]
        report.add(f"hf_over_comoe{suffix}", asdict(ratio(times, "hf", "comoe")))
        per_token = {
            name: [
                None if value is None else value / count
                for value, count in zip(times[name], tokens, strict=True)
            ]
            for name, tokens in measured["tokens"].items()
        }
        report.add(f"hf_over_comoe_per_token{suffix}", asdict(ratio(per_token, "hf", "comoe")))
        # Length grouping starts with the longest posts, so a few steps compare per token only.
        grouped = asdict(ratio(per_token, "hf grouped", "comoe"))
        report.add(f"hf_grouped_over_comoe_per_token{suffix}", grouped)
        if (mfu := measured["mfu"]) is not None:
            figure = dict.fromkeys(("value", "low", "high"), mfu) | {"rounds": rounds or 40}
            report.add(f"mfu{suffix}", figure)
        for name, seconds in measured["optimizer"].items():
            case = f"{ranks} rank(s)"
            report.add_time(name, median(times, name), case=f"{case}, whole step")
            report.add_time(name, seconds, case=f"{case}, step() within")
    if kind == "cpu":
        add_precision(report, recipe, OVERRIDES[kind], rounds=rounds or 20, cores=cores)
    report.publish(json_path)
    return report
