"""The grid of a scaling experiment, its runs (with a script in place of the training), its table and its pictures."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comoe.config.load import load_recipe
from comoe.experiments import runner as scaling_runs
from comoe.experiments.cluster.plan import gpu_numbers
from comoe.experiments.runner import Experiment, command_of, failure_file, remember, run_points
from comoe.experiments.scale.grid import Grid, Point, build_grid, plan_points
from comoe.experiments.scale.plots import lines_figure, series_of, write_plots
from comoe.experiments.scale.table import (
    grouped,
    markdown,
    quality_of,
    row_of,
    write_hparams,
    write_tables,
)
from comoe.tasks.task import Task

ROOT = Path(__file__).parents[4]
RECIPE = "tasks: {mood: {path: x}}\nmodel: {moe: {num_experts: 4, top_k: 2}}\nparallel: {ep_size: auto}\n"
ONE = Grid(
    experts=(4,),
    top_k=(2,),
    gates=("sigmoid",),
    ep_sizes=("auto",),
    encoders=("kit:minilm",),
    seeds=(0,),
)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    zero2 = ROOT / "ds_configs/zero2.json"
    return Experiment(
        tmp_path / "recipe.yaml", zero2, tmp_path / "out", ROOT / "launch/train.py", ranks=2
    )


def names(points: list[Point]) -> list[str]:
    return [point.name for point in points]


def test_lists_are_read_and_a_missing_list_is_the_recipes_own_value(experiment: Experiment):
    recipe = load_recipe(experiment.config)
    grid = build_grid(
        recipe,
        experts="0, 2,4,2",
        top_k="1,all",
        gates="sigmoid,softmax",
        ep_sizes="auto,2",
        seeds=None,
    )
    assert grid == Grid(
        (0, 2, 4), (1, "all"), ("sigmoid", "softmax"), ("auto", 2), ("kit:minilm",), (0,)
    )
    assert build_grid(recipe) == ONE


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"experts": "2,many"},
            "--experts is '2,many'; 'many' must be a whole number, in a list with commas",
        ),
        ({"top_k": "1,,2"}, "--top-k is '1,,2'; '' must be a whole number or all"),
        ({"ep_sizes": "0"}, "--ep is '0'; 0 must be at least 1"),
        ({"gates": "sigmoid,sofmax"}, "sofmax is not a gate; did you mean softmax"),
        ({"encoders": ""}, "--encoder is ''; '' must be a name"),
    ],
)
def test_a_wrong_list_is_refused_with_the_valid_values(
    experiment: Experiment, lists: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        build_grid(load_recipe(experiment.config), **lists)


def test_impossible_combinations_are_left_out_and_said(experiment: Experiment):
    points, left_out = plan_points(
        replace(ONE, experts=(1, 2, 4), top_k=(1, 2), ep_sizes=(2,)), experiment
    )
    assert [(point.experts, point.top_k) for point in points] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert len(left_out) == 2
    assert "model.moe.top_k (2) must be at most model.moe.num_experts (1)" in left_out[1]
    assert "parallel.ep_size" in left_out[0] and "[1]" in left_out[0]


def test_an_ep_size_that_does_not_divide_the_ranks_is_left_out_with_the_valid_ones(
    experiment: Experiment,
):
    points, left_out = plan_points(replace(ONE, ep_sizes=(1, 4)), experiment)
    assert [point.ep_size for point in points] == [1]
    assert "must divide both the ranks (2)" in left_out[0] and "[1, 2]" in left_out[0]


def test_without_experts_k_gate_and_ep_are_one_run(experiment: Experiment):
    grid = replace(
        ONE,
        experts=(0,),
        top_k=(1, 2, "all"),
        gates=("sigmoid", "softmax"),
        ep_sizes=(1, 2),
        seeds=(0, 1),
    )
    points, left_out = plan_points(grid, experiment)
    assert names(points) == ["E0-kit-minilm-s0", "E0-kit-minilm-s1"] and left_out == []
    assert points[0].overrides == [
        "model.encoder=kit:minilm",
        "train.seed=0",
        "model.moe.num_experts=0",
    ]


def test_all_is_as_many_as_there_are_and_no_run_is_made_twice(experiment: Experiment):
    points, _ = plan_points(replace(ONE, experts=(2, 4), top_k=(2, "all")), experiment)
    assert [(point.experts, point.top_k) for point in points] == [(2, 2), (4, 2), (4, 4)]
    # Bias balancing is the recipe's default, and refused where all experts run.
    assert [load_recipe(experiment.config, point.overrides).model.moe.balance for point in points] == [
        "none", "bias", "none"]  # fmt: skip


def test_a_points_words_make_its_recipe(experiment: Experiment):
    (point,), _ = plan_points(
        replace(ONE, experts=(8,), gates=("softmax",), ep_sizes=(2,), seeds=(3,)), experiment
    )
    recipe = load_recipe(experiment.config, [*point.overrides, f"run.name={point.name}"])
    moe = recipe.model.moe
    assert (moe.num_experts, moe.top_k, moe.gate, recipe.train.seed) == (8, 2, "softmax", 3)
    assert recipe.parallel.ep_size == 2 and recipe.run.name == "E8-k2-softmax-ep2-kit-minilm-s3"


@pytest.mark.parametrize("word", ["model.moe.top_k=3", "run.name=mine", "train.seed=4"])
def test_an_override_that_the_grid_sets_is_refused(experiment: Experiment, word: str):
    with pytest.raises(ValueError, match="cannot be an override here"):
        plan_points(ONE, replace(experiment, overrides=(word,)))


def test_a_wrong_recipe_is_the_users_error_and_not_a_combination_left_out(experiment: Experiment):
    with pytest.raises(ValueError, match="did you mean train.max_steps"):
        plan_points(ONE, replace(experiment, overrides=("train.max_step=3",)))


def test_two_encoders_must_not_share_a_run_folder(experiment: Experiment):
    with pytest.raises(ValueError, match="two encoders would share the run folder"):
        plan_points(replace(ONE, encoders=("a/mine", "b/mine")), experiment)


def test_a_folder_takes_one_experiment_only(experiment: Experiment):
    remember(experiment)
    remember(experiment)
    with pytest.raises(ValueError, match="recipe.train.batch_size 32 instead of 8"):
        remember(replace(experiment, overrides=("train.batch_size=8",)))
    with pytest.raises(ValueError, match="ranks 2 instead of 4"):
        remember(replace(experiment, ranks=4))


FAKE = """
import json, pathlib, sys
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
print("line one", flush=True)
if how == "refused":
    sys.exit("comoe: rank 0: the encoder is missing")
