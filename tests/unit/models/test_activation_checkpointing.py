"""Activation checkpointing changes no number, and routes every token as the first pass did."""

import pytest
import torch

from tests.helpers_model import (
    HF_CONFIGS,
    VARIANTS,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
    tiny_objective,
)


def gradients_and_routings(family, *, recompute, batches, dropout=0.0, **options):
    """Gradients of one backward pass over several encodes, the losses, and each encode's loads."""
    objective = tiny_objective(
        moe_config(**options), family=family, dropout=dropout, recompute=recompute
    )
    torch.manual_seed(5)
    steps = [objective(scaled(batch)) for batch in batches]
    sum(step.loss for step in steps).backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    loads = [[routing.counts_E for routing in step.output.routings] for step in steps]
    return gradients, [step.loss.detach() for step in steps], loads


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (family, dict(dropout=0.3, route_by="both", shared_width=8))
        for family in HF_CONFIGS | VARIANTS
    ]
    + [("bert", dict(dropout=0.0)), ("bert", dict(route_by="task", top_k=4, balance="none"))],
)
def test_two_encodes_then_one_backward_are_the_same_with_recomputed_layers(family, options):
    batches = random_batch(seed=1), random_batch(rows=3, length=7, seed=2)
    plain, again = (
        gradients_and_routings(family, recompute=recompute, batches=batches, **options)
        for recompute in (False, True)
    )
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


def test_recomputing_runs_each_layer_twice_and_only_in_training():
    model = tiny_model(recompute=True)
    assert list(model.state_dict()) == list(tiny_model().state_dict())
    calls = []
    model.encoder.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append(None))
    model(random_batch()).logits["mood"].sum().backward()
    assert len(calls) == 2
    model.eval()(random_batch())
    with torch.no_grad():
        model.train()(random_batch())
    assert len(calls) == 4


def test_recomputing_keeps_far_less_for_the_backward_pass():
    def kept(recompute):
        model, sizes = tiny_model(recompute=recompute), {}
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(random_batch(rows=16, length=30))
        assert hidden.logits
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_recomputed_tokens_go_to_the_same_experts_even_where_the_scores_have_turned():
    """A near-tie may fall the other way on a second pass; here the bias turns every choice in between."""

    def gradients(recompute):
        model = tiny_model(moe_config(top_k=1), recompute=recompute)
        output = model(random_batch())
        for routing, block in zip(output.routings, model.moe_layers(), strict=True):
            block.mixture.gate.e_score_correction_bias.copy_(-10.0 * routing.counts_E)
        output.logits["mood"].square().sum().backward()
        turned = model(random_batch()).routings
        assert not any(
            torch.equal(a.indices_Sk, b.indices_Sk)
            for a, b in zip(turned, output.routings, strict=True)
        )
        return [parameter.grad for parameter in model.encoder.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), atol=0, rtol=0)
