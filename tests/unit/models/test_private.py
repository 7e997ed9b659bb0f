"""Private parts: absent they change nothing, new they change no answer, and what keeps them apart from the shared."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers_export import tiny_recipe, tiny_tokenizer

from comoe.config.recipe import ContrastiveConfig, LossConfig
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.losses.objective import Objective
from comoe.losses.orthogonal import cross_sums, overlap
from comoe.train.memory_plan import count_parameters
from comoe.train.parallel.setup import parameter_group
from comoe.types import IGNORED
from tests.helpers_model import (
    HF_CONFIGS,
    TASKS,
    WIDTH,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
)

OFF = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
APART = replace(OFF, orthogonal_weight=0.5)


def awake(model):
    """Private parts that have learnt something."""
    torch.manual_seed(3)
    for part in model.private:
        torch.nn.init.normal_(part.feed_forward.gate_up.weight, std=0.3)
        torch.nn.init.normal_(part.feed_forward.down.weight, std=0.3)
    return model


def objective_of(loss, *, width=8):
    moe = moe_config()
    return Objective(tiny_model(moe, private_width=width), TASKS, loss, moe)


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_new_private_parts_leave_every_answer_as_it_is_to_the_bit(route_by):
    moe, batch = moe_config(route_by=route_by), random_batch()
    plain, private = tiny_model(moe), tiny_model(moe, private_width=8)
    assert plain.private is None and private.private is not None
    shared = {
        name: value
        for name, value in private.state_dict().items()
        if not name.startswith("private.")
    }
    assert list(shared) == list(plain.state_dict())
    assert all(torch.equal(shared[name], value) for name, value in plain.state_dict().items())
    for name, logits in plain(batch).logits.items():
        assert torch.equal(private(batch).logits[name], logits)


def test_a_private_part_changes_the_answers_of_its_own_task_alone():
    batch = random_batch()
    model = tiny_model(private_width=8).eval()
    before = model(batch).logits
    torch.nn.init.normal_(model.private[1].feed_forward.down.weight)
    after = model(batch).logits
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        TASKS[1].name
    ]


def test_private_parts_learn_at_the_rate_of_the_experts_and_are_counted():
    model = tiny_model(private_width=8)
    private = [name for name, _ in model.named_parameters() if name.startswith("private.")]
    assert len(private) == 4 * len(TASKS)
    assert {parameter_group(name) for name in private} == {"experts"}
    counts, plain = count_parameters(model, top_k=2), count_parameters(tiny_model(), top_k=2)
    grown = len(TASKS) * (2 * WIDTH + 3 * WIDTH * 8)
    assert counts["dense"] - plain["dense"] == counts["active"] - plain["active"] == grown
    assert counts["experts"] == plain["experts"]


def test_an_export_holds_the_private_parts_and_an_old_one_is_read_without(tmp_path):
    def exported(name, width):
        recipe = tiny_recipe()
        recipe.model.private_width = width
        model = tiny_model(recipe.model.moe, private_width=width).eval()
        export_model(
            tmp_path / name,
            state_dict=(awake(model) if width else model).state_dict(),
            backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / f"v{name}")),
            recipe=recipe,
            tasks=TASKS,
        )
        return model

    model, batch = exported("e", 8), random_batch()
    expected, found = model(batch), load_exported(tmp_path / "e").model(batch)
    for name, logits in expected.logits.items():
        torch.testing.assert_close(found.logits[name], logits, atol=1e-6, rtol=0)
    exported("old", 0)
    config = json.loads((tmp_path / "old/config.json").read_text())
    del config["model"]["private_width"]
    for task in config["tasks"]:
        del task["confidence_strategy"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    (tmp_path / "old/manifest.json").unlink()
    old = load_exported(tmp_path / "old")
    assert old.model.private is None and old.tasks == TASKS


def test_the_overlap_equals_the_one_computed_by_hand():
    # Shared states (2, 0) and (0, 3): unit features (1, 0), (0, 1). Private updates over these
    # lengths: (1, 0), (0, 0).
    shared, private = (
        torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]),
        torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]),
    )
    sums = cross_sums(shared, private, torch.ones(1, 2))
    assert sums.tolist() == [[1, 0, 1], [0, 0, 1], [1, 0, 2]]
    # Products / 2 = [[.5, 0], [0, 0]], means (.5, .5) and (.5, 0): covariance [[.25, 0], [-.25,
    # 0]].
    assert overlap(sums[None]) == pytest.approx(2 * 0.25**2)
    # The same twice, padded with what does not count, beside a task without tokens: the same
    # number.
    more = [
        torch.cat([states, states, 7 * torch.ones(1, 2, 2)], dim=1) for states in (shared, private)
    ]
    counted = torch.tensor([[1, 1, 1, 1, 0, 0]])
    both = torch.stack([cross_sums(*more, counted), cross_sums(*more, 0 * counted)])
    assert overlap(both) == pytest.approx(2 * 0.25**2)


def test_the_overlap_is_the_squared_covariance_and_its_gradients_are_right():
    torch.manual_seed(0)
    shared, private = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double().requires_grad_()
    counted = (torch.arange(5) < torch.tensor([[5], [2], [3]])).double()

    def value(private):
        return overlap(cross_sums(shared, private, counted)[None])

    units = F.normalize(shared, dim=2)[counted > 0]
    relative = (private / shared.norm(dim=2, keepdim=True))[counted > 0]
    covariance = (units - units.mean(0)).T @ (relative - relative.mean(0)) / 10
    torch.testing.assert_close(value(private), covariance.square().sum())
    assert torch.autograd.gradcheck(value, private)


def test_features_that_no_line_tells_from_the_shared_ones_do_not_overlap():
    torch.manual_seed(0)
    shared = F.normalize(torch.randn(1, 4000, 3), dim=2)
    apart, told = torch.randn(1, 4000, 3), shared @ torch.randn(3, 3)
    ones = torch.ones(1, 4000)
    assert overlap(cross_sums(shared, apart, ones)[None]) < 0.01 * overlap(
        cross_sums(shared, told, ones)[None]
    )


def test_the_orthogonal_term_counts_the_tokens_of_labelled_rows():
    objective, batch = objective_of(APART), random_batch()
    awake(objective.model)
    batch.labels["mood"][[0, 3]] = IGNORED
    whole = objective(scaled(batch))
    sharing, mask = whole.output.sharing, batch.attention_mask_BL
    labelled = {name: mask.clone() for name in sharing.private}
    labelled["mood"][[0, 3]] = 0
    sums = [
        cross_sums(sharing.shared_BLM, part, labelled[name])
        for name, part in sharing.private.items()
    ]
    torch.testing.assert_close(whole.terms["orthogonal"], overlap(torch.stack(sums)).detach())
    plain = objective_of(OFF)
    awake(plain.model)
    torch.testing.assert_close(
        whole.loss - plain(scaled(batch)).loss, 0.5 * whole.terms["orthogonal"]
    )


def test_micro_batches_of_one_step_are_summed_and_a_new_step_forgets_them():
    objective, batch = objective_of(APART), scaled(random_batch())
    awake(objective.model)
    whole = objective(batch).terms["orthogonal"]
    objective.begin_step()
    parts = [batch.take(torch.tensor(rows)) for rows in ([0, 1, 2], [3], [4, 5])]
    first, _, last = [objective(part).terms["orthogonal"] for part in parts]
    torch.testing.assert_close(last, whole)
    objective.begin_step()
    assert torch.equal(objective(parts[0]).terms["orthogonal"], first) and first != whole


def test_the_orthogonal_term_is_0_at_the_start_with_finite_gradients():
    assert objective_of(APART, width=0).terms == {}
    objective = objective_of(APART)
    step = objective(scaled(random_batch()))
    step.loss.backward()
    assert step.terms["orthogonal"] == 0
    assert all(p.grad.isfinite().all() for p in objective.model.private.parameters())
