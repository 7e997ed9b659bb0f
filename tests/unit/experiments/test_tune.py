"""``comoe tune``: the study with a script in place of the training; what a killed one leaves is taken up."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from comoe.config.failure import sentence
from comoe.config.load import load_recipe
from comoe.config.space import load_space

if find_spec("optuna") is None:
    pytest.skip("the extra tune is not installed", allow_module_level=True)

import optuna

from comoe.experiments import tune
from tests.helpers_data import files_up_to

ROOT = Path(__file__).parents[3]
RECIPE = (
    "tasks: {mood: {path: x}}\nmodel: {moe: {num_experts: 4, top_k: 2}}\ntrain: {max_steps: 30}\n"
)
SPACE = """options:
  train.learning_rate: {low: 1e-6, high: 1e-2, log: true}
  train.batch_size: {low: 8, high: 64, step: 8}
  model.moe.gate: [sigmoid, softmax]
"""


@pytest.fixture
def given(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "space.yaml").write_text(SPACE)
    return argparse.Namespace(
        config=str(tmp_path / "recipe.yaml"), deepspeed=str(ROOT / "ds_configs/zero2.json"),
        output=tmp_path / "out", ranks=1, overrides=["train.epochs=2"], space=tmp_path / "space.yaml",
        trials=8, seed=0, no_verify=False,
    )  # fmt: skip


class Training:
    """Writes what a run would: far from a rate of 1e-3 what the recipe asks for is low, and the mean high."""

    def __init__(self, killed_at=None, *, old=False):
        self.killed_at, self.runs, self.given_up = killed_at, [], {}
        self.keys = {"mean": 1} if old else {"mean": -1, "chosen": 1}

    def __call__(self, experiment, run, *, give_up=None):
        folder = experiment.runs / run.name
        folder.mkdir(parents=True, exist_ok=True)
        overrides = dict(pair.partition("=")[::2] for pair in run.overrides)
        self.runs.append((run.name, overrides))
        if len(self.runs) == self.killed_at:
            raise KeyboardInterrupt
        rate = float(overrides["train.learning_rate"])
        value = 1 / (1 + abs(rate - 1e-3) * 1000) - 0.01 * ("soft" in overrides["model.moe.gate"])
        for step in (10, 20, 30):
            line = {"step": step, "split": "validation"}
            line |= {key: sign * value * step / 30 for key, sign in self.keys.items()}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if give_up():
                self.given_up[run.name] = value
                return "comoe: stopped"
        (folder / "export").mkdir()
        (folder / "results.json").write_text(json.dumps({"finished": True, "best_value": value}))
        return ""


def study_of(given):
    return optuna.load_study(study_name="comoe", storage=f"sqlite:///{given.output / 'study.db'}")


def outcomes(given):
    return [(t.state, t.params, t.value) for t in tune.counted(study_of(given))]


@pytest.mark.parametrize("old", [False, True])
def test_a_study_finds_the_best_recipe_ends_poor_runs_and_leaves_out_what_costs(
    given, monkeypatch, capsys, old
):
    training = Training(old=old)
    monkeypatch.setattr(tune, "run_trial", training)
    assert tune._tune(given) is False
    assert len(training.runs) == 8 == len(tune.counted(study_of(given)))
    assert training.given_up and len(training.given_up) < 5
    assert all(overrides["run.plots"] == "false" for _, overrides in training.runs)
    complete = [t for t in study_of(given).trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.value)
    values = sorted(trial.value for trial in complete)
    assert max(training.given_up.values()) < values[len(values) // 2]
    recipe = load_recipe(given.output / "best.yaml")
    assert recipe.train.learning_rate == best.params["train.learning_rate"]
    assert recipe.train.batch_size == best.params["train.batch_size"] and recipe.run.plots
    assert recipe.train.epochs == 2 and recipe.train.batch_size % 8 == 0
    assert (given.output / "importance.png").read_bytes()[:4] == b"\x89PNG"
    table = (given.output / "tune.md").read_text()
    assert table.count("| t0") == 8 and "train.learning_rate: 0." in table
    assert "[8/8]" in capsys.readouterr().out
    # Nothing is left to do.
    assert tune._tune(given) is False and len(training.runs) == 8


def test_a_killed_study_goes_on_with_the_run_that_it_left_and_ends_as_an_undisturbed_one(
    given, monkeypatch, tmp_path
):
    monkeypatch.setattr(tune, "run_trial", Training())
    tune._tune(given)
    expected = outcomes(given)
    given.output = tmp_path / "killed"
    first = Training(killed_at=6)
    monkeypatch.setattr(tune, "run_trial", first)
    with pytest.raises(KeyboardInterrupt):
        tune._tune(given)
    second = Training()
    monkeypatch.setattr(tune, "run_trial", second)
    tune._tune(given)
    assert second.runs[0] == first.runs[-1] and len(second.runs) == 3
    assert outcomes(given) == expected


def test_a_study_without_room_is_named_and_goes_on_once_there_is_some(given, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", Training())
    given.trials = 1
    tune._tune(given)
    (first,) = outcomes(given)
    given.trials = 8
    file = given.output / tune.STUDY
    with files_up_to(8192), pytest.raises(OSError) as raised:
        tune._tune(given)
    assert sentence(raised.value).startswith(f"writing {file.resolve()}: File too large; ")
    tune._tune(given)
    assert len(outcomes(given)) == 8 and outcomes(given)[0] == first


def test_another_space_is_another_study(given, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", Training())
    given.trials = 1
    tune._tune(given)
    given.space.write_text(SPACE.replace("1e-6", "1e-5"))
    with pytest.raises(ValueError, match="holds a study of another --space"):
        tune._tune(given)


def test_a_run_that_fails_counts_and_is_told(given, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", lambda *words, **named: "comoe: no such encoder")
    given.trials = 2
    assert tune._tune(given) is True
    assert [t.user_attrs["problem"] for t in tune.counted(study_of(given))] == [
        "comoe: no such encoder"
    ] * 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("options: {}", "options is empty"),
        ("options: {train.learnin_rate: [1, 2]}", "did you mean train.learning_rate"),
        ("options: {train: [1, 2]}", "does not exist"),
        ("options: {run.name: [a, b]}", "comoe tune sets run.name itself"),
        ("options: {train.epochs: {low: 2, high: 1}}", r"low \(2\) must be below high \(1\)"),
        ("options: {train.epochs: {low: 0, high: 1, log: true}}", "low must be above 0"),
        ("options: {train.batch_size: {low: 1, high: 8, step: 0.5}}", r"step \(0.5\) must be who"),
        ("options: {train.epochs: [1]}", "not empty|at least"),
        ("options: {train.epochs: 3}", "must be"),
        ("train.epochs: [1, 2]", "is not an option"),
    ],
)
def test_a_bad_space_is_refused_with_its_place(text, message, tmp_path):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_space(tmp_path / "space.yaml", taken=("run.name",))


def test_a_value_that_the_option_does_not_take_is_refused_before_the_first_run(given):
    given.space.write_text("options: {model.moe.gate: [sigmoid, hard]}")
    with pytest.raises(ValueError, match="--space: command line: model.moe.gate is 'hard'"):
        tune._tune(given)
