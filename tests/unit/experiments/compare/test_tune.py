"""``--tune``: which runs it makes, which value it takes per arm, and that the rest of the comparison uses it."""

import json
import math

import pytest

from comoe.config.load import load_recipe, save_recipe
from comoe.experiments import runner
from comoe.experiments.compare import command
from comoe.experiments.compare.command import SETTINGS, TUNING, run_comparison
from comoe.experiments.runner import Experiment, Trial
from tests.helpers_compare import TASKS, arguments, write_run

RATE, HEAD = "train.expert_learning_rate", "train.head_learning_rate"
BEST = {"dense": 1e-3, "sigmoid": 3e-4}
"""Arm -> the rate with the lowest loss."""


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the runs; each leaves what a training would: the loss grows with the distance of the rate
    to the arm's best one, and the metric with the rate. A rate of 9 fails."""
    names: list[str] = []

    def train(experiment: Experiment, trial: Trial) -> str:
        names.append(trial.name)
        recipe = load_recipe(experiment.config, [*experiment.overrides, *trial.overrides])
        rate, arm = recipe.train.expert_learning_rate, trial.part.partition(".")[0]
        if rate == 9:
            return "comoe: the loss is not finite"
        loss = 0.5 + abs(math.log10(rate / BEST.get(arm, 1e-3))) + 0.01 * trial.seed / 1000
        loss += recipe.train.head_learning_rate
        right = dict.fromkeys(TASKS, 40 + round(math.log10(rate)))
        folder = experiment.runs / trial.name
        write_run(folder, right, losses=dict.fromkeys(TASKS, loss))
        save_recipe(recipe, folder / "config.yaml")
        return ""

    monkeypatch.setattr(runner, "run_trial", train)
    # They are drawn after each run.
    monkeypatch.setattr(command, "write_plots", lambda *_: None)
    return names


def compare(experiment: Experiment, *tune: str, **changed) -> tuple[list[str], dict]:
    """Failed runs, and what ``comparison.json`` says."""
    given = {"arms": "dense,sigmoid,no_experts", "affinity_posts": 0, "tune": list(tune)}
    failed = run_comparison(arguments(experiment, **given | changed))
    names = [trial.name for trial in failed]
    return names, json.loads((experiment.output / "comparison.json").read_text())


def test_each_arm_gets_its_own_best_value_from_runs_of_other_seeds(experiment, ran):
    claim = "sigmoid > dense on loss"
    failed, found = compare(experiment, f"{RATE}=1e-4,3e-4,0.001", claim=claim, seeds="0,1")
    tuned = [
        f"{arm}.{RATE}_{rate}"
        for arm in ("dense", "sigmoid")
        for rate in ("0.0001", "0.0003", "0.001")
    ]
    final = [f"dense.{RATE}_0.001", f"sigmoid.{RATE}_0.0003", "no_experts"]
    assert failed == []
    assert ran == [
        *(f"{name}-s{seed}" for seed in (1000, 1001) for name in tuned),
        *(f"{name}-s{seed}" for seed in (0, 1) for name in final),
    ]
    parts = found["tuning"]["parts"]
    assert {part: parts[part]["chosen"] for part in parts} == {
        "dense": [f"{RATE}=0.001"], "sigmoid": [f"{RATE}=0.0003"]}  # fmt: skip
    assert json.loads((experiment.output / TUNING).read_text()) == found["tuning"]
    assert [point["mean"] for point in parts["dense"]["points"]][2] == pytest.approx(
        0.510005 + 5e-4
    )
    # The chosen value of the dense block is the last one of its grid.
    assert found["tuning"]["notes"] == [
        f"tuning of dense: {RATE}=0.001 is the largest value tried; try a larger one."
    ]
    # The claim was recorded before the tuning.
    assert found["claim"]["runs_before"] == 0 and found["claim"]["seeds"] == [0, 1]
    text = (experiment.output / "table.md").read_text()
    assert "| sigmoid | 2 | 0.0003 | " in text and "| no_experts | 2 |  | " in text
    assert "| dense | 1.511 | 1.033 | **0.511** |" in text
    ran.clear()
    compare(experiment, f"{RATE}=0.0001,0.0003,1e-3", seeds="0,1,2")
    assert ran == [f"{name}-s2" for name in final]
    assert not (experiment.output / "failed").exists()


