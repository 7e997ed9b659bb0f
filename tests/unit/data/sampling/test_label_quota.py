"""Batches in which every label has company, and their cut into micro-steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from comoe.data.sampling.label_quota import cut_in_parts
from comoe.data.sampling.sampler import SamplerConfig, TrainSampler

POSTS, BATCH = 400, 20
LABELS = np.array([0] * 340 + [1] * 40 + [2] * 12 + [3] * 7 + [4])
SECOND = np.arange(POSTS) % 3
ONE_TASK = [np.flatnonzero(LABELS == label) for label in range(5)]
MEMBERS = ONE_TASK + [np.flatnonzero(SECOND == label) for label in range(3)]


def sampler(
    posts_per_label: int, *, label_members: Sequence[np.ndarray] = MEMBERS, **options: Any
) -> TrainSampler:
    lengths = np.random.default_rng(0).integers(4, 60, POSTS)
    config = SamplerConfig(BATCH, seed=3, posts_per_label=posts_per_label)
    groups = np.zeros(POSTS, dtype=int)
    config = replace(config, **options)
    return TrainSampler(lengths, groups, config, label_members=label_members)


@pytest.mark.parametrize(("wanted", "members"), [(2, MEMBERS), (4, ONE_TASK)])
def test_every_label_with_two_posts_has_its_quota_in_every_batch(wanted, members):
    plain, filled = sampler(0), sampler(wanted, label_members=members)
    without = 0
    for step in range(2 * plain.steps_per_epoch):
        batch = filled.global_batch(step)
        assert len(batch) == len(plain.global_batch(step))
        assert len(set(batch.tolist())) == len(batch)
        counts = np.bincount(LABELS[batch], minlength=5)
        assert (counts[:4] >= min(wanted, 4)).all()
        without += (np.bincount(LABELS[plain.global_batch(step)], minlength=5)[:4] < wanted).any()
    assert without > plain.steps_per_epoch  # the ordinary batches do not


def test_a_quota_of_zero_and_a_filled_batch_change_nothing():
    plain = sampler(0)
    for step in range(plain.steps_per_epoch):
        np.testing.assert_array_equal(
            plain.global_batch(step), sampler(0, label_members=()).global_batch(step)
        )
    # Two labels, half of the posts each: every batch has both anyway.
    halves = [np.arange(0, POSTS, 2), np.arange(1, POSTS, 2)]
    for step in range(5):
        expected = plain.global_batch(step)
        if min(np.isin(expected, half).sum() for half in halves) >= 2:
            np.testing.assert_array_equal(
                sampler(2, label_members=halves).global_batch(step), expected
            )


def test_labels_take_turns_where_the_batch_has_no_room():
    labels = np.arange(POSTS) % 40
    members = [np.flatnonzero(labels == label) for label in range(40)]
    small = sampler(2, label_members=members)
    served = [
        {label for label in range(40) if (labels[small.global_batch(step)] == label).sum() >= 2}
        for step in range(8)
    ]
    assert all(len(labels_) >= BATCH // 2 for labels_ in served)
    assert set.union(*served) == set(range(40))


def test_a_post_is_drawn_again_the_same_way_and_rare_posts_take_turns():
    first, second = sampler(2), sampler(2)
    drawn = [second.global_batch(step) for step in (7, 3, 11)]
    for step, batch in zip((7, 3, 11), drawn, strict=True):
        np.testing.assert_array_equal(first.global_batch(step), batch)
    seen = {post for step in range(20) for post in first.global_batch(step) if LABELS[post] == 3}
    assert seen == set(MEMBERS[3].tolist())


def test_posts_that_make_room_are_as_often_short_as_long():
    lengths = np.random.default_rng(0).integers(4, 60, POSTS)
    plain, filled = sampler(0), sampler(2)
    gone, there = [], []
    for step in range(3 * plain.steps_per_epoch):
        batch = plain.global_batch(step)
        gone += lengths[np.setdiff1d(batch, filled.global_batch(step))].tolist()
        there += lengths[batch].tolist()
    assert len(gone) > 100 and abs(np.mean(gone) - np.mean(there)) < 3


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_pair_is_in_one_micro_step_and_ranks_share_the_same_batch(world_size):
    cut = sampler(2, world_size=world_size, micro_batch_size=10 // world_size)
    assert cut.accumulation == 2
    for step in range(15):
        ranks = [cut.share(step, rank) for rank in range(world_size)]
        micro_steps = [np.concatenate([share[part] for share in ranks]) for part in range(2)]
        np.testing.assert_array_equal(
            np.sort(np.concatenate(micro_steps)), np.sort(cut.global_batch(step))
        )
        assert [len(part) for part in micro_steps] == [10, 10]
        for label in (1, 2, 3):
            assert max((LABELS[part] == label).sum() for part in micro_steps) >= 2
        alone = sampler(2, micro_batch_size=10).share(step, 0)
        for ours, theirs in zip(micro_steps, alone, strict=True):
            np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


def test_a_post_that_a_batch_holds_twice_stays_twice():
    posts = np.array([5, 5, 6, 7, 8, 8])
    parts = cut_in_parts(posts, [np.array([5, 8])], parts=2)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), posts)
    assert any({5, 8} <= set(part.tolist()) for part in parts)
    assert [len(part) for part in parts] == [3, 3]
