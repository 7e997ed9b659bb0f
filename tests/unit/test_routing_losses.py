"""Balance and z-loss: hand-computed values and independence of how tokens fall on ranks."""

from __future__ import annotations

import pytest
import torch

from comoe.losses.routing import BalanceLoss, ZLoss, balance_loss
from comoe.models.gate import SigmoidGate, SoftmaxGate
from comoe.protocols import ModelOutput

GATE, NO_BIAS = SigmoidGate(2), torch.zeros(4)


def routing_of(rows=30, seed=0):
    z = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    return GATE(z, NO_BIAS)


def output_of(*routings):
    return ModelOutput({}, {}, {}, routings, torch.zeros(routings[0].logits_SE.shape[0]))


def alone(tensor):
    return tensor.detach().clone()


def test_an_even_load_costs_one():
    scores = torch.rand(40, 4)
    assert balance_loss(scores, torch.full((4,), 20), num_tokens=40).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("k", "expected"), [(1, 4.0), (2, 2.0), (4, 1.0)])
def test_a_full_collapse_costs_experts_over_k(k, expected):
    picked = torch.tensor([1.0] * k + [0.0] * (4 - k))
    assert balance_loss(picked.repeat(10, 1), picked * 10, num_tokens=10).item() == pytest.approx(expected)


def test_the_balance_loss_equals_its_formula():
    routing = routing_of()
    scores, counts = routing.scores_SE.detach(), routing.counts_E
    shares = [counts[e].item() / 60 for e in range(4)]
    likely = [sum(scores[s, e] / scores[s].sum() for s in range(30)).item() / 30 for e in range(4)]
    loss = balance_loss(routing.scores_SE, counts, num_tokens=30)
    assert loss.item() == pytest.approx(4 * sum(f * p for f, p in zip(shares, likely, strict=True)))


def test_shrinking_every_score_alike_changes_nothing():
    scores, counts = torch.rand(10, 4, dtype=torch.float64), torch.tensor([8, 6, 4, 2])
    whole = balance_loss(scores, counts, num_tokens=10)
    torch.testing.assert_close(balance_loss(scores * 1e-3, counts, num_tokens=10), whole)


def test_the_gradient_pushes_busy_experts_down():
    z = torch.zeros(10, 4, requires_grad=True)
    balance_loss(torch.sigmoid(z), torch.tensor([20, 0, 0, 0]), num_tokens=10).backward()
    assert (z.grad[:, 0] > 0).all() and (z.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("build", [BalanceLoss, lambda **options: ZLoss(GATE.z_penalty, **options)])
def test_shares_of_uneven_ranks_average_to_the_whole(build):
    z = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = build(sum_over_ranks=alone, world_size=1)(output_of(GATE(z, NO_BIAS)), None)[0]
    parts = [output_of(GATE(part, NO_BIAS)) for part in z.split([7, 23])]

    def sum_over_two_ranks(tensor):
        return (GATE(z, NO_BIAS).counts_E[None] if tensor.dim() == 2 else tensor * 0 + 30).clone()

    term = build(sum_over_ranks=sum_over_two_ranks, world_size=2)
    values = []
    for part in parts:
        term.begin_step()
        values.append(term(part, None)[0])
    torch.testing.assert_close(sum(values) / 2, whole)


def test_under_accumulation_the_load_is_counted_over_the_micro_steps_since_begin_step():
    first, second = routing_of(seed=1), routing_of(seed=2)
    term = BalanceLoss(sum_over_ranks=alone, world_size=1)
    term(output_of(first), None)
    value = term(output_of(second), None)[0]
    running = balance_loss(second.scores_SE, first.counts_E + second.counts_E, num_tokens=30)
    torch.testing.assert_close(value, running)
    term.begin_step()
    fresh = balance_loss(second.scores_SE, second.counts_E, num_tokens=30)
    torch.testing.assert_close(term(output_of(second), None)[0], fresh)
    assert abs(running - fresh) > 1e-6


def test_layers_are_averaged():
    first, second = routing_of(seed=1), routing_of(seed=2)
    for build in (BalanceLoss, lambda **options: ZLoss(GATE.z_penalty, **options)):
        one, two, both = (
            build(sum_over_ranks=alone, world_size=1)(output_of(*routings), None)[0]
            for routings in ((first,), (second,), (first, second))
        )
        torch.testing.assert_close(both, (one + two) / 2)


def test_the_z_loss_has_the_form_that_suits_the_gate():
    z = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    for gate, expected in ((SigmoidGate(2), [3.5, 0.0]), (SoftmaxGate(2), [10.083898, 1.921812])):
        torch.testing.assert_close(gate.z_penalty(z), torch.tensor(expected))
        term = ZLoss(gate.z_penalty, sum_over_ranks=alone, world_size=1)
        value, logged = term(output_of(gate(z, NO_BIAS)), None)
        assert value.item() == logged["z"].item() == pytest.approx(sum(expected) / 2)
