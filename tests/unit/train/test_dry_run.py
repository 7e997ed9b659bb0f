"""What --dry-run prints, on a handful of posts of every kind of task."""

from dataclasses import dataclass, field, replace

import pytest
import yaml

from comoe.config.recipe import NormalizeConfig, Recipe, TaskConfig
from comoe.data.posts import PostSplit, unlabelled_posts
from comoe.data.report import BadRow, DataReport
from comoe.tasks.task import Task
from comoe.train.dry_run import SHOWN_CHARACTERS, dry_run_lines, sample_lines
from comoe.train.memory_plan import RunSize, plan_memory

CONFIG = NormalizeConfig()
PLAN = plan_memory(RunSize(2**20, 0))


@dataclass(frozen=True)
class FakeCorpus:
    tasks: tuple[Task, ...]
    splits: dict[str, PostSplit]
    report: DataReport = field(default_factory=DataReport)


def posts(
    texts: list[str], *, labels: dict, words: list | None = None, pairs: list | None = None
) -> PostSplit:
    return replace(unlabelled_posts(texts, tasks=[], words=words, pairs=pairs), labels=labels)


def test_samples_are_the_first_labelled_posts_cleaned_as_the_encoder_sees_them():
    mood = Task("mood", "single_label", ("bad", "good"), "macro_f1", auxiliary=True)
    texts = ["no label", "thanks @ann https://a.b/c", "two", "three", "a fourth one"]
    assert sample_lines(mood, posts(texts, labels={"mood": [None, 1, 0, 0, 1]}), CONFIG) == [
        "mood (single_label, metric macro_f1, auxiliary):",
        "  good | thanks @user http",
        "  bad | two",
        "  bad | three",
    ]
    (_, nothing) = sample_lines(mood, posts(["x"], labels={"mood": [None]}), CONFIG)
    assert nothing == "  no post has a label of this task"


@pytest.mark.parametrize(
    ("kind", "labels", "values", "words", "shown"),
    [("multi_label", ("art", "sport", "war"), [(0, 2), ()], None, ["art, war | x", "none of the labels | y z"]),
     ("regression", (), [-1.25, None], None, ["-1.25 | x"]),
     ("tags", ("O", "B-PER"), [None, [1, 0]], [None, ["y", "z"]], ["B-PER, O | y z"]),
     *((kind, (), [0, 0], None, ["no label | x", "no label | y z"]) for kind in ("unlabelled", "masked_words"))],
)  # fmt: skip
def test_every_kind_of_label_is_shown_in_words(kind, labels, values, words, shown):
    task = Task("t", kind, labels, "none")
    lines = sample_lines(task, posts(["x", "y z"], labels={"t": values}, words=words), CONFIG)
    assert lines[1:] == [f"  {line}" for line in shown]


def test_a_pair_is_shown_behind_its_post_and_a_long_post_is_cut():
    stance = Task("stance", "single_label", ("against", "favor"), "macro_f1")
    made = posts(["y " * 500], labels={"stance": [1]}, pairs=["the target"])
    (_, line) = sample_lines(stance, made, CONFIG)
    assert line.startswith("  favor | y y") and line.endswith("... || the target")
    assert len(line) < SHOWN_CHARACTERS + 40


def test_the_printout_holds_recipe_counts_set_aside_rows_posts_and_memory():
    recipe = Recipe(tasks={"mood": TaskConfig(path="mood.csv")})
    mood = Task("mood", "single_label", ("bad", "good"), "macro_f1")
    report = DataReport(
        posts={"mood": {"train": 1}},
        labels={"mood": {"train": {"bad": 0, "good": 1}}},
        set_aside=[BadRow("mood.csv", 7, "", "The text is empty.")],
    )
    corpus = FakeCorpus((mood,), {"train": posts(["a b"], labels={"mood": [1]})}, report)
    said = "\n".join(dry_run_lines(recipe, corpus, PLAN))
    shown, _ = said.split("# data")
    assert yaml.safe_load(shown)["tasks"]["mood"]["path"] == "mood.csv"
    assert [line for line in said.splitlines() if line.startswith("# ")] == [
        "# recipe", "# data", "# sample posts", "# memory",
    ]  # fmt: skip
    for part in ("bad 0, good 1", "set aside: 1 row", "mood.csv:7", "  good | a b", "20.0 MiB"):
        assert part in said, part
