"""Sampling: the mix of data sets, batches of similar length, equal shares for any number of ranks."""

import json

import numpy as np
import pytest

from comoe.data.sampling.mixing import MIXINGS, draws_per_epoch
from comoe.data.sampling.sampler import SamplerConfig, TrainSampler, eval_batches


def make_sampler(*, sizes: tuple[int, ...] = (70, 20, 7), **options: object) -> TrainSampler:
    total = sum(sizes)
    lengths = np.random.default_rng(5).integers(3, 60, total)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    settings = {"batch_size": 12, "world_size": 1, "micro_batch_size": "auto", "seed": 3} | options
    return TrainSampler(lengths, groups, SamplerConfig(**settings))


def test_each_post_comes_once_per_epoch_under_proportional_mixing():
    sampler, count = make_sampler(), 9
    assert sampler.steps_per_epoch == count
    batches = [sampler.global_batch(step) for step in range(3 * count)]
    for epoch in range(3):
        drawn = np.concatenate(batches[epoch * count : (epoch + 1) * count])
        assert sorted(drawn) == list(range(97))
    assert {len(batch) for batch in batches} == {10, 11}
    # Epochs and seeds shuffle differently.
    for other in (batches[count], make_sampler(seed=4).global_batch(0)):
        assert not np.array_equal(batches[0], other)


def test_a_step_is_the_same_in_any_order_of_asking():
    steps = [0, 20, 3, 9, 8, 3, 0, 40]
    sequential = make_sampler()
    in_order = [sequential.global_batch(step) for step in range(41)]
    jumping = make_sampler()
    for step in steps:
        assert np.array_equal(jumping.global_batch(step), in_order[step])


def test_rates_equal_the_hand_computed_ones():
    sizes = np.array([900, 100])
    assert MIXINGS["proportional"](sizes, 2.0) == pytest.approx([0.9, 0.1])
    assert MIXINGS["uniform"](sizes, 2.0) == pytest.approx([0.5, 0.5])
    assert MIXINGS["temperature"](sizes, 1.0) == pytest.approx([0.9, 0.1])
    assert MIXINGS["temperature"](sizes, 2.0) == pytest.approx([0.75, 0.25])  # 30 : 10
    assert MIXINGS["temperature"](sizes, 1e9) == pytest.approx([0.5, 0.5])


def test_draws_add_up_and_give_the_rest_to_the_largest_remainder():
    assert list(draws_per_epoch(np.array([0.5, 0.3, 0.2]), total=7)) == [4, 2, 1]  # 3.5, 2.1, 1.4
    thirds = np.array([3000, 3000, 1000]) / 7000
    assert list(draws_per_epoch(thirds, total=7000)) == [3000, 3000, 1000]


def test_uniform_mixing_repeats_the_small_set_and_passes_over_all_of_the_large_one():
    sampler = make_sampler(sizes=(60, 12), mixing="uniform")
    drawn = [np.concatenate([sampler.global_batch(e * 6 + s) for s in range(6)]) for e in range(5)]
    for epoch in drawn:
        large, small = np.bincount(epoch, minlength=72)[:60], np.bincount(epoch, minlength=72)[60:]
        assert large.sum() == small.sum() == 36
        assert set(small) == {3}
        assert large.max() <= 2
    # 5 epochs of 36 draws are three whole passes over the 60 posts.
    assert set(np.bincount(np.concatenate(drawn), minlength=72)[:60]) == {3}


def test_posts_of_a_batch_are_of_similar_length():
    lengths = np.random.default_rng(0).integers(3, 120, 4096)
    sampler = TrainSampler(lengths, np.zeros(4096, dtype=int), SamplerConfig(batch_size=32, seed=0))
    padded = sum(
        len(b) * lengths[b].max() for b in map(sampler.global_batch, range(sampler.steps_per_epoch))
    )
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 32)
    assert padded < 1.2 * lengths.sum()
    assert (32 * shuffled.max(axis=1)).sum() > 1.7 * lengths.sum()


