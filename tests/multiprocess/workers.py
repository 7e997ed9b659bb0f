"""What the ranks of the multi-process tests run: a tiny model on fixed global batches, over any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.config import recipe_from_dict
from comoe.protocols import IGNORED, Batch
from comoe.tasks.catalog import Task

TASKS = (
    Task("mood", "single_label", ("bad", "good", "none"), "macro_f1", 1.0, None, 0.0, True),
    Task("heat", "regression", (), "pearson", 1.0, None, 0.0, False),
    Task("topic", "single_label", ("a", "b"), "macro_f1", 1.0, (0.5, 2.0), 0.0, True),
    Task("spans", "tags", ("O", "B-x", "I-x"), "span_f1", 1.0, None, 0.0, False),
)


def make_encoder(folder: Path) -> str:
    """A BERT of two layers with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def posts(step: int, count: int = 12) -> list[dict[str, Any]]:
    """The global batch of one step: uneven lengths, missing labels, a task that few posts have."""
    rng = np.random.default_rng(step)
    made = []
    for row in range(count):
        length = int(rng.integers(3, 14))
        made.append({
            "ids": rng.integers(3, 60, length), "row": row,
            "mood": int(rng.integers(0, 3)) if row % 3 else IGNORED,
            "heat": float(rng.normal()) if row % 2 else float("nan"),
            "topic": int(rng.integers(0, 2)) if row < 5 else IGNORED,
            "spans": rng.integers(0, 3, length) if row % 4 == 1 else np.full(length, IGNORED),
        })  # fmt: skip
    return made


def batch_of(rows: list[dict[str, Any]]) -> Batch:
    """Pad to the longest row; a filler row where there is none."""
    rows = rows or [{"ids": np.array([3, 4]), "row": -1, "mood": IGNORED, "heat": float("nan"), "topic": IGNORED,
                     "spans": np.full(2, IGNORED)}]  # fmt: skip
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor(
            np.stack([np.pad(row[key], (0, longest - len(row[key])), constant_values=value) for row in rows])
        )

    ids_BL = padded("ids", 0)
    labels = {name: torch.tensor([row[name] for row in rows]) for name in ("mood", "heat", "topic")}
    labels["spans"] = padded("spans", IGNORED)
    return Batch(
        input_ids_BL=ids_BL,
        attention_mask_BL=(ids_BL > 0).long(),
        token_type_ids_BL=None,
        word_starts_BL=ids_BL > 0,
        task_ids_B=torch.tensor([row["row"] % len(TASKS) for row in rows]),
        row_ids_B=torch.tensor([row["row"] for row in rows]),
        labels=labels,
    )


def shares(step: int, *, rank: int, world_size: int, accumulation: int) -> list[Batch]:
    """This rank's micro-batches; the split over ranks is uneven on purpose."""
    chunks = np.array_split(np.arange(12), accumulation)
    everything = posts(step)
    out = []
    for chunk in chunks:
        cuts = np.linspace(0, 1, world_size + 1) ** 1.7 * len(chunk)
        low, high = round(cuts[rank]), round(cuts[rank + 1])
        out.append(batch_of([everything[index] for index in chunk[low:high]]))
    return out


def recipe_of(encoder: str, **changes: Any) -> Any:
    """A recipe for the tiny model; ``changes`` are dotted keys with __ for the dot."""
    raw: dict[str, Any] = {
        "model": {"encoder": encoder, "dropout": 0.0,
                  "moe": {"num_experts": 4, "top_k": 2, "layers": "all", "expert_width": 16, "output_init": 0.05}},
        "tasks": {"mood": {"path": "x"}},
        "loss": {"contrastive": {"weight": 0.3}, "z_weight": 0.01, "balance_weight": 0.02},
        "train": {"batch_size": 12, "learning_rate": 1e-3, "expert_learning_rate": 3e-3, "head_learning_rate": 2e-3,
                  "warmup_fraction": 0.0, "schedule": "constant"},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = raw
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return recipe_from_dict(raw)


def build(recipe: Any, *, stage: int, accumulation: int = 1, settings: dict[str, Any] | None = None) -> Any:
    """(engine, layout) of this rank."""
    from comoe.distributed import world_size
    from comoe.objective import build_objective
    from comoe.train.engine import Engine
    from comoe.train.parallel import build_deepspeed_engine, start_ranks
    from comoe.train.settings import fill_settings, plan_layout

    if not torch.distributed.is_initialized():
        start_ranks(timeout_seconds=120)
    raw = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}} | (settings or {})
    layout = replace(plan_layout(recipe, raw, world_size=world_size(), gpu=False), accumulation=accumulation)
    torch.manual_seed(0)
    objective = build_objective(recipe, TASKS)
    return Engine(
        build_deepspeed_engine(objective, recipe, fill_settings(raw, recipe, layout, gpu=False)), recipe
    ), layout


