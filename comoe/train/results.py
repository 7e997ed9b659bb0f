"""What a finished run leaves beside its export: ``results.json``, ``predictions/``, and the table that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.files import atomic_file, plain, read_json
from comoe.data.posts import PART_NAMES, PostSplit
from comoe.data.reading.files import json_line
from comoe.data.reading.inputs import pair_in_training
from comoe.distributed import broadcast_object, is_main, world_size
from comoe.evaluation.evaluate import TEACHER_KL, Evaluation
from comoe.evaluation.experts_off import experts_lines
from comoe.evaluation.gaps import gaps_of
from comoe.evaluation.tables import (
    calibration_lines,
    format_results_table,
    gap_lines,
    noise_lines,
    slice_lines,
)
from comoe.inference.export_config import CONFIG
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task

if TYPE_CHECKING:
    # The engine that it holds loads DeepSpeed, which a classical arm does not need.
    from comoe.train.training_run import TrainingRun


def results_of(
    run: TrainingRun, evaluations: Mapping[str, Evaluation], *, step: int
) -> dict[str, Any]:
    """What ``results.json`` says of a run, without what only ``finalize`` measures.

    Args:
        run: at its end.
        evaluations: split -> evaluation, those under noise too.
        step: of the evaluated weights.
    """
    state, report = run.state, run.report
    # Divergence from the teachers: split -> task, and their mean.
    kl = {split: found for split, one in evaluations.items() if (found := one.teacher_kl())}
    return {
        "run": run.recipe.run.name,
        "finished": state.finished,
        "step": state.step,
        "best_step": step,
        "best_value": state.best_value,
        "early_stop_metric": run.recipe.train.early_stop_metric,
        "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
        **({TEACHER_KL: kl} if kl else {}),
        "seconds": state.seconds,
        "posts": state.posts_seen,
        "posts_per_second": state.posts_seen / state.seconds if state.seconds else None,
        "skipped_steps": state.nonfinite_total,
        "clipped_steps": state.clipped_total,
        "world_size": world_size(),
        "ep_size": run.layout.ep_size,
        "zero_stage": run.layout.stage,
        "bf16": run.layout.bf16,
        "parameters": dict(run.parameters),
        "data": {
            "posts": report.posts,
            "labels": report.labels,
            "set_aside": [str(row) for row in report.set_aside],
            "without_picture": [str(row) for row in report.without_image],
            "truncated": report.truncated,
            "prompts_cut": report.prompts_cut,
            "answers_cut": report.targets_cut,
            "notes": report.notes,
            "warnings": report.warnings,
        },
    }


def gaps_by_split(
    run: TrainingRun, evaluations: Mapping[str, Evaluation], tasks: Sequence[Task]
) -> dict[str, Any]:
    """``gaps`` of ``results.json``: split -> task -> of ``gaps_of``; nothing without slices.

    Args:
        run: at its end.
        evaluations: split -> evaluation, of the run's own splits.
        tasks: with fitted thresholds, which count beyond the validation posts that chose them.
    """
    found = {}
    for split, evaluation in evaluations.items():
        chosen = [
            replace(task, thresholds=None) if split == "validation" else task for task in tasks
        ]
        if gaps := gaps_of(evaluation.outputs, chosen, run.splits[split].posts.columns):
            found[split] = gaps
    return {"gaps": found} if found else {}


def write_predictions(
    folder: Path, evaluations: Mapping[str, Evaluation], posts: Mapping[str, PostSplit]
) -> None:
    """A file per split and task, in the place of earlier ones; other files in the folder stay.

    Posts without any label are in all of them; ``data_set`` tells them apart.
    """
    for older in (file for split in PART_NAMES for file in (folder / split).glob("*.jsonl")):
        older.unlink()
    for split, evaluation in evaluations.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for task, rows in evaluation.predictions.items():
            with atomic_file(folder / split / f"{task}.jsonl", "w") as file:
                for row in rows:
                    place = posts[split].groups[row["row"]]
                    line = {"row": row["row"], "data_set": posts[split].group_names[place]} | row
                    file.write(json_line(plain(line)))


def written_out(folder: Path, step: int) -> bool:
    """Whether results and export are of this step: a resumed run still has those of its first end.

    Every rank must call it.
    """
    results = folder / "results.json"
    done = is_main() and results.is_file() and (folder / "export").is_dir()
    return broadcast_object(done and read_json(results)["step"] == step)


def print_results(folder: Path, tasks: Sequence[Task]) -> None:
    """The table of a finished run, from its ``results.json``, and the next commands."""
    results = read_json(folder / "results.json")
    print()
    metrics = results["metrics"]
    print(
        "\n".join(
            [
                format_results_table(metrics, tasks),
                *slice_lines(metrics, tasks),
                *gap_lines(results.get("gaps", {}), tasks),
                *noise_lines(metrics, tasks),
            ]
        )
    )
    print("\n".join(["", *calibration_lines(results.get("calibration", {})), ""]))
    if experts := experts_lines(results, tasks):
        print("\n".join([*experts, ""]))
    if (clipped := results.get("clipped_steps", 0)) > results.get("step", 0) / 2:
        print(
            f"warning: the gradient was scaled down in {clipped:,} of {results['step']:,} steps, so that steps with "
            "large gradients count less; train.max_grad_norm=auto does it to outliers alone.\n"
        )
    print(f"run folder     {folder}")
    print(f"watch          tensorboard --logdir {folder.parent}")
    export = folder / "export"
    if not any(task.rules.predicts for task in tasks):
        print(f"start there    comoe train RECIPE model.start_from={export}")
        return
    posts = f"--input {_fitting_input(export, tasks)} --output predictions.jsonl"
    print(f"predict        comoe predict --model {export} {posts}")


def _fitting_input(export: Path, tasks: Sequence[Task]) -> str:
    """Name of a file that can hold what the model reads: plain text has no columns for images and second texts."""
    place = export / CONFIG
    config = read_json(place) if place.is_file() else {}
    column = pair_in_training(config, tasks)
    if column is None and any(wants_pair(task.prompt) for task in tasks):
        column = "pair"
    sees = config.get("image_column") is not None
    return (
        f"posts.jsonl --pair-column {column}" if column else "posts.jsonl" if sees else "posts.txt"
    )