if how == "taken" and not (folder.parent / "taken").exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / "taken").touch()
    sys.exit("comoe: rank 0: no connection to the other ranks: code: -98, name: EADDRINUSE")
folder.mkdir(parents=True)
if how == "lost":
    print("a rank was killed", flush=True)
    sys.exit(0)
(folder / "export").mkdir(exist_ok=True)
(folder / "results.json").write_text(json.dumps({"finished": "all steps done", "best_value": 0.5}))
sys.exit(3)
"""


@pytest.fixture
def fake(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Seed -> how the run of that seed ends: well where it is not named."""
    fates: dict[int, str] = {}

    def command(given: Experiment, point: Point) -> list[str]:
        return [
            sys.executable,
            "-c",
            FAKE,
            str(given.runs / point.name),
            fates.get(point.seed, "well"),
        ]

    monkeypatch.setattr(scaling_runs, "command_of", command)
    return fates


def run(experiment: Experiment, seeds: int) -> tuple[list[str], list[str], int]:
    """(failed, lines printed, reports written)."""
    points, _ = plan_points(replace(ONE, seeds=tuple(range(seeds))), experiment)
    said: list[str] = []
    reports: list[object] = []
    failed = run_points(experiment, points, report=reports.append, say=said.append)
    return names(failed), said, len(reports)


def test_a_failing_run_is_recorded_and_the_others_run(experiment: Experiment, fake: dict[int, str]):
    fake |= {0: "refused", 1: "lost"}
    failed, said, reports = run(experiment, 3)
    assert [name[-2:] for name in failed] == ["s0", "s1"] and reports == 3
    assert "FAILED (comoe: rank 0: the encoder is missing)" in said[1] and said[1].startswith(
        "[1/3]"
    )
    # The launcher's exit code was 0, and that of the good run 3: only the results count.
    assert "FAILED (a rank was killed)" in said[2] and "validation 0.5000" in said[3]
    assert "left" in said[3]
    point = Point(4, 2, "sigmoid", "auto", "kit:minilm", 0)
    text = failure_file(experiment, point).read_text()
    assert "exit code 1" in text and "line one" in text and "the encoder is missing" in text


