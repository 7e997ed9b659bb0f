"""The end of a run: best weights back, splits and noisy posts scored, predictions, results, export, a table."""

from __future__ import annotations

import sys
from dataclasses import replace

import psutil
import torch

from comoe.data.posts import PART_NAMES
from comoe.distributed import barrier, broadcast_object, is_main, max_over_ranks
from comoe.evaluation.calibration import Calibrator, reliability_bins
from comoe.evaluation.experts_off import experts_lines
from comoe.inference.checkpoint_folder import step_of
from comoe.inference.export import export_checkpoint, make_room
from comoe.train.checkpoint.folder import best_checkpoint, find_checkpoint
from comoe.train.checkpoint.save_load import load_checkpoint
from comoe.train.cross_tables import write_cross_tables
from comoe.train.evaluator import evaluate_noisy, evaluate_split, measure_experts
from comoe.train.monitor.log_window import log_lost_images
from comoe.train.monitor.metrics_file import write_results
from comoe.train.monitor.monitor import Monitor
from comoe.train.results import (
    gaps_by_split,
    print_results,
    results_of,
    write_predictions,
    written_out,
)
from comoe.train.training_run import TrainingRun


def finish(run: TrainingRun, *, trained: bool) -> None:
    """Write out a run that is finished, or print what was written, or how to go on; every rank must call it.

    Args:
        run: after training, or as its last checkpoint left it.
        trained: this start trained it.
    """
    folder, state = run.folder, run.state
    if state.finished and (trained or not written_out(folder, state.step)):
        finalize(run)
    elif state.finished and is_main():
        print_results(folder, run.tasks)
    elif is_main():
        print(f"stopped; go on with: --resume {folder}")


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
        results = results_of(run, evaluations | under_noise, step=step) | {
            "peak_memory_bytes_per_rank": peak,
            "predicted_posts_per_second": predicted / seconds if seconds else None,
            "calibration": calibrator.report(),
            **gaps_by_split(run, evaluations, calibrator.tasks),
            **experts,
        }
        # The export comes last and tells that all is written; not one that an earlier end of the
        # run left.
        make_room(run.folder / "export")
        write_results(run.folder, results)
        posts = {split: run.splits[split].posts for split in evaluations}
        write_predictions(run.folder / "predictions", evaluations, posts)
        write_cross_tables(run.folder, evaluations, run.tasks, monitor=run.monitor, step=step)
        export_checkpoint(chosen, run.folder / "export")
        print_results(run.folder, run.tasks)
    barrier()


def _log_calibration(monitor: Monitor, step: int, calibrator: Calibrator) -> None:
    """Diagrams of every split and task in ``plots/`` and TensorBoard, and the errors as scalars."""
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
