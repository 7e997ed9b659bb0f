"""Our dispatch on a CPU against AutoEP's own, on the same layer: answers, loads and all gradients."""

from itertools import chain
from typing import Any

import pytest
import torch

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import build, make_encoder, recipe_of

pytestmark = pytest.mark.multiprocess


def all_ways(encoder: str, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [both_ways(encoder, ep_size=ep_size, top_k=top_k) for ep_size, top_k in cases]


def both_ways(encoder: str, *, ep_size: int, top_k: int) -> dict[str, Any]:
    """The largest difference of each quantity between the two ways, with the load both counted."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    from comoe.distributed import rank

    recipe = recipe_of(
        encoder, parallel__ep_size=ep_size, model__moe__top_k=top_k, model__moe__output_init=0.5
    )
    engine, _ = build(recipe, stage=1)
    layer = engine.objective.model.moe_layers()[0].mixture
    generator = torch.Generator().manual_seed(rank())
    width = engine.objective.model.config.hidden_size
    # Uneven ranks: each sends another number of tokens.
    x = torch.randn(1, 30 + 11 * rank(), width, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = []
    for forward in (layer._forward, lambda hidden: AutoEPMoELayer._forward(layer, hidden)):
        before = layer.tokens_per_expert.clone()
        layer.router.prepare(None)
        answer = forward(x)
        layer.router.collect()
        gradients = torch.autograd.grad(answer, [x, *weights], upstream)
        found.append([answer.detach(), layer.tokens_per_expert - before, *gradients])
    return {
        "type": type(layer).__name__,
        "differences": [
            float((ours - theirs).abs().max()) for ours, theirs in zip(*found, strict=True)
        ],
        "sizes": [float(theirs.abs().max()) for theirs in found[1]],
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.mark.parametrize(("ranks", "cases"), [(1, [(1, 2), (1, 1)]), (2, [(2, 2)]), (4, [(2, 3)])])
def test_our_dispatch_equals_autoeps_own(encoder, ranks, cases):
    """``cases``: (EP size, top k)."""
    here = "tests.multiprocess.test_dispatch:all_ways"
    answers = run_ranks(here, ranks, encoder=encoder, cases=cases)
    for answer in chain.from_iterable(answers):
        assert answer["type"] == "CooperativeLayer"
        assert len(answer["sizes"]) == 7 and min(answer["sizes"]) > 1e-3
        for difference, size in zip(answer["differences"], answer["sizes"], strict=True):
            assert difference <= 2e-6 * max(1.0, size)
