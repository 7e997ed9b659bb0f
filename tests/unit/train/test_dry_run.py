"""What --dry-run prints, on a handful of posts of every kind of task."""

from dataclasses import dataclass, field, replace

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
    mood = Task("mood", "single_label", ("bad", "good"), "macro_f1")
    texts = ["no label", "thanks @ann https://a.b/c", "two", "three", "a fourth one"]
    assert sample_lines(mood, posts(texts, labels={"mood": [None, 1, 0, 0, 1]}), CONFIG) == [
        "mood (single_label, metric macro_f1):",
        "  good | thanks @user http",
        "  bad | two",
        "  bad | three",
    ]


def test_every_kind_of_label_is_shown_in_words():
    topics = Task("topics", "multi_label", ("art", "sport", "war"), "macro_f1")
    assert sample_lines(topics, posts(["x", "y"], labels={"topics": [(0, 2), ()]}), CONFIG)[1:] == [
        "  art, war | x",
        "  none of the labels | y",
    ]
    strength = Task("strength", "regression", (), "pearson")
    assert sample_lines(strength, posts(["x"], labels={"strength": [-1.25]}), CONFIG)[1:] == [
        "  -1.25 | x"
    ]
    spans = Task("spans", "tags", ("O", "B-PER"), "span_f1")
    tagged = posts(["Ann runs"], labels={"spans": [[1, 0]]}, words=[["Ann", "runs"]])
    assert sample_lines(spans, tagged, CONFIG)[1:] == ["  B-PER, O | Ann runs"]


def test_a_pair_is_shown_behind_its_post_and_a_long_post_is_cut():
    stance = Task("stance", "single_label", ("against", "favor"), "macro_f1")
    (_, line) = sample_lines(
        stance, posts(["y " * 500], labels={"stance": [1]}, pairs=["the target"]), CONFIG
    )
    assert line.startswith("  favor | y y") and line.endswith("... || the target")
    assert len(line) < SHOWN_CHARACTERS + 40


def test_an_auxiliary_task_is_marked():
    mood = Task("mood", "single_label", ("bad", "good"), "macro_f1", auxiliary=True)
    lines = sample_lines(mood, posts(["x"], labels={"mood": [1]}), CONFIG)
    assert lines == ["mood (single_label, metric macro_f1, auxiliary):", "  good | x"]


def test_a_task_without_a_label_says_so():
    mood = Task("mood", "single_label", ("bad", "good"), "macro_f1")
    assert (
        sample_lines(mood, posts(["x"], labels={"mood": [None]}), CONFIG)[1]
        == "  no post has a label of this task"
    )


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
    for part in ("bad 0, good 1", "set aside: 1 rows", "mood.csv:7", "  good | a b", "20.0 MiB"):
        assert part in said, part
