"""Which posts make up a step: mixed over data sets, similar in length, whatever the ranks.

Everything here is a pure function of the seed, the step and, where rates follow the progress, of
the history of rates that ``TrainState`` keeps: a resumed run draws the posts that the uninterrupted
one would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoe.config.recipe import Recipe
from comoe.data.sampling.label_quota import LabelQuota, cut_in_parts, label_members
from comoe.data.sampling.mixing import (
    MIXINGS,
    balanced_classes,
    draws_in_stretch,
    draws_per_epoch,
    joint_label_shares,
    label_shares,
    next_turn,
)
from comoe.data.tokens.split import TokenizedSplit
from comoe.tasks.task import Task

POOL_BATCHES = 50
"""Batches whose posts are sorted by length together: little padding, and still random."""

LENGTH_NOISE = 0.1
"""Lengths are scaled by up to this much before sorting: posts meet others in every epoch."""

MAX_AUTO_MICRO_BATCH = 128
"""Most posts per forward pass on one rank under ``train.micro_batch_size: auto``."""


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """How training posts are drawn, and cut for the ranks."""

    batch_size: int
    """Posts per optimizer step on all ranks together."""
    world_size: int = 1
    """Number of ranks; changes the shares, never the global batch."""
    micro_batch_size: int | str = "auto"
    """Posts per forward pass on one rank, or auto: the whole share of the rank, at most 128."""
    mixing: str = "proportional"
    """Key of ``MIXINGS``."""
    temperature: float = 2.0
    """Exponent of ``mixing: temperature``, at least 1."""
    seed: int = 0
    """Any non-negative int."""
    posts_per_label: int = 0
    """Fewest posts of a label in each batch, where the data and the batch allow it."""
    inner_steps: int = 0
    """Steps in a row whose posts are of one data set; 0 mixes them in each step."""


class TrainSampler:
    """Deals the training posts: a global batch per optimizer step, cut into micro-steps and ranks.

    An epoch has as many draws as there are posts. Each data set is a stream of fresh shuffles, and
    its draws are spread evenly over the epoch; under ``proportional`` mixing every post comes
    exactly once per epoch. Batches of an epoch differ by at most one post in size and hold at most
    ``batch_size``. With ``posts_per_label`` posts of rare labels take the place of others
    (``comoe.data.sampling.label_quota``).

    Within a data set with ``classes`` each label is a stream of its own, with the same share of the
    draws. Under ``mixing: progress`` the rates change at evaluations (``change``): draws are laid
    out for the steps from one evaluation to the next, and the streams go on where they were.

    With ``inner_steps`` the data sets take turns of so many steps, as often as their rates say. A
    turn goes on where the last one of its data set ended; passes over two of them end apart.

    Args:
        lengths: tokens per post, int, shape (N,).
        groups: data set of each post, int, shape (N,).
        config: how to draw and to cut.
        label_members: posts of each label of each contrastive task, int arrays; read where
            ``posts_per_label`` is set.
        classes: labels of each post by which its data set is drawn evenly, int, shape (N, C), -1 for
            none; None balances nothing.

    Raises:
        ValueError: no posts.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        groups: np.ndarray,
        config: SamplerConfig,
        *,
        label_members: Sequence[np.ndarray] = (),
        classes: np.ndarray | None = None,
    ) -> None:
        batch_size, world_size, mixing = config.batch_size, config.world_size, config.mixing
        if len(lengths) == 0:
            raise ValueError("There are no training posts to draw from.")
        self.world_size = world_size
        self.micro_batch_size = posts_per_forward(
            config.micro_batch_size, batch_size=batch_size, world_size=world_size
        )
        self.accumulation = -(-batch_size // (world_size * self.micro_batch_size))
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._lengths = np.asarray(lengths)
        self._seed = config.seed
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        sizes_G = np.array([len(members) for members in self._members], dtype=np.int64)
        self.follows_progress = MIXINGS[mixing].follows_progress
        self.rates_G = MIXINGS[mixing](sizes_G, config.temperature)
        """Share of the draws per data set, before any change."""
        streams = [_streams(group, members, classes) for group, members in enumerate(self._members)]
        self._streams = [stream for found in streams for stream in found]
        self._stream_of = np.empty(len(lengths), dtype=np.int64)
        for number, stream in enumerate(self._streams):
            self._stream_of[stream.members] = number
        parts = self.steps_per_epoch
        self._sizes = np.full(parts, len(lengths) // parts) + (
            np.arange(parts) < len(lengths) % parts
        )
        self._inner_steps = config.inner_steps
        self._stretch_steps = config.inner_steps or self.steps_per_epoch
        self._turns: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._had_G = np.zeros(len(self._members), dtype=np.int64)
        self._first_G = np.random.default_rng([config.seed, 6]).random(len(self._members))
        self._history: list[Mapping[str, Any]] = []
        self._laid_out: tuple[range, list[np.ndarray]] | None = None
        labels_of = [label_members]
        if config.inner_steps:
            # Of a turn's posts none may come of another data set.
            labels_of = [
                [label for label in label_members if (groups[label] == group).all()]
                for group in np.unique(groups)
            ]
        self._quotas = [
            LabelQuota(labels, config.posts_per_label, seed=config.seed) for labels in labels_of
        ]

    def global_batch(self, step: int) -> np.ndarray:
        """Posts of optimizer step ``step`` (from 0) on all ranks together: int64 indices, sorted by length."""
        return self._by_length(self._drawn(step)[0])

    def share(self, step: int, rank: int) -> list[np.ndarray]:
        """What one rank runs in one step: ``accumulation`` index arrays, uneven or empty where posts run short.

        The micro-steps are the same posts for any number of ranks with the same ``accumulation``;
        posts that are there for one label are in one micro-step where it has room. Within one,
        sorted posts are dealt to the ranks back and forth, so that the ranks get the same number of
        tokens.
        """
        batch, together = self._drawn(step)
        micro_steps = cut_in_parts(self._by_length(batch), together, parts=self.accumulation)
        mine = []
        for micro in map(self._by_length, micro_steps):
            # Ranks of the sorted posts: 0 1 2 2 1 0 0 1 2 ...
            turns, seats = np.divmod(np.arange(len(micro)), self.world_size)
            ranks = np.where(turns % 2 == 0, seats, self.world_size - 1 - seats)
            mine.append(micro[ranks == rank])
        return mine

    def without_turn(self, steps: int) -> list[int]:
        """With ``inner_steps`` the data sets, by their numbers, that no post of the first so many steps is of."""
        had = {self._turn(step)[0] for step in range(0, steps, self._inner_steps or steps + 1)}
        return [group for group in range(len(self._members)) if group not in had]

    def follow(self, history: Sequence[Mapping[str, Any]], *, every: int) -> None:
        """Take over a history of rates.

        Args:
            history: what ``change`` gave, in its order; from the ``step`` of an entry on its
                ``rates`` hold.
            every: steps from one evaluation to the next; the rates are kept over each such stretch.
        """
        self._history, self._stretch_steps = list(history), every
        self._laid_out = None

    def change(self, step: int, rates_G: np.ndarray) -> dict[str, Any]:
        """The entry of a history for new rates from ``step`` on; plain numbers, for JSON."""
        start, rates_S, drawn_S = self._stretch(step)
        if start < step:
            # What is left of a stretch that is cut short is passed over.
            drawn_S = drawn_S + self._counts(start, rates_S)
        return {
            "step": step,
            "rates": [float(rate) for rate in rates_G],
            "drawn": [int(count) for count in drawn_S],
        }

    def _drawn(self, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The posts of one step, and those of them that fill one label's quota together."""
        if self._laid_out is None or step not in self._laid_out[0]:
            start, rates_S, drawn_S = self._stretch(step)
            changes = [entry["step"] for entry in self._history if entry["step"] > start]
            steps = range(start, min([start + self._stretch_steps, *changes]))
            self._laid_out = (steps, self._batches(start, rates_S, drawn_S))
        steps, batches = self._laid_out
        quota = self._quotas[self._turn(step)[0] if len(self._quotas) > 1 else 0]
        return quota.fill(batches[step - steps.start], step)

    def _turn(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Of the turn that a step lies in: its data set, the streams' rates, and their draws before it."""
        while len(self._turns) <= step // self._inner_steps:
            drawn_S = np.zeros(len(self._streams), dtype=np.int64)
            if self._turns:
                _, rates_S, before_S = self._turns[-1]
                start = (len(self._turns) - 1) * self._inner_steps
                drawn_S = before_S + self._counts(start, rates_S)
            group = next_turn(self.rates_G, self._had_G, self._first_G)
            self._had_G[group] += 1
            alone_S = self._rates(np.eye(len(self.rates_G))[group])
            self._turns.append((group, alone_S, drawn_S))
        return self._turns[step // self._inner_steps]

    def _rates(self, rates_G: np.ndarray) -> np.ndarray:
        """Share of the draws per stream."""
        return np.array([rates_G[stream.group] * stream.share for stream in self._streams])

    def _stretch(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Of the stretch that a step lies in: its first step, the streams' rates, and their draws before it."""
        if self._inner_steps:
            _, rates_S, drawn_S = self._turn(step)
            return step // self._inner_steps * self._inner_steps, rates_S, drawn_S
        entry = next((entry for entry in reversed(self._history) if entry["step"] <= step), None)
        rates_G = self.rates_G if entry is None else np.array(entry["rates"])
        rates_S = self._rates(rates_G)
        drawn_S = np.array([0] * len(rates_S) if entry is None else entry["drawn"], dtype=np.int64)
        start = 0 if entry is None else entry["step"]
        passed = (step - start) // self._stretch_steps
        if not self.follows_progress:
            return passed * self._stretch_steps, rates_S, passed * self._counts(0, rates_S)
        for _ in range(passed):
            drawn_S = drawn_S + self._counts(start, rates_S)
            start += self._stretch_steps
        return start, rates_S, drawn_S

    def _counts(self, start: int, rates_S: np.ndarray) -> np.ndarray:
        """Draws of each stream in the stretch that begins with a step."""
        total = int(self._step_sizes(start).sum())
        if not self.follows_progress and not self._inner_steps:
            return draws_per_epoch(rates_S, total=total)
        drawn_S, mine_S = np.zeros(len(rates_S), dtype=np.int64), rates_S > 0
        seed = [self._seed, 5, start]
        drawn_S[mine_S] = draws_in_stretch(rates_S[mine_S], total=total, seed=seed)
        return drawn_S

    def _step_sizes(self, start: int) -> np.ndarray:
        """Posts of each step of the stretch that begins with a step."""
        return self._sizes[np.arange(start, start + self._stretch_steps) % self.steps_per_epoch]

    def _by_length(self, posts: np.ndarray) -> np.ndarray:
        return posts[np.lexsort((posts, self._lengths[posts]))]

    def _batches(self, start: int, rates_S: np.ndarray, drawn_S: np.ndarray) -> list[np.ndarray]:
        """All batches of one stretch (an epoch, but for rates that follow the progress): one O(N log N) shuffle."""
        turn, draws, keys = start // self._stretch_steps, [], []
        for stream, before, count in zip(
            self._streams, drawn_S, self._counts(start, rates_S), strict=True
        ):
            if not count:
                continue
            draws.append(stream.draws(self._seed, start=int(before), count=int(count)))
            jitter = np.random.default_rng([self._seed, 1, turn, *stream.key]).random(count)
            # Evenly spread draws put every data set into nearly every batch and keep repeats of a
            # post far apart.
            keys.append((np.arange(count) + jitter) / count)
        order = np.concatenate(draws)[np.argsort(np.concatenate(keys), kind="stable")]
        rng = np.random.default_rng([self._seed, 2, turn])
        ends = np.cumsum(self._step_sizes(start))
        starts = np.concatenate(([0], ends[:-1]))
        batches: list[np.ndarray] = []
        for first in range(0, len(ends), POOL_BATCHES):
            last = min(first + POOL_BATCHES, len(ends)) - 1
            pool = order[starts[first] : ends[last]]
            pool = pool[np.argsort(self._length_ranks(pool, rng), kind="stable")]
            cuts = np.split(pool, ends[first:last] - starts[first])
            batches.extend(cuts[i] for i in rng.permutation(len(cuts)))
        return batches

    def _length_ranks(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rank of each draw's length among the pool's draws of its own stream, in (0, 1), with some noise.

        Batches cut along it hold posts of similar relative length and every stream in its share. Sorted by
        plain length a batch of long posts would be one data set's: 9 of 10 tokens full on the starter
        kit where this packs 8 (random batches: 5), but tasks would take turns.
        """
        noisy = self._lengths[pool] * (1 + LENGTH_NOISE * rng.random(len(pool)))
        ranks, streams = np.empty(len(pool)), self._stream_of[pool]
        for number in np.unique(streams):
            here = np.flatnonzero(streams == number)
            ranks[here[np.argsort(noisy[here], kind="stable")]] = (
                np.arange(len(here)) + 0.5
            ) / len(here)
        return ranks


@dataclass(frozen=True, slots=True)
class _Stream:
    """Endless shuffles of some posts: of a data set, or of one label of it."""

    group: int
    """Data set."""
    key: tuple[int, ...]
    """Its place in the seeds of its shuffles."""
    members: np.ndarray
    """Its posts."""
    share: float
    """Its share of the draws of its data set."""

    def draws(self, seed: int, *, start: int, count: int) -> np.ndarray:
        """Draws ``start`` to ``start + count``."""
        size = len(self.members)
        first, last = start // size, (start + count - 1) // size
        passes = [
            self.members[np.random.default_rng([seed, 0, *self.key, number]).permutation(size)]
            for number in range(first, last + 1)
        ]
        offset = start - first * size
        return np.concatenate(passes)[offset : offset + count]


def _streams(group: int, members: np.ndarray, classes: np.ndarray | None) -> list[_Stream]:
    """One stream per data set, or one per label of it, or per combination of labels."""
    own = None if classes is None else classes[members]
    if own is None or (own < 0).all():
        return [_Stream(group, (group,), members, 1.0)]
    own = own[:, (own >= 0).any(axis=0)]
    shares = label_shares(own[:, 0]) if own.shape[1] == 1 else joint_label_shares(own)
    return [
        _Stream(group, (group, place), members[rows], share)
        for place, (rows, share) in enumerate(shares)
    ]


def eval_batches(
    lengths: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """Row ids that one rank evaluates, longest posts first; every row on exactly one rank.

    Every rank gets the same number of batches, padded with empty arrays: each forward holds
    collectives.

    Args:
        lengths: tokens per row, int, shape (N,).
        batch_size: rows per forward pass on one rank.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        ValueError: a batch of no rows, which would leave every row out.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return mine + [np.zeros(0, dtype=np.int64)] * (rounds - len(mine))


def posts_per_forward(wanted: int | str, *, batch_size: int, world_size: int) -> int:
    """``train.micro_batch_size`` as a number: auto is the whole share of a rank, at most 128."""
    share = -(-batch_size // world_size)
    if wanted == "auto":
        return min(share, MAX_AUTO_MICRO_BATCH)
    return min(int(wanted), share)


def sampler_of(
    recipe: Recipe,
    train: TokenizedSplit,
    tasks: Sequence[Task],
    world_size: int,
    micro_batch_size: int,
) -> TrainSampler:
    """The sampler of a run.

    Args:
        recipe: resolved.
        train: the training posts.
        tasks: of the run.
        world_size: number of ranks.
        micro_batch_size: posts per forward pass on one rank.
    """
    config = SamplerConfig(
        batch_size=recipe.train.batch_size,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        mixing=recipe.data.mixing,
        temperature=recipe.data.mixing_temperature,
        seed=recipe.train.seed,
        posts_per_label=recipe.data.posts_per_label,
        inner_steps=recipe.train.reptile_steps,
    )
    members = label_members(train.posts, tasks) if config.posts_per_label else ()
    classes = balanced_classes(train.posts, tasks, recipe.tasks)
    return TrainSampler(train.lengths, train.groups, config, label_members=members, classes=classes)
