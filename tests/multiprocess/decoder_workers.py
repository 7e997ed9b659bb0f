"""What the ranks of the tests of decoders run: tiny ones on fixed global batches, over any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.types import Batch
from tests.helpers_seq2seq import MIXED, decoder_batch, filler
from tests.multiprocess.workers import recipe_of, train_plainly

STEPS, SAVED_AFTER = 4, 1
"""Steps of a run, and after how many of them it is saved: two more read the optimizer's state that
was saved."""
# Row by row; the last four make the share of a rank that has nothing for the decoder.
SERVED = [-1, 1, 3, 4, 1, 3, 1, 4, -1, -1, -1, -1]


def make_models(folder: Path) -> dict[str, str]:
    """A T5 whose output layer is its table of words, a Flan-T5 whose is its own, a BART, and a Llama as T5, with
    random weights."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    t5 = dict(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
        # Weights as large as a new model's would make picks of near-ties, and gradients in the
        # thousands.
        initializer_factor=0.3,
    )  # fmt: skip
    configs = {
        "t5": T5Config(**t5),
        "flan": T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "bart": BartConfig(
            vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
            decoder_start_token_id=2, init_std=0.2,
        ),
        "llama": LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
        ),
    }  # fmt: skip
    for name, config in configs.items():
        torch.manual_seed(7)
        classes = {"bart": BartForConditionalGeneration, "llama": LlamaForCausalLM}
        model = classes.get(name, T5ForConditionalGeneration)(config)
        if name == "flan":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 16) * 0.2)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


def recipe(encoder: str, *, ep: int, recompute: bool = False, **changes: Any) -> Any:
    """Mixed tasks, all losses on the gates, private parts and weights of posts."""
    fixed = {
        "parallel__ep_size": ep, "train__activation_checkpointing": recompute, "loss__contrastive": {"weight": 0.2},
        "loss__task_separation_weight": 0.05, "model__private_width": 8, "model__projection_width": 8,
        "model__moe__route_by": "both", "model__moe__expert_width": 8, "train__epsilon": 1e-5,
    }  # fmt: skip
    if family_in(encoder) == "llama":
        fixed |= {"model__moe__form": "lora", "model__moe__gate_scope": "layer"}
    return recipe_of(encoder, **fixed, **changes)


def family_in(encoder: str) -> str:
    """The family of a folder of ``make_models``."""
    return Path(encoder).name


def tasks() -> Any:
    """Two heads, words of labels, two texts, one searched with three beams."""
    return tuple(replace(task, confidence_strategy="input_output") for task in MIXED)


def share(step: int, *, rank: int, world_size: int, family: str) -> Batch:
    """This rank's rows of the global batch, uneven; a filler row where there is none."""
    numbers_B, known = torch.arange(len(SERVED)), tasks()
    signs = "bart" if family == "bart" else "t5"
    batch = decoder_batch(tasks=known, family=signs, seed=step, served=SERVED)
    sure = {task.name: (numbers_B * 7 % 11 + place + 1) / 16 for place, task in enumerate(known)}
    batch = replace(batch, confidences=sure, step=step, progress=0.1 * step)
    bounds = {1: [0, 12], 2: [0, 8, 12], 4: [0, 3, 8, 8, 12]}[world_size]
    rows = torch.arange(*bounds[rank : rank + 2])
    return batch.take(rows) if len(rows) else filler(batch)


def own_batch(step: int, family: str) -> Batch:
    """The share with the scale of the whole step."""
    from comoe.distributed import rank, sum_over_ranks, world_size
    from comoe.losses.objective import count_units, unit_scale

    batch = share(step, rank=rank(), world_size=world_size(), family=family)
    units = sum_over_ranks(count_units(batch, tasks()))
    return replace(batch, unit_scale_T=unit_scale(units, world_size=world_size(), accumulation=1))


def start(encoder: str, *, stage: int, ep: int, recompute: bool, universal: bool = False) -> Any:
    """(engine, layout) of this rank."""
    from tests.multiprocess import workers

    chosen = recipe(encoder, ep=ep, recompute=recompute)
    workers.tasks_of = lambda recipe: tasks()
    settings = {"checkpoint": {"load_universal": True}} if universal else {}
    return workers.build(chosen, stage=stage, settings=settings)


def train(engine: Any, steps: range, family: str) -> list[float]:
    """Global losses."""
    from comoe.distributed import sum_over_ranks, world_size

    losses = []
    for step in steps:
        report = engine.train_step([own_batch(step, family)])
        assert not report.skipped
        losses.append(float(sum_over_ranks(report.loss)) / world_size())
    return losses


