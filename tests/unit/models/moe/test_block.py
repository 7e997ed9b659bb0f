"""The cooperative block against dense references in float64."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from comoe.models.moe.block import (
    MIXTURE_PATTERN,
    ContextHolder,
    CooperativeBlock,
    ExpertMixture,
    RoutingContext,
)
from comoe.models.moe.experts import Experts, GatedFeedForward, run_grouped
from comoe.models.moe.gate import draw
from tests.helpers_model import WIDTH, moe_config, random_batch, tiny_model

M, WIDE = 8, 16


def dense_expert(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=1)
    return (F.silu(gate) * up) @ down.T


def build_block(*, real_rows=((0, 5), (1, 3)), length=5, embeddings=None, num_tasks=1, **options):
    """A float64 block and a context for two rows, the second with padding."""
    torch.manual_seed(0)
    holder = ContextHolder()
    more = {"layer": 0, "holder": holder, "num_tasks": num_tasks}
    block = CooperativeBlock(M, WIDE, moe_config(**options), **more).double()
    index = torch.tensor(
        [row * length + column for row, count in real_rows for column in range(count)]
    )
    holder.context = RoutingContext(index, index // length, embeddings)
    return block, holder.context


def run_block(block, context):
    """A block's update of the real tokens of some states, what its experts read, and what each of them gives."""
    x_SM = torch.randn(2, 5, M, dtype=torch.float64)
    update_SM = block(x_SM).reshape(10, M)[context.real_index_S]
    h_SM = F.layer_norm(x_SM.reshape(10, M)[context.real_index_S], (M,))
    experts = block.mixture.experts
    pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
    return update_SM, h_SM, torch.stack([dense_expert(h_SM, *pair) for pair in pairs])


def shared_of(block, h_SM):
    return dense_expert(h_SM, block.shared.gate_up.weight, block.shared.down.weight)


def test_experts_equal_a_dense_loop():
    torch.manual_seed(0)
    experts = Experts(4, M, WIDE, output_init=0.5).double()
    x, counts = torch.randn(10, M, dtype=torch.float64), torch.tensor([3, 0, 6, 1])
    owner = [0] * 3 + [2] * 6 + [3]
    expected = [
        dense_expert(x[[n]], experts.gate_up_proj[e], experts.down_proj[e])
        for n, e in zip(range(10), owner, strict=True)
    ]
    torch.testing.assert_close(experts(x, counts), torch.cat(expected))


def test_the_grouped_kernel_equals_the_loop():
    torch.manual_seed(0)
    experts, counts = Experts(4, M, WIDE, output_init=0.5), torch.tensor([3, 0, 6, 1])
    x = torch.randn(10, M)
    answers = [run_grouped(x, counts, experts.gate_up_proj, experts.down_proj), experts(x, counts)]
    torch.testing.assert_close(*answers)
    gradients = [
        torch.autograd.grad(answer.square().sum(), experts.parameters()) for answer in answers
    ]
    torch.testing.assert_close(*gradients)


