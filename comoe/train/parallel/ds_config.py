"""The DeepSpeed JSON: every "auto" filled from the recipe, every clash refused before anything is built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from comoe.config.ready_made import settings_path
from comoe.config.recipe import Recipe
from comoe.data.sampling.sampler import posts_per_forward
from comoe.distributed import all_gather_objects, gpu_lacks_bf16
from comoe.models.encoders.attach import FORMS
from comoe.models.moe.block import MIXTURE_PATTERN
from comoe.train.parallel.ds_keys import REFUSED, SET, check_settings, parse_settings

AUTO = "auto"

ZERO_2: Mapping[str, Any] = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "bf16": {"enabled": AUTO},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
    },
    "expert_parallel": {
        "enabled": True,
        "autoep_size": AUTO,
        "top_k": AUTO,
        "use_grouped_mm": AUTO,
    },
}
"""What a run without a DeepSpeed JSON takes: ``ds_configs/zero2.json``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one run lies over its ranks."""

    world_size: int
    """Ranks W."""
    ep_size: int
    """Ranks that share one set of experts."""
    stage: int
    """ZeRO stage, 1 to 3."""
    micro_batch_size: int
    """Posts per forward pass on one rank."""
    accumulation: int
    """Forward passes per optimizer step."""
    bf16: bool
    """Parameters in bfloat16, float32 masters and gradient sums."""
    precision: str = field(default="", compare=False)
    """The precision and what decided it, for the user."""


def plan_layout(
    recipe: Recipe,
    settings: Mapping[str, Any],
    *,
    world_size: int,
    gpu: bool,
    begun_in_bf16: bool | None = None,
) -> Layout:
    """Settle the numbers that depend on the ranks. Every rank must call it.

    Args:
        recipe: of the run.
        settings: the DeepSpeed JSON.
        world_size: number of ranks.
        gpu: whether they have GPUs.
        begun_in_bf16: precision of the run that is resumed, which "auto" keeps; None for a new run.

    Raises:
        ValueError: naming the key, the value and the valid ones.
    """
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage ({stage}) must be 1, 2 or 3: stage 0 clips wrongly with experts."
        )
    bf16, reason = _precision(settings, gpu=gpu, begun_in_bf16=begun_in_bf16)
    batch = recipe.train.batch_size
    asked = recipe.loss.contrastive.chunk_size or recipe.train.micro_batch_size
    micro = posts_per_forward(asked, batch_size=batch, world_size=world_size)
    return Layout(
        world_size=world_size,
        ep_size=_ep_size(recipe, settings, world_size),
        stage=stage,
        micro_batch_size=micro,
        accumulation=math.ceil(batch / (micro * world_size)),
        bf16=bf16,
        precision=f"{'bf16 with float32 master weights' if bf16 else 'float32'}: {reason}",
    )


BF16_WORD = "COMOE_BF16"
"""Environment variable that settles ``"auto"`` for a new run on a CPU: 1 or 0."""


def _precision(
    settings: Mapping[str, Any], *, gpu: bool, begun_in_bf16: bool | None
) -> tuple[bool, str]:
    """Whether to train in bfloat16, and what decided that."""
    asked = settings.get("bf16", {}).get("enabled", AUTO)
    # One decision for all ranks, whose machines may have different GPUs.
    reasons = all_gather_objects(gpu_lacks_bf16()) if gpu else []
    lacking = next(filter(None, reasons), "")
    if lacking and (asked is True or (asked == AUTO and begun_in_bf16)):
        why = (
            "bf16.enabled is true in the DeepSpeed JSON"
            if asked is True
            else "it was begun in bf16"
        )
        raise ValueError(f"{why}, but {lacking}; write false in the JSON, or use another GPU.")
    if asked != AUTO:
        return bool(asked), "bf16.enabled in the DeepSpeed JSON"
    if begun_in_bf16 is not None:
        return begun_in_bf16, "as the run was begun"
    if lacking:
        return False, lacking
    if gpu:
        return True, "GPU"
    # One decision for all ranks, which may run on different machines, with other variables.
    found = all_gather_objects((os.environ.get(BF16_WORD, ""), multiplies_bf16()))
    words = sorted({word for word, _ in found} - {""})
    if words not in ([], ["0"], ["1"]):
        raise ValueError(
            f"the environment variable {BF16_WORD} is {' and '.join(map(repr, words))}; set it to 0 or 1."
        )
    if words:
        return words == ["1"], f"{BF16_WORD}={words[0]}"
    if all(native for _, native in found):
        return True, "the CPU multiplies bfloat16 natively"
    return False, "the CPU does not multiply bfloat16 natively"


def multiplies_bf16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _ep_size(recipe: Recipe, settings: Mapping[str, Any], world_size: int) -> int:
    experts, form = recipe.model.moe.num_experts, recipe.model.moe.form
    if experts == 0:
        return 1
    if not FORMS[form].over_ranks:
        asked = settings.get("expert_parallel", {}).get("autoep_size", AUTO)
        if asked not in (AUTO, 1):
            raise ValueError(
                f"expert_parallel.autoep_size is {asked} in the DeepSpeed JSON, but expert parallelism is for "
                f"model.moe.form beside, and it is {form}: its experts are small and whole on "
                "every rank; leave the key out."
            )
        return 1
    valid = [
        size for size in range(1, world_size + 1) if world_size % size == 0 and experts % size == 0
    ]
    asked = recipe.parallel.ep_size
    written = settings.get("expert_parallel", {}).get("autoep_size", AUTO)
    if asked == AUTO and written != AUTO:
        asked = written
    if asked == AUTO:
        return valid[-1]
    if asked not in valid:
        raise ValueError(
            f"parallel.ep_size ({asked}) must divide both the ranks ({world_size}) and "
            f"model.moe.num_experts ({experts}); set it to one of {valid}."
        )
    return int(asked)


def load_settings(given: str | Path, *, saved: bool = False) -> dict[str, Any]:
    """Read the DeepSpeed JSON of a path or name.

    Args:
        given: path, or name of a ready file.
        saved: that of a run that was begun, which keeps what it began with.

    Raises:
        ValueError: with file and line where it is no JSON object, or holds what would be ignored.
    """
    path = settings_path(given)
    if not path.is_file():
        raise ValueError(
            f"--deepspeed {path}: no such file; give a path, or the name of a ready one: zero2."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--deepspeed {path} cannot be read as UTF-8 ({error}).") from error
    settings = parse_settings(text, where=str(path))
    if not saved:
        check_settings(settings, where=str(path))
    return settings


def fill_settings(
    settings: Mapping[str, Any], recipe: Recipe, layout: Layout, *, gpu: bool
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of this run.

    Args:
        settings: the JSON as read; numbers that the recipe owns are "auto", absent, or equal to the
            recipe's.

    Raises:
        ValueError: a clash with the recipe, a section that the recipe owns, or an "auto" that
            nothing fills.
    """
    for section in ("optimizer", "scheduler", "fp16", "elasticity"):
        if section in settings:
            raise ValueError(
                f"{section} must not be in the DeepSpeed JSON: {(SET | REFUSED)[section]}"
            )
    values = _values(recipe, layout, gpu=gpu)
    filled = _fill(settings, values, prefix="")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        filled[key] = values[key]
    filled.setdefault("gradient_clipping", values["gradient_clipping"])
    if filled["gradient_clipping"] == AUTO:
        # The trainer gives each step its own limit.
        filled["gradient_clipping"] = 0.0
    filled.setdefault("bf16", {"enabled": layout.bf16})
    if layout.bf16:
        # bf16 sums of gradients lose small ones; accumulation would not equal the large batch.
        filled.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    else:
        filled.pop("data_types", None)
    kind, parameters = _OPTIMIZERS[recipe.train.optimizer]
    filled["optimizer"] = {"type": kind, "params": parameters(recipe.train)}
    offload = filled["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if kind == "AdamW" and (not gpu or offload != "none"):
        # One pass over weights, gradients and moments in the CPU's memory instead of a dozen.
        filled["optimizer"]["params"]["fused"] = True
    # Our optimizers are torch's own; DeepSpeed asks for this word before it shards them.
    filled["zero_allow_untested_optimizer"] = True
    filled["zero_optimization"] = {**filled["zero_optimization"]}
    if layout.world_size == 1 and layout.stage < 3:
        # Else every gradient is divided by one, in a pass of its own.
        filled.setdefault("gradient_allreduce_op", "sum")
    if "offload_optimizer" in filled["zero_optimization"]:
        filled["zero_force_ds_cpu_optimizer"] = False
    filled["steps_per_print"] = 2**31
    filled["expert_parallel"] = _expert_parallel(filled.get("expert_parallel", {}), recipe, values)
    return filled


def _values(recipe: Recipe, layout: Layout, *, gpu: bool) -> dict[str, Any]:
    return {
        "train_batch_size": layout.micro_batch_size * layout.accumulation * layout.world_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16.enabled": layout.bf16,
        "expert_parallel.autoep_size": layout.ep_size,
        "expert_parallel.top_k": recipe.model.moe.top_k,
        "expert_parallel.use_grouped_mm": gpu and not gpu_lacks_bf16(),
    }


def _fill(section: Mapping[str, Any], values: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            filled[key] = _fill(value, values, prefix=f"{path}.")
        elif value == AUTO:
            if path not in values:
                raise ValueError(
                    f'{path} is "auto" in the DeepSpeed JSON, but nothing fills it; write a value.'
                )
            filled[key] = values[path]
        else:
            if (
                path in values
                and path not in ("bf16.enabled", "expert_parallel.use_grouped_mm")
                and value != values[path]
            ):
                raise ValueError(
                    f"{path} is {value} in the DeepSpeed JSON and {values[path]} by the recipe and the ranks; "
                    f'write "auto" in the JSON, or make the two agree.'
                )
            filled[key] = value
    return filled


def _expert_parallel(
    section: Mapping[str, Any], recipe: Recipe, values: Mapping[str, Any]
) -> dict[str, Any]:
    if recipe.model.moe.num_experts == 0 or not FORMS[recipe.model.moe.form].over_ranks:
        return {"enabled": False}
    for key, value in _AUTOEP.items():
        if section.get(key, value) != value:
            raise ValueError(
                f"expert_parallel.{key} is {json.dumps(section[key])} in the DeepSpeed JSON, but comoe's experts need "
                f"{json.dumps(value)}; leave the key out (model.moe.num_experts=0 switches the experts off)."
            )
    return {
        "use_grouped_mm": values["expert_parallel.use_grouped_mm"],
        # AutoEP wants to know them; our gate scores the experts.
        "score_func": "sigmoid",
        "route_norm": True,
        **section,
        **_AUTOEP,
        "autoep_size": values["expert_parallel.autoep_size"],
        "top_k": recipe.model.moe.top_k,
    }


_AUTOEP = {
    "enabled": True,
    "moe_layer_pattern": MIXTURE_PATTERN,
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    # The gate's weights multiply what the experts say, not what they hear: the paper's form.
    "score_apply": "post",
}
"""What AutoEP must be told of the blocks in ``comoe.models.moe.block``."""

_OPTIMIZERS = {
    "adamw": (
        "AdamW",
        # torch_adam: DeepSpeed's own Adam would be compiled for a minute on a CPU.
        lambda train: {
            "lr": train.learning_rate,
            "betas": train.betas,
            "eps": train.epsilon,
            "weight_decay": train.weight_decay,
            "torch_adam": True,
        },
    ),
    "sgd": (
        "SGD",
        lambda train: {
            "lr": train.learning_rate,
            "momentum": train.momentum,
            "weight_decay": train.weight_decay,
        },
    ),
}
