"""Which posts make up a step: mixed over data sets, similar in length, the same on any number of ranks.

Everything here is a pure function of the seed and the step, so a resumed run needs no sampler state but its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from comoe.data.label_pairs import LabelQuota, cut_in_parts
from comoe.rules import unknown_name

POOL_BATCHES = 50
"""Batches whose posts are sorted by length together: large enough for little padding, small enough to stay random."""
LENGTH_NOISE = 0.1
"""Lengths are scaled by up to this much before sorting, so that posts do not meet the same neighbours every epoch."""
MAX_AUTO_MICRO_BATCH = 128
"""Most posts per forward pass on one rank under ``train.micro_batch_size: auto``."""


class TrainSampler:
    """Deals the training posts: one global batch per optimizer step, cut into micro-steps and ranks.

    An epoch has as many draws as there are posts. Each data set is a stream of fresh shuffles, and its draws are spread
    evenly over the epoch; under ``proportional`` mixing every post comes exactly once per epoch. Batches of an epoch
    differ by at most one post in size and hold at most ``batch_size``. With ``posts_per_label`` posts of rare labels
    take the place of others (``comoe.data.label_pairs``).

    Args:
        lengths: tokens per post, int, shape (N,).
        groups: data set of each post, int, shape (N,).
        batch_size: posts per optimizer step on all ranks together.
        world_size: number of ranks; changes the shares, never the global batch.
        micro_batch_size: posts per forward pass on one rank, or auto: the whole share of the rank, at most 128.
        mixing: key of ``MIXINGS``.
        temperature: exponent of ``mixing: temperature``, at least 1.
        seed: any non-negative int.
        label_members: posts of each label of each contrastive task, int arrays; read where ``posts_per_label`` is set.
        posts_per_label: fewest posts of a label in each batch, where the data and the batch allow it.

    Raises:
        ValueError: no posts, a size below 1, an unknown mixing, a temperature below 1.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        groups: np.ndarray,
        *,
        batch_size: int,
        world_size: int = 1,
        micro_batch_size: int | str = "auto",
        mixing: str = "proportional",
        temperature: float = 2.0,
        seed: int = 0,
        label_members: Sequence[np.ndarray] = (),
        posts_per_label: int = 0,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("There are no training posts to draw from.")
        if batch_size < 1:
            raise ValueError(f"train.batch_size ({batch_size}) must be at least 1.")
        if mixing not in MIXINGS:
            raise unknown_name("data.mixing", mixing, MIXINGS)
        self.world_size = world_size
        self.micro_batch_size = posts_per_forward(micro_batch_size, batch_size=batch_size, world_size=world_size)
        self.accumulation = -(-batch_size // (world_size * self.micro_batch_size))
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        sizes_G = np.array([len(members) for members in self._members], dtype=np.int64)
        self.rates_G = MIXINGS[mixing](sizes_G, temperature)
        self._draws_G = draws_per_epoch(self.rates_G, total=len(lengths))
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self._quota = LabelQuota(label_members, posts_per_label, seed=seed)

    def global_batch(self, step: int) -> np.ndarray:
        """Posts of optimizer step ``step`` (from 0) on all ranks together: int64 indices, sorted by length."""
        return self._by_length(self._drawn(step)[0])

    def share(self, step: int, rank: int) -> list[np.ndarray]:
        """What one rank runs in one step: ``accumulation`` index arrays, uneven or empty where posts run short.

        The micro-steps are the same posts for any number of ranks with the same ``accumulation``; posts that are there
        for one label are in one micro-step where it has room. Within one, sorted posts are dealt to the ranks back and
        forth, so that the ranks get the same number of tokens.
        """
        batch, together = self._drawn(step)
        micro_steps = cut_in_parts(self._by_length(batch), together, parts=self.accumulation)
        return [micro[_deal(len(micro), self.world_size) == rank] for micro in map(self._by_length, micro_steps)]

    def _drawn(self, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The posts of one step, and those of them that fill one label's quota together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._quota.fill(self._epoch[1][position], step)

    def _by_length(self, posts: np.ndarray) -> np.ndarray:
        return posts[np.lexsort((posts, self._lengths[posts]))]

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """All batches of one epoch, in order: one O(N log N) shuffle."""
        draws, keys = [], []
        for group, (members, count) in enumerate(zip(self._members, self._draws_G, strict=True)):
            draws.append(self._stream(group, start=epoch * count, count=count))
            jitter = np.random.default_rng([self._seed, 1, epoch, group]).random(count)
            # Evenly spread draws put every data set into nearly every batch and keep repeats of a post far apart.
            keys.append((np.arange(count) + jitter) / max(count, 1))
            assert len(members) > 0
        order = np.concatenate(draws)[np.argsort(np.concatenate(keys), kind="stable")]
        rng = np.random.default_rng([self._seed, 2, epoch])
        ends = np.cumsum(_even_sizes(len(order), self.steps_per_epoch))
        starts = np.concatenate(([0], ends[:-1]))
        batches: list[np.ndarray] = []
        for first in range(0, self.steps_per_epoch, POOL_BATCHES):
            last = min(first + POOL_BATCHES, self.steps_per_epoch) - 1
            pool = order[starts[first] : ends[last]]
            pool = pool[np.argsort(self._length_ranks(pool, rng), kind="stable")]
            cuts = [pool[starts[i] - starts[first] : ends[i] - starts[first]] for i in range(first, last + 1)]
            batches.extend(cuts[i] for i in rng.permutation(len(cuts)))
        return batches

    def _length_ranks(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rank of each draw's length among the pool's draws of its own data set, in (0, 1), with some noise.

        Batches cut along it hold posts of similar relative length and every data set in its share. Sorted by plain
        length, a batch of long posts would be one of the data set with the longest posts alone: that packs 9 of 10
        tokens full on the starter kit where this packs 8 of 10 (random batches: 5), and gives the tasks turns instead
        of a mixture.
        """
        noisy = self._lengths[pool] * (1 + LENGTH_NOISE * rng.random(len(pool)))
        ranks = np.empty(len(pool))
        for members in self._members:
            here = np.flatnonzero(np.isin(pool, members))
            order = np.argsort(noisy[here], kind="stable")
            ranks[here[order]] = (np.arange(len(here)) + 0.5) / max(len(here), 1)
        return ranks

    def _stream(self, group: int, *, start: int, count: int) -> np.ndarray:
        """Draws ``start`` to ``start + count`` of one data set's endless stream of shuffles."""
        members = self._members[group]
        first, last = start // len(members), (start + max(count, 1) - 1) // len(members)
        passes = [
            members[np.random.default_rng([self._seed, 0, group, number]).permutation(len(members))]
            for number in range(first, last + 1)
        ]
        offset = start - first * len(members)
        return np.concatenate(passes)[offset : offset + count]


def eval_batches(lengths: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """Row ids that one rank evaluates, longest posts first; every row on exactly one rank.

    Every rank gets the same number of batches, padded with empty arrays: each forward holds collectives.

    Args:
        lengths: tokens per row, int, shape (N,).
        batch_size: rows per forward pass on one rank.
        rank: this rank.
        world_size: number of ranks.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return mine + [np.zeros(0, dtype=np.int64)] * (rounds - len(mine))


def draws_per_epoch(rates_G: np.ndarray, *, total: int) -> np.ndarray:
    """Whole draws per data set that add up to ``total``, by largest remainder; int64, shape (G,)."""
    exact = rates_G * total
    # The small number keeps 2999.9999999 from losing the post that makes proportional mixing exact.
    draws = np.floor(exact + 1e-6).astype(np.int64)
    missing = total - int(draws.sum())
    draws[np.argsort(-(exact - draws), kind="stable")[:missing]] += 1
    return draws


def posts_per_forward(wanted: int | str, *, batch_size: int, world_size: int) -> int:
    """``train.micro_batch_size`` as a number: auto is the whole share of a rank, at most 128."""
    share = -(-batch_size // world_size)
    if wanted == "auto":
        return min(share, MAX_AUTO_MICRO_BATCH)
    if isinstance(wanted, str) or wanted < 1:
        raise ValueError(f"train.micro_batch_size ({wanted!r}) must be a number of at least 1, or auto.")
    return min(int(wanted), share)


def _even_sizes(total: int, parts: int) -> np.ndarray:
    """``parts`` sizes that differ by at most one and add up to ``total``."""
    return np.full(parts, total // parts, dtype=np.int64) + (np.arange(parts) < total % parts)


def _deal(count: int, world_size: int) -> np.ndarray:
    """Rank of each of ``count`` sorted posts: 0 1 2 2 1 0 0 1 2 ..."""
    turns, seat = np.divmod(np.arange(count), world_size)
    return np.where(turns % 2 == 0, seat, world_size - 1 - seat)


def proportional(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """Rates that follow the sizes: every post once per epoch. ``temperature`` has no effect."""
    return sizes_G / sizes_G.sum()


def uniform(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """The same rate for every data set. ``temperature`` has no effect."""
    return np.full(len(sizes_G), 1 / len(sizes_G))


def by_temperature(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """Rates proportional to size ** (1 / temperature): 1 is proportional, large is uniform.

    Source: Aharoni et al. 2019, arXiv:1903.00089.
    """
    if not temperature >= 1:
        raise ValueError(
            f"data.mixing_temperature ({temperature}) must be at least 1: below, small data sets would vanish. "
            "1 is proportional, 2 is usual, more is closer to uniform."
        )
    scaled_G = sizes_G.astype(np.float64) ** (1 / temperature)
    return scaled_G / scaled_G.sum()


MIXINGS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "proportional": proportional,
    "uniform": uniform,
    "temperature": by_temperature,
}
"""Sampling rule: (posts per data set, temperature) -> share of the draws per data set, summing to 1."""