def test_experts_without_tokens_get_a_zero_gradient_and_not_none():
    experts = Experts(4, M, WIDE)
    experts(torch.randn(0, M), torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert not any(parameter.grad.any() for parameter in experts.parameters())


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_permuting_the_experts_changes_nothing(gate):
    torch.manual_seed(0)
    mixture = ExpertMixture(M, WIDE, moe_config(gate=gate)).double()
    bias_E = mixture.gate.e_score_correction_bias
    bias_E.copy_(torch.tensor([0.1, -0.1, 0.05, 0.0]))
    x, order = torch.randn(1, 20, M, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    before = mixture(x)
    with torch.no_grad():
        for tensor in (*mixture.experts.parameters(), mixture.gate.weight, bias_E):
            tensor.copy_(tensor[order])
    torch.testing.assert_close(mixture(x), before)


def test_the_paper_gate_equals_a_few_lines_of_float64():
    """route_by task, k = E, no bias: s = sigmoid(W e_t), g = s / sum(s), out = W0 x + sum g_i expert_i(x)."""
    embeddings = torch.randn(2, 64, dtype=torch.float64)
    options = dict(route_by="task", top_k=4, balance="none", shared_width=8, gate_scale=1.0)
    block, context = build_block(embeddings=embeddings, **options)
    update, h, each_ESM = run_block(block, context)
    s = torch.sigmoid(embeddings @ block.task_projection.weight.T)
    g = (s / s.sum(1, keepdim=True))[context.token_rows_S]
    routed = torch.einsum("se,esm->sm", g, each_ESM)
    torch.testing.assert_close(update, shared_of(block, h) + routed)


def test_shared_and_routed_experts_by_token_and_task_equal_a_float64_reference():
    embeddings = torch.randn(2, 64, dtype=torch.float64)
    block, context = build_block(embeddings=embeddings, route_by="both", top_k=2, shared_width=8)
    bias_E = torch.tensor([0.3, -0.3, 0.0, 0.1])
    block.mixture.gate.e_score_correction_bias.copy_(bias_E)
    update, h, each_ESM = run_block(block, context)
    task = (embeddings @ block.task_projection.weight.T)[context.token_rows_S]
    logits = h @ block.mixture.gate.weight.T + task
    torch.testing.assert_close(context.routings[0].logits_SE, logits)
    s = torch.sigmoid(logits)
    picks = (s + bias_E).topk(2).indices
    g = torch.zeros_like(s).scatter(1, picks, s.gather(1, picks))
    routed = torch.einsum("se,esm->sm", 2 * g / g.sum(1, keepdim=True), each_ESM)
    torch.testing.assert_close(update, shared_of(block, h) + routed)


def test_one_expert_equals_the_dense_block():
    block, context = build_block(num_experts=1, top_k=1, balance="none")
    dense = GatedFeedForward(M, WIDE).double()
    with torch.no_grad():
        dense.gate_up.weight.copy_(block.mixture.experts.gate_up_proj[0])
        dense.down.weight.copy_(block.mixture.experts.down_proj[0])
    update, h, _ = run_block(block, context)
    torch.testing.assert_close(update, dense(h))


def test_padding_gets_no_update_and_counts_as_no_load():
    block, context = build_block()
    update = block(torch.randn(2, 5, M, dtype=torch.float64))
    assert not update[1, 3:].any() and update[1, :3].any(dim=1).all()
    assert context.routings[0].counts_E.sum() == 8 * 2


def test_a_recomputed_layer_keeps_its_first_routing():
    block, context = build_block()
    block(torch.randn(2, 5, M, dtype=torch.float64))
    first = context.routings[0]
    block(torch.randn(2, 5, M, dtype=torch.float64))
    assert context.routings[0] is first


def test_under_route_by_task_the_token_projection_is_frozen_and_unused():
    block, _ = build_block(route_by="task", embeddings=torch.randn(2, 64, dtype=torch.float64))
    x = torch.randn(2, 5, M, dtype=torch.float64)
    before = block(x)
    assert not block.mixture.gate.weight.requires_grad and not block.mixture.gate.weight.any()
    with torch.no_grad():
        block.mixture.gate.weight.normal_()
    assert torch.equal(block(x), before)
    block(x).sum().backward()
    assert block.task_projection.weight.grad.any()


def test_a_mixture_is_what_autoep_looks_for():
    model = tiny_model(moe_config(layers=[1], expert_width=12))
    found = {
        name: module
        for name, module in model.named_modules()
        if re.fullmatch(MIXTURE_PATTERN, name)
    }
    assert list(found) == ["encoder.encoder.layer.1.output.block.mixture"]
    (mixture,) = found.values()
    assert mixture.gate.weight.shape == (4, WIDTH)
    assert mixture.gate.e_score_correction_bias.dtype == torch.float32
    assert mixture.experts.gate_up_proj.shape == (4, 24, WIDTH)
    assert mixture.experts.down_proj.shape == (4, WIDTH, 12)
    owners = [
        name
        for name, module in mixture.named_modules()
        if "e_score_correction_bias" in module._buffers
    ]
    assert owners == ["gate"]
    # "expert" in any other parameter path of a block is dropped from DeepSpeed's checkpoints.
    assert all(
        "mixture.experts." in name for name, _ in model.named_parameters() if "expert" in name
    )


def reference_update(x, y, width, rate, steps):
    """A dense block of this width, written out: output zero at the start, Adam in float64."""
    up = torch.randn(2 * width, x.shape[1], dtype=torch.float64) / x.shape[1] ** 0.5
    up, down = up.requires_grad_(), torch.zeros(x.shape[1], width, dtype=torch.float64)
    optimizer = torch.optim.Adam([up, down.requires_grad_()], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (dense_expert(x, up, down) - y).square().sum().backward()
        optimizer.step()
    return dense_expert(x, up, down)


@pytest.mark.parametrize("shared_width", [0, 32])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_experts_move_the_function_as_far_as_a_dense_block_of_their_active_width(
    top_k, shared_width
):
    torch.manual_seed(0)
    width, rate, steps = 32, 1e-3, 10
    x = torch.randn(1024, width, dtype=torch.float64)
    y = torch.randn(width, dtype=torch.float64)
    expected = reference_update(x, y, 64, rate, steps).norm()
    holder = ContextHolder(RoutingContext(torch.arange(1024), torch.zeros(1024, dtype=torch.long)))
    options = dict(num_experts=8, top_k=top_k, balance="none", output_init=0.0)
    config = moe_config(**options, shared_width=shared_width)
    active = 64 - shared_width
    block = CooperativeBlock(width, active // top_k, config, layer=0, holder=holder).double()
    optimizer = torch.optim.Adam(block.parameters(), lr=rate)
    for _ in range(steps + 1):
        holder.context.routings.clear()
        update = block(x.view(1, 1024, width))[0]
        optimizer.zero_grad()
        (update - y).square().sum().backward()
        optimizer.step()
    assert 0.8 < (update.norm() / expected).item() < 1.25


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_output_init_is_the_spread_of_the_output_projection(spread):
    torch.manual_seed(0)
    experts, dense = (
        Experts(8, 32, 64, output_init=spread),
        GatedFeedForward(32, 64, output_init=spread),
    )
    assert experts.down_proj.std().item() == pytest.approx(spread, rel=0.05)
    assert dense.down.weight.std().item() == pytest.approx(spread, rel=0.1)
    assert experts.gate_up_proj.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert dense.gate_up.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    narrow = Experts(8, 32, 64, expert_init=0.02)
    assert narrow.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("off", [False, True])
def test_a_block_measures_its_update_and_what_it_read_outside_training(off):
    block, context = build_block()
    block.holder.off = off
    x_BLM = torch.randn(2, 5, M, dtype=torch.float64)
    update_SM = block.eval()(x_BLM)[[0] * 5 + [1] * 3, [*range(5), *range(3)]]
    expected = [update_SM.norm(dim=1), x_BLM.flatten(0, 1)[context.real_index_S].norm(dim=1)]
    energies_S2 = context.routings[0].energies_S2
    torch.testing.assert_close(energies_S2, torch.stack(expected, dim=1).square().float())
    assert bool((energies_S2[:, 0] == 0).all()) == off
    context.routings.clear()
    block.train()(x_BLM)
    assert context.routings[0].energies_S2 is None


def test_own_and_shared_experts_equal_a_model_of_one_block_per_task():
    """PLE with one expert per task in float64: out = shared(x) + expert_t(x)."""
    tasks_B, embeddings = torch.tensor([1, 0]), torch.randn(2, 64, dtype=torch.float64)
    options = dict(route_by="task", num_experts=2, top_k=1, shared_width=8, task_prior="own")
    block, context = build_block(embeddings=embeddings, num_tasks=2, **options)
    context.task_ids_B = tasks_B
    update, h, each_ESM = run_block(block, context)
    own = each_ESM[tasks_B[context.token_rows_S], torch.arange(len(h))]
    torch.testing.assert_close(update, own + shared_of(block, h))


def test_a_prior_raises_the_logits_of_the_tasks_experts():
    embeddings = torch.randn(2, 64, dtype=torch.float64)
    logits = []
    for prior in (0.0, 1.5):
        block, context = build_block(
            embeddings=embeddings, num_tasks=2, route_by="both", task_prior=prior
        )
        context.task_ids_B = torch.tensor([1, 0])
        torch.manual_seed(3)
        block(torch.randn(2, 5, M, dtype=torch.float64))
        logits.append(context.routings[0].logits_SE)
    raised = torch.tensor([[0.0, 1.5], [1.5, 0.0]], dtype=torch.float64).repeat(1, 2)
    torch.testing.assert_close(logits[1] - logits[0], raised[context.token_rows_S])


RANDOM = dict(gate="random", top_k=1, balance="none")


def test_a_drawn_expert_runs_all_tokens_of_a_post_and_evaluation_runs_the_mean():
    block, context = build_block(**RANDOM, gate_scale=2.0)
    context.draws_B = torch.tensor([5, 60])
    update, h, each_ESM = run_block(block, context)
    chosen_S = context.routings[0].indices_Sk[:, 0]
    expected_B = draw(context.draws_B, 0) % 4
    assert torch.equal(chosen_S, expected_B[context.token_rows_S])
    assert expected_B[0] != expected_B[1]
    torch.testing.assert_close(update, 2 * each_ESM[chosen_S, torch.arange(len(h))])
    context.routings.clear()
    context.draws_B = None
    update, h, _ = run_block(block.eval(), context)
    experts = block.mixture.experts
    mean = dense_expert(h, experts.gate_up_proj.mean(0), experts.down_proj.mean(0))
    torch.testing.assert_close(update, 2 * mean)


def test_another_step_pass_or_seed_draws_other_experts_and_the_same_draw_the_same():
    model, batch = tiny_model(moe_config(**RANDOM)), random_batch(rows=40)

    def picks(step=3, view=0, seed=0):
        model.holder.view, model.holder.seed = view, seed
        return torch.stack([r.indices_Sk for r in model(replace(batch, step=step)).routings])

    first = picks()
    assert torch.equal(picks(), first)
    assert len({tuple(layer.flatten().tolist()) for layer in first}) == 3
    for other in (picks(step=4), picks(view=1), picks(seed=1)):
        assert 0.1 < (other == first).float().mean() < 0.4
    # A post has its experts wherever it stands.
    model.holder.view = model.holder.seed = 0
    rows = torch.arange(39, -1, -1)
    turned = model(replace(batch.take(rows), step=3)).routings[0]
    again = model(replace(batch, step=3)).routings[0].indices_Sk[:, 0]
    lengths = batch.attention_mask_BL.sum(1)
    ends = lengths.cumsum(0)
    last = turned.indices_Sk[:, 0][lengths[rows].cumsum(0) - 1]
    assert torch.equal(last.flip(0), again[ends - 1])
