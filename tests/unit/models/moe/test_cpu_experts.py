"""The experts' own autograd step against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from comoe.models.moe.experts import GatedFeedForward, gated, mix_experts, sort_routes
from comoe.models.moe.gate import best_experts

M, WIDE, E = 6, 5, 4


def inputs(tokens=12, k=2, *, unused=3, seed=0):
    """Rows, weights, picks that never name the expert ``unused``, and three projections; float64."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, M, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(tokens, E)
    scores[:, unused] = -1.0
    shapes = ((E, WIDE, M), (E, WIDE, M), (E, M, WIDE))
    projections = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return x, weights, scores.topk(k, dim=1).indices, projections


def mixed(x, weights, picks, projections):
    counts = torch.bincount(picks.reshape(-1), minlength=E).tolist()
    return mix_experts(x, weights, sort_routes(picks), counts, *projections)


def by_hand(x, weights, picks, projections):
    gate, up, down = projections
    rows = []
    for token in range(len(x)):
        answers = [
            down[e] @ (F.silu(gate[e] @ x[token]) * (up[e] @ x[token])) for e in picks[token]
        ]
        rows.append(
            sum(weight * answer for weight, answer in zip(weights[token], answers, strict=True))
        )
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_answers_and_gradients_equal_a_loop_over_tokens(k):
    x, weights, picks, projections = inputs(k=k)
    leaves = [x, weights, *projections]
    answers = [form(x, weights, picks, projections) for form in (mixed, by_hand)]
    torch.testing.assert_close(*answers)
    upstream = torch.randn_like(answers[0])
    gradients = [torch.autograd.grad((answer * upstream).sum(), leaves) for answer in answers]
    torch.testing.assert_close(*gradients)


def test_gradients_pass_the_numerical_check():
    x, weights, picks, projections = inputs(tokens=5)
    assert torch.autograd.gradcheck(lambda *leaves: mixed(leaves[0], leaves[1], picks, leaves[2:]),
                                    (x, weights, *projections))  # fmt: skip


def test_bfloat16_fills_its_rows_up_to_tiles_and_changes_nothing_else():
    x, weights, picks, projections = inputs(tokens=150)
    leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in (x, weights, *projections)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    answers = [
        mixed(leaves[0], leaves[1], picks, leaves[2:]),
        by_hand(exact[0], exact[1], picks, exact[2:]),
    ]
    upstream = torch.randn_like(answers[0])
    found = torch.autograd.grad((answers[0] * upstream).sum(), leaves)
    expected = torch.autograd.grad((answers[1] * upstream.double()).sum(), exact)
    for ours, theirs in zip((answers[0], *found), (answers[1], *expected), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        # Four roundings to 8 bits in a row.
        assert error < 0.015


@pytest.mark.parametrize("rows", [0, 1, 64, 70])
def test_the_dense_block_fills_its_rows_up_too(rows):
    torch.manual_seed(0)
    block = GatedFeedForward(16, 24, output_init=0.1).bfloat16()
    x = torch.randn(rows, 16).bfloat16()
    gate_up, down = (layer.weight.double() for layer in (block.gate_up, block.down))
    expected = gated(x.double() @ gate_up.T) @ down.T
    assert block(x).shape == (rows, 16)
    torch.testing.assert_close(block(x).double(), expected, rtol=0.03, atol=0.01)


def test_an_expert_without_rows_gets_a_gradient_of_zero():
    x, weights, picks, projections = inputs()
    mixed(x, weights, picks, projections).sum().backward()
    for projection in projections:
        assert not projection.grad[3].any() and projection.grad[:3].any(dim=(1, 2)).all()


def test_without_any_row_every_gradient_is_zero_and_not_none():
    x, weights, picks, projections = inputs(tokens=0)
    answer = mixed(x, weights, picks, projections)
    answer.sum().backward()
    assert answer.shape == (0, M) and all(not p.grad.any() for p in projections)


def test_frozen_rows_still_train_the_experts():
    x, weights, picks, projections = inputs()
    mixed(x, weights, picks, projections).sum().backward()
    expected = [p.grad.clone() for p in projections]
    for p in projections:
        p.grad = None
    mixed(x.detach(), weights, picks, projections).sum().backward()
    torch.testing.assert_close([p.grad for p in projections], expected)


def test_bfloat16_stays_close_to_float64():
    x, weights, picks, projections = inputs(tokens=40)
    exact = mixed(x, weights, picks, projections)
    rough = mixed(x.bfloat16(), weights, picks, [p.bfloat16() for p in projections])
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("experts", [3, 64])
def test_the_best_experts_are_those_of_topk(k, experts):
    torch.manual_seed(0)
    scores = torch.rand(50, experts)
    assert torch.equal(best_experts(scores.clone(), k), scores.topk(k, dim=1).indices)


def test_ties_go_to_two_different_experts():
    assert best_experts(torch.ones(3, 4), 2).tolist() == [[0, 1]] * 3
