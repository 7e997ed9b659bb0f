"""Gates: what they pick, how they weigh, and what the balance bias may do."""

import pytest
import torch
from torch import nn

from comoe.config.recipe import MoeConfig
from comoe.models.moe.block import ContextHolder, CooperativeBlock, RoutingContext
from comoe.models.moe.gate import (
    GATES,
    SigmoidGate,
    SoftmaxGate,
    UniformGate,
    balanced_together,
    dealt_experts,
    draw,
    keep_bias,
    nudge_bias,
)
from comoe.models.moe.router import PendingRoute, RouteInputs, RouterProjection, build_gate

NO_BIAS = torch.zeros(4)
LEARNED = [name for name, gate in GATES.items() if not (gate.for_measuring or gate.draws)]


def logits(rows=50, experts=4, seed=0):
    return torch.randn(
        rows, experts, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


@pytest.mark.parametrize("name", GATES)
def test_weights_of_several_experts_sum_to_one_and_counts_cover_every_route(name):
    routing = GATES[name](2, 1.0, 0.0)(logits(), NO_BIAS)
    torch.testing.assert_close(routing.weights_Sk.sum(1), torch.ones(50))
    assert routing.counts_E.tolist() == [(routing.indices_Sk == e).sum().item() for e in range(4)]
    assert routing.weights_Sk.dtype == routing.scores_SE.dtype == torch.float32


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_under_the_automatic_scale_selected_experts_weigh_one_at_the_start(name, top_k):
    moe = MoeConfig(num_experts=8, top_k=top_k, gate=name, temperature=0.8, balance="none")
    z = 0.02 * 384**0.5 * logits(5000, 8).detach().double()
    bias_E = torch.zeros(8, dtype=torch.float64)
    weights_Sk = build_gate(moe, 384)(z, bias_E).weights_Sk
    assert weights_Sk.mean().item() == pytest.approx(1, abs=0.02)
    moe.gate_scale = 1.0
    mean_Sk = build_gate(moe, 384)(z, bias_E).weights_Sk
    if top_k > 1 or name not in LEARNED:
        torch.testing.assert_close(mean_Sk, weights_Sk / top_k)
    else:
        scores_SE = {"sigmoid": torch.sigmoid, "softmax": lambda t: t.softmax(1)}[name](z / 0.8)
        torch.testing.assert_close(mean_Sk[:, 0], scores_SE.amax(1) / scores_SE.sum(1))


@pytest.mark.parametrize("route_by", ["token", "task", "both"])
def test_logits_of_task_and_token_are_equally_wide_at_the_start(route_by):
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=8, top_k=1, route_by=route_by, output_init=0.1)
    holder = ContextHolder(RoutingContext(torch.arange(2000), torch.arange(2000)))
    holder.context.task_embeddings_BD = nn.Embedding(2000, moe.task_embedding_width).weight
    block = CooperativeBlock(384, 8, moe, layer=0, holder=holder)
    block(3 * torch.randn(1, 2000, 384))
    routing = holder.context.routings[0]
    expected = 0.02 * 384**0.5 * (2**0.5 if route_by == "both" else 1)
    assert routing.logits_SE.std().item() == pytest.approx(expected, rel=0.1)
    assert routing.weights_Sk.mean().item() == pytest.approx(1, abs=0.05)


def test_softmax_scores_compete_and_sigmoid_scores_do_not():
    z = torch.full((1, 4), 3.0)
    for gate, score in ((SoftmaxGate(2), 0.25), (SigmoidGate(2), 0.9525741268)):
        torch.testing.assert_close(gate(z, NO_BIAS).scores_SE, torch.full((1, 4), score))
    routing = SigmoidGate(2)(torch.tensor([[0.0, 2.0, -1.0, 1.0]]), NO_BIAS)
    assert routing.indices_Sk.tolist() == [[1, 3]]
    strong, weak = 0.8807970780, 0.7310585786
    torch.testing.assert_close(routing.weights_Sk, torch.tensor([[strong, weak]]) / (strong + weak))


@pytest.mark.parametrize("name", LEARNED)
def test_a_single_expert_of_several_gives_the_router_a_gradient(name):
    z = logits()
    routing = GATES[name](1, 1.0, 0.0)(z, NO_BIAS)
    share_S = routing.scores_SE.amax(1) / routing.scores_SE.sum(1)
    torch.testing.assert_close(routing.weights_Sk[:, 0], share_S, rtol=1e-6, atol=0)
    routing.weights_Sk.sum().backward()
    assert (z.grad.abs().sum(1) > 1e-4).all()


