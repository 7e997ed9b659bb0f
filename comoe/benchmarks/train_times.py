"""Runs on the ranks of ``launch/bench.py train``: whole training steps, comoe's and Hugging Face's, in turns."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from comoe.assemble import Run, assemble
from comoe.benchmarks.hugging_face import STRATEGIES, Rival, save_base_encoder
from comoe.benchmarks.report import machine_note
from comoe.benchmarks.timing import Contestant, take_turns
from comoe.benchmarks.workload import deepspeed_json, find_posts
from comoe.distributed import rank, sum_over_ranks, world_size
from comoe.objective import count_units, unit_scale
from comoe.train.parallel import start_ranks
from comoe.train.progress import Interval

WARMUP = 4
"""Untimed steps of each contestant."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}
"""Part of a GPU's name -> dense bfloat16 FLOP per second by its data sheet."""


class Steps:
    """comoe's training step, batch after batch: sampler, collator, totals over ranks, engine, and the log's numbers.

    ``counts`` holds (real, padded) tokens of each step on this rank.

    The run collates the next batch in another thread meanwhile; here it is collated within the step, as the Trainer's
    is by default.
    """

    def __init__(self, run: Run) -> None:
        self.trainer = run.trainer
        self.number = 0
        self.counts: list[tuple[int, int]] = []
        self.interval = Interval(run.tasks)

    def step(self) -> None:
        """One optimizer step."""
        trainer = self.trainer
        batches = [trainer.collator(trainer.train_split, share) for share in trainer.sampler.share(self.number, rank())]
        units_T = sum_over_ranks(torch.stack([count_units(batch, trainer.tasks) for batch in batches]).sum(0))
        scale_T = unit_scale(units_T, world_size=world_size(), accumulation=len(batches))
        batches = [replace(batch, unit_scale_T=scale_T) for batch in batches]
        rates = trainer.engine.set_rate_factor(1.0)
        report = trainer.engine.train_step(batches)
        self.interval.add(batches, report)
        self.number += 1
        if self.number % trainer.recipe.train.log_every == 0:
            self.interval.reduce(engine=trainer.engine, report=report, batches=batches, rates=rates)
            self.interval.reset()
        real = sum(int(batch.attention_mask_BL.sum()) for batch in batches)
        self.counts.append((real, sum(batch.attention_mask_BL.numel() for batch in batches)))


def measure(config: str | None, overrides: list[str], rounds: int) -> dict[str, Any]:
    """Time whole steps in turns; every rank calls it.

    Args:
        config: recipe file; None is the default recipe.
        overrides: ``key=value`` changes of it.
        rounds: timed steps of each.

    Returns:
        times: contestant -> seconds per round; contestants are comoe, hf (the Trainer's defaults: random order, padded
        to the longest of the batch) and hf grouped (group_by_length). tokens: contestant -> real tokens of all ranks
        per round. optimizer: contestant -> median seconds of the optimizer's step within. mfu: of comoe, None without
        a GPU of known peak. notes: lines.
    """
    device = start_ranks(timeout_seconds=600)
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name, silence():
        folder = Path(name)
        source = find_posts(config, overrides)
        recipe = source.recipe
        if device.type == "cuda":
            encoder = save_base_encoder(folder / "encoder", recipe.model.encoder)
            recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))
        run = assemble(
            recipe, deepspeed_json(), folder=folder, on_ready=lambda: None, device=device, dry_run=False, resume=False
        )
        assert run is not None
        ours = Steps(run)
        rivals = {
            label: Rival(recipe, run.splits["train"], folder=folder, device=device, strategy=strategy)
            for label, strategy in STRATEGIES.items()
        }
        contestants = {"comoe": Contestant(ours.step)}
        contestants |= {label: Contestant(rival.held.step) for label, rival in rivals.items()}
        with clocked_optimizers() as seconds:
            times = take_turns(contestants, rounds=rounds, warmup=WARMUP, device=device)
        engines = {"comoe": ours.trainer.engine.deepspeed} | {label: rival.engine for label, rival in rivals.items()}
        for rival in rivals.values():
            rival.held.stop()
        run.trainer.monitor.close()
    counts = {"comoe": ours.counts} | {label: rival.collator.counts for label, rival in rivals.items()}
    timed = {label: torch.tensor(values[WARMUP : WARMUP + rounds]) for label, values in counts.items()}
    tokens = {label: sum_over_ranks(values).tolist() for label, values in timed.items()}
    return {
        "times": times,
        "tokens": {label: [real for real, _ in values] for label, values in tokens.items()},
        "optimizer": {label: statistics.median(seconds[id(engine)][-rounds:]) for label, engine in engines.items()},
        "mfu": utilisation(run, tokens["comoe"], times["comoe"], device),
        "notes": _notes(run, source.name, tokens, device),
    }


