"""Runs on the ranks of ``launch/bench.py experts``: builds all layers, times them in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from comoe.benchmarks.experts import Size
from comoe.benchmarks.layers import (
    Block,
    EveryExpert,
    Native,
    adam_step,
    build_dense,
    forward_backward,
    precision,
)
from comoe.benchmarks.report import machine_note
from comoe.benchmarks.shares import routing_share
from comoe.benchmarks.timing import Contestant, take_turns
from comoe.benchmarks.workload import (
    even_picks,
    find_posts,
    force,
    hidden_states,
    load_skew,
    skewed_picks,
    steering_weight,
)
from comoe.distributed import rank
from comoe.train.parallel import start_ranks

SKEW = 3.0
"""Load of the busiest expert over the mean load, under forced skew."""


MOST_REFERENCE_EXPERTS = 16
"""The loop over all experts keeps E answers per token for its backward pass: with 64 that is gigabytes here."""
Run = Callable[[], None]


def measure(config: str | None, experts: list[int], **fields: Any) -> dict[str, Any]:
    """Time everything of one size; every rank calls it.

    Args:
        config: recipe file whose posts are read; None is the default recipe.
        experts: ``Size.experts``.
        fields: the rest of ``Size``.

    Returns:
        times: contestant -> seconds per round. Names are ``what/load/E``: block, native, reference under the loads
        posts, balanced and skew3; ``dense``; ``step of block/E`` and the like for AdamW.
        shares: E -> share of routing. skews: E -> largest over mean load of a fresh gate on the posts. notes: lines.
    """
    size = Size(experts=tuple(experts), **fields)
    device = start_ranks(timeout_seconds=600)
    source = find_posts(config)
    states_SM = hidden_states(source, tokens=size.tokens, width=size.model_width, seed=rank())
    # Blocks begin with a norm.
    x_SM = nn.functional.layer_norm(states_SM, (size.model_width,)).to(device, precision(device))
    torch.manual_seed(0)
    dense = build_dense(size.model_width, size.expert_width, top_k=size.top_k, device=device)
    upstream_SM = torch.randn(x_SM.shape).to(x_SM)
    contestants = {
        "dense": Contestant(forward_backward(dense, x_SM, upstream_SM)),
        "step of dense": Contestant(adam_step(dense)),
    }
    blocks: dict[int, tuple[Block, Run]] = {}
    for num_experts in size.experts:
        blocks[num_experts] = _on_posts(contestants, num_experts, x_SM, upstream_SM, size)
        _steered(contestants, num_experts, x_SM, upstream_SM, size)
    times = take_turns(contestants, rounds=size.rounds, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "times": times,
        "shares": {
            num_experts: asdict(routing_share(block, run, rounds=size.rounds, device=device))
            for num_experts, (block, run) in blocks.items()
            if size.alone
        },
        "skews": {num_experts: _skew(block, x_SM) for num_experts, (block, _) in blocks.items()},
        "notes": [
            machine_note(name, torch.get_num_threads()),
            f"M {size.model_width}, F {size.expert_width}, k {size.top_k}, {str(precision(device))[6:]}, {size.tokens} "
            f"real tokens per rank of {source.name}",
        ],
    }


def _on_posts(
    contestants: dict[str, Contestant], num_experts: int, x_SM: Tensor, upstream_SM: Tensor, size: Size
) -> tuple[Block, Run]:
    """Fresh gates on the posts themselves: what they route is what the posts make of them."""
    widths = (num_experts, size.model_width, size.expert_width)
    block = Block(*widths, top_k=size.top_k, device=x_SM.device)
    run = forward_backward(block, x_SM, upstream_SM)
    contestants[f"block/posts/{num_experts}"] = Contestant(run)
    contestants[f"step of block/{num_experts}"] = Contestant(adam_step(block))
    if size.alone and num_experts <= MOST_REFERENCE_EXPERTS:
        reference = EveryExpert(*widths, top_k=size.top_k, device=x_SM.device)
        # It takes E / k times as long as all others.
        contestants[f"reference/posts/{num_experts}"] = Contestant(
            forward_backward(reference, x_SM, upstream_SM), every=3
        )
    return block, run


def _steered(
    contestants: dict[str, Contestant], num_experts: int, x_SM: Tensor, upstream_SM: Tensor, size: Size
) -> None:
    """Forced loads: every layer runs its own router, and the tokens make all of them pick the same experts."""
    loads = {
        "balanced": even_picks(size.tokens, num_experts, size.top_k),
        "skew3": skewed_picks(size.tokens, num_experts, size.top_k, skew=SKEW),
    }
    forced = {load: force(x_SM, picks_Sk, num_experts) for load, picks_Sk in loads.items()}
    for name, kind in (("block", Block), ("native", Native)):
        layer = kind(num_experts, size.model_width, size.expert_width, top_k=size.top_k, device=x_SM.device)
        with torch.no_grad():
            layer.gate_weight.copy_(steering_weight(num_experts, size.model_width))
        for load, forced_SM in forced.items():
            run = forward_backward(layer, forced_SM, upstream_SM)
            contestants[f"{name}/{load}/{num_experts}"] = Contestant(run)
    contestants[f"step of native/{num_experts}"] = Contestant(adam_step(layer))


@torch.no_grad()
def _skew(block: Block, x_SM: Tensor) -> float:
    block.mixture.router.prepare(None)
    block.mixture(x_SM.unsqueeze(0))
    routing = block.mixture.router.collect()
    return load_skew(routing.indices_Sk.cpu(), routing.scores_SE.shape[1])
