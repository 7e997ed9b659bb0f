"""The routing measures against numbers worked out by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.evaluation.routing_stats import RoutingStats, mutual_information, share_measures
from comoe.types import IGNORED, Batch, ModelOutput, Routing, labelled_rows


def routing(scores, picks):
    scores, picks = torch.tensor(scores), torch.tensor(picks)
    return Routing(
        logits_SE=scores,
        scores_SE=scores,
        indices_Sk=picks,
        weights_Sk=torch.ones(picks.shape) / picks.shape[1],
        counts_E=torch.bincount(picks.flatten(), minlength=scores.shape[1]),
        # Norms of the updates 0, 1, 2, ..., of the states 10.
        energies_S2=torch.stack(
            [torch.arange(len(scores)) ** 2.0, torch.full((len(scores),), 100.0)], dim=1
        ),
    )


def output(routings, rows):
    rows_S = torch.tensor(rows)
    return ModelOutput(
        logits={}, embeddings={}, attentions={}, routings=tuple(routings), token_rows_S=rows_S
    )


SCORES = [[0.9, 0.6, 0.1, 0.1], [0.9, 0.4, 0.1, 0.1], [0.3, 0.2, 0.8, 0.7], [0.1, 0.1, 0.9, 0.9]]
PICKS = [[0, 1], [0, 1], [2, 3], [2, 3]]


def two_tasks():
    """Tokens 0, 1 belong to row 0 (task a), 2 to row 1 (task b), 3 to row 2 (no label)."""
    stats = RoutingStats(["a", "b"], num_layers=1, num_experts=4)
    labelled = torch.tensor([[True, False], [False, True], [False, False]])
    stats.update(output([routing(SCORES, PICKS)], [0, 0, 1, 2]), labelled)
    return stats


def test_counts_and_measures_equal_the_hand_computed_ones():
    stats = two_tasks()
    assert stats._sums[:, :-1, :4].tolist() == [[[2, 2, 0, 0], [0, 0, 1, 1]]]
    assert stats._sums[:, :-1, -1].tolist() == [[2, 1]]
    summary = stats.summary()
    assert summary.tokens == 3
    np.testing.assert_allclose(summary.share_LE, [[1 / 3, 1 / 3, 1 / 6, 1 / 6]])
    np.testing.assert_allclose(summary.share_LTE, [[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]])
    entropy = 2 / 3 * math.log(3) + 1 / 3 * math.log(6)
    expected = {
        "max_violation": 1 / 3,
        "entropy": entropy,
        "effective_experts": math.exp(entropy),
        "dead_share": 0.0,
        "monopoly": 1 / 3,
        "cooperation": 5 / 3,  # 2 picked experts above 0.5 for tokens 0 and 2, 1 for token 1
        "task_information": 2 / 3 * math.log(3 / 2)
        + 1 / 3 * math.log(3),  # the expert tells the task: H(task)
    }
    # Both picked experts weigh the same here, so the measures of the weights are those of the
    # routes.
    expected |= {
        f"weight_{name}": expected[name]
        for name in ("monopoly", "effective_experts", "task_information")
    }
    shares = [[score / sum(scores) for score in scores] for scores in SCORES[:3]]
    entropies = [-sum(share * math.log(share) for share in of_token) for of_token in shares]
    expected["gate_entropy"] = sum(entropies) / 3 / math.log(4)
    expected |= {"weight_spread": 0.0, "update_ratio": math.sqrt((0 + 1 + 4) / 300)}
    assert set(summary.by_layer) == set(expected)
    for name, value in expected.items():
        assert summary.by_layer[name][0] == pytest.approx(value, abs=1e-7), name
    np.testing.assert_allclose(summary.by_task["update_ratio"], [[math.sqrt(1 / 200), 0.2]])
    np.testing.assert_allclose(summary.by_task["effective_experts"], [[2, 2]])
    np.testing.assert_allclose(summary.by_task["dead_share"], [[0.5, 0.5]])
    np.testing.assert_allclose(summary.by_task["cooperation"], [[1.5, 2.0]])


def test_a_token_counts_for_each_label_of_its_post_but_once_for_the_layer():
    stats = RoutingStats(["a", "b"], num_layers=1, num_experts=4)
    stats.update(output([routing(SCORES[:2], PICKS[:2])], [0, 0]), torch.tensor([[True, True]]))
    assert stats._sums[:, :-1, -1].tolist() == [[2, 2]]
    summary = stats.summary()
    assert summary.tokens == 2
    assert summary.by_layer["task_information"][0] == pytest.approx(0.0, abs=1e-12)
    assert summary.by_layer["dead_share"][0] == 0.5


def test_where_every_expert_runs_only_the_weights_tell_of_a_monopoly():
    scores_SE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    picks_Sk = torch.tensor([[0, 1], [0, 1], [1, 0]])
    every = Routing(
        scores_SE,
        scores_SE,
        picks_Sk,
        scores_SE.gather(1, picks_Sk),
        torch.tensor([3, 3]),
        torch.ones(3, 2),
    )
    stats = RoutingStats(["a", "b"], num_layers=1, num_experts=2)
    stats.update(output([every], [0, 0, 1]), torch.tensor([[True, False], [False, True]]))
    summary = stats.summary()
    np.testing.assert_allclose(summary.share_LE, [[0.5, 0.5]])
    np.testing.assert_allclose(summary.weight_LE, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(summary.weight_LTE, [[[0.85, 0.15], [0.3, 0.7]]], rtol=1e-6)
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert summary.by_layer["monopoly"][0] == 0.5
    assert summary.by_layer["task_information"][0] == pytest.approx(0)
    assert summary.by_layer["weight_monopoly"][0] == pytest.approx(2 / 3)
    assert summary.by_layer["weight_effective_experts"][0] == pytest.approx(math.exp(entropy))
    assert summary.by_layer["weight_task_information"][0] > 0.1
    assert summary.by_layer["weight_spread"][0] == pytest.approx(
        2 * np.std([0.9, 0.1, 0.8, 0.2, 0.3, 0.7])
    )


def test_adding_the_ranks_tensors_equals_one_rank_with_all_tokens():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(12, 4, generator=generator)
    picks = scores.topk(2).indices
    labelled = torch.tensor([[True, False], [True, True], [False, True]])
    rows = [0, 1, 2] * 4
    whole = RoutingStats(["a", "b"], num_layers=2, num_experts=4)
    every = routing(scores.tolist(), picks.tolist())
    whole.update(output([every] * 2, rows), labelled)
    parts = [RoutingStats(["a", "b"], num_layers=2, num_experts=4) for _ in range(2)]
    for part, tokens in zip(parts, (slice(0, 3), slice(3, 12)), strict=True):
        share = routing(scores[tokens].tolist(), picks[tokens].tolist())
        share = replace(share, energies_S2=every.energies_S2[tokens])
        part.update(output([share] * 2, rows[tokens]), labelled)
    parts[0].load(parts[0].as_tensor() + parts[1].as_tensor())
    torch.testing.assert_close(parts[0].as_tensor(), whole.as_tensor())
    assert whole.summary().histogram_LH.sum() == 2 * 12 * 4
    parts[0].reset()
    assert parts[0].as_tensor().abs().sum() == 0


def test_even_use_and_a_monopoly_are_the_two_ends_of_the_measures():
    names = ("max_violation", "effective_experts", "dead_share", "monopoly")
    for shares, ends in (([0.25] * 4, (0, 4, 0, 0.25)), ([0.0, 1.0, 0.0, 0.0], (3, 1, 0.75, 1))):
        found = share_measures(np.array(shares))
        assert [found[name] for name in names] == pytest.approx(ends)
    # Two equal tasks that use different experts, and two that use the same.
    counts = np.array([[[5, 5, 0, 0], [0, 0, 2, 8]], [[3, 1, 0, 0], [6, 2, 0, 0]]])
    np.testing.assert_allclose(mutual_information(counts), [math.log(2), 0.0], atol=1e-12)


def test_a_window_without_tokens_is_written_as_null_and_without_experts_there_is_nothing():
    summary = RoutingStats(["a"], num_layers=1, num_experts=2).summary()
    line = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert line["tokens"] == 0
    assert line["entropy"] == [None] and line["effective_experts"] == [None]
    assert line["tasks"]["a"]["share"] == [[None, None]]
    stats = RoutingStats(["a"], num_layers=0, num_experts=0)
    stats.update(output([], [0, 0]), torch.tensor([[True]]))
    assert stats.summary().tokens == 0 and stats.as_tensor().numel() == 0


def test_labelled_rows_reads_every_shape_of_target():
    nan, ids = float("nan"), torch.zeros(2, 3, dtype=torch.int64)
    labels = {
        "single": torch.tensor([1, IGNORED]),
        "multi": torch.tensor([[nan, nan], [0.0, 1.0]]),
        "number": torch.tensor([nan, 0.5]),
        "tags": torch.tensor([[IGNORED, 2, IGNORED], [IGNORED, IGNORED, IGNORED]]),
    }
    batch = Batch(ids, ids + 1, None, ids == 0, torch.full((2,), -1), torch.arange(2), labels)
    rows = labelled_rows(batch, list(labels))
    assert rows.tolist() == [[True, False, False, True], [False, True, True, False]]


def test_layers_of_a_decoder_count_the_tokens_of_answers_and_say_whose_they_are():
    stats = RoutingStats(["a"], num_layers=2, num_experts=2, layers=[1, 4], first_decoder_layer=3)
    both = output(
        [routing([[0.5, 0.5]] * 3, [[0]] * 3), routing([[0.5, 0.5]] * 2, [[1]] * 2)], [0, 0, 1]
    )
    both = replace(both, answer_rows_S=torch.tensor([0, 1]), num_answer_layers=1)
    stats.update(both, torch.tensor([[True], [False]]))
    assert stats._sums[:, :-1, -1].tolist() == [[2.0], [1.0]]
    assert stats.summary().layer_names == ["1", "1 of the decoder"]
