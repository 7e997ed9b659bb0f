"""What the ranks of the multi-process tests run: a tiny model on fixed global batches, over any layout."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.config.load import recipe_from_dict
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch

TASKS = (
    Task("mood", "single_label", ("bad", "good", "none"), "macro_f1", 1.0, None, 0.0, True),
    Task("heat", "regression", (), "pearson", 1.0, None, 0.0, False),
    Task("topic", "single_label", ("a", "b"), "macro_f1", 1.0, (0.5, 2.0), 0.0, True),
    Task("spans", "tags", ("O", "B-x", "I-x"), "span_f1", 1.0, None, 0.0, False),
)


NUM_DOMAINS = 3
"""Values that ``loss.adversarial`` predicts, where it is on."""
REMEMBERED = {
    "loss__contrastive": {"weight": 0.3, "queue_size": 40, "learn_temperature": True},
    "loss__weighting": "dynamic_average", "loss__weighting_window": 2,
    "loss__adversarial": {"weight": 0.3, "hidden_width": 8},
}  # fmt: skip
"""What losses and weighting carry from step to step, so that a checkpoint must hold it."""


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


def picture(step: int, row: int) -> np.ndarray:
    """Noise of its own for each post."""
    return np.random.default_rng([step, row]).normal(size=(3, 16, 16)).astype(np.float32)


def posts(step: int, count: int = 12, *, paired: bool = False) -> list[dict[str, Any]]:
    """The global batch of one step: uneven lengths, missing labels, a task that few posts have.

    ``paired``: rows 2 n and 2 n + 1 read the same text, as the rows of a post for two tasks do.
    """
    rng = np.random.default_rng(step)
    made = []
    for row in range(count):
        length = int(rng.integers(3, 14))
        ids = rng.integers(3, 60, length)
        if paired and row % 2:
            ids, length = made[-1]["ids"], len(made[-1]["ids"])
        made.append({
            "ids": ids, "row": row,
            "mood": int(rng.integers(0, 3)) if row % 3 else IGNORED,
            "heat": float(rng.normal()) if row % 2 else float("nan"),
            "topic": int(rng.integers(0, 2)) if row < 5 else IGNORED,
            "spans": rng.integers(0, 3, length) if row % 4 == 1 else np.full(length, IGNORED),
            "picture": None if row % 3 == 1 else picture(step, row),
        })  # fmt: skip
    return made


def batch_of(rows: list[dict[str, Any]], *, step: int = 0) -> Batch:
    """Pad to the longest row; a filler row where there is none, and a blank picture likewise."""
    rows = rows or [{"ids": np.array([3, 4]), "row": -1, "mood": IGNORED, "heat": float("nan"), "topic": IGNORED,
                     "spans": np.full(2, IGNORED), "picture": None}]  # fmt: skip
    seen = [number for number, row in enumerate(rows) if row["picture"] is not None]
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        fill = [(0, longest - len(row[key])) for row in rows]
        cells = [
            np.pad(row[key], pad, constant_values=value)
            for row, pad in zip(rows, fill, strict=True)
        ]
        return torch.tensor(np.stack(cells))

    blank = np.zeros((3, 16, 16), dtype=np.float32)
    ids_BL = padded("ids", 0)
    labels = {name: torch.tensor([row[name] for row in rows]) for name in ("mood", "heat", "topic")}
    labels["spans"] = padded("spans", IGNORED)
    numbers_B = torch.tensor([row["row"] for row in rows])
    # Some posts have no value for the adversary; the filler row, -1, is one of them. Nothing of it
    # draws a number.
    told_B = numbers_B % 4 != 3
    return Batch(
        input_ids_BL=ids_BL,
        attention_mask_BL=(ids_BL > 0).long(),
        token_type_ids_BL=None,
        word_starts_BL=ids_BL > 0,
        task_ids_B=torch.tensor([row["row"] % len(TASKS) for row in rows]),
        row_ids_B=torch.tensor([row["row"] for row in rows]),
        labels=labels,
        pixels_I3HW=torch.from_numpy(np.stack([rows[n]["picture"] for n in seen] or [blank])),
        image_rows_I=torch.tensor(seen or [-1]),
        step=step,
        progress=0.1 * (step + 1),
        confidences={
            task.name: (numbers_B * 7 % 11 + number) / 14 for number, task in enumerate(TASKS)
        },
        domains_B=torch.where(told_B, numbers_B % NUM_DOMAINS, IGNORED),
        domain_weights_B=told_B * (1.0 + numbers_B % 2),
    )


def shares(
    step: int,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    count: int = 12,
    paired: bool = False,
) -> list[Batch]:
    """This rank's micro-batches of ``count`` posts in all; the split over ranks is uneven on purpose."""
    chunks = np.array_split(np.arange(count), accumulation)
    everything = posts(step, count, paired=paired)
    out = []
    for chunk in chunks:
        cuts = np.linspace(0, 1, world_size + 1) ** 1.7 * len(chunk)
        low, high = round(cuts[rank]), round(cuts[rank + 1])
        out.append(batch_of([everything[index] for index in chunk[low:high]], step=step))
    return out