def test_ranks_get_nearly_the_same_number_of_tokens():
    lengths = np.random.default_rng(0).integers(3, 120, 4096)
    sampler = TrainSampler(
        lengths, np.zeros(4096, dtype=int), SamplerConfig(batch_size=64, world_size=4, seed=0)
    )
    tokens = np.array(
        [[lengths[sampler.share(s, r)[0]].sum() for r in range(4)] for s in range(64)]
    )
    assert (tokens.max(axis=1) / tokens.mean(axis=1)).mean() < 1.02


def test_fewer_posts_than_ranks_leave_empty_shares_and_no_rank_out():
    config = SamplerConfig(batch_size=8, world_size=4, seed=0)
    sampler = TrainSampler(np.array([5, 6]), np.array([0, 0]), config)
    shares = [sampler.share(0, rank) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]
    assert sum(len(share[0]) for share in shares) == 2
    assert all(share[0].dtype == np.int64 for share in shares)
    with pytest.raises(ValueError, match="no training posts"):
        TrainSampler(np.zeros(0), np.zeros(0), SamplerConfig(batch_size=4))


def test_auto_micro_batch_is_the_share_of_a_rank_up_to_128():
    assert make_sampler(batch_size=32, world_size=4).micro_batch_size == 8
    big = make_sampler(batch_size=1024, world_size=2)
    assert (big.micro_batch_size, big.accumulation) == (128, 4)


def test_every_batch_holds_every_data_set_in_its_share_though_their_lengths_differ():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(5, 20, 3000), rng.integers(30, 60, 1000)])
    groups = np.repeat([0, 1], [3000, 1000])
    sampler = TrainSampler(lengths, groups, SamplerConfig(batch_size=32))
    batches = [sampler.global_batch(step) for step in range(sampler.steps_per_epoch)]
    long_posts = [int(groups[batch].sum()) for batch in batches]
    assert min(long_posts) >= 6 and max(long_posts) <= 10
    # Similar in length within a data set: the spread inside a batch is a fraction of the spread of
    # all posts.
    spreads = [lengths[batch][groups[batch] == 0].std() for batch in batches]
    assert np.mean(spreads) < 0.25 * lengths[groups == 0].std()


def progress_sampler(**options: object) -> TrainSampler:
    return make_sampler(mixing="progress", **options)


def with_history(
    sampler: TrainSampler, changes: dict[int, list[float]], *, every: int = 4
) -> list[dict]:
    """A run's history: each change is made when its step is reached."""
    history: list[dict] = []
    sampler.follow(history, every=every)
    for step, rates in changes.items():
        history.append(sampler.change(step, np.array(rates)))
        sampler.follow(history, every=every)
    return json.loads(json.dumps(history))


CHANGES = {4: [0.2, 0.3, 0.5], 8: [0.6, 0.2, 0.2], 12: [0.1, 0.8, 0.1], 14: [0.3, 0.3, 0.4]}


def test_a_sampler_restarted_at_a_step_goes_on_to_the_index_with_the_history_of_rates():
    running, drawn, history = progress_sampler(), [], []
    running.follow(history, every=4)
    for step in range(24):
        if step in CHANGES:
            history.append(running.change(step, np.array(CHANGES[step])))
            running.follow(history, every=4)
        drawn.append(running.global_batch(step))
    for start in (0, 3, 4, 9, 13, 14, 21):
        fresh = progress_sampler()
        fresh.follow(
            [entry for entry in json.loads(json.dumps(history)) if entry["step"] <= start], every=4
        )
        for step in range(start, min((at for at in CHANGES if at > start), default=24)):
            assert np.array_equal(fresh.global_batch(step), drawn[step]), (start, step)
    # With the whole history any step can be asked for, in any order.
    for step in (23, 2, 13, 15, 0):
        assert np.array_equal(running.global_batch(step), drawn[step])


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_draws_that_follow_progress_are_the_same_on_any_number_of_ranks(world_size):
    one, many = progress_sampler(), progress_sampler(world_size=world_size)
    history = with_history(one, CHANGES)
    assert with_history(many, CHANGES) == history
    for step in range(16):
        dealt = np.concatenate(
            [micro for rank in range(world_size) for micro in many.share(step, rank)]
        )
        assert sorted(dealt) == sorted(one.global_batch(step))


