"""Tiles of rows against one expert after another, in float64, gradients too."""

import pytest
import torch

from comoe.models.moe.experts import Experts, gated, run_grouped, run_tiled, tile_rows

LOADS = ([5, 0, 17, 1, 40], [63], [0, 0, 3], [16, 32, 0, 16], [0, 0, 0], [1000, 3, 0, 0])


@pytest.mark.parametrize("counts", LOADS, ids=str)
def test_tiles_equal_one_expert_after_another(counts):
    torch.manual_seed(0)
    experts = Experts(len(counts), 6, 5, output_init=0.3).double()
    weights = (experts.gate_up_proj, experts.down_proj)
    x_NM = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    upstream_NM = torch.randn_like(x_NM)
    found = run_tiled(x_NM, torch.tensor(counts), *weights)
    expected = torch.cat([
        gated(part @ up.T) @ down.T for part, up, down in zip(x_NM.split(counts), *weights, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(answer, (x_NM, *weights), upstream_NM, retain_graph=True)
        for answer in (found, expected)
    ]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_large_even_load_gives_each_expert_four_to_eight_tiles():
    assert tile_rows(0, 8) == 16 and tile_rows(100, 64) == 16
    for rows, experts in ((20_000, 8), (60_000, 64), (9_600, 4)):
        tile = tile_rows(rows, experts)
        assert tile & (tile - 1) == 0 and 4 <= rows / experts / tile < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_float32_model_on_a_gpu_answers_as_on_the_cpu_and_never_waits_for_the_counts():
    torch.manual_seed(0)
    experts = Experts(8, 32, 16, output_init=0.3)
    x_SM, picks_Sk = torch.randn(200, 32), torch.rand(200, 8).topk(2).indices
    order_N, counts_E = (
        picks_Sk.reshape(-1).argsort(stable=True),
        picks_Sk.reshape(-1).bincount(minlength=8),
    )
    weights_Sk = torch.rand(200, 2)
    expected = experts(x_SM, counts_E, order_N, weights_Sk)
    moved = [tensor.cuda() for tensor in (x_SM, counts_E, order_N, weights_Sk)]
    experts.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = experts(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", [counts for counts in LOADS if sum(counts)], ids=str)
def test_grouped_products_in_bfloat16_equal_tiles_in_float32(counts):
    torch.manual_seed(0)
    experts = Experts(len(counts), 64, 32, output_init=0.3).cuda()
    weights = [weight.detach().bfloat16() for weight in experts.parameters()]
    x_NM = torch.randn(sum(counts), 64, device="cuda").bfloat16()
    upstream_NM = torch.randn_like(x_NM)
    answers = []
    for run, dtype in ((run_grouped, torch.bfloat16), (run_tiled, torch.float32)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x_NM, *weights)]
        found = run(inputs[0], torch.tensor(counts, device="cuda"), *inputs[1:])
        answers.append([found, *torch.autograd.grad(found, inputs, upstream_NM.to(dtype))])
    for grouped, tiled in zip(*answers, strict=True):
        # A relative rounding of 0.4 % in each of three products.
        scale = float(tiled.detach().abs().max())
        torch.testing.assert_close(grouped.float(), tiled, rtol=0, atol=0.03 * scale)
