"""The end of a run: best weights back, splits and noisy posts scored, predictions, results, export, a table."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from comoe.config.files import atomic_file, plain, read_json
from comoe.data.posts import PART_NAMES, PostSplit
from comoe.data.reading.files import json_line
from comoe.data.reading.inputs import pair_in_training
from comoe.data.text.noise import SEPARATOR, noisy
from comoe.data.tokens.split import tokenize_split
from comoe.distributed import barrier, broadcast_object, is_main, max_over_ranks, world_size
from comoe.evaluation.calibration import Calibrator, reliability_bins
from comoe.evaluation.evaluate import TEACHER_KL, Evaluation
from comoe.evaluation.experts_off import experts_lines
from comoe.evaluation.tables import (
    calibration_lines,
    format_results_table,
    noise_lines,
    slice_lines,
)
from comoe.inference.checkpoint_folder import step_of
from comoe.inference.export import CONFIG, export_checkpoint
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task
from comoe.train.checkpoint.folder import best_checkpoint, find_checkpoint
from comoe.train.checkpoint.save_load import load_checkpoint
from comoe.train.evaluator import evaluate_split, measure_experts
from comoe.train.monitor.log_window import log_lost_images
from comoe.train.monitor.metrics_file import write_results
from comoe.train.monitor.monitor import Monitor
from comoe.train.training_run import TrainingRun


def evaluate_noisy(
    run: TrainingRun, split: str, *, tasks: Sequence[Task], step: int
) -> dict[str, Evaluation]:
    """Evaluations of a split under each of ``data.noise``, logged, by name (``validation+typos``).

    The noise is the same on every rank, and for any number of them. None where the split has no
    labels. Every rank must call it.

    Args:
        run: with the weights to evaluate.
        split: validation or test.
        tasks: as the clean split was evaluated, with temperatures and thresholds where these were
            fitted.
        step: of the weights.
    """
    found: dict[str, Evaluation] = {}
    if split not in run.splits or not run.splits[split].labelled.any():
        return found
    data = run.recipe.data
    # More tokens than the encoder numbers may come of a slip; the run's own posts have been
    # checked.
    config = replace(data, max_length=min(data.max_length, run.model.longest_text))
    for noise in data.noise:
        name = f"{split}{SEPARATOR}{noise}"
        posts = noisy(
            run.splits[split].posts, noise, rate=data.noise_rate, seed=run.recipe.train.seed
        )
        tokens = tokenize_split(posts, run.collator.tokenizer, tasks=run.tasks, config=config)
        evaluation = evaluate_split(run, name, split=tokens, tasks=tasks)
        assert evaluation is not None
        # Plots of each noise would hide those of the run.
        found[name] = replace(evaluation, confusions={}, routing=None, embeddings=None)
        run.monitor.log_evaluation(step, split=name, evaluation=found[name])
    return found


def finalize(run: TrainingRun) -> None:
    """Score the best checkpoint, write ``results.json``, ``predictions/`` and ``export/``, print the table."""
    # Rank 0 decides: loading is a collective.
    best = broadcast_object(best_checkpoint(run.checkpoints) if is_main() else None)
    newest = find_checkpoint(run.checkpoints)
    assert newest is not None
    chosen = best or newest.path
    if chosen != newest.path:
        # The same loader as a resume: the one path that is proven to restore every layout.
        load_checkpoint(chosen, run.engine, run.layout)
    step = step_of(chosen)
    options = run.recipe.train
    calibrator = Calibrator(
        run.tasks, temperatures=options.calibrate, thresholds=options.fit_thresholds
    )
    evaluations = {}
    for split in PART_NAMES[1:]:
        found = evaluate_split(run, split, predictions=True)
        if found is None:
            continue
        posts = run.splits[split].posts
        found = calibrator.take(split, found, texts=posts.texts, columns=posts.columns)
        evaluations[split] = found
        if split != "validation":
            # The validation split of this step was logged when it was reached.
            run.monitor.log_evaluation(step, split=split, evaluation=found)
        run.monitor.log_projector(step, split=split, embeddings=found.embeddings)
    _log_calibration(run.monitor, step, calibrator)
    experts = {}
    if options.measure_experts and run.model.moe_layers() and "validation" in evaluations:
        experts = measure_experts(run, evaluations["validation"])
        run.monitor.log_experts(step, experts, lines=experts_lines(experts, run.tasks))
    # The thresholds were chosen on the validation posts, where results would be too good.
    plain = [replace(task, thresholds=None) for task in calibrator.tasks]
    seconds = sum(found.forward_seconds or 0.0 for found in evaluations.values())
    predicted = sum(len(run.splits[split]) for split in evaluations)
    under_noise = evaluate_noisy(run, "validation", tasks=plain, step=step)
    under_noise |= evaluate_noisy(run, "test", tasks=calibrator.tasks, step=step)
    log_lost_images(run.collator.pixels, run.monitor, run.state.step)
    peak = max_over_ranks(peak_memory_bytes())
    if is_main():
        results = _results(run, evaluations | under_noise, step=step) | {
            "peak_memory_bytes_per_rank": peak,
            "predicted_posts_per_second": predicted / seconds if seconds else None,
            "calibration": calibrator.report(),
            **experts,
        }
        # The export comes last and tells that all is written; not one that an earlier end of the
        # run left.
        shutil.rmtree(run.folder / "export", ignore_errors=True)
        write_results(run.folder, results)
        posts = {split: run.splits[split].posts for split in evaluations}
        write_predictions(run.folder / "predictions", evaluations, posts)
        export_checkpoint(chosen, run.folder / "export")
        print_results(run.folder, run.tasks)
    barrier()


def _log_calibration(monitor: Monitor, step: int, calibrator: Calibrator) -> None:
    """Diagrams of every split and task into ``plots/`` and TensorBoard, and the errors as scalars."""
    report = calibrator.report()
    for (split, task), both in calibrator.pairs.items() if monitor.enabled else ():
        errors = {
            name: value for name, value in report[task]["ece"][split].items() if value is not None
        }
        curves = {
            f"{name}, error {errors[name]:.3f}": reliability_bins(pairs)
            for name, pairs in zip(("before", "after"), both, strict=True)
            if pairs is not None
        }
        monitor.log_reliability(step, split=split, task=task, curves=curves, errors=errors)


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


def peak_memory_bytes() -> float:
    """Peak memory of this rank so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _results(
    run: TrainingRun, evaluations: Mapping[str, Evaluation], *, step: int
) -> dict[str, Any]:
    state, report = run.state, run.report
    return {
        "run": run.recipe.run.name,
        "finished": state.finished,
        "step": state.step,
        "best_step": step,
        "best_value": state.best_value,
        "early_stop_metric": run.recipe.train.early_stop_metric,
        "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
        **_teacher_kl(evaluations),
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


def _teacher_kl(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """``teacher_kl``: split -> task -> divergence from the teachers, and their mean; nothing without teachers."""
    found = {split: kl for split, one in evaluations.items() if (kl := one.teacher_kl())}
    return {TEACHER_KL: found} if found else {}


def write_predictions(
    folder: Path, evaluations: Mapping[str, Evaluation], posts: Mapping[str, PostSplit]
) -> None:
    """A file per split and task. Posts without any label are in all of them; ``data_set`` tells them apart."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, evaluation in evaluations.items():
        (folder / split).mkdir(parents=True)
        for task, rows in evaluation.predictions.items():
            with atomic_file(folder / split / f"{task}.jsonl", "w") as file:
                for row in rows:
                    place = posts[split].groups[row["row"]]
                    line = {"row": row["row"], "data_set": posts[split].group_names[place]} | row
                    file.write(json_line(plain(line)))