def test_changed_rates_hold_from_their_step_on_and_streams_go_on_where_they_were():
    sampler, other = (progress_sampler(sizes=(60, 60)) for _ in range(2))
    groups = np.repeat([0, 1], [60, 60])
    with_history(sampler, {5: [0.25, 0.75]}, every=5)
    before = np.concatenate([sampler.global_batch(step) for step in range(5)])
    after = np.concatenate([sampler.global_batch(step) for step in range(5, 10)])
    assert np.bincount(groups[before]).tolist() == [30, 30]
    assert np.bincount(groups[after]).tolist() == [15, 45]
    # The second data set's 60 posts come once each before any comes again: 30, then 30 of the 45.
    counts = np.bincount(np.concatenate([before, after]), minlength=120)[60:]
    assert counts.sum() == 75 and counts.min() == 1 and counts.max() == 2
    # An entry that cuts a stretch short rules from its step.
    with_history(other, {2: [1.0, 0.0]}, every=5)
    assert (other.global_batch(2) < 60).all() and (other.global_batch(1) >= 60).any()


def test_labels_of_a_balanced_data_set_come_equally_often_and_posts_without_label_keep_their_share():
    # One data set with 40, 16, 4 posts of three labels and 20 without; another one that is not
    # balanced.
    classes = np.concatenate([np.repeat([0, 1, 2, -1], [40, 16, 4, 20]), np.full(40, -1)])
    groups = np.repeat([0, 1], [80, 40])
    sampler = TrainSampler(
        np.full(120, 5), groups, SamplerConfig(12, seed=1), classes=classes[:, None]
    )
    assert sampler.steps_per_epoch == 10
    for epoch in range(2):
        drawn = np.concatenate([sampler.global_batch(10 * epoch + step) for step in range(10)])
        assert np.bincount(groups[drawn]).tolist() == [80, 40]
        inside = classes[drawn[groups[drawn] == 0]]
        assert [int((inside == label).sum()) for label in (-1, 0, 1, 2)] == [20, 20, 20, 20]
        # Posts without the label, and the other data set, come once each.
        assert sorted(drawn[classes[drawn] < 0]) == [*range(60, 80), *range(80, 120)]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_rows_is_refused_rather_than_everything_left_out(size):
    with pytest.raises(ValueError, match="it must be at least 1"):
        eval_batches(np.ones(3), batch_size=size)


def test_each_batch_of_a_balanced_data_set_has_every_label_also_where_length_tells_it():
    labels = np.repeat([0, 1, 2], [300, 200, 100])
    lengths = np.random.default_rng(4).integers(3, 9, 600) + 20 * labels
    config = SamplerConfig(batch_size=24, world_size=1, micro_batch_size="auto", seed=1)
    sampler = TrainSampler(lengths, np.zeros(600, dtype=np.int64), config, classes=labels[:, None])
    counts = [np.bincount(labels[sampler.global_batch(step)], minlength=3) for step in range(50)]
    assert np.abs(np.array(counts) - 8).max() <= 3


def test_draws_are_even_over_the_labels_of_two_tasks_at_once():
    classes = np.array([[0, 0]] * 60 + [[0, 1]] * 30 + [[1, 0]] * 20 + [[1, 1]] * 10)
    sampler = TrainSampler(
        np.full(120, 5), np.zeros(120, dtype=int), SamplerConfig(12, seed=1), classes=classes
    )
    drawn = np.concatenate([sampler.global_batch(step) for step in range(100)])
    assert np.bincount(classes[drawn, 0]) / len(drawn) == pytest.approx([0.5, 0.5], abs=0.01)
    assert np.bincount(classes[drawn, 1]) / len(drawn) == pytest.approx([0.5, 0.5], abs=0.01)


