"""Batches in which every label has company: a label's only post has no contrastive loss.

Pure functions of the seed and the step, as all sampling is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from comoe.data.posts import PostSplit
from comoe.tasks.task import Task

TRIES = 8
"""Draws per wanted post before all members of a label are looked through."""


class LabelQuota:
    """Puts posts of too rare labels into a batch, in the place of posts that no label needs there.

    Args:
        label_members: posts of each label of each task, int arrays; a post may be in several.
        posts_per_label: fewest posts of each label; 0 leaves batches as they are.
        seed: any non-negative int.
    """

    def __init__(
        self, label_members: Sequence[np.ndarray], posts_per_label: int, *, seed: int
    ) -> None:
        self._posts_per_label = posts_per_label
        self._seed = seed
        wanted = label_members if posts_per_label else ()
        # A label with one post in all can never have a pair.
        self._members = [np.sort(members) for members in wanted if len(members) > 1]

    def fill(self, batch: np.ndarray, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The batch of one step with its quotas filled, as large as before.

        Labels take turns to be served first; one that finds no room left in this batch is among the
        first in a later one.

        Args:
            batch: the posts as the mixing drew them.
            step: optimizer step, from 0.

        Returns:
            The posts, and for each served label the posts that fill its quota.
        """
        kept: dict[int, None] = {}
        together = []
        count = len(self._members)
        for turn in range(count):
            label = (step * max(1, len(batch) // max(self._posts_per_label, 1)) + turn) % count
            members = self._members[label]
            # A binary search per post: members are sorted, and may be most of the data.
            places = np.searchsorted(members, batch).clip(max=len(members) - 1)
            here = batch[members[places] == batch]
            # Posts that are kept for another label serve this one too.
            chosen = sorted(dict.fromkeys(here.tolist()), key=lambda post: post not in kept)[
                : self._posts_per_label
            ]
            chosen += self._draw(
                label, self._posts_per_label - len(chosen), batch=batch, kept=kept, step=step
            )
            if len(kept.keys() | set(chosen)) <= len(batch):
                kept |= dict.fromkeys(chosen)
                together.append(np.array(chosen, dtype=np.int64))
        if not kept:
            return batch, []
        # Any of the rest may go: what a served label needs is kept. Not the last ones, which are
        # the longest.
        rest = np.random.default_rng([self._seed, 4, step]).permutation(_without(batch, kept))
        return np.concatenate([np.array(list(kept), dtype=np.int64), rest])[: len(batch)], together

    def _draw(
        self, label: int, missing: int, *, batch: np.ndarray, kept: dict[int, None], step: int
    ) -> list[int]:
        """Posts of a label that are not in the batch yet; fewer where it has no more."""
        if missing <= 0:
            return []
        members = self._members[label]
        rng = np.random.default_rng([self._seed, 3, step, label])
        there = {*batch.tolist(), *kept}
        found = dict.fromkeys(
            int(post) for post in rng.choice(members, missing * TRIES) if int(post) not in there
        )
        if len(found) < missing:
            found = dict.fromkeys(
                int(post) for post in rng.permutation(members) if int(post) not in there
            )
        return list(found)[:missing]


def label_members(posts: PostSplit, tasks: Sequence[Task]) -> list[np.ndarray]:
    """Posts of each label of each contrastive task, as ``LabelQuota`` takes them."""
    found: dict[tuple[str, int], list[int]] = {}
    for task in tasks:
        if task.contrastive:
            for post, value in enumerate(posts.labels[task.name]):
                for label in () if value is None else task.rules.label_ids(value):
                    found.setdefault((task.name, label), []).append(post)
    return [np.array(found[key]) for key in sorted(found)]


def cut_in_parts(
    posts: np.ndarray, together: Sequence[np.ndarray], *, parts: int
) -> list[np.ndarray]:
    """Cut the posts of a step into micro-steps whose sizes differ by at most one, bundles whole.

    Args:
        posts: sorted by length; what no bundle binds is cut along that order.
        together: bundles of posts; one that shares posts with an earlier one goes where most of its
            posts are.
        parts: number of micro-steps.

    Bundles stay whole where there is room for all of one.
    """
    sizes = [len(part) for part in np.array_split(posts, parts)]
    if parts == 1 or not together:
        return np.array_split(posts, parts)
    place: dict[int, int] = {}
    free = list(sizes)
    for bundle in together:
        new = [int(post) for post in bundle if int(post) not in place]
        known = [place[int(post)] for post in bundle if int(post) in place]
        order = sorted(range(parts), key=lambda part: (-known.count(part), -free[part], part))
        # Where no micro-step has room for the whole, the bundle is broken: sizes come first.
        for part in order:
            taken, new = (new, []) if len(new) <= free[part] else ([], new)
            place |= dict.fromkeys(taken, part)
            free[part] -= len(taken)
    rest = np.split(_without(posts, place), np.cumsum(free)[:-1])
    bound = [[post for post, home in place.items() if home == part] for part in range(parts)]
    return [
        np.concatenate([np.array(a, dtype=np.int64), b]) for a, b in zip(bound, rest, strict=True)
    ]


def _without(posts: np.ndarray, taken: Iterable[int]) -> np.ndarray:
    """The posts in their order, less one of each that is taken: a batch may hold a post twice."""
    _, first = np.unique(posts, return_index=True)
    gone = first[np.isin(posts[first], list(taken))]
    return np.delete(posts, gone)