def test_the_bias_picks_but_never_weighs():
    z = torch.tensor([[1.0, 0.9, -2.0, -3.0]])
    routing = SigmoidGate(2)(z, torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert sorted(routing.indices_Sk[0].tolist()) == [0, 3]
    picked = torch.sigmoid(z[0, routing.indices_Sk[0]])
    torch.testing.assert_close(routing.weights_Sk[0], picked / picked.sum())


def test_the_cooperation_threshold_silences_weak_experts_but_never_the_best():
    z = torch.tensor([[2.0, -1.0, -2.0, -3.0], [-3.0, -4.0, -5.0, -6.0], [2.0, 1.0, 0.5, 0.0]])
    routing = SigmoidGate(2, cooperation_threshold=0.5)(z, NO_BIAS)
    torch.testing.assert_close(routing.weights_Sk[:2], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert (routing.weights_Sk[2] > 0).all()


def test_extreme_logits_give_finite_weights_and_gradients():
    z = torch.tensor(
        [[-200.0, -300.0, -200.0, -250.0], [200.0, 300.0, 0.0, -200.0]], requires_grad=True
    )
    weights = SigmoidGate(2)(z, NO_BIAS).weights_Sk
    weights.sum().backward()
    assert weights.isfinite().all() and z.grad.isfinite().all()


def test_routing_is_float32_and_the_same_each_time_under_bfloat16():
    project = RouterProjection(8, 4).bfloat16()
    hidden = torch.randn(20, 8).bfloat16()
    z = project(hidden)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, hidden.float() @ project.weight.float().T)
    first, second = SigmoidGate(2)(z, NO_BIAS), SigmoidGate(2)(project(hidden), NO_BIAS)
    assert torch.equal(first.weights_Sk, second.weights_Sk)


def test_the_balance_bias_keeps_float32_when_the_model_becomes_bfloat16():
    project = RouterProjection(8, 4)
    nudge_bias(project.e_score_correction_bias, torch.tensor([9, 1, 1, 1]), 0.001)
    before = project.e_score_correction_bias.clone()
    project.bfloat16()
    assert project.weight.dtype == torch.bfloat16
    assert torch.equal(project.e_score_correction_bias, before)
    assert list(project.state_dict()) == ["weight", "e_score_correction_bias"]


def test_the_balance_bias_falls_for_busy_experts_and_rises_for_idle_ones():
    bias = torch.zeros(4)
    nudge_bias(bias, torch.tensor([8, 4, 4, 0]), 0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    keep_bias(bias, torch.tensor([8, 4, 4, 0]), 0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_task_logits_are_added_and_used_once():
    route = PendingRoute(SigmoidGate(2), RouteInputs(token=True, task=True))
    project, hidden, task = RouterProjection(8, 4), torch.randn(5, 8), torch.randn(5, 4)
    route.prepare(task)
    routing = route.route(project, hidden, NO_BIAS)
    torch.testing.assert_close(routing.logits_SE, project(hidden) + task)
    assert route.collect() is routing
    with pytest.raises(AssertionError, match="prepare"):
        route.route(project, hidden, NO_BIAS)


def test_picks_are_handed_over_for_one_call():
    route = PendingRoute(SigmoidGate(2), RouteInputs(token=True, task=False))
    project, hidden, picks = RouterProjection(8, 4), torch.randn(5, 8), torch.tensor([[3, 1]] * 5)
    route.prepare(None, picks)
    assert torch.equal(route.route(project, hidden, NO_BIAS).indices_Sk, picks)
    route.prepare(None)
    torch.testing.assert_close(
        route.route(project, hidden, NO_BIAS).indices_Sk, project(hidden).topk(2, dim=1).indices
    )


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_the_only_expert_weighs_one_and_its_balance_bias_stays_zero(balance):
    gate, bias = build_gate(MoeConfig(num_experts=1, top_k=1, balance=balance), 8), torch.zeros(1)
    routing = gate(logits(experts=1), bias)
    nudge_bias(bias, routing.counts_E, 0.001)
    assert bias.tolist() == [0.0] and routing.counts_E.tolist() == [50]
    routing = SigmoidGate(1)(logits(experts=1), torch.zeros(1))
    assert torch.equal(routing.weights_Sk, torch.ones(50, 1))


@pytest.mark.parametrize(
    ("top_k", "experts", "rows"), [(1, 4, 12), (2, 4, 10), (3, 8, 16), (4, 4, 5), (2, 4, 7)]
)
def test_the_uniform_gate_gives_every_expert_the_same_load_and_weight(top_k, experts, rows):
    z = logits(rows, experts)
    routing = UniformGate(top_k)(z, torch.full((experts,), 3.0))
    counts, even = routing.counts_E, rows * top_k % experts == 0
    assert counts.sum() == rows * top_k and counts.max() - counts.min() == (not even)
    assert all(len(set(row)) == top_k for row in routing.indices_Sk.tolist())
    torch.testing.assert_close(routing.weights_Sk, torch.full((rows, top_k), 1 / top_k))
    torch.testing.assert_close(routing.scores_SE, torch.sigmoid(z))
    routing.weights_Sk.sum().backward()
    assert z.grad is not None and not z.grad.any()


@pytest.mark.parametrize("name", GATES)
def test_given_picks_are_kept_and_weighed_anew(name):
    gate, z = GATES[name](2, 1.0, 0.0), logits()
    first = gate(z, NO_BIAS)
    again = gate(z, torch.tensor([9.0, 0.0, -9.0, 5.0]), first.indices_Sk)
    for field in ("indices_Sk", "weights_Sk", "counts_E"):
        assert torch.equal(getattr(again, field), getattr(first, field))
    others = (first.indices_Sk + 1) % 4
    moved = SigmoidGate(2)(z, NO_BIAS, others)
    picked = torch.sigmoid(z).gather(1, others)
    torch.testing.assert_close(moved.weights_Sk, picked / picked.sum(1, keepdim=True))
    assert moved.counts_E.tolist() == torch.bincount(others.flatten(), minlength=4).tolist()


@pytest.mark.parametrize(
    ("experts", "tasks", "expected"),
    [(6, 3, [{0, 3}, {1, 4}, {2, 5}]), (5, 2, [{0, 2, 4}, {1, 3}]), (2, 3, [{0}, {1}, {0}]),
     (4, 1, [{0, 1, 2, 3}])],
)  # fmt: skip
def test_experts_are_dealt_to_tasks_in_turn(experts, tasks, expected):
    dealt_TE = dealt_experts(torch.arange(tasks), experts, tasks)
    assert [set(row.nonzero()[:, 0].tolist()) for row in dealt_TE] == expected


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_sees_its_own_experts_alone(name, top_k):
    z = logits(experts=6, seed=1).detach().double()
    tasks_S = torch.arange(50) % 3
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 50.0], dtype=torch.float64)
    gate = GATES[name](top_k, scale=float(top_k))
    routing = gate(z, bias_E, None, dealt_experts(tasks_S, 6, 3))
    for s, task in enumerate(tasks_S.tolist()):
        # What a gate of two experts would do.
        alone = gate(z[s : s + 1, task::3], bias_E[task::3])
        assert (3 * alone.indices_Sk + task == routing.indices_Sk[s]).all()
        torch.testing.assert_close(alone.weights_Sk[0], routing.weights_Sk[s])


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("prior", [0.0, 2.0, "own"])
def test_under_a_prior_selected_experts_weigh_one_at_the_start(name, prior):
    options = dict(num_experts=8, top_k=1, gate=name, route_by="both", task_prior=prior)
    gate = build_gate(MoeConfig(**options), 384, 4)
    z = 0.02 * (2 * 384) ** 0.5 * logits(8000, 8).detach().double()
    dealt_SE = dealt_experts(torch.arange(8000) % 4, 8, 4)
    raised, own_SE = (0.0, dealt_SE) if prior == "own" else (prior, None)
    routing = gate(z + raised * dealt_SE, torch.zeros(8).double(), None, own_SE)
    assert routing.weights_Sk.mean().item() == pytest.approx(1, abs=0.03)


def test_the_bias_of_own_experts_is_balanced_within_each_task():
    moe = MoeConfig(num_experts=4, top_k=1, route_by="task", task_prior="own")
    bias_E, load_E = torch.zeros(4), torch.tensor([90.0, 1.0, 70.0, 3.0])
    for group in balanced_together(moe, 2):
        nudge_bias(bias_E[group], load_E[group], 0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.5, -0.5]
    moe.task_prior = 1.0
    assert [bias_E[group].tolist() for group in balanced_together(moe, 2)] == [bias_E.tolist()]


def test_draws_are_even_and_unrelated():
    numbers_N = torch.arange(40000)
    drawn = {salts: numbers_N for salts in [(0, 3), (0, 4), (1, 3)]}
    for salts in drawn:
        for salt in salts:
            drawn[salts] = draw(drawn[salts], salt)
        shares_E = torch.bincount(drawn[salts] % 5, minlength=5) / 40000
        torch.testing.assert_close(shares_E, torch.full((5,), 0.2), atol=0.01, rtol=0)
    one, other, third = (numbers % 5 for numbers in drawn.values())
    for a, b in ((one, other), (one, third), (one[1:], one[:-1])):
        assert abs((a == b).float().mean().item() - 0.2) < 0.01
    # Steele et al. 2014: the first number of the generator with the state 0.
    assert draw(torch.tensor([0]), 0).tolist() == [0xE220A8397B1DCDAF & (2**62 - 1)]


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_a_gate_of_one_expert_is_scaled_alike_where_only_sizes_are_wanted(name):
    moe = MoeConfig(gate=name, num_experts=4, top_k=1)
    with torch.device("meta"):
        shape = build_gate(moe, 384)
    assert shape == build_gate(moe, 384) and shape.scale > 1
