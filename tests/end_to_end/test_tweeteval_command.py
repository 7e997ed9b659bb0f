"""The TweetEval recipe on a folder of its shape: five tasks together, and the files that its scorer wants."""

import json
import random
from pathlib import Path

import pytest

from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import LEAN, read_lines, train_in_ranks, train_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

LABELS = {
    "emotion": ("anger", "joy", "optimism", "sadness"),
    "irony": ("non_irony", "irony"),
    "offensive": ("not-offensive", "offensive"),
    "hate": ("not-hate", "hate"),
    "sentiment": ("negative", "neutral", "positive"),
}
SIZES = {"train": 48, "val": 12, "test": 14}
BARE = "hate"
"""The task whose test labels are not published."""


def write_task(folder: Path, labels: tuple[str, ...]) -> None:
    """The files of one task; its second test post has a sign in it that ends a line elsewhere."""
    folder.mkdir(parents=True)
    rng = random.Random(folder.name)
    words = "the this friend salad song lovely awful @user #weekend today".split()
    mapping = "".join(f"{number}\t{label}\n" for number, label in enumerate(labels))
    (folder / "mapping.txt").write_text(mapping, encoding="utf-8")
    for split, count in SIZES.items():
        texts = [f"{' '.join(rng.choices(words, k=6))} {split} {number}" for number in range(count)]
        if split == "test":
            texts[1] += "\u2028 and more"
        (folder / f"{split}_text.txt").write_text(
            "".join(f"{text}\n" for text in texts), encoding="utf-8"
        )
        if split != "test" or folder.name != BARE:
            answers = "".join(f"{number % len(labels)}\n" for number in range(count))
            (folder / f"{split}_labels.txt").write_text(answers, encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tweeteval")
    for name, labels in LABELS.items():
        write_task(root / name, labels)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, home) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    words = [
        *LEAN, f"data.root={data}", "model.encoder=smoke:encoder", f"run.output_dir={runs}", "train.max_steps=3",
        "train.eval_every=3", "train.log_every=1", "data.noise=[typos, no_hashtags]", "tasks.irony.auxiliary=true",
        "tasks.emotion.hold_out={label: [sadness]}", "tasks.hate.slices=[label]",
    ]  # fmt: skip
    said = train_in_ranks(1, home, words, config="launch/configs/tweeteval.yaml")
    (runs / "said.txt").write_text(said, encoding="utf-8")
    return runs / "tweeteval"


def test_five_tasks_are_trained_together(run):
    assert all(tuple(line["tasks"]) == tuple(LABELS) for line in train_lines(run).values())
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert set(metrics["validation"]) == set(LABELS)
    assert {"f1_class_1"} <= set(metrics["validation"]["irony"])
    assert {"macro_recall"} <= set(metrics["validation"]["sentiment"])


def test_noise_slices_held_out_posts_and_auxiliary_tasks_are_told_apart(run):
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metrics, said = results["metrics"], (run.parent / "said.txt").read_text(encoding="utf-8")
    splits, noises = ("validation", "test"), ("typos", "no_hashtags")
    noisy = [f"{split}+{noise}" for split in splits for noise in noises]
    assert list(metrics) == [*splits, "unseen", *noisy]
    assert set(metrics["validation+typos"]) == set(LABELS)
    assert set(metrics["test+typos"]) == set(LABELS) - {BARE}
    # 12 of 48 training and 3 of 12 validation posts are sad.
    assert metrics["unseen"]["emotion"]["n"] == 15 and metrics["validation"]["emotion"]["n"] == 9
    assert (run / "predictions" / "unseen" / "emotion.jsonl").is_file()
    hate = metrics["validation"]["hate"]
    assert hate["n@label=hate"] == hate["n@label=not-hate"] == 6
    main = {"sentiment": "macro_recall"}
    tasks = [task for task in LABELS if task != "irony"]
    counted = [metrics["validation"][task][main.get(task, "macro_f1")] for task in tasks]
    assert results["best_value"] == pytest.approx(sum(counted) / 4)
    assert "| irony (auxiliary) |" in (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "irony (auxiliary)" in said and "label=not-hate" in said and "unseen" in said


def test_test_posts_without_labels_are_predicted_and_not_scored(run):
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert set(metrics["test"]) == set(LABELS) - {BARE}
    rows = read_lines(run / "predictions" / "test" / f"{BARE}.jsonl")
    assert len(rows) == SIZES["test"]
    assert all(row["gold"] is None and row["label"] in LABELS[BARE] for row in rows)


def test_each_task_gets_a_file_with_one_label_id_per_line(run, data, tmp_path):
    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    for name, labels in LABELS.items():
        source, target = data / name / "test_text.txt", tmp_path / f"{name}.txt"
        options = {"format": "tweeteval", "tasks": [name]}
        predict_file(predictor, source, target, PredictOptions(**options))
        *lines, end = target.read_bytes().decode("ascii").split("\n")
        assert end == "" and len(lines) == SIZES["test"]
        assert {int(line) for line in lines} <= set(range(len(labels)))
        told = read_lines(run / "predictions" / "test" / f"{name}.jsonl")
        # A post without any label is answered for every task.
        own = [row for row in told if row["gold"] is not None or name == BARE]
        assert [labels[int(line)] for line in lines] == [row["label"] for row in own]