def one_step(engine: Any, step: int, *, accumulation: int = 1) -> Any:
    """Train on the global batch of ``step``; the report of this rank."""
    from comoe.distributed import rank, sum_over_ranks, world_size
    from comoe.objective import count_units, unit_scale

    batches = shares(step, rank=rank(), world_size=world_size(), accumulation=accumulation)
    units_T = sum_over_ranks(torch.stack([count_units(batch, TASKS) for batch in batches]).sum(0))
    scale_T = unit_scale(units_T, world_size=world_size(), accumulation=accumulation)
    return engine.train_step([replace(batch, unit_scale_T=scale_T) for batch in batches])


def many(encoder: str, cases: list[dict[str, Any]], work: str = "case") -> list[dict[str, Any]]:
    """Several cases in one world: starting a world takes longer than a case. ``work`` is a function of this module."""
    return [globals()[work](encoder, **arguments) for arguments in cases]


def case(encoder: str, *, stage: int, steps: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """Train a few steps: global losses, norms, weights, logits by the engine and by the plain model."""
    from comoe.distributed import sum_over_ranks, world_size
    from comoe.objective import build_objective
    from comoe.train.parallel import gather_full_state

    recipe = recipe_of(encoder, **changes)
    engine, layout = build(recipe, stage=stage, accumulation=accumulation)
    before = gather_full_state(engine.deepspeed)
    values, norms = [], []
    for step in range(steps):
        report = one_step(engine, step, accumulation=accumulation)
        assert not report.skipped
        values.append(float(sum_over_ranks(report.loss)) / world_size())
        norms.append(report.grad_norm)
    after = gather_full_state(engine.deepspeed)
    batch = batch_of(posts(99, 4))
    by_engine = engine.forward(batch).logits
    answer: dict[str, Any] = {"losses": values, "norms": norms, "ep": layout.ep_size}
    if after:
        plain = build_objective(recipe, TASKS).model.eval()
        plain.load_state_dict(after)
        with torch.no_grad():
            by_plain = plain(batch).logits
        answer["state"] = {key: value.numpy() for key, value in after.items()}
        answer["moves"] = {key: (after[key] - before[key]).numpy() for key in after if after[key].is_floating_point()}
        answer["engine_logits"] = {key: value.numpy() for key, value in by_engine.items()}
        answer["plain_logits"] = {key: value.numpy() for key, value in by_plain.items()}
    return answer


def resumed(encoder: str, *, stage: int, folder: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three steps, a checkpoint, three more; then a fresh engine loads it and does the same three."""
    from comoe.train.checkpoint import load_checkpoint, save_checkpoint
    from comoe.train.folders import find_checkpoint
    from comoe.train.state import TrainState

    recipe = recipe_of(encoder, train__schedule="linear", model__dropout=0.1, parallel__ep_size=2)

    def train(engine: Any, first: int) -> list[float]:
        out = []
        for step in range(first, first + 3):
            engine.set_rate_factor(1 - step / 10)
            out.append(float(one_step(engine, step).loss))
        return out

    engine, layout = build(recipe, stage=stage, settings=settings)
    train(engine, 0)
    state = TrainState(step=3, best_value=0.25, evaluations_without_gain=2)
    save_checkpoint(Path(folder), engine, state, layout, keep=1)
    groups = [(group["lr"], group["weight_decay"], group["name"]) for group in engine.deepspeed.optimizer.param_groups]
    uninterrupted = train(engine, 3)
    fresh, layout = build(recipe, stage=stage, settings=settings)
    torch.manual_seed(999)
    found = find_checkpoint(Path(folder))
    assert found is not None and not found.broken
    restored = load_checkpoint(found.path, fresh, layout)
    fresh.set_rate_factor(1 - 2 / 10)
    after = [(group["lr"], group["weight_decay"], group["name"]) for group in fresh.deepspeed.optimizer.param_groups]
    return {
        "uninterrupted": uninterrupted, "resumed": train(fresh, 3), "groups_before": groups, "groups_after": after,
        "state": {key: getattr(restored, key) for key in ("step", "best_value", "evaluations_without_gain")},
    }  # fmt: skip


def poisoned(encoder: str, *, stage: int, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three steps; in the second, rank 1's targets hold an infinite number. Which were skipped, which moved weights?"""
    from comoe.distributed import broadcast_object, rank, sum_over_ranks, world_size
    from comoe.objective import count_units, unit_scale
    from comoe.train.parallel import gather_full_state

    engine, _ = build(recipe_of(encoder, parallel__ep_size=2), stage=stage, settings=settings)
    skipped, changed = [], []
    for step in range(3):
        before = gather_full_state(engine.deepspeed)
        batch = shares(step, rank=rank(), world_size=world_size(), accumulation=1)[0]
        if step == 1 and rank() == 1:
            batch = replace(batch, labels=dict(batch.labels, heat=torch.full_like(batch.labels["heat"], torch.inf)))
        units_T = sum_over_ranks(count_units(batch, TASKS))
        scale_T = unit_scale(units_T, world_size=world_size(), accumulation=1)
        skipped.append(engine.train_step([replace(batch, unit_scale_T=scale_T)]).skipped)
        after = gather_full_state(engine.deepspeed)
        changed.append(any(not torch.equal(after[key], before[key]) for key in after))
    return {"skipped": skipped, "changed": broadcast_object(changed)}


def contract(encoder: str) -> dict[str, Any]:
    """What AutoEP made of the plain model, in bf16: the precision in which buffers are easily lost."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    engine, _ = build(recipe_of(encoder), stage=2, settings={"bf16": {"enabled": True}})
    layers = {name: m for name, m in engine.objective.model.named_modules() if isinstance(m, AutoEPMoELayer)}
    return {
        "layers": list(layers),
        "router": sorted({type(layer.router).__name__ for layer in layers.values()}),
        "bias_dtype": sorted({str(layer.router.e_score_correction_bias.dtype) for layer in layers.values()}),
        "parameters": sorted({name for layer in layers.values() for name, _ in layer.named_parameters()}),
    }


def save_and_go_on(
    encoder: str, *, stages: list[int], ep: int, folder: str, first: int = 0, universal: bool = False
) -> dict[int, list[float]]:
    """From step ``first`` (a fresh model, or the newest checkpoint, converted): three steps, a checkpoint, three more.

    Returns the global losses of all six for each ZeRO stage; the checkpoints lie in ``folder``/<stage>.
    """
    from comoe.distributed import sum_over_ranks, world_size
    from comoe.train.checkpoint import load_checkpoint, save_checkpoint
    from comoe.train.folders import find_checkpoint
    from comoe.train.parallel import start_ranks
    from comoe.train.state import TrainState

    start_ranks(timeout_seconds=120)
    recipe = recipe_of(encoder, parallel__ep_size=ep, train__schedule="linear")
    losses: dict[int, list[float]] = {}
    for stage in stages:
        place = Path(folder) / str(stage)
        settings = {"checkpoint": {"load_universal": True}} if universal else {}
        engine, layout = build(recipe, stage=stage, settings=settings)
        state = TrainState()
        if universal:
            found = find_checkpoint(place)
            assert found is not None and found.step == first
            state = load_checkpoint(found.path, engine, layout)
        losses[stage] = []
        for step in range(first, first + 6):
            engine.set_rate_factor(1 - step / 30)
            losses[stage].append(float(sum_over_ranks(one_step(engine, step).loss)) / world_size())
            if step == first + 2:
                state.step = step + 1
                save_checkpoint(place, engine, state, layout, keep=9)
    return losses
