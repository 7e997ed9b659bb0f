"""Losses on the gates: hand-computed values and independence of how tokens fall on ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from comoe.losses.routing import (
    BalanceLoss,
    TaskSeparationLoss,
    ZLoss,
    balance_loss,
    gate_vectors,
    task_separation,
)
from comoe.models.moe.gate import SigmoidGate, SoftmaxGate
from comoe.types import IGNORED, Batch, ModelOutput

GATE, NO_BIAS = SigmoidGate(2), torch.zeros(4)


def routing_of(rows=30, seed=0):
    z = torch.randn(
        rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()
    return GATE(z, NO_BIAS)


def output_of(*routings):
    return ModelOutput({}, {}, {}, routings, torch.zeros(routings[0].logits_SE.shape[0]))


def alone(tensor):
    return tensor.detach().clone()


@pytest.mark.parametrize(("k", "expected"), [(1, 4.0), (2, 2.0), (4, 1.0)])
def test_an_even_load_costs_one_and_a_full_collapse_experts_over_k(k, expected):
    picked = torch.tensor([1.0] * k + [0.0] * (4 - k))
    for scale in (1.0, 1e-3):  # shares of the scores, not the scores
        value = balance_loss(scale * picked.repeat(10, 1), picked * 10, num_tokens=10)
        assert value.item() == pytest.approx(expected)
    even = balance_loss(torch.rand(40, 4), torch.full((4,), 10 * k), num_tokens=40)
    assert even.item() == pytest.approx(1.0)


def test_the_balance_loss_equals_its_formula():
    routing = routing_of()
    scores, counts = routing.scores_SE.detach(), routing.counts_E
    shares = [counts[e].item() / 60 for e in range(4)]
    likely = [sum(scores[s, e] / scores[s].sum() for s in range(30)).item() / 30 for e in range(4)]
    loss = balance_loss(routing.scores_SE, counts, num_tokens=30)
    assert loss.item() == pytest.approx(4 * sum(f * p for f, p in zip(shares, likely, strict=True)))


def test_the_gradient_pushes_busy_experts_down():
    z = torch.zeros(10, 4, requires_grad=True)
    balance_loss(torch.sigmoid(z), torch.tensor([20, 0, 0, 0]), num_tokens=10).backward()
    assert (z.grad[:, 0] > 0).all() and (z.grad[:, 1:] < 0).all()


def scaled_by(tokens, *, shares=1):
    """What the trainer hands over: ranks * micro-steps / tokens of the whole step, behind the tasks' own."""
    return SimpleNamespace(
        unit_scale_T=torch.tensor([0.0, shares / tokens, 0.0], dtype=torch.float64)
    )


def z_loss():
    return ZLoss(GATE.z_penalty)


@pytest.mark.parametrize("build", [BalanceLoss, z_loss])
def test_shares_of_uneven_ranks_average_to_the_whole(build, monkeypatch):
    z = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = build()(output_of(GATE(z, NO_BIAS)), scaled_by(30))[0]
    parts = [output_of(GATE(part, NO_BIAS)) for part in z.split([7, 23])]
    counts_1E = GATE(z, NO_BIAS).counts_E[None]
    monkeypatch.setattr("comoe.losses.routing.sum_over_ranks", lambda own: counts_1E.clone())
    term = build()
    values = []
    for part in parts:
        term.begin_step()
        values.append(term(part, scaled_by(30, shares=2))[0])
    torch.testing.assert_close(sum(values) / 2, whole)


def test_under_accumulation_load_and_tokens_are_those_of_the_whole_step():
    first, second = routing_of(rows=10, seed=1), routing_of(rows=30, seed=2)
    term = BalanceLoss()
    batch = scaled_by(40, shares=2)
    term(output_of(first), batch)
    value = term(output_of(second), batch)[0]
    running = 2 * balance_loss(second.scores_SE, first.counts_E + second.counts_E, num_tokens=40)
    torch.testing.assert_close(value, running)
    term.begin_step()
    fresh = 2 * balance_loss(second.scores_SE, second.counts_E, num_tokens=40)
    torch.testing.assert_close(term(output_of(second), batch)[0], fresh)
    assert abs(running - fresh) > 1e-6


def test_layers_are_averaged():
    first, second = routing_of(seed=1), routing_of(seed=2)
    for build in (BalanceLoss, z_loss):
        one, two, both = (
            build()(output_of(*routings), scaled_by(30))[0]
            for routings in ((first,), (second,), (first, second))
        )
        torch.testing.assert_close(both, (one + two) / 2)


def test_the_z_loss_has_the_form_that_suits_the_gate():
    z = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    for gate, expected in ((SigmoidGate(2), [3.5, 0.0]), (SoftmaxGate(2), [10.083898, 1.921812])):
        torch.testing.assert_close(gate.z_penalty(z), torch.tensor(expected))
        value, logged = ZLoss(gate.z_penalty)(output_of(gate(z, NO_BIAS)), scaled_by(2))
        assert value.item() == logged["z"].item() == pytest.approx(sum(expected) / 2)


NAMES = ("mood", "heat", "signs", "words")