def make_tower(folder: Path) -> str:
    """A vision transformer of one layer with random weights."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(8)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def recipe_of(encoder: str, **changes: Any) -> Any:
    """A recipe for the tiny model; ``changes`` are dotted keys with __ for the dot."""
    raw: dict[str, Any] = {
        "model": {"encoder": encoder, "dropout": 0.0,
                  "moe": {"num_experts": 4, "top_k": 2, "layers": "all", "expert_width": 16, "output_init": 0.05}},
        "tasks": {"mood": {"path": "x"}},
        "loss": {"contrastive": {"weight": 0.3}, "z_weight": 0.01, "balance_weight": 0.02},
        "train": {"batch_size": 12, "learning_rate": 1e-3, "expert_learning_rate": 3e-3, "head_learning_rate": 2e-3,
                  "router_learning_rate": 6e-3, "max_grad_norm": 1.0, "warmup_fraction": 0.0, "schedule": "constant"},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = raw
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return recipe_from_dict(raw)


def tasks_of(recipe: Any) -> tuple[Task, ...]:
    """The tasks; all in the contrastive loss, or weighed by confidence, where the recipe says so of the first one."""
    given = recipe.tasks["mood"]
    changes = {"contrastive": True, "contrastive_width": 1.0} if given.contrastive is True else {}
    return tuple(
        replace(task, **changes, confidence_strategy=given.confidence_strategy) for task in TASKS
    )


def build(
    recipe: Any, *, stage: int, accumulation: int = 1, settings: dict[str, Any] | None = None, seed: int = 0
) -> Any:  # fmt: skip
    """(engine, layout) of this rank."""
    from comoe.distributed import world_size
    from comoe.losses.build import build_objective
    from comoe.train.parallel.ds_config import fill_settings, plan_layout
    from comoe.train.parallel.engine import Engine
    from comoe.train.parallel.setup import build_deepspeed_engine, building, start_ranks
    from comoe.train.start_from import start_from_export

    if not torch.distributed.is_initialized():
        start_ranks(timeout_seconds=120)
    # DeepSpeed collects garbage for every engine; in all that earlier ones leave behind, that takes
    # as long as a step.
    gc.collect()
    gc.freeze()
    raw = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}} | (
        settings or {}
    )
    layout = replace(
        plan_layout(recipe, raw, world_size=world_size(), gpu=False), accumulation=accumulation
    )
    filled = fill_settings(raw, recipe, layout, gpu=False)
    torch.manual_seed(seed)
    with building(filled):
        objective = build_objective(recipe, tasks_of(recipe), num_domains=NUM_DOMAINS)
    start_from_export(recipe.model, objective.model)
    return Engine(build_deepspeed_engine(objective, recipe, filled), recipe), layout


def one_step(engine: Any, step: int, *, accumulation: int = 1) -> Any:
    """Train on the global batch of ``step``; the report of this rank."""
    return engine.train_step(own_batches(step, accumulation=accumulation))


def own_batches(
    step: int, *, accumulation: int = 1, count: int = 12, paired: bool = False
) -> list[Batch]:
    """This rank's micro-batches with the scale of the whole step."""
    from comoe.distributed import rank, sum_over_ranks, world_size
    from comoe.losses.objective import count_units, unit_scale

    batches = shares(
        step,
        rank=rank(),
        world_size=world_size(),
        accumulation=accumulation,
        count=count,
        paired=paired,
    )
    units_T = sum_over_ranks(torch.stack([count_units(batch, TASKS) for batch in batches]).sum(0))
    scale_T = unit_scale(units_T, world_size=world_size(), accumulation=accumulation)
    return [replace(batch, unit_scale_T=scale_T) for batch in batches]


