"""``launch/bench.py experts``: the block against what else one would use, and what routing and monitoring cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.report import Report, Target
from comoe.benchmarks.timing import Times, median, ratio


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
    """One rank: time the loop over all experts and the share of routing too. With several ranks the wait for one
    another would count as routing."""


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
    "cpu": {"block_over_dense": Target(at_most=1.3), "routing_share": Target(at_most=0.15), **_ANYWHERE},
    "cuda": {"block_over_dense": Target(at_most=1.15), "routing_share": Target(at_most=0.10), **_ANYWHERE},
}
"""Kind of device -> key -> target."""


def run(json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None) -> Report:
    """Measure everything, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the default recipe.
        rounds: timed rounds instead of the usual number.
    """
    recipe = None if config is None else str(config.resolve())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[kind] if rounds is None else replace(SIZES[kind], rounds=rounds)
    report = Report("experts: forward and backward of one layer; ratios of times taken in turns", TARGETS[kind])
    measured = run_on_ranks("comoe.benchmarks.layer_times:measure", 1, config=recipe, **asdict(size))
    report.notes += measured["notes"]
    add_ratios(report, measured["times"], size.experts)
    add_shares(report, measured)
    if kind == "cpu" or torch.cuda.device_count() > 1:
        ends = (size.experts[0], size.experts[-1])
        halves = replace(size, tokens=size.tokens // 2, experts=ends, alone=False)
        several = run_on_ranks("comoe.benchmarks.layer_times:measure", 2, config=recipe, **asdict(halves))
        report.notes.append(f"*_ep2: two ranks share the experts (EP 2), {halves.tokens} tokens on each")
        add_ratios(report, several["times"], ends, suffix="_ep2")
    monitoring = run_on_ranks("comoe.benchmarks.monitoring:measure", 1, config=recipe)
    report.notes.append(monitoring["note"])
    report.add("monitoring_share", monitoring["share"])
    report.add("evaluation_monitoring_share", monitoring["evaluation_share"])
    add_times(report, measured["times"])
    print("\n".join(report.lines()))
    if json_path is not None:
        report.write(json_path)
    return report


def add_ratios(report: Report, times: Times, experts: tuple[int, ...], *, suffix: str = "") -> None:
    """Ratios of every number of experts; a key's figure is that of the first, the default recipe's E = 8."""
    for key, (above, below) in RATIOS.items():
        for num_experts in experts:
            names = above.format(num_experts), below.format(num_experts)
            if all(name in times for name in names):
                case = "" if num_experts == experts[0] else f"E={num_experts}"
                report.add(key + suffix, asdict(ratio(times, *names)), case=case)
    many, few = (f"block/balanced/{count}" for count in (experts[-1], experts[0]))
    report.add(f"e{experts[-1]}_over_e{experts[0]}{suffix}", asdict(ratio(times, many, few)))


def add_shares(report: Report, measured: Mapping[str, Any]) -> None:
    """Share of routing; a key's figure is the default's, the rest are rows. JSON made the keys strings."""
    for number, (num_experts, share) in enumerate(measured["shares"].items()):
        report.add("routing_share", share, case="" if number == 0 else f"E={num_experts}")
    skews = ", ".join(f"{value:.2f} at E={num_experts}" for num_experts, value in measured["skews"].items())
    report.notes.append(f"largest over mean load of a fresh gate on these posts: {skews}; forced skew: 3")


def add_times(report: Report, times: Times) -> None:
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
