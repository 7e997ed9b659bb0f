"""A grouping of tasks, proposed from what a comparison has measured of each pair of them.

Two kinds of evidence, both above 0 where tasks go together: the cosine of their gradients, and how much the one
loses without the other, in their main metrics, the mean of both directions. Each kind is divided by its root mean
square over the pairs, and what is known of a pair is averaged. A grouping is worth the sum over all pairs that share
a group (correlation clustering, Bansal et al. 2004), and every grouping is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoe.evaluation.tables import markdown_table as table
from comoe.experiments.compare.statistics import Difference
from comoe.experiments.compare.transfer import Cosines

Groups = tuple[tuple[str, ...], ...]

FEWEST, MOST = 3, 10
"""Tasks that can be grouped: of two there is nothing to choose, of ten there are 115,975 groupings."""

RANDOM = 3
"""Random groupings that the proposed one is tested against."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The best grouping by the evidence, and what it is to be tested against."""

    tasks: tuple[str, ...]
    evidence_TT: np.ndarray
    """Symmetric; 0 where nothing is known of a pair, and on the diagonal."""
    sources: tuple[str, ...]
    """What was measured."""
    groups: Groups
    worth: float
    second: tuple[Groups, float]
    """The grouping after it."""
    together: float
    """What one group of all is worth; each task alone is worth 0."""
    random: tuple[Groups, ...]
    """Other groupings with groups of the same sizes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "tasks": list(self.tasks), "evidence": self.evidence_TT.round(6).tolist(),
            "sources": list(self.sources), "groups": self.groups, "worth": self.worth,
            "second": {"groups": self.second[0], "worth": self.second[1]},
            "together": self.together, "random": self.random,
        }  # fmt: skip

    @property
    def options(self) -> list[str]:
        """Words of the command that trains all of these groupings."""
        named = {"proposed": self.groups}
        named |= {f"random{number}": groups for number, groups in enumerate(self.random, start=1)}
        return [
            word
            for name, groups in named.items()
            for word in ("--groups", f"{name}:{typed(groups)}")
        ]


def propose(
    tasks: Sequence[str],
    cosines: Cosines | None,
    changes: Mapping[str, Mapping[str, Difference]],
    *,
    seed: int = 0,
) -> Proposal | None:
    """The grouping that is worth most; None where nothing is measured, or of fewer than three tasks.

    Args:
        tasks: that are measured, at most ``MOST``.
        cosines: of the joint arm.
        changes: dropped task -> task -> its improvement without that one.
        seed: of the random groupings.
    """
    if not FEWEST <= len(tasks) <= MOST:
        return None
    parts = {
        "gradient cosines": _of_cosines(tasks, cosines),
        "tasks left out": _of_changes(tasks, changes),
    }
    known = {name: part for name, part in parts.items() if np.isfinite(part).any()}
    if not known:
        return None
    # Each of root mean square 1, but where all is 0.
    sizes = [float(np.sqrt(np.nanmean(part**2))) or 1.0 for part in known.values()]
    stack = np.stack([part / size for part, size in zip(known.values(), sizes, strict=True)])
    count_TT = np.isfinite(stack).sum(0)
    evidence_TT = np.nansum(stack, axis=0) / np.maximum(count_TT, 1)
    ranked = sorted(
        ((worth(ids, evidence_TT), ids) for ids in groupings(len(tasks))),
        key=lambda pair: (-pair[0], len(set(pair[1]))),
    )
    (best, ids), (next_best, next_ids) = ranked[:2]
    sizes = sorted(ids.count(group) for group in set(ids))
    alike = [
        other
        for _, other in ranked
        if other != ids and sorted(other.count(group) for group in set(other)) == sizes
    ]
    chosen = np.random.default_rng(seed).permutation(len(alike))[:RANDOM]
    return Proposal(
        tuple(tasks), evidence_TT, tuple(known), _named(ids, tasks), best, (_named(next_ids, tasks), next_best),
        worth((0,) * len(tasks), evidence_TT), tuple(_named(alike[place], tasks) for place in chosen),
    )  # fmt: skip


def groupings(tasks: int) -> Iterator[tuple[int, ...]]:
    """Every partition, each once: the group of each task, numbered in the order of their first tasks."""
    ids = [0]

    def grown(used: int) -> Iterator[tuple[int, ...]]:
        if len(ids) == tasks:
            yield tuple(ids)
            return
        for group in range(used + 1):
            ids.append(group)
            yield from grown(max(used, group + 1))
            ids.pop()

    yield from grown(1)


def worth(ids: Sequence[int], evidence_TT: np.ndarray) -> float:
    """Sum of the evidence over the pairs that share a group, each pair once."""
    return math.fsum(
        evidence_TT[one, other]
        for one, other in itertools.combinations(range(len(ids)), 2)
        if ids[one] == ids[other]
    )


def typed(groups: Groups) -> str:
    """As ``--groups`` takes them."""
    return "/".join("+".join(group) for group in groups)


def proposal_lines(proposal: Proposal | None, command: str) -> list[str]:
    """The section of ``table.md``; ``command`` trains the groupings."""
    if proposal is None:
        return []
    rows = [
        [task, *("" if one == other else f"{value:+.2f}" for other, value in enumerate(values))]
        for one, (task, values) in enumerate(zip(proposal.tasks, proposal.evidence_TT, strict=True))
    ]
    shown = {
        "proposed": (proposal.groups, proposal.worth),
        "second": proposal.second,
        "all together": ((proposal.tasks,), proposal.together),
        "each alone": (tuple((task,) for task in proposal.tasks), 0.0),
    }
    lines = ["", "## Groups", "", _TEXT.format(sources=" and ".join(proposal.sources)), ""]
    lines += [*table(["", *proposal.tasks], rows), ""]
    lines += table(["grouping", "groups", "worth"], [
        [name, typed(groups), f"{value:+.2f}"] for name, (groups, value) in shown.items()
    ])  # fmt: skip
    if not proposal.random:
        return [
            *lines,
            "",
            "No other grouping has groups of these sizes: nothing random to test it against.",
        ]
    test = "This is a proposal. It is tested against random groups of the same sizes by:"
    return [*lines, "", test, "", "```bash", command, "```"]


def _of_cosines(tasks: Sequence[str], cosines: Cosines | None) -> np.ndarray:
    found_TT = np.full((len(tasks), len(tasks)), math.nan)
    for one, other in itertools.permutations(range(len(tasks)), 2):
        if cosines is not None and {tasks[one], tasks[other]} <= set(cosines.tasks):
            place = cosines.tasks.index(tasks[one]), cosines.tasks.index(tasks[other])
            found_TT[one, other] = cosines.mean_TT[place]
    return found_TT


def _of_changes(
    tasks: Sequence[str], changes: Mapping[str, Mapping[str, Difference]]
) -> np.ndarray:
    found_TT = np.full((len(tasks), len(tasks)), math.nan)
    for one, other in itertools.permutations(range(len(tasks)), 2):
        both = [
            -changes[dropped][task].mean
            for dropped, task in ((tasks[one], tasks[other]), (tasks[other], tasks[one]))
            if task in changes.get(dropped, {})
        ]
        if both:
            found_TT[one, other] = np.mean(both)
    return found_TT


def _named(ids: Sequence[int], tasks: Sequence[str]) -> Groups:
    return tuple(
        tuple(task for task, group in zip(tasks, ids, strict=True) if group == number)
        for number in range(max(ids) + 1)
    )


_TEXT = (
    "Evidence that two tasks go together, from {sources}, each divided by its root mean square over the pairs: above 0 "
    "one group, below 0 apart. A grouping is worth the sum over the pairs that share a group; all groupings were tried."
)