@dataclass(frozen=True, slots=True)
class Picks:
    """Where the tokens of one optimizer step went, on one rank; filler rows are left out."""

    tokens_S: np.ndarray
    """Post times 100 plus place in the post."""
    picks_LSk: np.ndarray
    """Experts of each layer and token, ascending."""
    margins_LS: np.ndarray
    """Score with bias of the last expert picked minus that of the first one left out."""


def picks_of(outputs: Sequence[Any], batches: Sequence[Batch], biases_LE: torch.Tensor) -> Picks:
    """The picks of one step's micro-batches; ``biases_LE`` as they were before the step."""
    tokens, picks, margins = [], [], []
    for output, batch in zip(outputs, batches, strict=True):
        columns_S = batch.attention_mask_BL.nonzero()[: len(output.token_rows_S), 1]
        tokens.append(batch.row_ids_B[output.token_rows_S] * 100 + columns_S)
        routings = output.routings
        k = routings[0].indices_Sk.shape[1]
        picks.append(torch.stack([routing.indices_Sk.sort(dim=1).values for routing in routings]))
        scores = (
            torch.stack([routing.scores_SE.detach().float() for routing in routings])
            + biases_LE[:, None]
        )
        best = scores.sort(dim=2, descending=True).values
        margins.append(best[..., k - 1] - best[..., min(k, best.shape[2] - 1)])
    tokens_S = torch.cat(tokens)
    real = tokens_S >= 0
    order = tokens_S[real].argsort()
    whole = (torch.cat(parts, dim=1)[:, real][:, order].numpy() for parts in (picks, margins))
    return Picks(tokens_S[real][order].numpy(), *whole)


def many(encoder: str, cases: list[dict[str, Any]], work: str = "case") -> list[dict[str, Any]]:
    """Several cases in one world: starting a world takes longer than a case. ``work``, which a case may have of its
    own, is a function of this module."""
    works = [case.get("work", work) for case in cases]
    arguments = [{key: value for key, value in case.items() if key != "work"} for case in cases]
    return [globals()[name](encoder, **each) for name, each in zip(works, arguments, strict=True)]