def data_set_of(batch: np.ndarray) -> int:
    """The one data set of ``make_sampler`` that all posts of a batch are of."""
    (group,) = {*np.searchsorted([70, 90], batch, side="right").tolist()}
    return group


def test_the_steps_of_an_inner_loop_have_posts_of_one_data_set_as_often_as_the_mixing_says():
    for mixing, rates in (("proportional", [70, 20, 7]), ("uniform", [1, 1, 1])):
        sampler = make_sampler(inner_steps=3, mixing=mixing)
        batches = [sampler.global_batch(step) for step in range(3 * 60)]
        loops = np.array([data_set_of(batch) for batch in batches]).reshape(60, 3)
        assert (loops == loops[:, :1]).all()
        assert {len(batch) for batch in batches} == {10, 11}
        had = np.cumsum(np.eye(3)[loops[:, 0]], axis=0)
        due = np.arange(1, 61)[:, None] * np.array(rates) / sum(rates)
        assert np.abs(had - due).max() < 2
        # The order is the seed's.
        other = make_sampler(inner_steps=3, mixing=mixing, seed=8)
        assert [data_set_of(other.global_batch(3 * loop)) for loop in range(60)] != list(
            loops[:, 0]
        )


def test_inner_loops_lose_no_post():
    sampler = make_sampler(inner_steps=3, mixing="uniform")
    seen: list[list[int]] = [[], [], []]
    for batch in map(sampler.global_batch, range(3 * 60)):
        seen[data_set_of(batch)].extend(batch.tolist())
    for drawn, size in zip(seen, (70, 20, 7), strict=True):
        counts = np.unique(drawn, return_counts=True)[1]
        # Each of its posts, and none again before all others have come.
        assert len(counts) == size and counts.max() - counts.min() <= 1


def test_an_inner_loop_is_the_same_in_any_order_of_asking_and_on_any_number_of_ranks():
    sequential = make_sampler(inner_steps=4)
    in_order = [sequential.global_batch(step) for step in range(41)]
    jumping, two = make_sampler(inner_steps=4), make_sampler(inner_steps=4, world_size=2)
    for step in (0, 40, 3, 9, 8, 3, 0, 40):
        assert np.array_equal(jumping.global_batch(step), in_order[step])
        shares = [post for rank in (0, 1) for part in two.share(step, rank) for post in part]
        assert sorted(shares) == sorted(in_order[step])


def test_data_sets_without_an_inner_loop_are_known():
    sampler = make_sampler(inner_steps=4)
    groups = {data_set_of(sampler.global_batch(step)) for step in range(4)}
    assert len(groups) == 1 and sampler.without_turn(4) == sorted({0, 1, 2} - groups)
    assert sampler.without_turn(4 * 60) == []


def test_inner_loops_balance_labels_and_fill_quotas_from_their_own_data_set():
    groups, classes = np.repeat([0, 1], [90, 60]), np.full((150, 1), -1)
    classes[:90, 0] = np.repeat([0, 1], [80, 10])
    members = [np.arange(80), np.arange(80, 90), np.arange(90, 145), np.arange(145, 150)]
    config = SamplerConfig(batch_size=10, posts_per_label=2, inner_steps=5)
    sampler = TrainSampler(np.full(150, 5), groups, config, label_members=members, classes=classes)
    drawn: list[list[np.ndarray]] = [[], []]
    for batch in map(sampler.global_batch, range(200)):
        (group,) = {*groups[batch].tolist()}
        for label in members[2 * group : 2 * group + 2]:
            assert np.isin(batch, label).sum() >= 2
        drawn[group].append(batch)
    assert np.mean(np.concatenate(drawn[0]) >= 80) == pytest.approx(0.5, abs=0.02)