def cells(
    models: dict[str, str], cases: list[dict[str, Any]], folder: str | None = None, moved: tuple[str, ...] = (),
    steps: int = STEPS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each case: train, gather, answer; a case with a name saves itself on the way."""
    answers = [_cell(models, folder=folder, steps=steps, **case) for case in cases]
    return [*answers, *(_moved(models, Path(folder), name, steps=steps) for name in moved)]


def _cell(
    models: dict[str, str], *, family: str, stage: int, ep: int, recompute: bool = False, name: str = "",
    folder: str | None = None, steps: int,
) -> dict[str, Any]:  # fmt: skip
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.parallel.setup import gather_full_state
    from comoe.train.state import TrainState

    engine, layout = start(models[family], stage=stage, ep=ep, recompute=recompute)
    losses = train(engine, range(SAVED_AFTER), family)
    place = Path(folder or ".") / name
    if name:
        save_checkpoint(place, engine, TrainState(step=SAVED_AFTER), layout, keep=1)
    losses += train(engine, range(SAVED_AFTER, steps), family)
    answer: dict[str, Any] = {"losses": losses, "ep": layout.ep_size, "name": name}
    state = gather_full_state(engine.deepspeed)
    answer |= _answered(engine, state, family)
    if state:
        # While the other ranks are elsewhere: a model that is whole here must not wait for them.
        answer["alone"] = by_one_process(
            models, family, state, engine.objective.model.encoder.config.to_dict()
        )
    if name:
        fresh, layout = start(models[family], stage=stage, ep=ep, recompute=recompute)
        load_checkpoint(find_checkpoint(place).path, fresh, layout)
        answer["resumed"] = train(fresh, range(SAVED_AFTER, steps), family)
    return answer


def _answered(engine: Any, state: dict[str, torch.Tensor], family: str) -> dict[str, Any]:
    """The answers of all ranks by the engine, in order, and the gathered weights; on rank 0."""
    from comoe.distributed import all_gather_objects, rank, world_size

    mine = share(50, rank=rank(), world_size=world_size(), family=family)
    found = _arrays(engine.forward(mine))
    shares = all_gather_objects(found if int(mine.row_ids_B[0]) >= 0 else None)
    by_engine = {name: _stacked([part[name] for part in shares if part]) for name in found}
    return {"engine": by_engine, "state": state} if state else {}


def by_one_process(
    models: dict[str, str],
    family: str,
    state: dict[str, torch.Tensor],
    encoder_config: dict[str, Any],
) -> dict[str, np.ndarray]:
    """What the plain model of an export answers, given the weights that a layout gathered."""
    from comoe.inference.exported_model import fill_in
    from comoe.models.build import build_model

    config = json.loads(json.dumps(encoder_config, default=str))
    model = build_model(recipe(models[family], ep=1).model, tasks(), encoder_config=config)
    fill_in(model.eval(), state, place=Path("gathered"))
    with torch.no_grad():
        return _arrays(model(share(50, rank=0, world_size=1, family=family)))


def _arrays(output: Any) -> dict[str, np.ndarray]:
    """Logits, and generated token ids as ``<task>/ids``."""
    found = {name: value.float().numpy() for name, value in output.logits.items()}
    return found | {f"{name}/ids": value.numpy() for name, value in output.generated.items()}


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Written texts are as wide as the longest of their rank."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
    )


def _moved(models: dict[str, str], folder: Path, name: str, *, steps: int) -> dict[str, Any]:
    """Go on from the checkpoint of another layout."""
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint

    family, stage = name.split("-")
    engine, layout = start(models[family], stage=int(stage), ep=1, recompute=False, universal=True)
    load_checkpoint(find_checkpoint(folder / name).path, engine, layout)
    return {"losses": train(engine, range(SAVED_AFTER, steps), family), "name": name}


def plain(models: dict[str, str], *, steps: int) -> dict[str, dict[str, Any]]:
    """The same steps by PyTorch alone: no DeepSpeed."""
    from comoe.losses.objective import Objective
    from comoe.models.build import build_model

    answers = {}
    for family, encoder in models.items():
        chosen = recipe(encoder, ep=1)
        torch.manual_seed(0)
        model = build_model(chosen.model, tasks())
        objective = Objective(model, tasks(), chosen.loss, chosen.model.moe).train()
        batches = ([own_batch(step, family)] for step in range(steps))
        losses = [loss for loss, *_ in train_plainly(objective, chosen, batches)]
        state = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
        answers[family] = {"losses": losses, "state": state}
    return answers


def plain_and_one_rank(
    models: dict[str, str], *, steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """Both in one process start."""
    return {"plain": plain(models, steps=steps), "cells": cells(models, steps=steps, **options)}