def _notes(run: Run, posts: str, tokens: Mapping[str, Sequence[Sequence[int]]], device: torch.device) -> list[str]:
    recipe, millions = run.recipe, {key: f"{count / 1e6:.1f}" for key, count in run.parameters.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    means = {label: torch.tensor(values, dtype=torch.float64).mean(0).tolist() for label, values in tokens.items()}
    return [
        f"{world_size()} rank(s), {machine_note(name, torch.get_num_threads())}",
        f"recipe {recipe.run.name} on {posts}: {recipe.train.batch_size} posts per step, at most "
        f"{recipe.data.max_length} tokens each, {len(run.tasks)} tasks, {millions['total']} million parameters "
        f"({millions['active']} active); hf: the same encoder, dense, one task",
        "tokens per step, real / with padding: "
        + "; ".join(f"{label} {real:.0f} / {padded:.0f}" for label, (real, padded) in means.items()),
    ]


def utilisation(
    run: Run, tokens: Sequence[Sequence[int]], times: Sequence[float | None], device: torch.device
) -> float | None:
    """Model FLOPs utilisation: arithmetic that the real tokens need, over what the GPU could do in the time.

    6 FLOPs per active parameter and token (forward 2, backward 4) without the embeddings, which are looked up, plus
    12 L M n per token for attention over n tokens; padding and recomputation count as nothing. None on an unknown
    device, and with a decoder, whose tokens are others than the encoder's.

    Args:
        run: the run.
        tokens: (real, padded) tokens of all ranks, per step.
        times: seconds per step.
        device: of this rank.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    model = run.trainer.engine.objective.model
    if peak is None or model.decoder is not None:
        return None
    config = model.encoder.config
    per_token = 6 * (run.parameters["active"] - looked_up(model.encoder))
    per_token += 12 * config.num_hidden_layers * config.hidden_size * float(run.splits["train"].lengths.mean())
    seconds = statistics.median(value for value in times if value is not None)
    real = statistics.mean(real for real, _ in tokens)
    return per_token * real / seconds / (peak * world_size())


def looked_up(encoder: nn.Module) -> int:
    """Numbers in an encoder's tables, of words, positions and the like: rows are picked, nothing is multiplied."""
    tables = [module.weight for module in encoder.modules() if isinstance(module, nn.Embedding)]
    # Under ZeRO-3 a weight that is split says by itself how large it is; a table may have several places.
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in {id(one): one for one in tables}.values())


@contextmanager
def clocked_optimizers() -> Iterator[Mapping[int, list[float]]]:
    """While open, every ``DeepSpeedEngine.step`` adds its seconds to its engine's list; keys are ``id(engine)``."""
    seconds: dict[int, list[float]] = {}
    original = DeepSpeedEngine.step

    def step(engine: DeepSpeedEngine, *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        answer = original(engine, *arguments, **named)
        seconds.setdefault(id(engine), []).append(time.perf_counter() - began)
        return answer

    DeepSpeedEngine.step = step
    try:
        yield seconds
    finally:
        DeepSpeedEngine.step = original


@contextmanager
def silence() -> Iterator[None]:
    """What the libraries print is not the benchmark's; errors still raise."""
    with open(os.devnull, "w", encoding="utf-8") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield
