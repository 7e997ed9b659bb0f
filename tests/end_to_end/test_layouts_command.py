"""Ranks, expert parallelism and ZeRO stage change nothing, from the first loss to the export."""

import json
from pathlib import Path

import numpy as np
import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import (
    LEAN,
    SMOKE,
    TASKS,
    deepspeed,
    losses,
    read_lines,
    train_in_ranks,
)

pytestmark = pytest.mark.end_to_end

STEPS = 6
COMMON = (f"train.max_steps={STEPS}", "model.dropout=0", "train.log_every=1", *LEAN)
# A small batch: with this gate each post is a row per task.
PAPER = (
    "model.moe.route_by=task model.moe.top_k=4 model.moe.balance=none train.batch_size=24".split()
)


def train(ranks: int, home: Path, runs: Path, settings: str, *words: str) -> Path:
    train_in_ranks(ranks, home, [f"run.output_dir={runs}", *COMMON, *words], settings=settings)
    return runs / "smoke"


def layout_of(run: Path) -> tuple[int, int, int]:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return results["world_size"], results["ep_size"], results["zero_stage"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, shared_terminal) -> Path:
    """The launcher without a number of ranks, which is one rank on a CPU."""
    runs, words = tmp_path_factory.mktemp("one"), deepspeed(1)
    where = words.index("--num_accelerators")
    del words[where : where + 2]
    done = shared_terminal.run(*words, "--config", SMOKE, f"run.output_dir={runs}", *COMMON)
    assert done.code == 0, done.out + done.err
    return runs / "smoke"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, home) -> Path:
    """Two ranks that share the experts, ZeRO 3: what is hardest to put together again."""
    return train(2, home, tmp_path_factory.mktemp("two"), "zero3")


def test_one_process_has_one_rank(one_process):
    assert layout_of(one_process) == (1, 1, 2) and len(losses(one_process)) == STEPS


def test_two_ranks_with_zero_3_have_the_losses_of_one_process(one_process, two_ranks):
    assert layout_of(two_ranks) == (2, 2, 3)
    np.testing.assert_allclose(losses(two_ranks), losses(one_process), rtol=1e-5)


def test_the_papers_gate_on_four_ranks_in_two_expert_groups_has_the_losses_of_one_rank(
    tmp_path, home
):
    alone = train(1, home, tmp_path / "one", "zero2", *PAPER)
    four = train(4, home, tmp_path / "four", "zero1", *PAPER, "parallel.ep_size=2")
    assert layout_of(alone) == (1, 1, 2) and layout_of(four) == (4, 2, 1)
    np.testing.assert_allclose(losses(four), losses(alone), rtol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, two_ranks, shared_terminal) -> Path:
    """An export made anew, in one process, from the checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("again") / "export"
    done = shared_terminal.here("launch/export.py", "--checkpoint", two_ranks, "--output", folder)
    assert done.code == 0 and f"exported to {folder}" in done.out, done.said
    return folder


def test_an_export_from_shared_experts_and_zero_3_is_the_one_that_the_run_made(exported, two_ranks):
    assert (exported / "model.safetensors").read_bytes() == (
        two_ranks / "export/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_the_export_answers_as_the_training_engine_did(task, exported, two_ranks, home):
    told = read_lines(two_ranks / "predictions" / "test" / f"{task}.jsonl")
    source = {"mentions": "mentions", "stance": "stance"}.get(task, "reviews")
    posts = read_lines(home / "smoke-1" / "posts" / source / "test.jsonl")
    # A tenth of the posts has no topic.
    posts = [post for post in posts if task != "topic" or post.get("topic") is not None]
    texts = [post.get("text") or " ".join(post["words"]) for post in posts]
    assert texts == [row["text"] for row in told]
    predictor = Predictor.from_pretrained(exported, device="cpu")
    pairs, words = ([post.get(name) for post in posts] for name in ("target", "words"))
    answers = predictor(texts, pairs=pairs, words=words, tasks=[task])
    numbers = []
    for row, answer in zip(told, answers, strict=True):
        ours = answer[task]
        for key in {"label", "labels", "tags"} & set(row):
            assert ours[key] == row[key], row["text"]
        numbers.append((values_of(ours), values_of(row)))
    assert len(numbers) >= 70
    for ours, theirs in numbers:
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def values_of(answer: dict) -> list[float]:
    """Every number of an answer: the value, or the score of each label or word."""
    scores = answer.get("scores", [])
    if "value" in answer:
        return [answer["value"]]
    return list(scores.values() if isinstance(scores, dict) else scores)