def case(
    encoder: str, *, stage: int, steps: int, accumulation: int = 1, count: int = 12, seed: int = 0,
    settings: dict[str, Any] | None = None, plainly: bool = True, paired: bool = False, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a few steps: global losses, norms, picks, weights, logits by the engine and, ``plainly``, by the model and
    without experts.

    ``paired``: rows share texts, and the batch says so.
    """
    from comoe.distributed import sum_over_ranks, world_size
    from comoe.losses.build import build_objective
    from comoe.train.parallel.setup import gather_full_state
    from comoe.train.state import norm_limit

    recipe = recipe_of(encoder, **changes)
    engine, layout = build(
        recipe, stage=stage, accumulation=accumulation, settings=settings, seed=seed
    )
    before = gather_full_state(engine.deepspeed)
    values, norms, picks = [], [], []
    for step in range(steps):
        batches = own_batches(step, accumulation=accumulation, count=count, paired=paired)
        if paired:
            numbers = [batch.row_ids_B.div(2, rounding_mode="floor") for batch in batches]
            batches = [
                replace(batch, text_numbers_B=numbers_B)
                for batch, numbers_B in zip(batches, numbers, strict=True)
            ]
        layers = engine.objective.model.moe_layers()
        biases_LE = torch.stack([layer.balance_bias_E.clone() for layer in layers])
        # Half of the median, where it is 3 times that in a run: so it bites in every step.
        limit = (
            norm_limit(recipe.train, norms) / 6 if recipe.train.max_grad_norm == "auto" else None
        )
        report = engine.train_step(batches, max_grad_norm=limit)
        assert not report.skipped
        picks.append(picks_of([output.output for output in report.outputs], batches, biases_LE))
        values.append(float(sum_over_ranks(report.loss)) / world_size())
        norms.append(report.grad_norm)
    after = gather_full_state(engine.deepspeed)
    batch = batch_of(posts(99, 4))
    by_engine = under_conditions(engine.objective.model, lambda: engine.forward(batch), plainly)
    answer: dict[str, Any] = {
        "losses": values,
        "norms": norms,
        "picks": picks,
        "ep": layout.ep_size,
    }
    answer["sums"] = [str(engine.deepspeed.get_data_types()[1])]
    if after:
        answer |= _outcome(before, after)
        answer["engine_logits"] = by_engine
    if after and plainly:
        plain = build_objective(recipe, tasks_of(recipe), num_domains=NUM_DOMAINS).model.eval()
        plain.load_state_dict(after)
        with torch.no_grad():
            answer["plain_logits"] = under_conditions(plain, lambda: plain(batch), plainly)
    return answer


def under_conditions(model: Any, forward: Any, all_of_them: bool) -> dict[str, np.ndarray]:
    """Logits as trained, by task, and with experts off and in turn, by ``<condition>/<task>``."""
    from comoe.evaluation.experts_off import CONDITIONS

    found = {name: value.float().numpy() for name, value in forward().logits.items()}
    for condition, within in CONDITIONS.items() if all_of_them else ():
        with within(model):
            logits = forward().logits.items()
        found |= {f"{condition}/{name}": value.float().numpy() for name, value in logits}
    return found


def _outcome(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, Any]:
    moved = {
        key: (after[key] - before[key]).numpy() for key in after if after[key].is_floating_point()
    }
    return {"state": {key: value.numpy() for key, value in after.items()}, "moves": moved}


def plain_case(
    encoder: str, *, steps: int, accumulation: int = 1, count: int = 12, seed: int = 0, paired: bool = False,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """What ``case`` does, by PyTorch alone: one process, its own optimizer, its own clipping. No DeepSpeed runs."""
    from comoe.losses.build import build_objective
    from comoe.train.start_from import start_from_export

    recipe = recipe_of(encoder, **changes)
    torch.manual_seed(seed)
    objective = build_objective(recipe, TASKS).train()
    start_from_export(recipe.model, objective.model)
    before = {key: value.clone() for key, value in objective.model.state_dict().items()}
    batches = [
        own_batches(step, accumulation=accumulation, count=count, paired=paired)
        for step in range(steps)
    ]
    steps_done = train_plainly(objective, recipe, batches)
    values, norms, answers, biases = zip(*steps_done, strict=True)
    picks = [picks_of(*of_step) for of_step in zip(answers, batches, biases, strict=True)]
    outcome = _outcome(before, objective.model.state_dict())
    return {"losses": values, "norms": norms, "picks": picks, **outcome}


def train_plainly(
    objective: Any, recipe: Any, batches: Iterable[list[Batch]]
) -> Iterator[tuple[float, float, list[Any], torch.Tensor]]:
    """Loss, gradient norm, outputs, and balance biases before it, of each step; ``batches``: its micro-batches."""
    from comoe.models.moe.gate import BALANCES
    from comoe.train.parallel.setup import parameter_groups

    train, gates = recipe.train, objective.model.moe_layers()
    make, options = {
        "adamw": (torch.optim.AdamW, {"betas": tuple(train.betas), "eps": train.epsilon}),
        "sgd": (torch.optim.SGD, {"momentum": train.momentum}),
    }[train.optimizer]
    groups = [
        {key: group[key] for key in ("params", "lr", "weight_decay")}
        for group in parameter_groups(objective, recipe)
    ]
    optimizer = make(groups, **options)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    norms: list[float] = []
    for of_step in batches:
        biases_LE = torch.stack([gate.balance_bias_E.clone() for gate in gates])
        objective.begin_step()
        outputs = []
        for batch in of_step:
            outputs.append(objective(batch))
            (outputs[-1].loss / len(of_step)).backward()
        limit = train.max_grad_norm or torch.inf
        if limit == "auto":
            limit = 0.5 * float(np.median(norms)) if norms else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
        answers = [output.output for output in outputs]
        for number, gate in enumerate(gates):
            load_E = sum(answer.routings[number].counts_E for answer in answers).double()
            # Each task's own experts are balanced among themselves.
            groups = len(TASKS) if recipe.model.moe.task_prior == "own" else 1
            for group in range(groups):
                BALANCES[recipe.model.moe.balance](
                    gate.balance_bias_E[group::groups],
                    load_E[group::groups],
                    recipe.model.moe.balance_rate,
                )
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        yield float(loss), float(norm), answers, biases_LE


def resumed(
    encoder: str,
    *,
    stage: int,
    folder: str,
    settings: dict[str, Any] | None = None,
    fused: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Three steps, a checkpoint, two more; then a fresh engine loads it and does the same two.

    Args:
        fused: whether the first engine has fused Adam, as the fresh one does; False is a run of an
            earlier version.
    """
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.state import TrainState

    recipe = recipe_of(
        encoder, train__schedule="linear", train__layer_decay=0.5, model__dropout=0.1,
        loss__r_drop_weight=0.5, **({"parallel__ep_size": 2} | REMEMBERED | changes),
    )  # fmt: skip

    def groups_of(engine: Any) -> list[tuple[Any, ...]]:
        groups = engine.deepspeed.optimizer.param_groups
        keys = ("lr", "weight_decay", "name")
        return [tuple(group[key] for key in keys) for group in groups]

    def train(engine: Any, steps: range) -> list[float]:
        out = []
        for step in steps:
            engine.set_rate_factor(1 - step / 10)
            out.append(float(one_step(engine, step).loss))
        return out

    engine, layout = build(recipe, stage=stage, settings=settings)
    for group in engine.deepspeed.optimizer.optimizer.param_groups:
        assert group["fused"]
        group["fused"] = fused
    train(engine, range(3))
    state = TrainState(step=3, best_value=0.25, evaluations_without_gain=2)
    save_checkpoint(Path(folder), engine, state, layout, keep=1)
    groups = groups_of(engine)
    uninterrupted = train(engine, range(3, 5))
    fresh, layout = build(recipe, stage=stage, settings=settings)
    torch.manual_seed(999)
    found = find_checkpoint(Path(folder))
    assert found is not None and not found.broken
    restored = load_checkpoint(found.path, fresh, layout)
    fresh.set_rate_factor(1 - 2 / 10)
    after = groups_of(fresh)
    return {
        "uninterrupted": uninterrupted, "resumed": train(fresh, range(3, 5)),
        "groups_before": groups, "groups_after": after,
        "fused": [group["fused"] for group in fresh.deepspeed.optimizer.optimizer.param_groups],
        "state": {key: getattr(restored, key) for key in ("step", "best_value", "evaluations_without_gain")},
    }  # fmt: skip


def poisoned(encoder: str, *, stage: int, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three steps; in the second, rank 1's targets hold an infinite number. Which were skipped, which moved weights?"""
    from comoe.distributed import broadcast_object, rank, sum_over_ranks, world_size
    from comoe.losses.objective import count_units, unit_scale
    from comoe.train.parallel.setup import gather_full_state

    engine, _ = build(recipe_of(encoder, parallel__ep_size=2), stage=stage, settings=settings)
    skipped, changed = [], []
    for step in range(3):
        before = gather_full_state(engine.deepspeed)
        batch = shares(step, rank=rank(), world_size=world_size(), accumulation=1)[0]
        if step == 1 and rank() == 1:
            batch = replace(
                batch,
                labels=dict(batch.labels, heat=torch.full_like(batch.labels["heat"], torch.inf)),
            )
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
    layers = {
        name: m
        for name, m in engine.objective.model.named_modules()
        if isinstance(m, AutoEPMoELayer)
    }
    return {
        "layers": list(layers),
        "router": sorted({type(layer.router).__name__ for layer in layers.values()}),
        "bias_dtype": sorted(
            {str(layer.router.e_score_correction_bias.dtype) for layer in layers.values()}
        ),
        "parameters": sorted(
            {name for layer in layers.values() for name, _ in layer.named_parameters()}
        ),
    }


def save_and_go_on(
    encoder: str,
    *,
    layouts: dict[str, tuple[int, int]],
    folder: str,
    first: int = 0,
    steps: int = 5,
) -> dict[str, list[float]]:
    """From step ``first`` (a fresh model, or the newest checkpoint, converted): ``steps`` steps.

    A checkpoint is saved after the third unless that is the last.

    Args:
        layouts: name of a run -> its (ZeRO stage, EP size) in this world; its checkpoints lie in
            ``folder``/<name>.

    Returns the global losses of each run.
    """
    from comoe.distributed import sum_over_ranks, world_size
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.parallel.setup import start_ranks
    from comoe.train.state import TrainState

    start_ranks(timeout_seconds=120)
    losses: dict[str, list[float]] = {}
    for name, (stage, ep) in layouts.items():
        place = Path(folder) / name
        recipe = recipe_of(encoder, parallel__ep_size=ep, train__schedule="linear", **REMEMBERED)
        engine, layout = build(
            recipe, stage=stage, settings={"checkpoint": {"load_universal": True}} if first else {}
        )
        state = TrainState()
        if first:
            found = find_checkpoint(place)
            assert found is not None and found.step == first
            state = load_checkpoint(found.path, engine, layout)
        losses[name] = []
        for step in range(first, first + steps):
            engine.set_rate_factor(1 - step / 30)
            losses[name].append(float(sum_over_ranks(one_step(engine, step).loss)) / world_size())
            if step == first + 2 < first + steps - 1:
                state.step = step + 1
                save_checkpoint(place, engine, state, layout, keep=9)
    return losses
