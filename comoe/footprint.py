"""What a built model takes: its parameters counted, and the memory of one rank planned from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from comoe.data.tokenized import TokenizedSplit
from comoe.memory import MemoryPlan, Work, plan_memory, reduction_elements
from comoe.models.multitask import MultiTaskModel
from comoe.models.vision import expected_tokens
from comoe.schema import Recipe
from comoe.train.settings import Layout

UNBOUNDED = 1_000_000_000
"""What DeepSpeed takes where the JSON says nothing of ``stage3_max_live_parameters`` and its like."""
DEFAULT_BUCKET = 500_000_000
"""What DeepSpeed takes where the JSON says nothing of ``reduce_bucket_size``."""


def count_parameters(model: MultiTaskModel, *, top_k: int) -> dict[str, int]:
    """Parameters of the whole model, a vision tower's too: in all, in experts, dense, frozen, and active per token."""
    total = _elements(model.parameters())
    experts = sum(_elements(layer.mixture.experts.parameters()) for layer in model.moe_layers())
    frozen = _elements(parameter for parameter in model.parameters() if not parameter.requires_grad)
    share = top_k / max(1, model.config.num_local_experts)
    return {
        "total": total,
        "experts": experts,
        "dense": total - experts,
        "frozen": frozen,
        "active": int(total - experts * (1 - share)),
    }


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    # Under ZeRO-3 a weight that is split already says by itself how large it is in all.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def plan_run(
    recipe: Recipe, layout: Layout, model: MultiTaskModel, train: TokenizedSplit, settings: Mapping[str, Any]
) -> MemoryPlan:
    """The memory of one rank of this run.

    Args:
        recipe: with the encoder resolved.
        layout: of the run.
        model: built, on no device in particular.
        train: its mean length decides the tokens of a forward pass.
        settings: complete DeepSpeed configuration.
    """
    parameters = count_parameters(model, top_k=recipe.model.moe.top_k)
    zero = settings["zero_optimization"]
    encoder, blocks = model.encoder.config, model.moe_layers()
    posts = layout.micro_batch_size
    return plan_memory(
        parameters["dense"],
        expert_parameters=parameters["experts"],
        frozen_parameters=parameters["frozen"],
        world_size=layout.world_size,
        ep_size=layout.ep_size,
        stage=layout.stage,
        bf16=layout.bf16,
        optimizer=recipe.train.optimizer,
        momentum=recipe.train.momentum,
        offload=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
        bucket_elements=reduction_elements(
            int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            largest=max(_elements([weight]) for weight in model.parameters()),
        ),
        gathered_elements=min(kept_whole(zero), parameters["dense"] + parameters["experts"] // layout.ep_size),
        tower=_tower_work(model, posts),
        tokens=int(posts * (train.lengths.mean() + model.image_tokens)),
        layers=encoder.num_hidden_layers,
        width=model.config.hidden_size,
        # DistilBERT has its own word for it.
        ffn_width=getattr(encoder, "intermediate_size", None) or getattr(encoder, "hidden_dim", None),
        tasks=sum(head.pooling is not None for head in model.heads),
        private_parts=len(model.tasks) if recipe.model.private_width else 0,
        private_width=recipe.model.private_width,
        moe_layers=len(blocks),
        top_k=recipe.model.moe.top_k,
        recompute=recipe.train.activation_checkpointing,
        expert_width=blocks[0].mixture.experts.down_proj.shape[-1] if blocks else 0,
    )


def _tower_work(model: MultiTaskModel, pictures: int) -> Work | None:
    """What a vision tower of transformer layers that trains goes through; None for others."""
    if model.tower is None or not model.tower.trained:
        return None
    config = model.tower.inner.config
    layers, tokens = getattr(config, "num_hidden_layers", 0), expected_tokens(config)
    ffn_width = getattr(config, "intermediate_size", None)
    return Work(tokens=pictures * tokens, layers=layers, width=model.tower.width, ffn_width=ffn_width)


def kept_whole(zero: Mapping[str, Any]) -> int:
    """Weights that stage 3 may hold whole from the forward to the backward pass, in elements.

    A weight stays gathered while its next use is no farther than ``stage3_max_reuse_distance`` elements of other
    weights away, in the forward and then the backward pass: so half of that distance counts. It stays too where
    fetching ahead, up to ``stage3_max_live_parameters``, has come to its next use. So the larger of the two holds.

    Args:
        zero: ``zero_optimization`` of the DeepSpeed JSON.

    Source: ``partitioned_param_coordinator`` of DeepSpeed 0.19.8; tests/multiprocess/test_construction_memory.py
    measures it.
    """
    reach = int(zero.get("stage3_max_reuse_distance", UNBOUNDED)) // 2
    return max(reach, int(zero.get("stage3_max_live_parameters", UNBOUNDED)))
