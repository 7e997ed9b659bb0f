"""``comoe bench experts``: the block against what else one would use, and what routing and monitoring cost.

``measure`` runs on the ranks: it builds all layers and times them in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comoe.benchmarks.layers import (
    Block,
    EveryExpert,
    Native,
    adam_step,
    build_dense,
    forward_backward,
    precision,
)
from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Ratio,
    Target,
    Times,
    clocked,
    machine_note,
    median,
    ratio,
    spread_of,
    take_turns,
    wait_for,
)
from comoe.benchmarks.workload import (
    balanced_selection,
    find_posts,
    force,
    hidden_states,
    load_skew,
    skewed_selection,
    steering_weight,
)
from comoe.distributed import rank
from comoe.train.parallel.setup import start_ranks


class Clock:
    """Sums the time between ``start`` and ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        """Begin to count."""
        wait_for(self.device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Count up to now."""
        assert self._began is not None, "stop() comes after start()"
        wait_for(self.device)
        self.seconds += time.perf_counter() - self._began
        self._began = None


class _Mark(torch.autograd.Function):
    """Identity whose backward pass calls a function."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


@contextmanager
def clocked_routing(layer: nn.Module, clock: Clock) -> Any:
    """While open, ``clock`` runs in everything that ``layer`` does to decide, forward and backward.

    Forward: from the layer's start to the start of its experts: logits, scores, top-k, counts,
    sort. With one rank nothing is sent in between; on a GPU, AutoEP's gather of the rows is, so the
    share is an upper limit there. Backward: from the gradient of the routes' weights to that of the
    router's input, which autograd works through without anything else in between.
    """
    handles = [
        layer.register_forward_pre_hook(lambda module, arguments: clock.start()),
        layer.experts.register_forward_pre_hook(lambda module, arguments: clock.stop()),
        layer.router.register_forward_pre_hook(
            lambda module, arguments: (_Mark.apply(arguments[0], clock.stop), *arguments[1:])
        ),
        layer.router.register_forward_hook(
            lambda module, arguments, output: (_Mark.apply(output[0], clock.start), *output[1:])
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def routing_share(
    block: Block, run: Callable[[], None], *, rounds: int, device: torch.device
) -> Ratio:
    """Time of routing over time of the block's whole forward and backward pass.

    Args:
        block: on one rank.
        run: one forward and backward pass of the block.
        rounds: repetitions; each gives one share.
        device: of the block.
    """
    shares = []
    run()
    for _ in range(rounds):
        clock = Clock(device)
        with clocked_routing(block.mixture, clock):
            whole = clocked(run, device)
        shares.append(clock.seconds / whole)
    return spread_of(shares)


SKEW = 3.0
"""Load of the busiest expert over the mean load, under forced skew."""

MOST_REFERENCE_EXPERTS = 16
"""The loop over all experts keeps E outputs per token for its backward pass: with 64 that is
gigabytes here."""

Run = Callable[[], None]


def measure(config: str | None, experts: list[int], **fields: Any) -> dict[str, Any]:
    """Time everything of one size; every rank calls it.

    Args:
        config: recipe file whose posts are read; None is the default recipe.
        experts: ``Size.experts``.
        fields: the rest of ``Size``.

    Returns:
        times: contestant -> seconds per round. Names are ``what/load/E``: block, native, reference
            under the loads
        posts, balanced and skew3; ``dense``; ``step of block/E`` and the like for AdamW.
        shares: E -> share of routing. skews: E -> largest over mean load of a fresh gate on the
            posts. notes: lines.
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
            f"M {size.model_width}, F {size.expert_width}, k {size.top_k}, "
            f"{str(precision(device))[6:]}, {size.tokens} real tokens per rank of {source.name}",
        ],
    }


def _on_posts(
    contestants: dict[str, Contestant],
    num_experts: int,
    x_SM: Tensor,
    upstream_SM: Tensor,
    size: Size,
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
    contestants: dict[str, Contestant],
    num_experts: int,
    x_SM: Tensor,
    upstream_SM: Tensor,
    size: Size,
) -> None:
    """Forced loads: every layer runs its own router, and all of them select the same experts."""
    loads = {
        "balanced": balanced_selection(size.tokens, num_experts, size.top_k),
        "skew3": skewed_selection(size.tokens, num_experts, size.top_k, skew=SKEW),
    }
    forced = {load: force(x_SM, selected_Sk, num_experts) for load, selected_Sk in loads.items()}
    for name, kind in (("block", Block), ("native", Native)):
        layer = kind(
            num_experts, size.model_width, size.expert_width, top_k=size.top_k, device=x_SM.device
        )
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


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    model_width: int
    """M."""
    expert_width: int
    """F."""
    tokens: int
    """Real tokens per rank and pass."""
    experts: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of experts E."""
    top_k: int = 2
    """Experts per token, at most 2 (what DeepSpeed's own layer was built for)."""
    rounds: int = 9
    """Timed rounds."""
    alone: bool = True
    """One rank: time the loop over all experts and the share of routing too. With several ranks the
    wait for one another would count as routing."""


SIZES = {
    # Widths of the default recipe; 300 tokens per expert at E = 64.
    "cpu": Size(model_width=384, expert_width=96, tokens=9600),
    # Widths of an encoder of 125 million parameters; 1024 tokens per expert at E = 64.
    "cuda": Size(model_width=768, expert_width=192, tokens=32768, rounds=21),
}
"""Kind of device -> what is measured."""

_ANYWHERE = {
    "native_over_block_skew3": Target(at_least=2.0),
    "native_over_block_balanced": Target(at_least=1.0),
    "e64_over_e8": Target(at_most=1.2),
    "monitoring_share": Target(at_most=0.01),
}

TARGETS = {
    "cpu": {
        "block_over_dense": Target(at_most=1.3),
        "routing_share": Target(at_most=0.15),
        **_ANYWHERE,
    },
    "cuda": {
        "block_over_dense": Target(at_most=1.15),
        "routing_share": Target(at_most=0.10),
        **_ANYWHERE,
    },
}
"""Kind of device -> key -> target."""


def run(
    json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None
) -> Measurements:
    """Measure everything, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the default recipe.
        rounds: timed rounds instead of the usual number.
    """
    recipe = None if config is None else str(config.resolve())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[kind] if rounds is None else replace(SIZES[kind], rounds=rounds)
    report = Measurements(
        "experts: forward and backward of one layer; ratios of times taken in turns", TARGETS[kind]
    )
    measured = run_on_ranks("comoe.benchmarks.experts:measure", 1, config=recipe, **asdict(size))
    report.notes += measured["notes"]
    add_ratios(report, measured["times"], size.experts)
    add_shares(report, measured)
    if kind == "cpu" or torch.cuda.device_count() > 1:
        ends = (size.experts[0], size.experts[-1])
        halves = replace(size, tokens=size.tokens // 2, experts=ends, alone=False)
        several = run_on_ranks(
            "comoe.benchmarks.experts:measure", 2, config=recipe, **asdict(halves)
        )
        report.notes.append(
            f"*_ep2: two ranks share the experts (EP 2), {halves.tokens} tokens on each"
        )
        add_ratios(report, several["times"], ends, suffix="_ep2")
    monitoring = run_on_ranks("comoe.benchmarks.training:measure_monitoring", 1, config=recipe)
    report.notes.append(monitoring["note"])
    report.add("monitoring_share", monitoring["share"])
    report.add("evaluation_monitoring_share", monitoring["evaluation_share"])
    add_times(report, measured["times"])
    report.publish(json_path)
    return report


def add_ratios(
    report: Measurements, times: Times, experts: tuple[int, ...], *, suffix: str = ""
) -> None:
    """Ratios of every number of experts; a key's figure is that of the first, the default recipe's E = 8."""
    for key, (above, below) in RATIOS.items():
        for num_experts in experts:
            names = above.format(num_experts), below.format(num_experts)
            if all(name in times for name in names):
                case = "" if num_experts == experts[0] else f"E={num_experts}"
                report.add(key + suffix, asdict(ratio(times, *names)), case=case)
    many, few = (f"block/balanced/{count}" for count in (experts[-1], experts[0]))
    report.add(f"e{experts[-1]}_over_e{experts[0]}{suffix}", asdict(ratio(times, many, few)))


def add_shares(report: Measurements, measured: Mapping[str, Any]) -> None:
    """Share of routing; a key's figure is the default's, the rest are rows. JSON made the keys strings."""
    for number, (num_experts, share) in enumerate(measured["shares"].items()):
        report.add("routing_share", share, case="" if number == 0 else f"E={num_experts}")
    skews = ", ".join(
        f"{value:.2f} at E={num_experts}" for num_experts, value in measured["skews"].items()
    )
    report.notes.append(
        f"largest over mean load of a fresh gate on these posts: {skews}; forced skew: 3"
    )


def add_times(report: Measurements, times: Times) -> None:
    """The medians behind the ratios of the first part, AdamW's step apart from forward and backward."""
    for name in times:
        what, _, case = name.partition("/")
        report.add_time(what, median(times, name), case=case.replace("/", ", E="))


RATIOS = {
    "block_over_dense": ("block/posts/{}", "dense"),
    "native_over_block_skew3": ("native/skew3/{}", "block/skew3/{}"),
    "native_over_block_balanced": ("native/balanced/{}", "block/balanced/{}"),
    "reference_over_block": ("reference/posts/{}", "block/posts/{}"),
}
"""Key -> contestants above and below, with a place for E."""
