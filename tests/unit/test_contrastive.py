"""The contrastive loss against a float64 reference, and its edges."""

from __future__ import annotations

import pytest
import torch

from comoe.losses.contrastive import ContrastiveLoss, contrastive_sums
from comoe.protocols import IGNORED, Batch, ModelOutput
from tests.helpers_model import MOOD, TOPIC, random_batch, tiny_model


def alone(rows):
    return rows, 0


def reference(z, tasks, labels, tau):
    """The formula of methods.md section 2, one anchor at a time."""
    total = z.sum() * 0
    for t in sorted(set(tasks)):
        rows, anchors = [i for i in range(len(z)) if tasks[i] == t], []
        for i in rows:
            rivals = [j for j in rows if j != i]
            positives = [j for j in rivals if labels[j] == labels[i]]
            if positives:
                lse = torch.log(sum(torch.exp(z[i] @ z[j] / tau) for j in rivals))
                anchors.append(lse - sum(z[i] @ z[p] / tau for p in positives) / len(positives))
        total = total + (sum(anchors) / len(anchors) if anchors else 0)
    return total


def unit_rows(count, width=5, seed=0):
    z = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=1).requires_grad_()


def sums(z, tasks, labels, *, gather=alone, tau=0.1):
    ids = torch.tensor(tasks, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)
    return contrastive_sums(z, *ids, num_tasks=3, temperature=tau, gather=gather)


TASKS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0]
LABELS = [0, 1, 0, 1, 2, 0, 0, 0, 1, 0, 1, 0]


def test_value_and_gradient_equal_the_reference():
    z, w = unit_rows(12), unit_rows(12)
    shares, anchors = sums(z, TASKS, LABELS)
    expected = reference(w, TASKS, LABELS, 0.1)
    torch.testing.assert_close(shares.sum(), expected, atol=1e-12, rtol=0)
    assert anchors.tolist() == [5, 3, 0] and shares[2] == 0
    shares.sum().backward()
    expected.backward()
    torch.testing.assert_close(z.grad, w.grad, atol=1e-12, rtol=0)


def test_a_hand_computed_case():
    """Two equal posts and one opposite: lse = log(e^1 + e^-1) for both anchors, attraction 1."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    shares, _ = sums(z, [0, 0, 0], [0, 0, 1], tau=1.0)
    assert shares[0].item() == pytest.approx(0.12692801104)


def test_an_anchor_without_positives_adds_nothing_but_repels():
    z, w = unit_rows(3), unit_rows(2)
    pair = sums(w, [0, 0], [0, 0])[0]
    assert pair[0].item() == pytest.approx(0.0)
    shares, anchors = sums(z, [0, 0, 0], [0, 0, 1])
    assert anchors[0] == 2
    torch.testing.assert_close(shares.sum(), reference(z, [0, 0, 0], [0, 0, 1], 0.1))


def test_posts_of_another_task_are_neither_positives_nor_rivals():
    z = unit_rows(6)
    shares, _ = sums(z, [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1])
    torch.testing.assert_close(shares[0], sums(z[:3], [0, 0, 0], [0, 0, 1])[0][0])
    torch.testing.assert_close(shares[1], sums(z[3:], [0, 0, 0], [0, 0, 1])[0][0])


@pytest.mark.parametrize(("tasks", "labels"), [([], []), ([0], [0]), ([0, 1], [0, 0]), ([0, 0], [0, 1])])
def test_a_batch_without_pairs_gives_zero_and_a_connected_gradient(tasks, labels):
    z = unit_rows(len(tasks))
    shares, anchors = sums(z, tasks, labels)
    assert shares.tolist() == [0.0, 0.0, 0.0] and not anchors.any()
    shares.sum().backward()
    assert z.grad is not None and not z.grad.any()


@pytest.mark.parametrize("cut", [0, 1, 4, 12])
def test_shares_of_uneven_ranks_add_up_to_the_whole(cut):
    """Each rank sees all rows and answers for its own; the sum over ranks is the one-process value and gradient."""
    whole, z = unit_rows(12), unit_rows(12)
    sums(whole, TASKS, LABELS)[0].sum().backward()
    columns = torch.tensor([TASKS, LABELS], dtype=torch.float64).T
    everything = torch.cat([z, columns], dim=1)
    parts = [
        sums(z[rows], TASKS[rows], LABELS[rows], gather=lambda own, rows=rows: (everything, rows.start))[0]
        for rows in (slice(0, cut), slice(cut, 12))
    ]
    torch.testing.assert_close(sum(parts), sums(unit_rows(12), TASKS, LABELS)[0])
    sum(parts).sum().backward()
    torch.testing.assert_close(z.grad, whole.grad)


def test_the_gather_is_reached_without_rows_and_carries_large_ids_exactly():
    seen = []

    def gather(rows):
        seen.append(rows)
        return rows, 0

    sums(unit_rows(0), [], [], gather=gather)
    assert seen[0].shape == (0, 7)
    z = unit_rows(2).float()
    sums(z, [2, 2], [100_003, 100_004], gather=gather)
    assert seen[1][:, -2:].tolist() == [[2.0, 100_003.0], [2.0, 100_004.0]]


def batch_with(mood, topic):
    blank = torch.ones(len(mood), 2, dtype=torch.int64)
    return Batch(blank, blank, None, blank.bool(), blank[:, 0], blank[:, 0], {"mood": mood, "topic": topic})


def test_the_term_takes_labelled_rows_of_its_tasks_and_scales_by_the_ranks():
    z = {"mood": unit_rows(4, seed=1), "topic": unit_rows(4, seed=2), "heat": unit_rows(4, seed=3)}
    mood, topic = torch.tensor([0, 0, 1, IGNORED]), torch.tensor([IGNORED, 1, 1, 0])
    loss = ContrastiveLoss((MOOD, TOPIC), temperature=0.1, gather=alone, world_size=3)
    total, terms = loss(ModelOutput({}, z, {}, (), torch.zeros(0)), batch_with(mood, topic))
    first = reference(z["mood"][:3], [0, 0, 0], [0, 0, 1], 0.1)
    second = reference(z["topic"][1:], [0, 0, 0], [1, 1, 0], 0.1)
    torch.testing.assert_close(total, 3 * (first + second))
    torch.testing.assert_close(terms["contrastive/topic"], 3 * second.detach())
    assert list(terms) == ["contrastive", "contrastive/mood", "contrastive/topic"]
    assert not any(value.requires_grad for value in terms.values())


def test_a_batch_without_labels_still_gives_the_projection_a_gradient():
    model, batch = tiny_model(), random_batch(labelled=False)
    total, _ = ContrastiveLoss((MOOD, TOPIC), temperature=0.1, gather=alone, world_size=1)(model(batch), batch)
    total.backward()
    assert total == 0 and model.projection.weight.grad is not None and not model.projection.weight.grad.any()


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="loss.contrastive.temperature"):
        ContrastiveLoss((MOOD,), temperature=0.0, gather=alone, world_size=1)
