"""Removing an expert equals a gate that never had it."""

import pytest
import torch

from comoe.config.recipe import MoeConfig
from comoe.experiments.ablate import GateWithout, removed
from comoe.models.moe.router import build_gate
from tests.helpers_model import moe_config, random_batch, tiny_model


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_the_others_route_as_if_the_expert_had_never_been(gate, top_k):
    generator = torch.Generator().manual_seed(top_k)
    logits_SE = torch.randn(50, 5, generator=generator)
    bias_E = 0.1 * torch.randn(5, generator=generator)
    options = dict(gate=gate, gate_scale=3.0, balance="none")
    whole = build_gate(MoeConfig(num_experts=5, top_k=top_k, **options), 8)
    gone = 2
    routing = GateWithout(whole, gone)(logits_SE, bias_E)
    weights_SE = torch.zeros(50, 5).scatter_add_(1, routing.indices_Sk, routing.weights_Sk)

    left = [0, 1, 3, 4]
    fewer = build_gate(MoeConfig(num_experts=4, top_k=min(top_k, 4), **options), 8)
    reference = fewer(logits_SE[:, left], bias_E[left])
    expected = torch.zeros(50, 4).scatter_add_(1, reference.indices_Sk, reference.weights_Sk)
    torch.testing.assert_close(weights_SE[:, left], expected)
    assert weights_SE[:, gone].abs().max() == 0
    assert top_k == 5 or (routing.indices_Sk != gone).all()


def test_the_only_expert_leaves_nothing_behind():
    only = build_gate(MoeConfig(num_experts=1, top_k=1), 8)
    routing = GateWithout(only, 0)(torch.randn(6, 1), torch.zeros(1))
    assert routing.weights_Sk.abs().max() == 0


def test_a_model_loses_an_expert_that_works_and_does_not_miss_one_that_sleeps():
    model = tiny_model(moe_config(balance="none")).double().eval()
    batch = random_batch()
    block = model.moe_layers()[0]
    with torch.no_grad():
        # Nobody's choice, whatever the token.
        block.mixture.gate.e_score_correction_bias[3] = -10.0
        whole = model(batch).logits["mood"]
        assert model(batch).routings[0].counts_E[3] == 0
        with removed(block, 3):
            torch.testing.assert_close(model(batch).logits["mood"], whole, rtol=0, atol=0)
        with removed(block, 0):
            changed = model(batch)
        assert changed.routings[0].counts_E[0] == 0
        assert (changed.logits["mood"] - whole).abs().max() > 1e-6
        torch.testing.assert_close(model(batch).logits["mood"], whole, rtol=0, atol=0)
