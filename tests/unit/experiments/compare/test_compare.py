"""The arms of a comparison, its intervals against textbook numbers, and its report from written run folders."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comoe.config.load import load_recipe, save_recipe
from comoe.config.recipe import TaskConfig
from comoe.experiments.cluster.shape import shape_of_recipe
from comoe.experiments.compare.arms import ARMS
from comoe.experiments.compare.own_arms import custom_arms
from comoe.experiments.compare.plan import check_earlier, plan_arms
from comoe.experiments.compare.plots import removal_figure, write_plots
from comoe.experiments.compare.report import compare, with_metrics, write_comparison
from comoe.experiments.compare.results import REMOVAL_FILE
from comoe.experiments.compare.statistics import (
    Predictions,
    paired_difference,
    read_predictions,
    resampled,
    seed_interval,
)
from comoe.experiments.compare.tables import markdown_lines
from comoe.experiments.runner import Experiment
from comoe.tasks.task import build_task
from tests.helpers_compare import RECIPE as FOUR_TASKS
from tests.helpers_compare import experiment_of

RECIPE = (
    "tasks: {mood: {path: x, confidence: sure, descriptions: {bad: poor, good: fine}}}\n"
    "loss: {contrastive: {first_steps: 3}}\n"
    "model: {encoder: smoke:encoder, moe: {num_experts: 4, top_k: 2, expert_width: 24}}\n"
)


@pytest.fixture
def experiment(tmp_path, encoder) -> Experiment:
    return replace(experiment_of(tmp_path, encoder, RECIPE), ranks=2)


def mood(
    kind: str = "single_label", metric: str = "accuracy", name: str = "mood", labels=("bad", "good")
):
    return build_task(
        name, TaskConfig(path="x", kind=kind, metric=metric), labels=list(labels), label_counts={}
    )


def plan_trials(experiment: Experiment, **asked):
    return plan_arms(experiment, **asked).trials


def test_arms_of_lora_experts_have_the_rank_of_a_token_and_its_scale(experiment):
    moe = "{form: lora, num_experts: 4, top_k: 4, rank: 3, alpha: 6, route_by: task, balance: none}"
    recipe = load_recipe(experiment.config, [f"model.moe={moe}"])
    found = {
        arm: load_recipe(experiment.config, [f"model.moe={moe}", *ARMS[arm](recipe)]).model.moe
        for arm in ("dense_total", "paper", "softmax_all", "by_token", "one_per_task")
    }
    for arm, made in found.items():
        assert (made.top_k * made.rank, made.alpha / made.rank) == (12, 2), arm
    assert (found["dense_total"].num_experts, found["dense_total"].rank) == (1, 12)
    # Four experts of rank 3 in every map: 12 rows of A and 12 columns of B.
    assert shape_of_recipe(recipe).expert_parameters % 12 == 0
    with pytest.raises(ValueError, match="counted in the linear maps.*leave out --encoder-shape"):
        shape_of_recipe(recipe, "2,16,32,99")


def test_every_arm_with_experts_has_the_same_active_width(experiment):
    trials = plan_trials(experiment, arms=[arm for arm in ARMS], custom={}, seeds=[0])
    widths = {}
    for trial in trials:
        shape = shape_of_recipe(load_recipe(experiment.config, trial.overrides))
        active = shape.top_k * shape.expert_width + shape.shared_width
        widths[trial.part] = shape.moe_layers * active
    layers = shape_of_recipe(load_recipe(experiment.config)).moe_layers
    assert widths.pop("no_experts") == 0
    assert widths.pop("dense_total") == layers * 4 * 24
    assert set(widths.values()) == {layers * 48}
    (paper,) = (trial for trial in trials if trial.part == "paper")
    made = load_recipe(experiment.config, paper.overrides).model.moe
    assert (made.route_by, made.top_k, made.num_experts, made.balance) == ("task", 4, 4, "none")


def test_one_block_per_task_and_arms_that_do_not_read_the_task(experiment):
    recipe = experiment.config
    encoder = load_recipe(recipe).model.encoder
    recipe.write_text(
        "tasks: {mood: {path: x}, heat: {path: y, kind: regression}, topic: {path: z}}\n"
        f"model: {{encoder: {encoder}, moe: {{num_experts: 6, top_k: 2, expert_width: 24, "
        "route_by: both, task_prior: own}}\n"
    )
    names = ["one_per_task", "by_token", "dense", "ple"]
    trials = plan_trials(experiment, arms=names, custom={}, seeds=[0])
    made = {trial.part: load_recipe(recipe, trial.overrides).model.moe for trial in trials}
    one = made["one_per_task"]
    assert (one.num_experts, one.top_k, one.expert_width, one.task_prior) == (3, 1, 48, "own")
    assert made["by_token"].task_prior == made["dense"].task_prior == 0
    ple = made["ple"]
    assert (ple.shared_width, ple.expert_width, ple.task_prior, ple.route_by) == (24, 12, 1, "both")


def test_trials_run_seed_by_seed_and_custom_arms_are_read_with_lists(experiment):
    trials = plan_trials(experiment, arms=["dense", "sigmoid"], custom={}, seeds=[3, 1])
    assert [trial.name for trial in trials] == ["dense-s3", "sigmoid-s3", "dense-s1", "sigmoid-s1"]
    assert load_recipe(experiment.config, trials[0].overrides).train.seed == 3
    own = custom_arms(["last:model.moe.layers=[1,3],loss.contrastive.weight=0"])
    assert own == {"last": ["model.moe.layers=[1,3]", "loss.contrastive.weight=0"]}
    with pytest.raises(ValueError, match="must read name:key=value"):
        custom_arms(["last"])


def test_a_file_that_single_and_joint_runs_divide_otherwise_is_named(tmp_path, encoder):
    def notes(overrides, arms=("single", "multi")):
        text = FOUR_TASKS.replace("path: reviews", "path: reviews.csv")
        asked = experiment_of(tmp_path, encoder, text, overrides)
        plan = plan_arms(asked, arms=list(arms), custom={}, seeds=[0])
        return [note for note in plan.notes if "stratify" in note]

    (note,) = notes([])
    assert "of reviews.csv, runs without some of the tasks hold out other posts" in note
    assert notes(["data.stratify=none"]) == [] and notes([], arms=["multi"]) == []
    held = ["tasks.mood.splits.validation=v.csv", "tasks.topic.splits.validation=v.csv"]
    assert notes(held) == []


def test_a_confidence_arm_is_about_the_tasks_that_have_confidences(experiment):
    config = experiment.config
    config.write_text(config.read_text().replace("{mood:", "{plain: {path: y}, mood:"))
    (trial,) = plan_trials(experiment, arms=["confidence_input_output"], custom={}, seeds=[0])
    tasks = load_recipe(config, trial.overrides).tasks
    strategies = {name: task.confidence_strategy for name, task in tasks.items()}
    assert strategies == {"plain": "none", "mood": "input_output"}


def test_contrastive_arms_differ_in_where_the_loss_stands_and_where_heads_start(experiment):
    names = [
        "no_contrastive",
        "contrastive_beside",
        "contrastive_before",
        "contrastive_before_bare",
    ]
    found = []
    for trial in plan_trials(experiment, arms=names, custom={}, seeds=[0]):
        recipe = load_recipe(experiment.config, trial.overrides)
        config = recipe.loss.contrastive
        found.append((config.weight, config.first_steps, len(recipe.tasks["mood"].descriptions)))
    assert found == [(0, 0, 2), (0.1, 0, 2), (0, 3, 2), (0, 3, 0)]
    text = experiment.config.read_text()
    experiment.config.write_text(text.replace("{first_steps: 3}", "{weight: 0.2}"))
    with pytest.raises(ValueError, match="set loss.contrastive.first_steps"):
        plan_trials(experiment, arms=["contrastive_before"], custom={}, seeds=[0])
    experiment.config.write_text(text.replace(", descriptions: {bad: poor, good: fine}", ""))
    with pytest.raises(ValueError, match="leave _bare out"):
        plan_trials(experiment, arms=["no_contrastive_bare"], custom={}, seeds=[0])


def test_an_earlier_run_of_another_arm_of_the_same_name_is_refused(experiment):
    def wide(width: int):
        words = [f"model.moe.expert_width={width}"]
        return plan_trials(experiment, arms=["wide"], custom={"wide": words}, seeds=[0])[0]

    folder = experiment.runs / "wide-s0"
    folder.mkdir(parents=True)
    names = ["run.name=wide-s0", f"run.output_dir={experiment.runs}"]
    save_recipe(
        load_recipe(experiment.config, [*wide(48).overrides, *names]), folder / "config.yaml"
    )
    check_earlier(experiment, wide(48))
    with pytest.raises(
        ValueError, match="was trained with model.moe.expert_width 48 instead of 96"
    ):
        check_earlier(experiment, wide(96))


def test_the_bootstrap_has_the_textbook_width_and_is_zero_between_equal_arms():
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 2, 500)
    task = mood()

    def predictions(right: float) -> dict[str, Predictions]:
        hit = generator.random(500) < right
        return {"mood": Predictions(np.arange(500), gold, np.where(hit, gold, 1 - gold))}

    good, bad = predictions(0.85), predictions(0.7)
    drawn = resampled([good, bad, good], [task], resamples=800)["mood"]
    hits = [(run["mood"].predicted == gold).astype(float) for run in (good, bad)]
    plain = float(np.mean(hits[0] - hits[1]))
    item = paired_difference([plain], drawn[:1] - drawn[1:2])
    expected = 1.96 * np.std(hits[0] - hits[1]) / math.sqrt(500)
    assert (item.high - item.low) / 2 == pytest.approx(expected, rel=0.1)
    assert item.low < plain < item.high and item.low > 0
    same = paired_difference([0.0], drawn[:1] - drawn[2:])
    assert (same.low, same.high) == (0.0, 0.0)


def test_seeds_that_disagree_widen_the_interval_as_student_says():
    student = 4.302652730 / math.sqrt(3)
    item = seed_interval([1.0, 2.0, 3.0])
    assert item.mean == 2.0 and item.high - 2.0 == pytest.approx(student) == 2.0 - item.low
    assert seed_interval([0.5]).to_dict() == {"mean": 0.5, "low": None, "high": None}
    item = paired_difference([0.0, 0.1, 0.2], np.zeros((3, 100)))
    assert item.mean == pytest.approx(0.1) and item.high - 0.1 == pytest.approx(0.1 * student)


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_a_twentieth_where_the_interval_ends_at_zero(seeds):
    generator = np.random.default_rng(0)
    differences, drawn = generator.standard_normal(seeds), generator.standard_normal((seeds, 300))
    item = paired_difference(list(differences), drawn)
    edge = paired_difference(list(differences - item.low), drawn)
    assert edge.low == pytest.approx(0, abs=1e-12) and edge.p == pytest.approx(0.05, rel=1e-6)
    further = paired_difference(list(differences - item.low + 0.1), drawn)
    assert further.p < 0.05 and further.verdict == "gained"
    assert paired_difference([0.0], np.zeros((1, 9))).p == 1.0


@pytest.mark.parametrize(
    ("seeds", "between", "posts"), [(3, 1.0, 0.0), (3, 1.0, 1.0), (3, 0.2, 1.0), (5, 1.0, 0.5)]
)
def test_ninety_five_of_hundred_intervals_hold_the_truth(seeds, between, posts):
    generator = np.random.default_rng(seeds)
    trials, held = 600, 0
    for _ in range(trials):
        # Seeds differ among themselves; the posts are the same for all of them, and another draw
        # each time.
        differences = (
            between * generator.standard_normal(seeds) + posts * generator.standard_normal()
        )
        resampled_differences = differences[:, None] + posts * generator.standard_normal(200)
        item = paired_difference(list(differences), resampled_differences)
        held += item.low <= 0 <= item.high
    assert 0.935 <= held / trials


def test_a_post_is_drawn_for_all_of_its_tasks_at_once():
    both = np.arange(40)
    first, second = mood(), mood(name="anger")
    hit = np.random.default_rng(1).random(40) < 0.5
    gold = np.zeros(40, dtype=np.int64)
    run = {name: Predictions(both, gold, np.where(hit, 0, 1)) for name in ("mood", "anger")}
    drawn = resampled([run], [first, second], resamples=50)
    np.testing.assert_array_equal(drawn["mood"], drawn["anger"])
    assert drawn["mood"].std() > 0.01
    np.testing.assert_allclose(drawn["mean"], drawn["mood"])


@pytest.mark.parametrize(
    ("kind", "metric", "labels", "rows", "value"),
    [
        ("single_label", "accuracy", ("bad", "good"),
         [{"gold": "bad", "label": "bad"}, {"gold": "good", "label": "bad"}, {"gold": None, "label": "bad"}], 0.5),
        ("multi_label", "jaccard", ("a", "b"),
         [{"gold": ["a"], "labels": ["a", "b"]}, {"gold": [], "labels": []}], 0.75),
        ("regression", "mae", (), [{"gold": 1.0, "value": 3.0}, {"gold": 0.0, "value": 1.0}], 1.5),
        ("tags", "span_f1", ("O", "B-PER", "I-PER"),
         [{"gold": ["B-PER", "I-PER"], "tags": ["B-PER", "I-PER"]}, {"gold": ["O"], "tags": ["B-PER"]}], 2 / 3),
    ],
)  # fmt: skip
def test_written_predictions_are_scored_as_they_were(kind, metric, labels, rows, value):
    task = mood(kind, metric, labels=labels)
    read = read_predictions([{"row": 10 + number} | row for number, row in enumerate(rows)], task)
    assert task.rules.measure(read.gold, read.predicted, task) == pytest.approx(value)
    assert read.rows.tolist() == [10, 11]


def write_run(folder: Path, *, right: list[bool], experts: bool, removal: bool = False) -> None:
    """A finished run of 40 posts, of which those in ``right`` are answered right."""
    task = mood()
    folder.mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps([task.to_dict()]))
    share = sum(right) / len(right)
    results = {"finished": True, "step": 4, "seconds": 2.0, "posts": 96}
    results |= {"peak_memory_bytes_per_rank": 2**20}
    results |= {"data": {"posts": {"x": {"train": 48, "test": 40}}}}
    results |= {"parameters": {"experts": 5, "active": 6, "total": 7}}
    results |= {"metrics": {"test": {"mood": {"accuracy": share}}}}
    (folder / "results.json").write_text(json.dumps(results))
    routing = {
        "share": [[0.5, 0.5], [0.7, 0.3]],
        "weight_monopoly": [0.2, 0.4],
        "max_violation": [0.5, None],
        "dead_share": [0.0, 0.0],
    }
    lines = [{"split": "train", "step": 2, "seconds": 1.0, "tokens_per_second": 10.0},
             {"split": "test", "step": 4} | ({"routing": routing} if experts else {})]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions/test").mkdir(parents=True)
    rows = [
        {"row": row, "gold": "good", "label": "good" if hit else "bad"}
        for row, hit in enumerate(right)
    ]
    (folder / "predictions/test/mood.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    if removal:
        found = {"layers": [1], "posts": 40, "whole": {"mean": share, "loss": 1.0}, "drop": [[0.1, 0.3]],
                 "loss_rise": [[0.0, 0.2]], "limit": None}  # fmt: skip
        (folder / REMOVAL_FILE).write_text(json.dumps(found))


def test_the_report_says_what_the_run_folders_say(experiment, tmp_path):
    plan = plan_arms(experiment, arms=["dense", "sigmoid", "paper"], custom={}, seeds=[0, 1])
    for seed, wrong in ((0, 20), (1, 18)):
        write_run(
            tmp_path / "runs" / f"dense-s{seed}",
            right=[post >= wrong for post in range(40)],
            experts=False,
        )
        better = [post >= wrong - 8 for post in range(40)]
        write_run(tmp_path / "runs" / f"sigmoid-s{seed}", right=better, experts=True, removal=True)
    comparison = compare(plan, tmp_path / "runs", baseline="dense", resamples=200)
    comparison = with_metrics(comparison, ["mood/accuracy", "mood/acuracy"])
    comparison = replace(comparison, problems={"paper-s0": "killed"})
    difference = comparison.against["sigmoid"]["mean"]
    assert difference.mean == pytest.approx(0.2) and difference.low < 0.2 < difference.high
    assert comparison.interval("sigmoid", "routing", "weight_monopoly").mean == pytest.approx(0.3)
    assert comparison.interval("dense", "routing", "weight_monopoly") is None
    write_comparison(comparison, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dense"]["mood"]["accuracy"]["mean"] == pytest.approx(0.525)
    assert summary["dense"]["mood"]["accuracy"]["values"] == [0.5, 0.55]
    assert "paper" not in summary
    rest = json.loads((tmp_path / "comparison.json").read_text())
    assert rest["arms"]["sigmoid"]["routing"]["max_violation"]["mean"] == 0.5
    assert rest["failed"] == {"paper-s0": "killed"}
    assert rest["arms"]["sigmoid"]["gained"] == ["mood"] and rest["arms"]["sigmoid"]["lost"] == []
    assert rest["arms"]["sigmoid"]["costs"]["posts_per_second"]["mean"] == 48.0
    table = "\n".join(markdown_lines(comparison))
    assert "| sigmoid | 2 | 0.725 [" in table
    assert "| **+0.200 [" in table
    assert "0.725 ± 0.035" in table
    assert "| sigmoid | 1 | 4 | 96 | 2.0 | x 48 |" in table
    assert " | ".join(f"{x} [{x}, {x}]" for x in ("0.200", "0.300", "0.100", "0.200")) in table
    assert "* paper-s0: killed" in table
    assert "| arm | mood/accuracy |\n| --- | --- |\n| dense | 0.525 [" in table
    assert (
        "* mood/acuracy is not a metric of these runs (--metrics); did you mean mood/accuracy?"
        in table
    )
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5
    write_plots(comparison, tmp_path)
    for name in ("quality.png", "metrics.png", "gates.png", "removal.png"):
        assert (tmp_path / "plots" / name).stat().st_size > 4000


def test_removal_is_drawn_for_every_arm_that_has_it_in_the_panel_of_its_own_layer(
    experiment, tmp_path
):
    plan = plan_arms(experiment, arms=["dense", "sigmoid"], custom={}, seeds=[0])
    for trial in plan.trials:
        write_run(
            tmp_path / trial.name, right=[True] * 40, experts=trial.part == "sigmoid", removal=True
        )
    file = tmp_path / "dense-s0" / REMOVAL_FILE
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"layers": [3], "drop": [[0.4]], "loss_rise": [[0.5]]}
        )
    )
    comparison = compare(plan, tmp_path, baseline="dense", resamples=0)
    panels = removal_figure(comparison, ["dense", "sigmoid"]).axes
    assert [panel.get_title() for panel in panels] == ["layer 1", "layer 3"]
    drawn = [{line.get_label(): list(line.get_ydata()) for line in panel.lines} for panel in panels]
    assert drawn == [{"sigmoid": [0.2, 0.0]}, {"dense": [0.5]}]
    assert "| dense |  |  |  |  |  |  |  | 0.400 | 0.400 | 0.500 | 0.500 |" in "\n".join(
        markdown_lines(comparison)
    )
