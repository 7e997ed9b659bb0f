"""The contrastive loss written a second time, densely and in float64, and batches of every kind to try it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comoe.config.recipe import ContrastiveConfig
from comoe.losses.contrastive.loss import ContrastiveLoss, alone
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch, ModelOutput

WIDTH = 5
MOOD = Task(
    "mood", "single_label", ("a", "b", "c"), "macro_f1", contrastive=True, contrastive_weight=0.5
)
SIGNS = Task(
    "signs", "multi_label", tuple(f"s{i:02}" for i in range(23)), "macro_f1", contrastive=True
)
HEAT = Task(
    "heat",
    "regression",
    (),
    "pearson",
    contrastive=True,
    contrastive_width=0.7,
    contrastive_temperature=0.3,
)
WORDS = Task("words", "tags", ("O", "B"), "span_f1", contrastive=True)
PLAIN = Task("plain", "unlabelled", (), "none", contrastive=True, contrastive_weight=2.0)
TASKS = (MOOD, SIGNS, HEAT, WORDS, PLAIN)


def loss_of(tasks: Sequence[Task] = TASKS, *, gather=alone, ranks=1, **options) -> ContrastiveLoss:
    """A loss in float64, to be tried at full precision."""
    config = ContrastiveConfig(**options)
    return ContrastiveLoss(tasks, config, width=WIDTH, gather=gather, ranks=ranks).double()


def random_rows(
    count: int, *, seed: int = 0, tasks: Sequence[Task] = TASKS, first_post: int = 0
) -> dict[str, Tensor]:
    """Named tensors with ``count`` rows each: ``posts``, and per task ``label/``, ``z/`` and ``view/``.

    The labels are those of posts 0 to 63 whatever the seed: a post never changes its label. From
    the eighth row on some posts are there again: row 7 and row 11 are the post of row 2, row 10
    that of row 5.
    """
    posts, count = torch.arange(first_post, first_post + count), 64
    posts[7::3] -= 5
    posts[11::6] -= 9
    draw = torch.Generator().manual_seed(0)
    labels = {
        "single_label": lambda: torch.randint(0, 3, (count,), generator=draw),
        "multi_label": lambda: (torch.rand(count, 23, generator=draw) < 0.1).float(),
        "regression": lambda: torch.randn(count, generator=draw),
        "tags": lambda: torch.randint(0, 2, (count, 4), generator=draw),
        "unlabelled": lambda: torch.zeros(count, dtype=torch.int64),
    }
    found = {"posts": torch.arange(count)[posts] + 5_000_000_000}
    vectors = torch.Generator().manual_seed(seed)
    for task in tasks:
        target = labels[task.kind]()
        missing = torch.rand(count, generator=draw) < 0.2
        target[missing] = float("nan") if target.is_floating_point() else IGNORED
        found[f"label/{task.name}"] = target[posts]
        for what in ("z", "view"):
            rows = torch.randn(len(found["posts"]), WIDTH, dtype=torch.float64, generator=vectors)
            found[f"{what}/{task.name}"] = F.normalize(rows, dim=1)
    return found


def call(loss: ContrastiveLoss, rows: dict[str, Tensor]):
    """(share, terms, leaves): the loss on some rows, with leaves that collect the gradient."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in rows.items()
        if name.startswith(("z/", "view/"))
    }
    parts = {
        what: {n[len(what) + 1 :]: leaf for n, leaf in leaves.items() if n.startswith(what)}
        for what in ("z", "view")
    }
    labels = {name[6:]: value for name, value in rows.items() if name.startswith("label/")}
    posts = rows["posts"]
    blank = torch.ones(len(posts), 2, dtype=torch.int64)
    batch = Batch(blank, blank, None, blank.bool(), posts, posts, labels)
    share, terms = loss(ModelOutput({}, parts["z"], {}, (), posts[:0], views=parts["view"]), batch)
    return share, terms, leaves


def reference(tasks, rows, *, scales=None, temperature=0.1, past=None, views=1, across=False):
    """(value, value per task, leaves): the formula of docs/method.md with full matrices.

    Args:
        tasks: those that take part.
        rows: of all ranks.
        scales: inverse temperatures (T,), with gradient; None takes the tasks' own or
            ``temperature``.
        temperature: of tasks without an own one.
        past: task -> (rows, label tensor, posts) in the queue.
        views: 2 gives every post of every task its second view.
        across: rows of other tasks are negatives too.
    """
    leaves = {
        name: v.double().clone().requires_grad_()
        for name, v in rows.items()
        if name.startswith(("z/", "view/"))
    }
    compared = {task.name: compared_rows(task, rows, leaves, views=views) for task in tasks}
    total, each = torch.zeros((), dtype=torch.float64), {}
    for index, task in enumerate(tasks):
        z, target, posts = compared[task.name]
        others, targets, all_posts = z, target, posts
        if past is not None:
            others, targets, all_posts = (
                torch.cat(pair) for pair in zip((z, target, posts), past[task.name], strict=True)
            )
        foreign, foreign_posts = [], []
        for other in tasks if across else ():
            for source in (compared, past or {}):
                if other is not task and other.name in source:
                    foreign.append(source[other.name][0])
                    foreign_posts.append(source[other.name][2])
        scale = (
            1 / (task.contrastive_temperature or temperature) if scales is None else scales[index]
        )
        value = z.sum() * 0
        anchors = 0
        current = len(z) if views == 2 or task.kind in ("tags", "unlabelled") else 0
        for i in range(len(z)):
            rivals = [
                j
                for j in range(len(others))
                if j != i and not (j >= current and all_posts[j] == posts[i])
            ]
            w = torch.tensor(
                [alike(task, target[i], targets[j]) for j in rivals], dtype=torch.float64
            )
            if len(rivals) and w.sum() > 0:
                s = scale * (others[rivals] @ z[i])
                pushed = [s]
                for rows_of, posts_of in zip(foreign, foreign_posts, strict=True):
                    pushed.append(scale * (rows_of[posts_of != posts[i]] @ z[i]))
                value = value + torch.logsumexp(torch.cat(pushed), 0) - (w * s).sum() / w.sum()
                anchors += 1
        each[task.name] = value / max(anchors, 1)
        total = total + task.contrastive_weight * each[task.name]
    return total, each, leaves


def compared_rows(task, rows, leaves, *, views):
    """(rows, label of each, post of each) of one task, second views last."""
    target = rows[f"label/{task.name}"]
    present = ~target.isnan() if target.is_floating_point() else target != IGNORED
    present = present.flatten(1).any(1) if target.ndim > 1 else present
    z, target, posts = leaves[f"z/{task.name}"][present], target[present], rows["posts"][present]
    if views == 1 and task.kind not in ("tags", "unlabelled"):
        return z, target, posts
    # Without labels to compare a post is like itself alone.
    target = posts if task.kind in ("tags", "unlabelled") else target
    view = leaves[f"view/{task.name}"][present]
    return torch.cat([z, view]), torch.cat([target, target]), posts.repeat(2)


def alike(task: Task, a: Tensor, b: Tensor) -> float:
    """How much two posts with these labels are positives of one another."""
    if task.kind == "multi_label":
        a, b = a > 0, b > 0
        return float((a & b).sum()) / max(float((a | b).sum()), 1.0)
    if task.kind == "regression":
        return float(torch.exp(-(a.double() - b.double()).abs() / task.contrastive_width))
    return float(a == b)
