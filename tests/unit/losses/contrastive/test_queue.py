"""The queue: first in, first out, seen by anchors, silent during warm-up, safe from casts."""

import pytest
import torch

from comoe.config.recipe import ContrastiveConfig, LossConfig
from comoe.losses.contrastive.queue import Queue
from tests.helpers_contrastive import MOOD, TASKS, call, loss_of, random_rows, reference
from tests.helpers_model import tiny_objective


def rows_of(first, count):
    numbers = torch.arange(first, first + count)
    return numbers[:, None].float() * torch.ones(3), numbers[:, None].float() + 0.5, numbers


def kept(queue, task=0):
    rows, keys, posts = queue.read(task, added=int(queue.added_T[task]))
    assert torch.equal(rows[:, 0].long(), posts) and torch.equal(keys[:, 0] - 0.5, posts.float())
    return sorted(posts.tolist())


def fill(queue, *counts, task=0):
    for count in counts:
        first = int(queue.added_T[task])
        queue.put(task, *rows_of(first, count), added=first)
    return queue


@pytest.mark.parametrize("counts", [(3,), (5,), (3, 4), (2, 2, 2, 2), (12,), (4, 12), (0, 7)])
def test_the_last_rows_are_kept(counts):
    queue = fill(Queue(2, size=5, width=3, num_keys=1), *counts)
    assert kept(queue) == list(range(max(0, sum(counts) - 5), sum(counts))) and kept(queue, 1) == []


def test_rows_that_are_not_finite_stay_out():
    queue = Queue(1, size=4, width=3, num_keys=1)
    rows, keys, posts = rows_of(0, 4)
    rows[1, 2], rows[3, 0] = float("nan"), float("inf")
    queue.put(0, rows, keys, posts, added=0)
    assert kept(queue) == [0, 2] and queue.added_T.tolist() == [2]


def test_a_cast_to_half_precision_leaves_it_alone_and_a_checkpoint_holds_it():
    queue = fill(Queue(1, size=5, width=3, num_keys=1), 7)
    queue.bits_TQP[0, 0] = torch.tensor([0.1, 0.2, 0.3]).view(torch.int32)
    before = [value.clone() for value in queue.read(0, added=7)]
    fresh = Queue(1, size=5, width=3, num_keys=1).bfloat16()
    fresh.load_state_dict(queue.bfloat16().state_dict())
    for got, expected in zip(fresh.read(0, added=int(fresh.added_T[0])), before, strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def past_of(loss):
    """Task -> (rows, label tensor, posts) as ``reference`` wants them, of what is in the queue."""
    found = {}
    for index, task in enumerate(loss.tasks):
        rows, keys, posts = (
            part.clone() for part in loss.queue.read(index, added=int(loss.queue.added_T[index]))
        )
        labels = {
            "single_label": lambda keys=keys: keys[:, 0].long(),
            "regression": lambda keys=keys: keys[:, 0],
        }
        bits = keys.long()[..., None] >> torch.arange(20) & 1
        labels |= {"multi_label": lambda bits=bits: bits.flatten(1)[:, :23].float()}
        labels |= dict.fromkeys(("tags", "unlabelled"), lambda posts=posts: posts)
        found[task.name] = (rows.double(), labels[task.kind](), posts)
    return found


@pytest.mark.parametrize(
    "learned, views, across", [(False, 1, False), (True, 1, False), (True, 2, True)]
)
def test_past_rows_are_rivals_and_positives_without_gradient(learned, views, across):
    options = {"views": views, "negatives": "all" if across else "task"}
    loss = loss_of(queue_size=20, learn_temperature=learned, **options)
    call(loss, random_rows(11, seed=1, first_post=4))
    rows = random_rows(9, seed=2)
    call(loss, random_rows(4, seed=3, first_post=40))
    past = past_of(loss)
    lengths = {len(posts) for _, _, posts in past.values()}
    assert 20 in lengths and (views == 2 or min(lengths) < 20), "one is full, another is not"
    share, _, leaves = call(loss, rows)
    share.backward()
    scales = loss.scales.log_scales_T.detach().exp().requires_grad_() if learned else None
    compared = {"scales": scales, "past": past, "views": views, "across": across}
    expected, _, references = reference(TASKS, own_targets(rows), **compared)
    expected.backward()
    atol = 1e-12
    torch.testing.assert_close(share.detach(), expected.detach(), atol=atol, rtol=atol)
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, references[name].grad, atol=atol, rtol=atol)
    if learned:
        slope = scales.grad * scales.detach()
        torch.testing.assert_close(loss.scales.log_scales_T.grad, slope, atol=atol, rtol=atol)


def own_targets(rows):
    """Labels of kinds whose positives are views as post numbers, so that those of the queue can stand beside them."""
    changed = dict(rows)
    for name in ("words", "plain"):
        target = rows[f"label/{name}"]
        missing = (target == -100).flatten(1).all(1) if target.ndim > 1 else target == -100
        changed[f"label/{name}"] = torch.where(missing, -100, rows["posts"])
    return changed


def test_rows_of_the_anchors_own_post_are_left_out():
    rows = random_rows(6, tasks=(MOOD,))
    rows["label/mood"] = torch.tensor([0, 0, 1, 1, 2, 2])
    fresh, again = loss_of((MOOD,)), loss_of((MOOD,), queue_size=6)
    first = call(again, rows)[0]
    pair = {name: value[[0, 2]] for name, value in rows.items()}
    share = call(again, pair)[0]
    assert first == call(fresh, rows)[0] and share > 0
    # Post 0 has post 1 as its positive, post 2 has post 3; neither sees itself of the step before.
    expected = reference(
        (MOOD,),
        pair,
        past={"mood": (rows["z/mood"].float().double(), rows["label/mood"], rows["posts"])},
    )
    torch.testing.assert_close(share.detach(), expected[0].detach(), atol=1e-12, rtol=1e-12)


def test_the_queue_is_filled_but_not_read_before_its_step():
    loss, plain = loss_of((MOOD,), queue_size=8, queue_warmup=2), loss_of((MOOD,))
    equal = []
    for step in range(4):
        loss.begin_step()
        rows = random_rows(6, seed=step, tasks=(MOOD,), first_post=10 * step)
        equal.append(bool(call(loss, rows)[0] == call(plain, rows)[0]))
    assert equal == [True, True, False, False] and int(loss.queue.steps) == 4


def test_evaluation_neither_counts_nor_puts_anything_in():
    loss = loss_of((MOOD,), queue_size=8).eval()
    loss.begin_step()
    call(loss, random_rows(6, tasks=(MOOD,)))
    assert not any(value.any() for value in loss.queue.state_dict().values())


def test_the_queue_travels_in_the_state_of_the_objective():
    objective = tiny_objective(loss=LossConfig(contrastive=ContrastiveConfig(queue_size=4)))
    names = {name.rpartition(".")[2] for name in objective.state_dict() if ".queue." in name}
    assert names == {"bits_TQP", "key_bits_TQK", "posts_TQ", "added_T", "steps"}