def posts(rows=10, *, missing=0.4, seed=0):
    """Rows of three tokens with labels of some of four tasks; the first row is unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(rows, 4, generator=generator) < missing
    gone[0] = True
    labels = {
        "mood": torch.where(gone[:, 0], IGNORED, 1),
        "heat": torch.where(gone[:, 1], math.nan, 0.5),
        "signs": torch.where(gone[:, 2:3], math.nan, torch.ones(rows, 2)),
        "words": torch.where(gone[:, 3:4], IGNORED, torch.tensor([[IGNORED, 1, 0]])),
    }
    ids = torch.zeros(rows, 3, dtype=torch.int64)
    return Batch(ids, ids + 1, None, ids > 0, ids[:, 0] - 1, ids[:, 0], labels), ~gone


def separated(z, batch, rows_S, gate=GATE, term=None):
    term = term or TaskSeparationLoss(NAMES)
    routings = tuple(gate(layer, NO_BIAS) for layer in z)
    return term(ModelOutput({}, {}, {}, routings, rows_S), batch)[0], routings


def by_hand(routings, labelled, rows_S):
    """Task separation in plain Python numbers."""
    layers = []
    for routing in routings:
        means = []
        for task in range(labelled.shape[1]):
            mine = [s for s, row in enumerate(rows_S.tolist()) if labelled[row, task]]
            gates = [[0.0] * 4 for _ in mine]
            for vector, s in zip(gates, mine, strict=True):
                for expert, weight in zip(
                    routing.indices_Sk[s].tolist(), routing.weights_Sk[s].tolist(), strict=True
                ):
                    vector[expert] = weight
            if mine:
                means.append([sum(column) / len(mine) for column in zip(*gates, strict=True)])
        pairs = [(a, b) for i, a in enumerate(means) for b in means[i + 1 :]]
        cosines = [
            sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            for a, b in pairs
        ]
        layers.append(sum(cosines) / len(cosines))
    return sum(layers) / len(layers)


def gate_logits(tokens=30, layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        3 * torch.randn(layers, tokens, 4, generator=generator, dtype=torch.float64)
    ).requires_grad_()


@pytest.mark.parametrize("gate", [SigmoidGate(1), SigmoidGate(2), SigmoidGate(4), SoftmaxGate(2)])
def test_task_separation_equals_a_float64_reference(gate):
    (batch, labelled), rows_S = posts(), torch.arange(10).repeat_interleave(3)
    value, routings = separated(gate_logits(), batch, rows_S, gate)
    assert value.item() == pytest.approx(by_hand(routings, labelled, rows_S), abs=1e-12)
    assert 0.05 < value < 1


def test_the_gradient_of_task_separation_is_exact():
    (batch, _), rows_S, z = (
        posts(rows=4, missing=0.2),
        torch.arange(4).repeat_interleave(2),
        gate_logits(8),
    )
    # Far from a tie, so that the small steps of the check change no pick.
    assert torch.autograd.gradcheck(
        lambda z: separated(z, batch, rows_S)[0], z, eps=1e-7, atol=1e-6
    )


def test_tasks_with_one_gate_cost_one_and_tasks_without_a_shared_expert_nothing():
    even = torch.tensor([[[3.0, 1.0, 0.0, 0.0], [0.3, 0.1, 0.0, 0.0]]])
    apart = torch.tensor([[[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]]])
    for gates, cost in ((even, 1.0), (apart, 0.0), (torch.cat([even, apart]), 0.5)):
        assert task_separation(gates).item() == pytest.approx(cost)
    # A task without tokens takes no part.
    rows = torch.tensor([[[3.0, 1.0], [0.0, 0.0], [1.0, 3.0]]], requires_grad=True)
    value = task_separation(rows)
    assert value.item() == pytest.approx(0.6)
    value.backward()
    assert rows.grad.isfinite().all() and not rows.grad[0, 1].any() and rows.grad[0, 0].any()


@pytest.mark.parametrize("present", [0, 1])
def test_with_fewer_than_two_tasks_the_term_is_zero_with_a_gradient(present):
    gates = torch.zeros(2, 3, 4)
    gates[:, :present] = 1.0
    value = task_separation(gates.requires_grad_())
    value.backward()
    assert value.item() == 0 and gates.grad is not None and not gates.grad.any()


def test_gate_vectors_hold_the_weight_of_each_expert():
    routing = routing_of()
    vectors = gate_vectors(routing)
    torch.testing.assert_close(vectors.gather(1, routing.indices_Sk), routing.weights_Sk)
    torch.testing.assert_close(vectors.sum(1), torch.ones(30, dtype=torch.float64))


def test_equal_micro_steps_give_the_task_separation_and_gradient_of_one():
    (batch, _), rows_S = posts(), torch.arange(10).repeat_interleave(3)
    z = gate_logits()
    (once,) = torch.autograd.grad(separated(z, batch, rows_S)[0], z)
    term = TaskSeparationLoss(NAMES)
    values = [separated(z, batch, rows_S, term=term)[0] for _ in range(3)]
    (thrice,) = torch.autograd.grad(sum(values) / 3, z)
    torch.testing.assert_close(values, [values[0]] * 3)
    torch.testing.assert_close(thrice, once)


def test_task_separation_counts_the_micro_steps_since_begin_step():
    rows_S, term = (torch.arange(10).repeat_interleave(3), TaskSeparationLoss(NAMES))
    (first, _), (second, _) = posts(seed=1), posts(seed=2)
    separated(gate_logits(seed=1), first, rows_S, term=term)
    running = separated(gate_logits(seed=2), second, rows_S, term=term)[0]
    # The same as one batch with the tokens of both.
    labels = {name: torch.cat([first.labels[name], second.labels[name]]) for name in NAMES}
    ids = torch.zeros(20, 3, dtype=torch.int64)
    both = Batch(ids, ids + 1, None, ids > 0, ids[:, 0] - 1, ids[:, 0], labels)
    together = torch.cat([gate_logits(seed=1), gate_logits(seed=2)], dim=1)
    torch.testing.assert_close(
        running, separated(together, both, torch.cat([rows_S, rows_S + 10]))[0]
    )
    term.begin_step()
    fresh = separated(gate_logits(seed=2), second, rows_S, term=term)[0]
    assert abs(fresh - running) > 1e-4
    torch.testing.assert_close(fresh, separated(gate_logits(seed=2), second, rows_S)[0])
