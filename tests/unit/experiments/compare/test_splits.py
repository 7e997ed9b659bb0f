"""``--splits``: tables of further evaluated sets, from written run folders against numbers made by hand."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from comoe.config.load import load_recipe
from comoe.config.recipe import TaskConfig
from comoe.experiments.compare import command
from comoe.experiments.compare.command import run_comparison
from comoe.experiments.compare.plan import plan_arms
from comoe.experiments.compare.report import compare
from comoe.experiments.compare.splits import check_splits
from comoe.experiments.compare.tables import markdown_lines
from comoe.tasks.task import build_task
from tests.helpers_compare import TASKS, arguments, write_run

HELD = ["tasks.mood.hold_out={place: [sea]}", "tasks.topic.hold_out={place: [sea]}"]
STUDENT = 4.302652730
"""t(2) at 97.5 %."""


def add_set(folder: Path, name: str, right: dict[str, int], *, posts: int, predicted=False) -> None:
    """A further set of a written run, which answers the first so many posts right."""
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["metrics"][name] = {
        task: {"n": posts, "accuracy": hits / posts} for task, hits in right.items()
    }
    file.write_text(json.dumps(results))
    for task, hits in right.items() if predicted else ():
        place = folder / "predictions" / name
        place.mkdir(exist_ok=True)
        rows = [
            {"row": row, "text": f"{task} {row}", "gold": "good", "label": "good" if row < hits else "bad"}
            for row in range(posts)
        ]  # fmt: skip
        (place / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_runs(runs: Path) -> None:
    """0.8 of the test posts and 0.9 of the validation posts are right everywhere. Unseen posts have labels of mood
    and topic: together 0.7 of mood, alone 0.5, 0.6, 0.7. With typos 48 of 60, alone 42, 43, 44."""
    for seed in range(3):
        folders = {runs / f"single.{name}-s{seed}": [name] for name in TASKS}
        folders[runs / f"recipe-s{seed}"] = [*TASKS, "hint"]
        for folder, names in folders.items():
            alone = len(names) == 1
            write_run(folder, dict.fromkeys(names, 48))
            add_set(folder, "validation", dict.fromkeys(names, 54), posts=60)
            noisy = dict.fromkeys(names, 42 + seed if alone else 48)
            add_set(folder, "validation+typos", noisy, posts=60)
            unseen = {"mood": 10 + 2 * seed if alone else 14, "topic": 10}
            unseen = {name: unseen[name] for name in names if name in unseen}
            add_set(folder, "unseen", unseen, posts=20, predicted=True)


def test_sets_are_compared_with_the_arm_of_the_claim_and_every_fall_is_told(
    experiment, monkeypatch
):
    monkeypatch.setattr(command, "write_plots", lambda *_: None)
    write_runs(experiment.runs)
    given = {"arms": "multi,single", "seeds": "0,1,2", "affinity_posts": 0, "resamples": 200}
    given |= {"claim": "multi > single", "splits": "unseen,validation+typos,test,test+typos"}
    overrides = [*HELD, "data.noise=[typos]"]
    assert run_comparison(arguments(experiment, **given, overrides=overrides)) == []
    found = json.loads((experiment.output / "comparison.json").read_text())
    assert found["baseline"] == "multi"
    unseen, typos, same, none = found["splits"].values()

    assert (unseen["baseline"], unseen["from"], unseen["resampled_posts"]) == ("single", "test", True)  # fmt: skip
    assert unseen["posts"] == {"mood": [20], "topic": [20]}
    single, multi = unseen["arms"]["single"], unseen["arms"]["multi"]
    assert single["quality"]["mood/accuracy"]["values"] == [0.5, 0.6, 0.7]
    assert single["quality"]["mean"]["values"] == pytest.approx([0.5, 0.55, 0.6])
    mood, mean = (multi["against_baseline"][name] for name in ("mood", "mean"))
    assert (mood["mean"], mean["mean"]) == (pytest.approx(0.1), pytest.approx(0.05))
    # Together is right alone on two posts in one seed of three, and on two in two.
    spread = math.sqrt(((2 * 1 / 9 + 2 * 4 / 9) / 20 - 0.1**2) / 20)
    assert mood["post_spread"] == pytest.approx(spread, rel=0.15)
    assert multi["against_baseline"]["topic"]["p"] == 1 and mood["adjusted"] > mood["p"]
    fall = single["fall"]["mood"]
    assert fall["values"] == pytest.approx([0.3, 0.2, 0.1])
    assert fall["high"] - fall["mean"] == pytest.approx(0.1 * STUDENT / math.sqrt(3))
    # The mean is over the two tasks that both sets have.
    assert single["fall"]["mean"]["values"] == pytest.approx([0.3, 0.25, 0.2])
    assert multi["fall"]["mean"]["values"] == pytest.approx([0.2] * 3)
    less = multi["falls_less_than_baseline"]["mean"]
    assert less["mean"] == pytest.approx(0.05)
    assert less["p"] == pytest.approx(stats.ttest_1samp([0.1, 0.05, 0.0], 0).pvalue, rel=1e-4)

    # Runs write no predictions for noisy posts, and fall from the same posts without the noise.
    assert (typos["from"], typos["resampled_posts"]) == ("validation", False)
    mean = typos["arms"]["multi"]["against_baseline"]["mean"]
    expected = stats.ttest_1samp([6 / 60, 5 / 60, 4 / 60], 0)
    assert mean["mean"] == pytest.approx(5 / 60) and mean["p"] == pytest.approx(expected.pvalue)
    assert typos["arms"]["single"]["fall"]["stance"]["values"] == pytest.approx([0.2, 11 / 60, 1 / 6])  # fmt: skip
    assert typos["arms"]["multi"]["fall"]["hint"]["mean"] == pytest.approx(0.1)
    assert same["notes"] == ["The other tables are of these posts."]
    assert none["notes"] == ["No finished run has labeled posts there."]

    text = (experiment.output / "table.md").read_text()
    for part in ("## Split unseen", "the posts of unseen (mood 20, topic 20)", "a paired bootstrap of the posts",
                 "| arm | of | seeds | unseen | against single | p | fall from test | less than single | p |",
                 "| single | mood/accuracy | 3 | 0.600 [", " | +0.200 [-0.048, +0.448] |", "| fall from validation |",
                 "wrote no predictions", "Smallest difference that this table can see: "):  # fmt: skip
        assert part in text
    again = arguments(experiment, **given | {"claim": None}, against="multi", overrides=overrides)
    run_comparison(again)
    found = json.loads((experiment.output / "comparison.json").read_text())
    assert found["splits"]["unseen"]["baseline"] == "multi"


def test_a_set_of_other_posts_and_an_unfinished_arm_are_told_as_far_as_they_are(experiment):
    write_runs(experiment.runs)
    add_set(experiment.runs / "recipe-s1", "unseen", {"mood": 14, "topic": 10}, posts=19)
    (experiment.runs / "single.topic-s2/results.json").unlink()
    plan = plan_arms(experiment, arms=["single", "multi"], custom={}, seeds=[0, 1, 2])
    further = {"unseen": "single"}
    (found,) = compare(
        plan, experiment.runs, baseline="single", resamples=0, further=further
    ).further
    assert found.posts["mood"] == [19, 20] and found.resampled and not found.differences
    assert found.values("single", "mean") == pytest.approx([0.5, 0.55])
    # Seed 1 has other posts, seed 2 no topic alone.
    assert {name: item.seeds for name, item in found.steadier["multi"].items()} == {
        "mood": 2, "topic": 1, "mean": 1}  # fmt: skip
    assert "multi predicts for other posts of mood, topic than single" in found.notes[0]


def test_an_error_that_grows_is_a_fall(experiment):
    plan = plan_arms(experiment, arms=["dense", "softmax"], custom={}, seeds=[0])
    task = build_task(
        "mood", TaskConfig(path="x", kind="regression", metric="mae"), labels=[], label_counts={}
    )
    for arm, noisy in (("dense", 1.5), ("softmax", 1.2)):
        folder = experiment.runs / f"{arm}-s0"
        write_run(folder, {"mood": 1})
        (folder / "tasks.json").write_text(json.dumps([task.to_dict()]))
        results = json.loads((folder / "results.json").read_text())
        errors = {"test": 1.0, "test+typos": noisy}
        results["metrics"] = {name: {"mood": {"n": 60, "mae": x}} for name, x in errors.items()}
        (folder / "results.json").write_text(json.dumps(results))
    further = {"test+typos": "dense"}
    comparison = compare(plan, experiment.runs, baseline="dense", resamples=0, further=further)
    text = "\n".join(markdown_lines(comparison))
    assert "| softmax | mood/mae | 1 | 1.200 | +0.300 |  | +0.200 | +0.300 |  |" in text


def test_sets_are_known_from_the_recipe(experiment):
    recipe = load_recipe(experiment.config, [*HELD, "data.noise=[typos,no_emoji]"])
    assert check_splits(None, recipe) == []
    names = " unseen,test+no_emoji, validation,unseen"
    assert check_splits(names, recipe) == ["unseen", "test+no_emoji", "validation"]
