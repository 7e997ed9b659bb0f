"""The grid of a scaling experiment, its runs (with a script in place of the training), its table and its figures."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comoe.config.files import lock_beside, locked
from comoe.config.load import load_recipe
from comoe.experiments import runner
from comoe.experiments.cluster.plan import gpu_numbers
from comoe.experiments.compare.plan import Arm, Plan
from comoe.experiments.runner import Experiment, Trial, command_of, record_settings, run_trials
from comoe.experiments.scale.command import name_of, plan_grid, read_grid
from comoe.experiments.scale.report import (
    grouped,
    lines_figure,
    markdown,
    read_rows,
    series_of,
    write_hparams,
    write_plots,
    write_tables,
)

ROOT = Path(__file__).parents[4]
RECIPE = "tasks: {mood: {path: x}}\nmodel: {moe: {num_experts: 4, top_k: 2}}\nparallel: {ep_size: auto}\n"
ONE = {"encoder": ("kit:minilm",), "gate": ("sigmoid",), "ep_size": ("auto",), "experts": (4,),
       "top_k": (2,), "seeds": (0,)}  # fmt: skip
POINT = "E4-k2-sigmoid-epauto-kit-minilm"


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    zero2 = ROOT / "ds_configs/zero2.json"
    return Experiment(tmp_path / "recipe.yaml", zero2, tmp_path / "out", ranks=2)


def points(plan: Plan) -> list[tuple[int, int]]:
    return [(arm.settings["experts"], arm.settings["top_k"]) for arm in plan.arms]


def test_lists_are_read_and_a_missing_list_is_the_recipes_own_value(experiment):
    recipe = load_recipe(experiment.config)
    lists = {
        "experts": "0, 2,4,2",
        "top_k": "1,all",
        "gate": "sigmoid,softmax",
        "ep_size": "auto,2",
    }
    assert read_grid(recipe, lists | {"seeds": None}) == ONE | {
        "experts": (0, 2, 4), "top_k": (1, "all"), "gate": ("sigmoid", "softmax"), "ep_size": ("auto", 2),
    }  # fmt: skip
    assert read_grid(recipe, {}) == ONE


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"experts": "2,many"}, "--experts is '2,many'; 'many' must be an integer, in a list with commas"),
        ({"top_k": "1,,2"}, "--top-k is '1,,2'; '' must be an integer or all"),
        ({"ep_size": "0"}, "--ep is '0'; 0 must be at least 1"),
        ({"seeds": "-1"}, "--seeds is '-1'; -1 must be at least 0"),
        ({"gate": "sigmoid,sofmax"}, "sofmax is not a gate; did you mean softmax"),
        ({"encoder": ""}, "--encoder is ''; '' must be a name"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_with_the_valid_values(experiment, lists, message):
    with pytest.raises(ValueError, match=message):
        read_grid(load_recipe(experiment.config), lists)


def test_impossible_combinations_are_left_out_with_a_note(experiment):
    grid = ONE | {"experts": (1, 2, 4), "top_k": (1, 2), "ep_size": (2,)}
    plan = plan_grid(grid, experiment)
    assert points(plan) == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert len(plan.notes) == 3 and "all experts run" in plan.notes[2]
    assert "model.moe.top_k (2) must be at most model.moe.num_experts (1)" in plan.notes[1]
    assert "parallel.ep_size" in plan.notes[0] and "[1]" in plan.notes[0]
    with pytest.raises(
        ValueError, match="left out E1-.*\n.*no combination of the grid is possible"
    ):
        plan_grid(grid | {"experts": (1,), "top_k": (2,)}, experiment)

    # An EP size that does not divide the ranks is left out with the valid ones.
    plan = plan_grid(ONE | {"ep_size": (1, 4)}, experiment)
    assert [arm.settings["ep_size"] for arm in plan.arms] == [1]
    assert "must divide both the ranks (2)" in plan.notes[0] and "[1, 2]" in plan.notes[0]


def test_without_experts_k_gate_and_ep_are_one_arm(experiment):
    grid = ONE | {"experts": (0,), "top_k": (1, 2, "all"), "gate": ("sigmoid", "softmax"),
                  "ep_size": (1, 2), "seeds": (0, 1)}  # fmt: skip
    plan = plan_grid(grid, experiment)
    assert [trial.name for trial in plan.trials] == ["E0-kit-minilm-s0", "E0-kit-minilm-s1"]
    arguments = ["model.encoder=kit:minilm", "model.moe.num_experts=0", "train.seed=0"]
    assert plan.notes == () and plan.trials[0].overrides == arguments


def test_all_is_as_many_as_there_are_and_no_run_is_made_twice(experiment):
    plan = plan_grid(ONE | {"experts": (2, 4), "top_k": (2, "all")}, experiment)
    assert points(plan) == [(2, 2), (4, 2), (4, 4)]
    # Bias balancing is the recipe's default, and refused where all experts run.
    moes = [load_recipe(experiment.config, trial.overrides).model.moe for trial in plan.trials]
    assert [moe.balance for moe in moes] == ["none", "bias", "none"]


def test_the_overrides_of_a_point_make_its_recipe(experiment):
    grid = ONE | {"experts": (8,), "gate": ("softmax",), "ep_size": (2,), "seeds": (3,)}
    (trial,) = plan_grid(grid, experiment).trials
    recipe = load_recipe(experiment.config, [*trial.overrides, f"run.name={trial.name}"])
    moe = recipe.model.moe
    assert (moe.num_experts, moe.top_k, moe.gate, recipe.train.seed) == (8, 2, "softmax", 3)
    assert recipe.parallel.ep_size == 2 and recipe.run.name == "E8-k2-softmax-ep2-kit-minilm-s3"


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [({}, ["model.moe.top_k=3"], "model.moe.top_k cannot be an override here"),
     ({}, ["run.name=mine"], "run.name cannot be an override here"),
     ({}, ["train.seed=4"], "train.seed cannot be an override here"),
     ({}, ["train.max_step=3"], "did you mean train.max_steps"),
     ({"encoder": ("a/mine", "b/mine")}, [], "two encoders would share the run folder")],
)  # fmt: skip
def test_an_impossible_experiment_is_refused(experiment, changed, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_grid(ONE | changed, replace(experiment, overrides=tuple(overrides)))


def test_a_folder_takes_one_experiment_only(experiment):
    record_settings(experiment, file_name="scale.json")
    record_settings(experiment, file_name="scale.json")
    for changed, message in (
        ({"overrides": ("train.batch_size=8",)}, "recipe.train.batch_size 32 instead of 8"),
        ({"ranks": 4}, "ranks 2 instead of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            record_settings(replace(experiment, **changed), file_name="scale.json")


@pytest.mark.parametrize("name", ["table.md", "runs/mine/notes.txt", "compare.json"])
def test_a_folder_with_files_of_others_takes_no_experiment(experiment, name):
    file = experiment.output / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files of something else .*and no scale.json"):
        record_settings(experiment, file_name="scale.json")
    assert file.read_text() == "years of work" and not (experiment.output / "scale.json").exists()


FAKE = """
import json, pathlib, sys
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
print("line one", flush=True)
if how == "refused":
    sys.exit("comoe: rank 0: the encoder is missing")