def test_a_grid_is_tuned_by_the_metric_and_a_value_that_fails_is_not_taken(experiment, ran):
    tune = (f"{RATE}=1e-4,0.01,9", f"{HEAD}=0.1,0.2")
    own = {"arm": [f"fixed:{RATE}=0.5"], "arms": "sigmoid,no_experts"}
    failed, found = compare(experiment, *tune, tune_by="metric", tune_seeds="7", **own)
    parts = found["tuning"]["parts"]
    assert len(parts["sigmoid"]["points"]) == 6
    # An arm keeps what it sets itself, and reads no rate of experts without experts.
    for part in ("fixed", "no_experts"):
        overrides = [point["overrides"] for point in parts[part]["points"]]
        assert overrides == [[f"{HEAD}=0.1"], [f"{HEAD}=0.2"]]
    assert failed == [f"sigmoid.{RATE}_9.{HEAD}_{head}-s7" for head in ("0.1", "0.2")]
    # Both heads have the same metric: the first one is taken.
    assert parts["sigmoid"]["chosen"] == [f"{RATE}=0.01", f"{HEAD}=0.1"]
    assert sum("did not finish" in note for note in found["notes"]) == 2
    assert found["arms"]["sigmoid"]["seeds"] == [0]


def test_an_arm_without_any_finished_value_has_no_run(experiment, ran):
    own = {"arm": [f"broken:{RATE}=9"], "arms": "no_experts"}
    failed, found = compare(experiment, f"{HEAD}=0.1,0.2", tune_seeds="5", **own)
    assert len(failed) == 2 and list(found["arms"]) == ["no_experts"]
    assert "broken has no run: no value of its tuning finished." in found["notes"]


def test_a_dry_run_names_every_run_and_writes_nothing(experiment, ran, capsys):
    given = arguments(experiment, arms="dense", tune=[f"{RATE}=1e-4,3e-4"], dry_run=True)
    assert run_comparison(given) == []
    shown = capsys.readouterr().out
    assert "tuning: 4 runs" in shown and "comparison: 1 runs" in shown
    assert f"dense.{RATE}_0.0003-s1001" in shown and f"{RATE}=0.0003" in shown
    assert ran == [] and not experiment.output.exists()


@pytest.mark.parametrize(
    ("tune", "changed", "message"),
    [([f"{RATE}=1e-3"], {}, "must read option=a,b,c"), ([f"{RATE}=1e-3,0.001"], {}, "must read option=a,b,c"),
     ([RATE], {}, "must read option=a,b,c"), ([f"{RATE}=1,2", f"{RATE}=3,4"], {}, f"gives {RATE} twice"),
     (["train.expert_rate=1,2"], {}, "train.expert_learning_rate"),
     (["train.seed=1,2"], {}, "train.seed cannot be an override here"),
     ([f"{RATE}=1,2"], {"tune_seeds": "3,0"}, "both have 0"),
     ([f"{RATE}=1,2"], {"tune_seeds": "x"}, "--tune-seeds is 'x'"),
     ([], {"tune_by": "metric"}, "--tune-by metric tunes nothing"),
     ([], {"tune_seeds": "5"}, "--tune-seeds 5 tunes nothing")],
)  # fmt: skip
def test_a_wrong_grid_is_refused_before_anything_is_written(experiment, tune, changed, message):
    with pytest.raises(ValueError, match=message):
        compare(experiment, *tune, arms="dense,sigmoid", **changed)
    assert not (experiment.output / SETTINGS).exists()