def test_a_port_that_another_process_took_is_chosen_again(
    experiment: Experiment, fake: dict[int, str]
):
    fake[0] = "taken"
    failed, said, _ = run(experiment, 1)
    assert failed == [] and "validation 0.5000" in said[1]
    log = next((experiment.output / "logs").iterdir()).read_text()
    assert log.count("\n$ ") == 1 and log.count("comoe: rank 0: no connection") == 3


def test_a_second_call_makes_only_what_is_not_done(experiment: Experiment, fake: dict[int, str]):
    fake[1] = "refused"
    run(experiment, 3)
    before = (
        (experiment.runs / "E4-k2-sigmoid-epauto-kit-minilm-s0/results.json").stat().st_mtime_ns
    )
    fake.clear()
    failed, said, reports = run(experiment, 3)
    assert failed == [] and reports == 1 and said[0] == "3 runs, 2 of them done; 2 rank(s) each"
    assert said[1].startswith("[3/3] E4-k2-sigmoid-epauto-kit-minilm-s1")
    assert (
        experiment.runs / "E4-k2-sigmoid-epauto-kit-minilm-s0/results.json"
    ).stat().st_mtime_ns == before
    assert list((experiment.output / "failed").iterdir()) == []


def test_a_run_that_was_cut_short_is_resumed_and_a_new_one_is_told_everything(
    experiment: Experiment,
):
    experiment = replace(experiment, overrides=("train.epochs=1",))
    (point,), _ = plan_points(ONE, experiment)
    command = command_of(experiment, point)
    assert {
        "train.epochs=1",
        "model.moe.num_experts=4",
        f"run.name={point.name}",
        "--config",
    } <= set(command)
    assert command[command.index("--num_accelerators") + 1] == "2" and "--resume" not in command
    folder = experiment.runs / point.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    resumed = command_of(experiment, point)
    assert resumed[-2:] == ["--resume", str(folder)] and "--config" not in resumed
    ports = {words[words.index("--master_port") + 1] for words in (command, resumed)}
    assert all(1024 < int(port) < 65536 for port in ports)


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


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Two seeds of k = 2 at two sizes, the encoder alone, one failed, one open."""
    points = [
        Point(experts, 2, "sigmoid", "auto", "enc", seed) for experts in (4, 8) for seed in (0, 1)
    ]
    points.append(Point(0, 0, "", 1, "enc", 0))
    for point in points:
        score = 0.7 + 0.1 * point.seed + 0.01 * point.experts
        leave_run(tmp_path / "runs" / point.name, score=score, experts=point.experts)
    made = [row_of(point, tmp_path / "runs" / point.name) for point in points]
    made.append(
        row_of(
            Point(16, 2, "sigmoid", "auto", "enc", 0), tmp_path / "none", problem="comoe: no room"
        )
    )
    made.append(row_of(Point(16, 2, "sigmoid", "auto", "enc", 1), tmp_path / "none"))
    return made


def test_a_row_holds_what_the_run_left(rows: list[dict[str, Any]]):
    row = rows[0]
    assert (row["status"], row["ep_size"], row["split"]) == ("done", 2, "test")
    assert row["mood/macro_f1"] == pytest.approx(0.74) and row["heat/mae"] == 0.5
    assert row["mean"] == pytest.approx((0.74 - 0.5) / 2)  # an error counts against
    assert row["step_ms"] == pytest.approx(
        1000 * 2.0 / 10
    )  # the first steps, 500 ms each, are left out
    assert row["tokens_per_second"] == 200.0 and row["peak_mib"] == 3
    assert (row["max_violation"], row["effective_experts"]) == (1.0, 3.0)
    assert row["task_information"] == pytest.approx(0.2)
    assert (row["parameters_experts"], row["parameters_active"], row["parameters_total"]) == (
        40,
        80,
        100,
    )


def test_a_run_without_test_labels_or_experts_has_a_row_too(tmp_path: Path):
    point = Point(0, 0, "", 1, "enc", 0)
    leave_run(tmp_path / "run", score=0.9, experts=0, test=False)
    row = row_of(point, tmp_path / "run")
    assert row["split"] == "validation" and row["mean"] == 0.1 and "max_violation" not in row


def test_the_mean_leaves_auxiliary_tasks_out_and_the_row_shows_them():
    labels = ("a", "b")
    tasks = [Task("mood", "single_label", labels, "macro_f1")]
    tasks += [Task("helper", "single_label", labels, "macro_f1", auxiliary=True)]
    metrics = {"validation": {"mood": {"macro_f1": 0.8}, "helper": {"macro_f1": 0.2}}}
    row = quality_of(metrics, tasks)
    assert row == {"split": "validation", "mean": 0.8, "mood/macro_f1": 0.8, "helper/macro_f1": 0.2}
    assert quality_of({"validation": {"helper": {"macro_f1": 0.2}}}, tasks)["mean"] is None


def test_the_csv_has_every_run_and_the_markdown_means_over_seeds(
    rows: list[dict[str, Any]], tmp_path: Path
):
    write_tables(rows, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["run"] for row in read] == [row["run"] for row in rows]
    assert (
        float(read[0]["mood/macro_f1"]) == rows[0]["mood/macro_f1"]
        and read[5]["problem"] == "comoe: no room"
    )
    text = (tmp_path / "table.md").read_text()
    assert "5 of 7 runs done, 1 open, 1 failed. Quality on test" in text
    # The mean of 0.74 and 0.84, and their deviation.
    assert "0.790 ± 0.071" in text and "* E16-k2-sigmoid-epauto-enc-s0: comoe: no room" in text
    assert (
        len(
            {
                line.count("|")
                for line in text.splitlines()
                if line.startswith("| 2 |") or "seeds |" in line
            }
        )
        == 1
    )


def test_runs_that_differ_in_the_seed_alone_are_one_group(rows: list[dict[str, Any]]):
    assert [(group[0]["experts"], len(group)) for group in grouped(rows)] == [
        (0, 1),
        (4, 2),
        (8, 2),
    ]


def test_a_table_without_any_finished_run_says_so(rows: list[dict[str, Any]]):
    assert "0 of 2 runs done, 1 open, 1 failed" in markdown(rows[-2:])


def test_a_figure_has_a_line_per_k_the_seeds_and_the_level_without_experts(
    rows: list[dict[str, Any]],
):
    done = [row for row in rows if row["status"] == "done"]
    other = [row | {"top_k": 1, "mean": 0.2} for row in done if row["experts"]]
    assert list(series_of([*other, *done[:4]])) == ["k = 1", "k = 2"]
    figure = lines_figure([*done, *other], {"mean": "mean", "absent": "nothing"}, title="t")
    (panel,) = figure.axes
    lines = {
        line.get_label(): line for line in panel.get_lines() if not line.get_label().startswith("_")
    }
    assert set(lines) == {"k = 1", "k = 2", "no experts"}
    assert list(lines["k = 2"].get_xdata()) == [4, 8]
    assert lines["k = 2"].get_ydata() == pytest.approx(
        [(0.74 + 0.84 - 1) / 4, (0.78 + 0.88 - 1) / 4]
    )
    assert list(panel.get_xticks()) == [4, 8]


def test_gates_get_lines_of_their_own(rows: list[dict[str, Any]]):
    both = [*rows[:2], *(row | {"gate": "softmax"} for row in rows[:2])]
    assert list(series_of(both)) == ["k = 2, sigmoid", "k = 2, softmax"]


def test_pictures_of_quality_cost_and_shares_are_written(
    rows: list[dict[str, Any]], tmp_path: Path
):
    write_plots(rows, tmp_path)
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    heatmaps = {f"share_E{e}-k2-sigmoid-epauto-enc-s{seed}.png" for e in (4, 8) for seed in (0, 1)}
    assert written == {"quality.png", "cost.png", *heatmaps}
    write_plots(rows[-2:], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_tensorboard_gets_one_entry_per_finished_run_and_keeps_it(
    rows: list[dict[str, Any]], tmp_path: Path
):
    write_hparams(rows, tmp_path)
    folder = tmp_path / "tensorboard" / rows[0]["run"]
    files = sorted(folder.iterdir())
    write_hparams(rows, tmp_path)
    assert (
        sorted(folder.iterdir()) == files and len(list((tmp_path / "tensorboard").iterdir())) == 5
    )
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("scale/mean")[0].value == pytest.approx(rows[0]["mean"])


@pytest.mark.parametrize(
    ("text", "numbers"), [("1..8", [1, 2, 4, 8]), ("3..13", [3, 6, 12]), ("5,64", [5, 64])]
)
def test_numbers_of_gpus_are_listed_or_doubled(text: str, numbers: list[int]):
    assert gpu_numbers(text) == numbers


@pytest.mark.parametrize("text", ["8..1", "a", "0..4", ""])
def test_wrong_numbers_of_gpus_are_refused(text: str):
    with pytest.raises(ValueError, match="--gpus"):
        gpu_numbers(text)
