"""The whole model: what it returns, what padding may not change, and whose parameters are whose."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from comoe.tasks.task import Task
from comoe.train.parallel.setup import parameter_group
from tests.helpers_model import (
    TASKS,
    gradients,
    moe_config,
    random_batch,
    take,
    tiny_model,
    without_gradient,
)

ROUTES = ("token", "task", "both")


def padded(batch, extra):
    grown = [
        nn.functional.pad(tensor, (0, extra))
        for tensor in (batch.input_ids_BL, batch.attention_mask_BL)
    ]
    return replace(batch, input_ids_BL=grown[0] + (1 - grown[1]) * 1, attention_mask_BL=grown[1])


def test_the_output_has_every_task_in_its_shape():
    model, batch = tiny_model(), random_batch()
    output = model(batch)
    assert {name: tuple(value.shape) for name, value in output.logits.items()} == {
        "mood": (6, 3), "topic": (6, 2), "heat": (6, 1), "words": (6, 9, 2), "signs": (6, 2),
    }  # fmt: skip
    assert list(output.embeddings) == list(output.attentions) == ["mood", "topic", "heat", "signs"]
    for embeddings in output.embeddings.values():
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    real = int(batch.attention_mask_BL.sum())
    assert [routing.indices_Sk.shape for routing in output.routings] == [(real, 2)] * 3
    assert torch.bincount(output.token_rows_S).tolist() == batch.attention_mask_BL.sum(1).tolist()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("route_by", ROUTES)
def test_a_post_has_the_same_logits_alone_and_in_a_longer_batch(family, route_by):
    model = tiny_model(moe_config(route_by=route_by, shared_width=8), family=family).eval()
    batch = random_batch()
    together = model(padded(batch, 4)).logits
    for row in range(6):
        length, single = int(batch.attention_mask_BL[row].sum()), take(batch, [row])
        ids, mask = (t[:, :length] for t in (single.input_ids_BL, single.attention_mask_BL))
        single = replace(single, input_ids_BL=ids, attention_mask_BL=mask)
        for name, logits in model(single).logits.items():
            expected = together[name][[row]]
            expected = expected[:, :length] if logits.dim() == 3 else expected
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("route_by", "same"), [("token", True), ("task", False), ("both", False)])
def test_route_by_token_answers_alike_for_every_task_id_and_route_by_task_does_not(route_by, same):
    batch, model = random_batch(), tiny_model(moe_config(route_by=route_by)).eval()
    other = replace(batch, task_ids_B=(batch.task_ids_B + 1) % len(TASKS))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "task_projection" in name or "gate_up" in name:
                weight.mul_(20)
    assert torch.equal(model(batch).logits["mood"], model(other).logits["mood"]) is same


@pytest.mark.parametrize("route_by", ROUTES)
def test_a_filler_row_without_a_task_is_answered(route_by):
    batch = replace(
        random_batch(rows=1), task_ids_B=torch.tensor([-1]), row_ids_B=torch.tensor([-1])
    )
    output = tiny_model(moe_config(route_by=route_by))(batch)
    assert all(logits.isfinite().all() for logits in output.logits.values())
    # Its tokens ran, but no loss, no load and no statistic may count them.
    assert len(output.routings) == 3 and not output.token_rows_S.numel()
    for routing in output.routings:
        assert not routing.counts_E.any()
        assert routing.logits_SE.shape == routing.scores_SE.shape == (0, 4)


@pytest.mark.parametrize("route_by", ROUTES)
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_every_trainable_parameter_gets_a_gradient(route_by, gate):
    model = tiny_model(moe_config(route_by=route_by, gate=gate, top_k=1, shared_width=8))
    output = model(random_batch())
    total = sum(value.square().sum() for value in output.logits.values())
    (total + sum(value.sum() for value in output.embeddings.values())).backward()
    assert without_gradient(model) == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == (3 if route_by == "task" else 0)


def test_the_same_seed_builds_the_same_weights():
    first, second, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), atol=0, rtol=0)
    assert not torch.equal(first.heads[0].output.weight, other.heads[0].output.weight)
    # What AutoEP reads.
    config = first.config
    numbers = (config.num_local_experts, config.num_experts_per_tok, config.model_type)
    assert numbers == (4, 2, "comoe")


def test_two_encodes_before_one_backward_equal_two_separate_ones():
    model = tiny_model(moe_config(route_by="both"))
    batches = random_batch(seed=1), random_batch(rows=3, seed=2)

    def reached():
        return {name: g.clone() for name, g in gradients(model).items() if g is not None}

    sum(model(batch).logits["mood"].square().sum() for batch in batches).backward()
    together = reached()
    model.zero_grad()
    for batch in batches:
        model(batch).logits["mood"].square().sum().backward()
    torch.testing.assert_close(together, reached())


def test_parameters_belong_to_encoder_experts_router_or_heads():
    model = tiny_model(moe_config(route_by="both", shared_width=8, layers=[1]))
    groups = {name: parameter_group(f"module.model.{name}") for name, _ in model.named_parameters()}
    assert Counter(groups.values())["experts"] == 6
    assert Counter(groups.values())["router"] == 3
    for name, group in groups.items():
        routes = re.search(r"\.block\.(mixture\.gate|task_projection)|task_embedding", name)
        new = "router" if routes else "experts" if ".block." in name else None
        assert group == (new or ("heads" if re.match("heads|projection", name) else "encoder"))


def test_a_task_may_have_any_name():
    names = ["type", "expert", "a.b", "block", "forward"]
    awkward = [Task(name, "single_label", ("a", "b"), "macro_f1") for name in names]
    assert list(tiny_model(tasks=awkward)(random_batch(tasks=awkward)).logits) == names


def test_bfloat16_keeps_answers_float32_and_close():
    model, batch = tiny_model().eval(), random_batch()
    exact = model(batch).logits
    half = model.bfloat16()(batch)
    assert all(routing.logits_SE.dtype == torch.float32 for routing in half.routings)
    for name, logits in half.logits.items():
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, exact[name], atol=0.05, rtol=0.05)
