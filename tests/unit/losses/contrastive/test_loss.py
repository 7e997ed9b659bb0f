"""The contrastive loss of every kind against the dense formula in float64, and its edges."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from comoe.config.recipe import ContrastiveConfig
from comoe.losses.contrastive import loss as contrastive
from comoe.losses.contrastive.loss import ContrastiveLoss
from tests.helpers_contrastive import (
    HEAT,
    MOOD,
    PLAIN,
    SIGNS,
    TASKS,
    WIDTH,
    WORDS,
    call,
    loss_of,
    random_rows,
    reference,
)
from tests.helpers_model import random_batch, tiny_model


def check(loss, rows, tasks=TASKS, *, atol=1e-12, **options):
    share, terms, leaves = call(loss, rows)
    share.backward()
    expected, each, references = reference(tasks, rows, **options)
    expected.backward()
    torch.testing.assert_close(share.double(), expected, atol=atol, rtol=atol)
    for task in tasks:
        torch.testing.assert_close(
            terms[f"contrastive/{task.name}"].double(),
            each[task.name].detach(),
            atol=atol,
            rtol=atol,
        )
    for name, leaf in leaves.items():
        got, wanted = (
            torch.zeros_like(leaf) if g is None else g.to(leaf)
            for g in (leaf.grad, references[name].grad)
        )
        torch.testing.assert_close(got, wanted, atol=atol, rtol=atol)
    return terms


@pytest.mark.parametrize(
    "tasks",
    [*[(task,) for task in TASKS], TASKS],
    ids=lambda tasks: "+".join(t.name for t in tasks),
)
def test_every_kind_equals_float64_autograd_of_the_dense_formula(tasks):
    check(loss_of(tasks), random_rows(14, tasks=tasks), tasks)


@pytest.mark.parametrize("views, across", [(2, False), (1, True), (2, True)])
def test_second_views_and_negatives_of_other_tasks_equal_the_dense_formula(views, across):
    negatives = "all" if across else "task"
    loss, rows = loss_of(views=views, negatives=negatives), random_rows(14)
    check(loss, rows, views=views, across=across)
    # Each of both changes the gradient: the check above can fail.
    plain, _, found = reference(TASKS, rows)
    plain.backward()
    share, _, leaves = call(loss, rows)
    share.backward()
    assert not torch.allclose(leaves["z/mood"].grad, found["z/mood"].grad)


def test_a_task_of_weight_0_is_pushed_from_the_others_all_the_same():
    tasks = (MOOD, replace(HEAT, contrastive_weight=0.0))
    share, _, leaves = call(loss_of(tasks, negatives="all"), random_rows(9, tasks=tasks))
    share.backward()
    assert leaves["z/heat"].grad.any()
    check(loss_of(tasks, negatives="all"), random_rows(9, tasks=tasks), tasks, across=True)


def test_a_post_alone_with_its_label_is_an_anchor_through_its_second_view():
    rows = random_rows(3, tasks=(MOOD,))
    rows["label/mood"] = torch.tensor([0, 1, 2])
    assert call(loss_of((MOOD,)), rows)[0] == 0.0
    share, terms, leaves = call(loss_of((MOOD,), views=2), rows)
    share.backward()
    assert terms["positives_per_anchor/mood"] == 1.0
    assert all(leaf.grad.any(dim=1).all() for leaf in leaves.values())


@pytest.mark.parametrize("rows", [0, 1, 2, 14])
def test_the_weight_of_a_task_counts_in_the_sum_and_not_in_its_term(rows):
    terms = check(loss_of(), random_rows(rows, seed=3))
    weights = {task.name: task.contrastive_weight for task in TASKS}
    total = sum(weight * terms[f"contrastive/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(terms["contrastive"], total)
    assert not any(value.requires_grad for value in terms.values())


def test_float32_is_right_to_five_digits_and_half_precision_is_compared_in_float32():
    rows = random_rows(14)
    single, half = (
        {name: v.to(dtype) if v.dtype == torch.float64 else v for name, v in rows.items()}
        for dtype in (torch.float32, torch.bfloat16)
    )
    check(loss_of(), single, atol=1e-5)
    share = call(loss_of(), half)[0]
    assert share.dtype == torch.float32
    expected = reference(TASKS, half)[0].detach()
    torch.testing.assert_close(share.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("across", [False, True])
def test_a_learned_temperature_gets_the_exact_gradient_for_every_task(across):
    options = {"learn_temperature": True, "negatives": "all" if across else "task"}
    loss, rows = loss_of(temperature=0.2, **options), random_rows(14)
    log_scales = loss.scales.log_scales_T.detach().clone().requires_grad_()
    share, terms, _ = call(loss, rows)
    share.backward()
    expected = reference(TASKS, rows, scales=log_scales.exp(), across=across)[0]
    expected.backward()
    for found, wanted in ((share, expected), (loss.scales.log_scales_T.grad, log_scales.grad)):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    assert terms["temperature/mood"] == pytest.approx(0.2)
    assert terms["temperature/heat"] == pytest.approx(0.3)
    # Also without a row.
    loss.zero_grad()
    call(loss, random_rows(0))[0].backward()
    assert loss.scales.log_scales_T.grad.tolist() == [0.0] * 5


def test_a_temperature_at_its_floor_can_only_rise():
    loss, rows = loss_of((MOOD,), learn_temperature=True), random_rows(4, tasks=(MOOD,))
    with torch.no_grad():
        loss.scales.log_scales_T.fill_(9.0)
    assert loss.scales().item() == 100.0
    rows["z/mood"] = F.normalize(
        torch.eye(2, WIDTH, dtype=torch.float64)[[0, 0, 1, 1]] + 3.0, dim=1
    )
    for labels, passed in (([0, 0, 1, 1], False), ([0, 1, 0, 1], True)):
        loss.zero_grad()
        rows["label/mood"] = torch.tensor(labels)
        call(loss, rows)[0].backward()
        slope = loss.scales.log_scales_T.grad.item()
        assert slope > 0 if passed else slope == 0.0


def test_copies_of_a_post_are_neither_positives_nor_rivals_of_each_other():
    rows = random_rows(3, tasks=(MOOD,))
    rows["label/mood"] = torch.tensor([0, 0, 1])
    rows["posts"][1] = rows["posts"][0]
    assert call(loss_of((MOOD,)), rows)[0] == 0.0, "no other post has the label"
    twice = random_rows(4, tasks=(MOOD,))
    twice["label/mood"] = torch.tensor([0, 0, 0, 1])
    twice["posts"][1] = twice["posts"][0]
    assert check(loss_of((MOOD,)), twice, (MOOD,))["positives_per_anchor/mood"] == pytest.approx(
        (1 + 1 + 2) / 3
    )


def test_learned_temperatures_of_a_model_in_bf16_are_computed_in_float32_from_the_rounded_parameter():
    scales = loss_of((MOOD,), learn_temperature=True, temperature=0.07).scales.bfloat16()
    assert scales().dtype == torch.float32
    # 1 / 0.07 = e^2.659; bf16 has 2.65625.
    assert scales().item() == pytest.approx(math.exp(2.65625), rel=1e-6)


def test_an_anchor_without_positives_adds_nothing_but_repels():
    rows = random_rows(3, tasks=(MOOD,))
    rows["label/mood"] = torch.tensor([0, 0, 1])
    check(loss_of((MOOD,)), rows, (MOOD,))
    share, _, leaves = call(loss_of((MOOD,)), rows)
    share.backward()
    assert leaves["z/mood"].grad[2].any() and share > 0
    # Positives are counted by their weight; far numbers have next to none.
    rows = random_rows(5, tasks=(MOOD, PLAIN))
    rows["label/mood"] = torch.tensor([0, 0, 0, 1, 2])
    terms = call(loss_of((MOOD, PLAIN)), rows)[1]
    assert terms["positives_per_anchor/mood"] == 2.0 and terms["positives_per_anchor/plain"] == 1.0
    rows = random_rows(3, tasks=(HEAT,))
    rows["label/heat"] = torch.tensor([0.0, 0.0, 40.0])
    check(loss_of((HEAT,)), rows, (HEAT,))


def test_sets_without_labels_are_nobodys_positive():
    rows = random_rows(4, tasks=(SIGNS,))
    rows["label/signs"] = torch.zeros(4, 23)
    assert call(loss_of((SIGNS,)), rows)[0] == 0.0
    rows["label/signs"][:2, 21] = 1.0
    assert check(loss_of((SIGNS,)), rows, (SIGNS,))["positives_per_anchor/signs"] == 1.0


def test_two_views_of_a_post_are_both_anchors():
    rows = random_rows(4, tasks=(WORDS,))
    rows["label/words"][:] = 0
    share, terms, leaves = call(loss_of((WORDS,)), rows)
    share.backward()
    assert terms["positives_per_anchor/words"] == 1.0
    assert all(leaf.grad.any(dim=1).all() for leaf in leaves.values())


def test_a_batch_without_labels_still_gives_the_projection_a_gradient():
    task = replace(MOOD, labels=("bad", "so-so", "good"))
    model, batch = tiny_model(tasks=(task,)), random_batch(labelled=False, tasks=(task,))
    loss = ContrastiveLoss((task,), ContrastiveConfig(), width=8, gather=contrastive.alone)
    total, _ = loss(model(batch), batch)
    total.backward()
    assert total == 0
    assert model.projection.weight.grad is not None
    assert not model.projection.weight.grad.any()


def test_the_gathers_are_reached_without_rows_and_the_backward_pass_has_none():
    seen = []

    def gather(rows, *, sizes=None):
        seen.append((tuple(rows.shape), rows.dtype, sizes))
        return rows.detach(), 0

    share, _, _ = call(loss_of(gather=gather), random_rows(0))
    assert [shape for shape, _, _ in seen] == [(1, 5), (0, WIDTH + 2 + 2), (0, 2)]
    share.backward()
    assert len(seen) == 3 and seen[1][2] == seen[2][2] == [0]


def test_local_reaches_no_gather_and_is_not_scaled_by_the_ranks():
    def never(rows, *, sizes=None):
        raise AssertionError("no gather")

    rows = random_rows(9)
    share = call(loss_of(gather=never, ranks=4, over="local"), rows)[0]
    torch.testing.assert_close(share, reference(TASKS, rows)[0].detach())


@pytest.mark.parametrize("labels", [1, 20, 21, 53])
def test_label_sets_survive_as_the_bits_of_float32_numbers(labels):
    kind = SIGNS.rules
    targets = (torch.rand(9, labels, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    keys = kind.keys(targets)
    assert keys.shape == (9, kind.num_keys(range(labels))) and keys.max() < 2**20
    union = (targets[:, None] + targets).clamp_max(1).sum(-1)
    expected = (targets @ targets.T) / union.clamp_min(1)
    torch.testing.assert_close(kind.affinity(keys, keys, SIGNS), expected)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_affinities_are_symmetric_shares(task):
    rows = random_rows(12, tasks=(task,))
    target = rows[f"label/{task.name}"]
    keys = task.rules.keys(target[task.rules.labelled(target)])
    assert keys.shape[1] == task.rules.num_keys(task.labels)
    affinity = task.rules.affinity(keys, keys, task)
    assert torch.equal(affinity, affinity.T) and (affinity >= 0).all() and (affinity <= 1).all()
