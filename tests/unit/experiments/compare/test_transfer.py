"""Tasks alone against tasks together: which runs that takes, and what is said about written run folders."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comoe.config.load import load_recipe, save_recipe
from comoe.experiments.affinity import Affinity
from comoe.experiments.compare.command import run_comparison
from comoe.experiments.compare.plan import Plan, check_earlier, plan_arms
from comoe.experiments.compare.plots import write_plots
from comoe.experiments.compare.report import AFFINITY_FILE, Comparison, compare, write_comparison
from comoe.experiments.compare.statistics import Difference
from comoe.experiments.compare.tables import markdown_lines
from comoe.experiments.compare.transfer import mean_cosines, reasons_of, verdicts_of
from comoe.experiments.runner import Experiment, record_settings
from comoe.losses.weighting.strategies import WEIGHTINGS
from tests.helpers_compare import MODEL, POSTS, TASKS, arguments, experiment_of, write_run


def planned(
    experiment: Experiment, *arms: str, seeds: Sequence[int] = (0,), custom: Mapping | None = None
) -> Plan:
    return plan_arms(experiment, arms=arms, custom=custom or {}, seeds=seeds)


def recipe_of(experiment: Experiment, plan: Plan, run: str):
    trial = next(trial for trial in plan.trials if trial.name == run)
    return load_recipe(experiment.config, [*experiment.overrides, *trial.overrides])


def test_single_is_a_run_for_each_task_that_is_not_auxiliary(experiment):
    plan = planned(experiment, "single", "multi", seeds=(2, 0))
    assert [arm.name for arm in plan.arms] == ["single", "multi"] and plan.joint == "multi"
    names = ["single.mood", "single.topic", "single.stance", "recipe"]
    assert [trial.name for trial in plan.trials] == [
        f"{name}-s{seed}" for seed in (2, 0) for name in names
    ]
    whole = recipe_of(experiment, plan, "recipe-s0")
    alone = recipe_of(experiment, plan, "single.topic-s0")
    assert list(whole.tasks) == [*TASKS, "hint"] and list(alone.tasks) == ["topic"]
    # Equal passes: the sampler computes the steps from the remaining posts.
    assert alone.train.epochs == whole.train.epochs
    assert alone.train.batch_size == whole.train.batch_size
    assert alone.data == whole.data and alone.model == whole.model


def test_single_tasks_keep_the_teachers_that_know_them(experiment, monkeypatch):
    known = {"joint": ["mood", "topic"], "one": ["mood"]}
    monkeypatch.setattr(
        "comoe.experiments.compare.arms.read_export_config",
        lambda folder: {"tasks": [{"name": name} for name in known[folder.name]]},
    )
    taught = {"distill.teachers": "[joint,one]", "train.early_stop_metric": "teacher_kl"}
    for tasks, expected in (
        ("[]", {"mood": ["joint", "one"], "topic": ["joint"], "stance": []}),
        ("[mood]", {"mood": ["joint", "one"], "topic": [], "stance": []}),
    ):
        words = [f"{key}={value}" for key, value in (taught | {"distill.tasks": tasks}).items()]
        distilled = replace(experiment, overrides=(*experiment.overrides, *words))
        plan = planned(distilled, "single")
        for task, teachers in expected.items():
            recipe = recipe_of(distilled, plan, f"single.{task}-s0")
            assert recipe.distill.teachers == teachers
            assert recipe.train.early_stop_metric == ("teacher_kl" if teachers else "mean")


def test_without_auxiliary_tasks_the_others_stay_in_one_run_and_one_part_has_a_name(experiment):
    plan = planned(experiment, "recipe", "no_auxiliary", "single.mood", "without.stance")
    names = [trial.name for trial in plan.trials]
    assert names == ["recipe-s0", "no_auxiliary-s0", "single.mood-s0", "without.stance-s0"]
    assert list(recipe_of(experiment, plan, "no_auxiliary-s0").tasks) == ["mood", "topic", "stance"]
    # A single task does not need auxiliary tasks.
    config = experiment.config
    config.write_text(config.read_text().replace("auxiliary: true", "auxiliary: false"))
    assert planned(experiment, "single.mood").arms[0].name == "single.mood"


def test_leaving_one_out_drops_auxiliary_tasks_too_and_wants_the_run_of_all(experiment):
    plan = planned(experiment, "recipe", "leave_one_out")
    assert [arm.name for arm in plan.arms[1:]] == [f"without.{task}" for task in (*TASKS, "hint")]
    assert list(recipe_of(experiment, plan, "without.hint-s0").tasks) == list(TASKS)


def test_runs_of_ones_own_arms_of_the_same_name_are_shared_when_they_are_the_same_run(experiment):
    words = ["tasks.hint=null", "tasks.stance=null", "tasks.topic=null"]
    plan = planned(experiment, "single", "single.mood", custom={"single.mood": words})
    assert [trial.name for trial in plan.trials].count("single.mood-s0") == 1
    # A run that was made by the words of one arm is found by the other.
    folder = experiment.runs / "single.mood-s0"
    folder.mkdir(parents=True)
    saved = load_recipe(experiment.config, [*words, "train.seed=0", "run.name=single.mood-s0"])
    save_recipe(saved, folder / "config.yaml")
    for trial in planned(experiment, "single").trials:
        check_earlier(experiment, trial)


STEPS = ("train.max_steps=40", "train.epochs=2.5")
PASSES = "train.max_steps=null train.epochs=2.5"
ONE_TASK = ("tasks.topic=null", "tasks.stance=null", "tasks.hint=null")


@pytest.mark.parametrize(
    ("overrides", "arms", "custom", "named"),
    [
        ((), "dense", {"dense": []}, "--arm dense"),
        ((), "sigmiod", {}, "sigmoid"),
        ((), "x", {"x": ["loss.contrastive.wieght=0"]}, "loss.contrastive.weight"),
        ((), "confidence_output", {}, "tasks.<name>.confidence"),
        (("model.moe.expert_width=23",), "sigmoid_k4", {}, "model.moe.expert_width"),
        (("model.moe.num_experts=0",), "multi softmax", {}, "model.moe.num_experts"),
        (("tasks.hint.auxiliary=false",), "no_auxiliary", {}, "tasks.<name>.auxiliary"),
        ((), "single leave_one_out", {}, "--arms"),
        (ONE_TASK, "multi leave_one_out", {}, "leave_one_out"),
        ((), "single.moood", {}, "single.mood"),
        ((), "single single.mood", {"single.mood": list(ONE_TASK[:1])}, "single.mood-s0"),
        *(
            (STEPS, f"multi {arm}", {}, PASSES)
            for arm in ("single", "leave_one_out", "without.mood")
        ),
    ],
)
def test_a_wrong_arm_is_refused_with_what_to_change(
    tmp_path, encoder, overrides, arms, custom, named
):
    with pytest.raises(ValueError) as error:
        planned(experiment_of(tmp_path, encoder, overrides=overrides), *arms.split(), custom=custom)
    assert named in str(error.value)


def test_options_that_speak_of_other_tasks_are_put_right_for_a_task_alone(tmp_path, encoder):
    overrides = ["train.early_stop_metric=mood/accuracy", "loss.weighting=uncertainty",
                 "loss.adversarial.weight=0.2"]  # fmt: skip
    setting = experiment_of(tmp_path, encoder, overrides=overrides)
    plan = planned(setting, "single", "multi", "leave_one_out")
    metrics = {run: recipe_of(setting, plan, f"{run}-s0").train.early_stop_metric
               for run in ("recipe", "single.mood", "single.topic", "without.mood", "without.topic")}  # fmt: skip
    mood = "mood/accuracy"
    assert list(metrics.values()) == [mood, mood, "mean", "mean", mood]
    alone = recipe_of(setting, plan, "single.topic-s0").loss
    assert (alone.weighting, alone.adversarial.weight) == ("equal", 0)
    assert recipe_of(setting, plan, "without.topic-s0").loss.weighting == "uncertainty"


def test_what_is_not_equal_is_said(tmp_path, encoder):
    words = ["data.mixing=uniform", "train.eval_every=50"]
    plan = planned(setting := experiment_of(tmp_path, encoder, overrides=words), "single", "multi")
    mixing, evaluation = plan.notes
    assert "data.mixing is uniform" in mixing and "50 steps" in evaluation
    assert planned(setting, "multi", "no_contrastive").notes == ()
    # Steps instead of passes are possible for arms with all tasks.
    stepping = experiment_of(tmp_path, encoder, overrides=STEPS)
    assert planned(stepping, "multi", "adversarial").joint == "multi"


def test_a_recipe_of_one_task_is_alone_already(tmp_path, encoder):
    one = experiment_of(tmp_path, encoder, f"{MODEL}tasks: {{mood: {{path: reviews}}}}\n")
    plan = planned(one, "single", "multi", "no_contrastive")
    assert [trial.name for trial in plan.trials] == ["recipe-s0", "no_contrastive-s0"]
    assert plan.joint is None and plan.notes == ("single is the recipe itself: it has one task.",)


def test_each_weighting_is_an_arm_and_experts_are_wanted_only_by_arms_with_experts(
    tmp_path, encoder
):
    bare = experiment_of(tmp_path, encoder, overrides=["model.moe.num_experts=0"])
    plan = planned(bare, "single", "multi", "private", "adversarial", "no_contrastive", *WEIGHTINGS)
    for name in WEIGHTINGS:
        assert recipe_of(bare, plan, f"{name}-s0").loss.weighting == name
    assert recipe_of(bare, plan, "adversarial-s0").loss.adversarial.weight > 0
    assert recipe_of(bare, plan, "private-s0").model.private_width > 0


def test_a_comparison_begun_before_an_option_was_there_goes_on(experiment):
    record_settings(experiment, file_name="compare.json")
    file = experiment.output / "compare.json"
    before = json.loads(file.read_text())
    del before["recipe"]["loss"]["adversarial"], before["recipe"]["tasks"]["mood"]["auxiliary"]
    file.write_text(json.dumps(before))
    record_settings(experiment, file_name="compare.json")
    before["recipe"]["train"]["epochs"] = 9.0
    file.write_text(json.dumps(before))
    with pytest.raises(ValueError, match="train.epochs 9.0 instead of 3.0"):
        record_settings(experiment, file_name="compare.json")


@pytest.mark.parametrize(
    ("arms", "changed", "message"),
    [
        ("single,softmax", {"against": "sofmax"}, "sofmax is not .*against.*did you mean softmax"),
        ("single,softmax", {"remove_experts": "paper"}, "paper is not .*remove-experts"),
        ("single,softmax", {"remove_experts": "single"}, "--remove-experts single: this arm has a run for each task"),
        ("multi,no_experts", {"remove_experts": "no_experts"}, "this arm has no experts"),
        ("single,multi", {"affinity": "single"}, "--affinity single: this arm has a run for each task"),
        ("single,multi", {"affinity_posts": 1}, "--affinity-posts is 1; it must be at least 2, or 0"),
        ("single,,multi", {}, "--arms is 'single,,multi'; it must be names with commas between, of single, leave_one"),
        ("single,multi", {"metrics": "moood/accuracy"}, "--metrics moood/accuracy: write task/metric .mood/accuracy,"),
        ("single,multi", {"splits": "unseen"}, "unseen is not .*one of: validation, test.*hold_out makes unseen"),
        ("single,multi", {"splits": "test,tset+typos", "overrides": ["data.noise=[typos]"]}, "did you mean test.typos"),
        ("single,multi", {"claim": "single > mutli"}, "mutli is not .*claim.*did you mean multi"),
        ("single,multi", {"claim": "single and multi"}, "--claim 'single and multi' must read"),
        ("single,multi", {"claim": "multi > multi"}, "compares an arm with itself"),
        ("single,multi", {"claim": "multi > single on mood/acuracy"}, "did you mean accuracy"),
        ("single,multi", {"claim": "multi > single on hint/accuracy"}, "measure of a claim"),
        ("single,multi", {"seeds": "0,-1"}, "--seeds is '0,-1'"),
        ("single,multi", {"ranks": 0}, "--ranks is 0; it must be at least 1"),
        ("single,multi", {"overrides": ["run.name=x"]}, "run.name cannot be an override here"),
        ("single,multi", {"overrides": ["train.max_steps=9"]}, "train.max_steps=null train.epochs=3"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_before_anything_is_written(experiment, arms, changed, message):
    given = arguments(experiment, arms=arms, **changed)
    with pytest.raises(ValueError, match=message):
        run_comparison(given)
    assert not experiment.output.exists()


def write_affinity(folder: Path, mood_stance: float) -> None:
    cosine = np.array([[0.9, 0.5, mood_stance], [0.5, 0.8, 0.2], [mood_stance, 0.2, 0.7]])
    found = Affinity(TASKS, cosine, np.ones(3), (8, 8, 8), 8, 100)
    (folder / AFFINITY_FILE).write_text(json.dumps(found.to_dict()))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, encoder) -> Comparison:
    """Together mood and hint gain, topic stays, stance loses; without mood stance is as good as alone."""
    experiment = experiment_of(tmp_path_factory.mktemp("compared"), encoder)
    plan = planned(experiment, "single", "multi", "leave_one_out", seeds=(0, 1, 2))
    runs = experiment.runs
    for seed in plan.seeds:
        alone = {"mood": 30 + seed, "topic": 40, "stance": 50}
        for name, hits in alone.items():
            write_run(runs / f"single.{name}-s{seed}", {name: hits})
        together = {"mood": 45 + seed, "topic": 40, "stance": 38 - seed, "hint": 30}
        write_run(runs / f"recipe-s{seed}", together)
        write_affinity(runs / f"recipe-s{seed}", -0.3 - 0.1 * seed)
        for dropped in together:
            left = together | ({"stance": 50} if dropped == "mood" else {})
            write_run(
                runs / f"without.{dropped}-s{seed}",
                {name: left[name] for name in left if name != dropped},
            )
    return compare(plan, runs, baseline="single", resamples=40)


def test_the_arm_single_is_the_sum_of_its_runs(comparison):
    single, multi = comparison.results["single"][0], comparison.results["multi"][0]
    assert single.quality == {"mean": pytest.approx(2 / 3), "mood/accuracy": 0.5, "topic/accuracy": 40 / 60,
                              "stance/accuracy": 50 / 60}  # fmt: skip
    # The auxiliary task is told, but is in no mean.
    assert multi.quality["hint/accuracy"] == 0.5
    assert multi.quality["mean"] == pytest.approx(123 / 180)
    assert {name: single.costs[name] for name in ("seconds", "steps", "posts", "parameters_total", "peak_mib")} == {
        "seconds": 6.0, "steps": 15, "posts": 60, "parameters_total": 21, "peak_mib": 1.0}  # fmt: skip
    assert single.costs["posts_per_second"] == multi.costs["posts_per_second"] == 10.0
    # A post is predicted by three models.
    speeds = [one.costs["predicted_posts_per_second"] for one in (single, multi)]
    assert speeds == [pytest.approx(100 / 3), 100.0]
    assert "mean" not in comparison.results["without.mood"][0].quality


def test_posts_are_the_same_though_rows_count_from_elsewhere(comparison):
    gains = comparison.against["multi"]
    assert {name: round(item.mean * POSTS, 6) for name, item in gains.items()} == {
        "mood": 15, "topic": 0, "stance": -13, "mean": pytest.approx(2 / 3, abs=1e-5)}  # fmt: skip
    # Paired on the very posts: where both arms answer all alike there is nothing to doubt.
    assert (gains["topic"].low, gains["topic"].high, gains["topic"].p) == (0.0, 0.0, 1.0)
    assert gains["mood"].verdict == "gained" and gains["mood"].p < 0.001
    assert gains["stance"].verdict == "lost" and gains["mean"].verdict == ""
    assert not comparison.notes


def test_harm_is_named_with_what_speaks_for_its_reason(comparison, tmp_path):
    reasons = comparison.reasons("stance")
    assert reasons.opposed_by == (("mood", pytest.approx(-0.4)),)
    assert reasons.nearest == ("topic", pytest.approx(0.2))
    (dropped, change), *others = reasons.better_without
    assert dropped == "mood" and change.verdict == "gained" and others == []
    text = "\n".join(markdown_lines(comparison))
    for part in ("helped 1 of 3 tasks significantly (mood); hurt 1 (stance)", "Negative transfer: stance.",
                 "better in 1 of 3, significantly in 1; significantly worse in 1"):  # fmt: skip
        assert part in text
    why = next(line for line in text.split("\n") if line.startswith("| stance | **-0.2"))
    assert "| mood -0.400 | topic +0.200 | mood **+0.217 [" in why
    assert "| single | 3 | 15 | 60 | 2.0 | mood 10, topic 10, stance 10 |" in text
    write_comparison(comparison, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["single"]["mood"]["accuracy"] | {"low": 0, "high": 0} == {
        "mean": pytest.approx(31 / 60), "spread": pytest.approx(1 / 60), "low": 0, "high": 0,
        "values": [30 / 60, 31 / 60, 32 / 60]}  # fmt: skip
    rest = json.loads((tmp_path / "comparison.json").read_text())
    assert rest["arms"]["multi"]["lost"] == ["stance"]
    assert rest["reasons"]["stance"]["opposed_by"].keys() == {"mood"}
    assert rest["without"]["mood"]["stance"]["mean"] == pytest.approx(13 / 60)
    assert "multi,single,stance,-0.21" in (tmp_path / "gains.csv").read_text()
    assert "stance,mood,-0.4" in (tmp_path / "affinity.csv").read_text()
    write_plots(comparison, tmp_path)
    for name in ("gains", "gradients", "without", "quality"):
        assert (tmp_path / f"plots/{name}.png").stat().st_size > 4000


def test_an_unfinished_arm_is_told_as_far_as_it_is(experiment):
    plan = planned(experiment, "single", "multi")
    write_run(experiment.runs / "single.mood-s0", {"mood": 30})
    write_run(experiment.runs / "single.topic-s0", {"topic": 30})
    write_run(experiment.runs / "recipe-s0", {"mood": 40, "topic": 30, "stance": 20, "hint": 20})
    found = compare(plan, experiment.runs, baseline="single", resamples=20)
    found = replace(found, problems={"single.stance-s0": "killed"})
    (single,) = found.results["single"]
    assert "mean" not in single.quality and single.costs == {}
    assert found.against["multi"].keys() == {"mood", "topic"}
    text = "\n".join(markdown_lines(found))
    assert "| single | 1 |  |" in text and "* single.stance-s0: killed" in text


def test_other_posts_are_not_compared_and_this_is_said(experiment):
    plan = planned(experiment, "single", "multi")
    for name in TASKS:
        write_run(
            experiment.runs / f"single.{name}-s0", {name: 30}, posts=POSTS - (name == "topic")
        )
    write_run(experiment.runs / "recipe-s0", {"mood": 40, "topic": 30, "stance": 20, "hint": 20})
    found = compare(plan, experiment.runs, baseline="single", resamples=20)
    assert found.against["multi"].keys() == {"mood", "stance"}
    assert any("multi predicts for other posts of topic" in note for note in found.notes)


def test_a_task_opposes_another_only_where_every_seed_says_so():
    def affinity(value: float) -> Affinity:
        cosine = np.array([[1.0, value, np.nan], [value, 1.0, np.nan], [np.nan] * 3])
        return Affinity(("a", "b", "c"), cosine, np.ones(3), (2, 2, 1), 2, 1)

    sure = mean_cosines([affinity(-0.1), affinity(-0.2)])
    unsure = mean_cosines([affinity(-0.5), affinity(0.1)])
    assert reasons_of("a", sure, {}).opposed_by == (("b", pytest.approx(-0.15)),)
    assert reasons_of("a", unsure, {}).opposed_by == ()
    assert reasons_of("c", sure, {}).nearest is None


def test_a_task_gains_or_loses_only_where_the_adjusted_p_says_so():
    def difference(mean: float, p: float, adjusted: float = math.nan) -> Difference:
        return Difference(mean, 0, 0, p, 3, 0.1, 0.1, adjusted)

    found = {"a": difference(0.1, 0.01), "b": difference(-0.1, 0.01, 0.04), "c": difference(0.2, 0.3),
             "d": difference(0.1, 0.01, 0.06), "mean": difference(0.1, 0.0)}  # fmt: skip
    verdicts = verdicts_of(found, ["a", "b", "c", "d", "e"])
    assert (verdicts.gained, verdicts.lost, verdicts.open) == (("a",), ("b",), ("c", "d"))
    assert verdicts.count == 4
