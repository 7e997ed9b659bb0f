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
        return torch.tensor(np.stack([np.pad(row[key], (0, longest - len(row[key])), constant_values=value) for row in rows]))

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
    return Engine(build_deepspeed_engine(objective, recipe, fill_settings(raw, recipe, layout, gpu=False)), recipe), layout


def one_step(engine: Any, step: int, *, accumulation: int = 1) -> Any:
    """Train on the global batch of ``step``; the report of this rank."""
    from comoe.distributed import rank, sum_over_ranks, world_size
    from comoe.objective import count_units, unit_scale

    batches = shares(step, rank=rank(), world_size=world_size(), accumulation=accumulation)
    units_T = sum_over_ranks(torch.stack([count_units(batch, TASKS) for batch in batches]).sum(0))
    scale_T = unit_scale(units_T, world_size=world_size(), accumulation=accumulation)
    return engine.train_step([replace(batch, unit_scale_T=scale_T) for batch in batches])


def losses(encoder: str, *, stage: int, steps: int = 5, accumulation: int = 1, gradients: bool = False,
           settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:  # fmt: skip
    """Global losses of ``steps`` steps; the weights after them on rank 0, by plain name."""
    from comoe.distributed import sum_over_ranks, world_size
    from comoe.train.parallel import gather_full_state

    recipe = recipe_of(encoder, **changes)
    engine, layout = build(recipe, stage=stage, accumulation=accumulation, settings=settings)
    values, norms = [], []
    for step in range(steps):
        report = one_step(engine, step, accumulation=accumulation)
        assert not report.skipped
        values.append(float(sum_over_ranks(report.loss)) / world_size())
        norms.append(report.grad_norm)
    state = gather_full_state(engine.deepspeed)
    return {"losses": values, "norms": norms, "ep": layout.ep_size, "state": {k: v.numpy() for k, v in state.items()}}
