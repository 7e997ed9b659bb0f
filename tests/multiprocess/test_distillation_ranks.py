"""Soft labels over two ranks: teachers are asked once in all, and training equals one process under every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from comoe.types import Batch
from tests.helpers_export import TASKS as EXPORTED
from tests.helpers_export import export_tiny
from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.test_training_options import (
    ALONE,
    CHUNKS,
    CONTRASTED,
    SHARED,
    WEIGHED,
    assert_same,
)
from tests.multiprocess.workers import TASKS, make_encoder

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_distillation_ranks"
THREE = {"accumulation": 3}
BOTH = {"model__moe__route_by": "both"}
ANNEALED = {"distill__annealing": "linear"}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "softened": (
        WEIGHED | {"distill__temperature": 2.0}, [{"stage": 3, **SHARED, **THREE}, {"stage": 1, **ALONE}],
    ),
    "annealed by task": (WEIGHED | ANNEALED | BOTH, [{"stage": 2, **SHARED, **THREE}]),
    "posts": (WEIGHED | {"loss__weighting": "posts"}, [{"stage": 2, **ALONE, **THREE}]),
    "beside a contrastive loss": (CONTRASTED, [{"stage": 3, **SHARED, **CHUNKS}]),
    "surgery": (WEIGHED | ANNEALED | {"loss__weighting": "pcgrad"}, [{"stage": 1, **ALONE, **THREE}]),
}  # fmt: skip
"""Name -> options of both, layouts over two ranks."""


def with_soft_labels(batch: Batch) -> Batch:
    """Soft labels by the number of the post; a fifth of the posts, one task and the filler row have none."""
    soft = {}
    for number, task in enumerate(TASKS[:2] + TASKS[3:]):
        width = task.rules.num_outputs(task.labels)
        rows = []
        for row, starts_L in zip(batch.row_ids_B.tolist(), batch.word_starts_BL, strict=True):
            draws = np.random.default_rng([max(row, 0), number]).normal(size=(20, width))
            logits = torch.tensor(2 * draws, dtype=torch.float32)
            if task.mode == "tokens":
                logits = logits[: len(starts_L)].masked_fill(~starts_L[:, None], torch.nan)
            else:
                logits = logits[0]
            rows.append(logits * torch.nan if row % 5 == 4 else logits)
        soft[task.name] = task.rules.soft_labels(torch.stack(rows), task)
    return replace(batch, soft_labels=soft)


def run_all(work: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    plain = workers.batch_of
    workers.batch_of = lambda *rest, **options: with_soft_labels(plain(*rest, **options))
    return [workers.case(encoder, steps=2, plainly=False, **options) for encoder, options in work]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What one process, and two ranks, make of each case."""
    encoder = make_encoder(tmp_path_factory.mktemp("bert"))
    alone = [(encoder, {"stage": 1, **options}) for options, _ in CASES.values()]
    alone += [(encoder, {"stage": 1, **WEIGHED, **ANNEALED})]
    shared = [
        (encoder, options | layout) for options, layouts in CASES.values() for layout in layouts
    ]
    one = run_ranks(f"{HERE}:run_all", 1, work=alone)[0]
    two = iter(run_ranks(f"{HERE}:run_all", 2, timeout=600, work=shared)[0])
    return dict(zip([*CASES, "annealed"], one, strict=True)), {
        name: [next(two) for _ in layouts] for name, (_, layouts) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_logits_agree_with_one_process(name, answers):
    one_process, two_ranks = answers
    for answer in two_ranks[name]:
        assert_same(answer, one_process[name])


def test_the_options_train_differently_so_that_equal_losses_mean_something(answers):
    losses = [answers[0][name]["losses"][1] for name in ("softened", "annealed", "posts")]
    assert all(abs(a - b) > 1e-4 for i, a in enumerate(losses) for b in losses[:i])


def taught(export: str, caches: list[str]) -> tuple[list[list[str]], dict[str, np.ndarray]]:
    """What this rank asked the teacher, and what all ranks know then; each rank has its own cache."""
    from comoe.config.recipe import DistillConfig
    from comoe.data.posts import unlabelled_posts
    from comoe.inference import teacher

    if len(caches) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if len(caches) > 1 else 0
    texts = [f"{word} day {number}" for word in ("good", "bad", "sunny") for number in range(4)]
    words = [text.split() for text in texts]
    posts = unlabelled_posts(texts, tasks=[], words=words)
    asked, ask, teacher.CHUNK = [], teacher.ask, 3

    def counted(predictor: Any, posts: Any, *rest: Any, **options: Any) -> Any:
        asked.append(list(posts.texts))
        return ask(predictor, posts, *rest, **options)

    teacher.ask = counted
    config = DistillConfig(teachers=[export])
    said = teacher.soft_labels_of(
        config,
        teacher.find_teachers(config, EXPORTED),
        posts,
        device=torch.device("cpu"),
        cache_dir=Path(caches[rank]),
        progress=False,
    )
    return asked, {name: labels.values_RY for name, labels in said.items()}


def test_ranks_share_the_posts_and_a_second_run_asks_nothing(tmp_path):
    export_tiny(tmp_path)
    arguments = {
        "export": str(tmp_path / "export"),
        "caches": [str(tmp_path / "a"), str(tmp_path / "b")],
    }
    alone = taught(arguments["export"], [str(tmp_path / "c")])
    ranks = run_ranks(f"{HERE}:taught", 2, **arguments)
    asked = [{text for chunk in asked for text in chunk} for asked, _ in ranks]
    assert all(asked) and not asked[0] & asked[1] and len(asked[0] | asked[1]) == 12
    for _, said in ranks:
        for name, values in alone[1].items():
            np.testing.assert_allclose(said[name], values, atol=1e-6)
    again = run_ranks(f"{HERE}:taught", 2, **arguments)
    assert [asked for asked, _ in again] == [[], []]
