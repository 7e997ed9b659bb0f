"""What a built model takes: its parameters counted, and the memory of one rank planned from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from comoe.data.tokenized import TokenizedSplit
from comoe.memory import MemoryPlan, plan_memory, reduction_elements
from comoe.memory_work import DecoderWork, Work
from comoe.models.families import family_of, has_decoder
from comoe.models.gate import ROUTES
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
    rows = _row_tokens(model, train, by_task=ROUTES[recipe.model.moe.route_by].task)
    num_layers, ffn_widths = _stack_shapes(encoder)
    common = {
        "width": model.config.hidden_size,
        "top_k": recipe.model.moe.top_k,
        "recompute": recipe.train.activation_checkpointing,
        "expert_width": blocks[0].mixture.experts.down_proj.shape[-1] if blocks else 0,
    }
    decoder = None
    if has_decoder(model.encoder):
        of_decoder = sum(block.layer >= num_layers[0] for block in blocks)
        decoder = DecoderWork(
            Work(int(posts * rows.answers), num_layers[1], ffn_width=ffn_widths[1], moe_layers=of_decoder, **common),
            read_tokens=int(posts * rows.prompts),
            vocabulary=encoder.vocab_size,
        )
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
        decoder=decoder,
        tokens=int(posts * (rows.encoder + rows.pictures * model.image_tokens)),
        layers=num_layers[0],
        ffn_width=ffn_widths[0],
        tasks=sum(head.pooling is not None for head in model.heads),
        private_parts=len(model.tasks) if recipe.model.private_width else 0,
        private_width=recipe.model.private_width,
        moe_layers=sum(block.layer < num_layers[0] for block in blocks),
        **common,
    )


class RowTokens(NamedTuple):
    """Tokens per post, on average over a split."""

    encoder: float
    """That the encoder reads, in all of its rows."""
    prompts: float
    """Of them in rows that a decoder answers."""
    answers: float
    """That a decoder is taught."""
    pictures: float
    """Rows per post, each with its picture."""


def _row_tokens(model: MultiTaskModel, train: TokenizedSplit, *, by_task: bool) -> RowTokens:
    heads = [number for number, task in enumerate(model.tasks) if not task.rules.generates]
    decoded = [(number, task) for number, task in enumerate(model.tasks) if task.rules.generates]
    if not decoded and not by_task:
        return RowTokens(float(train.lengths.mean()), 0.0, 0.0, 1.0)
    labelled = train.labelled[:, heads]
    own = labelled.sum(axis=1) if by_task else labelled.any(axis=1)
    read = float((own * np.diff(train.tokens.offsets)).mean())
    prompts = answers = asked = 0.0
    for number, task in decoded:
        mine = train.labelled[:, number]
        asked += float(mine.mean())
        prompts += float((mine * train.prompts[task.name].lengths).mean())
        if task.label_words:
            # About two tokens a word, and an end sign; the collator knows them exactly.
            words = max(len(words.split()) for words in task.label_words)
            answers += float(mine.mean()) * (2 * words + 1)
        else:
            answers += float((mine * train.answers[task.name].lengths).mean())
    return RowTokens(read + prompts, prompts, answers, float(own.mean()) + asked)


def _stack_shapes(hf_config: Any) -> tuple[list[int], list[int]]:
    """Layers, and hidden width of the feed-forward, of the encoder and, of an encoder-decoder, of the decoder. A gated
    one keeps four numbers of its width where others keep two, so it counts as one of twice the width."""
    family = family_of(hf_config.model_type)
    gated = 2 if getattr(hf_config, "is_gated_act", False) else 1
    layers = [getattr(hf_config, field) for field in family.num_layers]
    widths = [gated * getattr(hf_config, field) for field in family.feed_forward]
    return layers, widths if len(widths) == len(layers) else widths * len(layers)


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