folder.mkdir(parents=True)
if how == "lost":
    print("comoe: starting 2 ranks, on the CPU", flush=True)
    print("a rank was killed", flush=True)
    sys.exit(0)
(folder / "export").mkdir(exist_ok=True)
(folder / "results.json").write_text(json.dumps({"finished": "all steps done", "best_value": 0.5}))
sys.exit(3)
"""


@pytest.fixture
def fake(experiment, monkeypatch) -> dict[int, str]:
    """Seed -> how the run of that seed ends: well where it is not named."""
    fates: dict[int, str] = {}

    def command(given: Experiment, trial: Trial) -> list[str]:
        fate = fates.get(trial.seed, "well")
        return [sys.executable, "-c", FAKE, str(given.runs / trial.name), fate]

    monkeypatch.setattr(runner, "command_of", command)
    return fates


@pytest.fixture
def printed(monkeypatch) -> list[str]:
    """Lines that the runner prints."""
    lines: list[str] = []
    monkeypatch.setattr(runner, "print_now", lines.append)
    return lines


def run(experiment: Experiment, seeds: int) -> tuple[list[str], int]:
    """(failed, reports written)."""
    plan = plan_grid(ONE | {"seeds": tuple(range(seeds))}, experiment)
    reports: list[int] = []
    failed = run_trials(experiment, plan.trials, report=lambda: reports.append(1))
    return [trial.name for trial in failed], len(reports)


def test_a_failing_run_is_recorded_and_the_others_run(experiment, fake, printed):
    fake |= {0: "refused", 1: "lost"}
    failed, reports = run(experiment, 3)
    assert failed == [f"{POINT}-s0", f"{POINT}-s1"] and reports == 3
    assert "FAILED (comoe: rank 0: the encoder is missing)" in printed[1]
    # The lost run's exit code was 0, and that of the good run 3: only the results count.
    assert "FAILED (a rank was killed)" in printed[2] and "validation 0.5000" in printed[3]
    assert printed[1].startswith("[1/3]") and "left" in printed[3]
    trial = Trial(POINT, 0, (), 4)
    text = experiment.failure_file(trial).read_text()
    assert "exit code 1" in text and "line one" in text and "the encoder is missing" in text
    assert experiment.problem(trial) == "comoe: rank 0: the encoder is missing"


def test_a_second_call_makes_only_what_is_not_done(experiment, fake, printed):
    fake[1] = "refused"
    run(experiment, 3)
    results = experiment.runs / f"{POINT}-s0/results.json"
    before = results.stat().st_mtime_ns
    fake.clear()
    printed.clear()
    assert run(experiment, 3) == ([], 1) and printed[0] == "3 runs, 2 of them done; 2 rank(s) each"
    assert printed[1].startswith(f"[3/3] {POINT}-s1") and results.stat().st_mtime_ns == before
    assert not (experiment.output / "failed").exists()
    # Two commands do not run one experiment.
    with locked(lock_beside(experiment.runs), "x"), pytest.raises(ValueError, match="is in use by"):
        run(experiment, 1)


def test_an_interrupted_run_is_resumed_and_a_new_one_gets_all_overrides(experiment):
    experiment = replace(experiment, overrides=("train.epochs=1",))
    (trial,) = plan_grid(ONE, experiment).trials
    command = command_of(experiment, trial)
    expected = {"train.epochs=1", "model.moe.num_experts=4", f"run.name={trial.name}", "--config"}
    assert expected <= set(command) and "--resume" not in command
    assert command[command.index("--ranks") + 1] == "2"
    folder = experiment.runs / trial.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    resumed = command_of(experiment, trial)
    assert resumed[-2:] == ["--resume", str(folder)] and "--config" not in resumed
    unverified = command_of(replace(experiment, verify=False), trial)
    assert unverified[-3:] == [*resumed[-2:], "--no-verify"]


TASK = {"name": "mood", "kind": "single_label", "labels": ["a", "b"], "metric": "macro_f1"}
ERROR = {"name": "heat", "kind": "regression", "labels": [], "metric": "mae"}


def leave_run(folder: Path, *, score: float, experts: int = 4, test: bool = True) -> None:
    """What a run leaves, as far as the table reads it."""
    folder.mkdir(parents=True)
    metrics = {"mood": {"macro_f1": score, "n": 9}, "heat": {"mae": 0.5, "n": 9}}
    results = {
        "finished": "all steps done", "step": 30, "best_step": 20, "seconds": 9.0, "world_size": 2, "ep_size": 2,
        "zero_stage": 2, "peak_memory_bytes_per_rank": 3 * 2**20,
        "parameters": {"total": 100, "experts": 10 * experts, "dense": 60, "active": 80},
        "metrics": {"validation": {"mood": {"macro_f1": 0.1}}} | ({"test": metrics} if test else {}),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "tasks.json").write_text(json.dumps([TASK, ERROR]))
    routing = {"layers": [1, 3], "max_violation": [0.5, 1.5], "effective_experts": [3.0, None],
               "task_information": [0.1, 0.3], "share": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]}  # fmt: skip
    lines: list[dict[str, Any]] = [
        {"split": "train", "step": 10, "seconds": 5.0, "tokens_per_second": 1.0},
        {"split": "train", "step": 20, "seconds": 7.0, "tokens_per_second": 100.0},
        {"split": "train", "step": 30, "seconds": 9.0, "tokens_per_second": 300.0},
        {"split": "validation", "step": 30} | ({"routing": routing} if experts else {}),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def plan_of(*points: tuple[int, tuple[int, ...]]) -> Plan:
    """Arms of these numbers of experts and seeds, k = 2."""
    arms = []
    for experts, seeds in points:
        with_experts = {"gate": "sigmoid", "ep_size": "auto", "experts": experts, "top_k": 2}
        without = {"gate": "", "ep_size": 1, "experts": 0, "top_k": 0}
        point = {"encoder": "enc"} | (with_experts if experts else without)
        trials = tuple(Trial(name_of(point), seed, (), experts) for seed in seeds)
        arms.append(Arm(name_of(point), trials, point))
    return Plan(tuple(arms), (0, 1), None, ())


@pytest.fixture
def rows(experiment) -> list[dict[str, Any]]:
    """Two seeds of k = 2 at two sizes, the encoder alone, one failed, one open."""
    plan = plan_of((4, (0, 1)), (8, (0, 1)), (0, (0,)), (16, (0, 1)))
    for arm in plan.arms[:3]:
        for trial in arm.trials:
            score = 0.7 + 0.1 * trial.seed + 0.01 * trial.experts
            leave_run(experiment.runs / trial.name, score=score, experts=trial.experts)
    failure = experiment.failure_file(plan.arms[3].trials[0])
    failure.parent.mkdir()
    failure.write_text("exit code 1\ncomoe: no room\nlast line\n")
    return read_rows(plan, experiment)


def test_a_row_holds_what_the_run_left(rows):
    # The mean: an error counts against. The step: the first ones, 500 ms each, are left out.
    expected = {
        "status": "done", "ep_size": 2, "split": "test", "mood/macro_f1": 0.74, "heat/mae": 0.5, "mean": 0.12,
        "step_ms": 200.0, "tokens_per_second": 200.0, "peak_mib": 3.0, "max_violation": 1.0, "effective_experts": 3.0,
        "task_information": 0.2, "parameters_experts": 40, "parameters_active": 80, "parameters_total": 100,
    }  # fmt: skip
    assert {name: rows[0][name] for name in expected} == pytest.approx(expected)
    assert [row["status"] for row in rows[4:]] == ["done", "failed", "open"]


def test_the_mean_leaves_auxiliary_tasks_out_and_the_row_shows_them(experiment):
    plan, helper = plan_of((0, (0, 1, 2))), {"auxiliary": True}
    for seed, tasks in enumerate(([TASK, ERROR | helper], [TASK | helper], [TASK, ERROR])):
        folder = experiment.runs / f"E0-enc-s{seed}"
        leave_run(folder, score=0.8, experts=0, test=seed < 2)
        (folder / "tasks.json").write_text(json.dumps(tasks))
    both, none, untested = read_rows(plan, experiment)
    assert (both["mean"], both["mood/macro_f1"], both["heat/mae"]) == (0.8, 0.8, 0.5)
    assert none["mean"] is None and none["mood/macro_f1"] == 0.8
    # A run without test labels or experts has a row too.
    assert (untested["split"], untested["mean"]) == ("validation", 0.1)
    assert "max_violation" not in untested


def test_the_csv_has_every_run_and_the_markdown_means_over_seeds(rows, tmp_path):
    write_tables(rows, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["run"] for row in read] == [row["run"] for row in rows]
    assert float(read[0]["mood/macro_f1"]) == rows[0]["mood/macro_f1"]
    assert read[5]["problem"] == "comoe: no room"
    text = (tmp_path / "table.md").read_text()
    assert "5 of 7 runs done, 1 open, 1 failed. Quality on test" in text
    # The mean of 0.74 and 0.84, and their deviation.
    assert "0.790 ± 0.071" in text and "* E16-k2-sigmoid-epauto-enc-s0: comoe: no room" in text
    lines = [line for line in text.splitlines() if line.startswith(("| 2 |", "| seeds |"))]
    assert len(lines) > 1 and len({line.count("|") for line in lines}) == 1
    # Runs that differ in the seed only are one group.
    groups = [(group[0]["experts"], len(group)) for group in grouped(rows)]
    assert groups == [(0, 1), (4, 2), (8, 2)]
    # Without a finished run.
    assert "0 of 2 runs done, 1 open, 1 failed" in markdown(rows[-2:])


def test_a_figure_has_a_line_per_k_the_seeds_and_the_level_without_experts(rows):
    done = [row for row in rows if row["status"] == "done"]
    other = [row | {"top_k": 1, "mean": 0.2} for row in done if row["experts"]]
    assert list(series_of([*other, *done[:4]])) == ["k = 1", "k = 2"]
    figure = lines_figure([*done, *other], {"mean": "mean", "absent": "nothing"}, title="t")
    (panel,) = figure.axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    labels = {label for label in lines if not label.startswith("_")}
    assert labels == {"k = 1", "k = 2", "no experts"}
    assert list(lines["k = 2"].get_xdata()) == [4, 8] == list(panel.get_xticks())
    means = [(0.74 + 0.84 - 1) / 4, (0.78 + 0.88 - 1) / 4]
    assert lines["k = 2"].get_ydata() == pytest.approx(means)
    # Gates have separate lines.
    both = [*rows[:2], *(row | {"gate": "softmax"} for row in rows[:2])]
    assert list(series_of(both)) == ["k = 2, sigmoid", "k = 2, softmax"]


def test_figures_of_quality_cost_and_shares_are_written(rows, tmp_path):
    output = tmp_path / "out"
    write_plots(rows, output)
    written = {path.name for path in (output / "plots").iterdir()}
    heatmaps = {f"share_E{e}-k2-sigmoid-epauto-enc-s{seed}.png" for e in (4, 8) for seed in (0, 1)}
    assert written == {"quality.png", "cost.png", *heatmaps}
    write_plots(rows[-2:], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_tensorboard_gets_one_entry_per_finished_run_and_keeps_it(rows, tmp_path):
    write_hparams(rows, tmp_path)
    folder = tmp_path / "tensorboard" / rows[0]["run"]
    files = sorted(folder.iterdir())
    write_hparams(rows, tmp_path)
    assert sorted(folder.iterdir()) == files
    assert len(list((tmp_path / "tensorboard").iterdir())) == 5
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("scale/mean")[0].value == pytest.approx(rows[0]["mean"])


def test_numbers_of_gpus_are_listed_or_doubled():
    for text, numbers in (("1..8", [1, 2, 4, 8]), ("3..13", [3, 6, 12]), ("5,64", [5, 64])):
        assert gpu_numbers(text) == numbers
    for text in ("8..1", "a", "0..4", ""):
        with pytest.raises(ValueError, match="--gpus"):
            gpu_numbers(text)
