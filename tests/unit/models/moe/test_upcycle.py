"""Experts made of a dense block give what it gave."""

import pytest
import torch

from comoe.models.moe.block import ContextHolder, CooperativeBlock, RoutingContext
from comoe.models.moe.upcycle import upcycle
from tests.helpers_model import moe_config
from tests.unit.models.moe.test_block import dense_expert

M, TOKENS, T = 8, 40, 2


def block_of(config, width):
    holder = ContextHolder()
    rows_S = torch.arange(TOKENS)
    generator = torch.Generator().manual_seed(4)
    embeddings = torch.randn(TOKENS, config.task_embedding_width, generator=generator).double()
    holder.context = RoutingContext(rows_S, rows_S, embeddings, rows_S % T)
    block = CooperativeBlock(M, width, config, layer=0, holder=holder, num_tasks=T)
    return block.double().eval()


def fill(block, dense_block, **configs):
    block.load_state_dict(
        block.state_dict()
        | upcycle(dense_block.state_dict(), block.state_dict(), num_tasks=T, **configs)
    )


def both(x, *, width=24, dense_shared=0, source=None, **options):
    """The dense block's output written out in float64, that of its experts, and these."""
    torch.manual_seed(0)
    dense = moe_config(
        num_experts=1, top_k=1, balance="none", shared_width=dense_shared, **(source or {})
    )
    before, config = block_of(dense, width), moe_config(**options)
    torch.nn.init.normal_(before.norm.weight)
    k, rest = config.top_k, width + dense_shared - config.shared_width
    after = block_of(config, rest // k)
    fill(after, before, source=dense, config=config)
    h, experts = before.norm(x), before.mixture.experts
    expected = (source or {}).get("gate_scale", 1.0) * dense_expert(
        h, experts.gate_up_proj[0], experts.down_proj[0]
    )
    if before.shared is not None:
        expected += dense_expert(h, before.shared.gate_up.weight, before.shared.down.weight)
    return expected, after(x[None])[0], after


@pytest.mark.parametrize("route_by", ["token", "task", "both"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("top_k", "experts", "shared"), [(2, 4, 0), (2, 8, 8), (4, 4, 0), (3, 9, 12)]
)
def test_experts_give_what_the_dense_block_gave(top_k, experts, shared, gate, route_by):
    x = torch.randn(TOKENS, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = dict(top_k=top_k, num_experts=experts, shared_width=shared, gate=gate)
    expected, found, block = both(x, route_by=route_by, balance="none", **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # Each token has every slice once, and tokens go to different experts.
    picked_Sk = block.holder.context.routings[0].indices_Sk
    assert ((picked_Sk % top_k).sort(dim=1).values == torch.arange(top_k)).all()
    assert len(picked_Sk.unique()) > top_k or experts == top_k


@pytest.mark.parametrize(
    ("options", "source"),
    [(dict(gate_scale=1.0), {}), (dict(temperature=0.5, cooperation_threshold=0.3), dict(gate_scale=3.0))],
)  # fmt: skip
def test_gate_scales_of_both_runs_are_undone(options, source):
    x = torch.randn(TOKENS, M, dtype=torch.float64)
    expected, found, _ = both(x, width=16, dense_shared=8, source=source, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("prior", [0.0, "own"])
def test_a_single_expert_per_token_is_the_whole_block_near_or_exactly(gate, prior):
    x = torch.randn(TOKENS, M, dtype=torch.float64)
    options = dict(top_k=1, num_experts=2, route_by="task", task_prior=prior, gate=gate)
    expected, found, _ = both(x, balance="none", **options)
    if prior == "own":
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    else:
        off = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert 0 < off.max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(top_k=2, num_experts=5), "must be a multiple of them"),
     (dict(top_k=2, route_by="task", task_prior=1.0), "model.moe.task_prior 0"),
     (dict(top_k=4), "with model.moe.expert_width=5 for one")],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused(options, message):
    width = 22 if options["top_k"] == 4 else 24
    with pytest.raises(ValueError, match=message):
        both(torch.randn(TOKENS, M, dtype=torch.float64), width=width, **options)
