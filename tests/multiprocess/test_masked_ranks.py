"""Hidden words over two ranks: the mean is over all hidden tokens, and the output layer is the embeddings in shares."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch
from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.test_training_options import (
    ALONE,
    RECOMPUTED,
    SHARED,
    WEIGHED,
    assert_same,
)
from tests.multiprocess.workers import make_encoder

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_masked_ranks"
DOMAIN = Task("domain", "masked_words", (), "masked_accuracy")
THREE = {"accumulation": 3}
PRIVATE = {"model__private_width": 8, "model__moe__route_by": "both"}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "weighed": (
        WEIGHED,
        [{"stage": 3, **SHARED, **THREE}, {"stage": 3, **ALONE, **RECOMPUTED}, {"stage": 2, **ALONE}],
    ),
    "surgery": (WEIGHED | {"loss__weighting": "pcgrad"}, [{"stage": 3, **ALONE, **THREE}]),
    "private": (WEIGHED | PRIVATE, [{"stage": 3, **SHARED}]),
    "frozen": (WEIGHED | {"model__train_layers": "none"}, [{"stage": 3, **ALONE}]),
}  # fmt: skip
"""Name -> options of both, layouts over two ranks."""


def with_hidden_words(batch: Batch) -> Batch:
    """A quarter of the posts hides one to three tokens by their number; in some micro-steps a rank has none."""
    number = len(workers.TASKS) - 1
    ids_BL = torch.full_like(batch.input_ids_BL, IGNORED)
    shown_BL, tasks_B = batch.input_ids_BL.clone(), batch.task_ids_B.clone()
    counts_B = torch.full_like(tasks_B, IGNORED)
    for row, post in enumerate(batch.row_ids_B.tolist()):
        if post % 4 != 3:
            tasks_B[row] = max(0, post) % number
        elif post >= 0:
            tasks_B[row] = number
            count = 1 + post % 3
            ids_BL[row, :count], counts_B[row] = shown_BL[row, :count], count
            shown_BL[row, :count] = 3
    labels = {**batch.labels, "domain": counts_B}
    made = replace(batch, input_ids_BL=shown_BL, masked_ids_BL=ids_BL, labels=labels)
    return replace(made, task_ids_B=tasks_B)


def run_all(work: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    plain, workers.TASKS = workers.batch_of, (*workers.TASKS, DOMAIN)
    workers.batch_of = lambda *rest, **options: with_hidden_words(plain(*rest, **options))
    return [workers.case(encoder, steps=3, plainly=False, **options) for encoder, options in work]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What one process, and two ranks, make of each case."""
    encoder = make_encoder(tmp_path_factory.mktemp("bert"))
    alone = [(encoder, {"stage": 1, **options}) for options, _ in CASES.values()]
    shared = [
        (encoder, options | layout) for options, layouts in CASES.values() for layout in layouts
    ]
    one = run_ranks(f"{HERE}:run_all", 1, work=alone)[0]
    two = iter(run_ranks(f"{HERE}:run_all", 2, timeout=600, work=shared)[0])
    return dict(zip(CASES, one, strict=True)), {
        name: [next(two) for _ in layouts] for name, (_, layouts) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_logits_agree_with_one_process(name, answers):
    one_process, two_ranks = answers
    for answer in two_ranks[name]:
        assert_same(answer, one_process[name])


def test_the_head_and_the_embeddings_learn(answers):
    moves = answers[0]["weighed"]["moves"]
    for name in (
        "masked_heads.0.dense.weight",
        "masked_heads.0.bias",
        "masked_heads.0.norm.weight",
    ):
        assert abs(moves[name]).max() > 1e-4
    assert answers[0]["weighed"]["engine_logits"]["domain"].any()
