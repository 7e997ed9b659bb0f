"""What adapting scores to another mix of labels gains: the test posts of a run, drawn anew in mixes that are known.

    python -m comoe.experiments.shifted_mix runs/starter --output shifted.json

For each task with one label per post: mixes drawn at random, each with so many test posts; macro F1
and accuracy of the predictions as they are, adapted to the true rates (--assume-rate), and to
estimated ones (--adapt-prior em).
"""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.files import read_json, write_json
from comoe.data.reading.sources import read_input
from comoe.evaluation.prior_shift import adapted, estimated
from comoe.inference.export_config import CONFIG
from comoe.inference.prior import adaptable, moved_thresholds
from comoe.tasks.metrics import METRICS
from comoe.tasks.task import Task, tasks_from

POSTS, MIXES = 500, 200
"""Posts of a corpus, and corpora."""

NEAREST = 0.2
"""Least distance of a mix from that of the validation posts (total variation)."""


def shifted(task: Task, rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Means over the mixes with 95 % intervals of what a mix gives, and the mean error of the estimated rates.

    Args:
        task: with the mix that its scores are for.
        rows: predictions with gold labels of the test posts.
        seed: of the mixes.
    """
    draw, labels = np.random.default_rng(seed), task.labels
    prior_Y, score_prior_Y = np.array(task.prior), np.array(task.score_prior)
    move = functools.partial(adapted, exclusive=True, power=task.score_power)
    scores_NY = np.array([[row["scores"][label] for label in labels] for row in rows])
    gold_N = np.array([labels.index(row["gold"]) for row in rows])
    by_label = [np.flatnonzero(gold_N == label) for label in range(len(labels))]
    found: dict[str, list[float]] = {}
    errors = []
    while len(errors) < MIXES:
        rates_Y = draw.dirichlet(np.ones(len(labels)))
        if np.abs(rates_Y - prior_Y).sum() / 2 < NEAREST or rates_Y.min() < 0.02:
            continue
        chosen = [
            draw.choice(by_label[y], size=n) for y, n in enumerate(draw.multinomial(POSTS, rates_Y))
        ]
        posts = np.concatenate(chosen)
        mine_NY, gold = scores_NY[posts], gold_N[posts]
        guess_Y = estimated(
            lambda mine_NY=mine_NY: [mine_NY], score_prior_Y, exclusive=True, power=task.score_power
        )
        errors.append(np.abs(guess_Y - rates_Y).sum() / 2)
        for name, scores, by in (
            ("as it is", mine_NY, task),
            ("assumed", move(mine_NY, score_prior_Y, rates_Y), moved_thresholds(task)),
            ("em", move(mine_NY, score_prior_Y, guess_Y), moved_thresholds(task)),
        ):
            predicted = task.rules.decided(scores, by)
            for metric in ("accuracy", "macro_f1"):
                value = METRICS[metric](gold, predicted, labels)
                found.setdefault(f"{metric} {name}", []).append(value)
    intervals = {name: _interval(values) for name, values in found.items()}
    for metric in ("accuracy", "macro_f1"):
        for name in ("assumed", "em"):
            gain = np.subtract(found[f"{metric} {name}"], found[f"{metric} as it is"])
            intervals[f"{metric} gain {name}"] = _interval(gain)
    return intervals | {"rate error em": _interval(errors)}


def _interval(values: Sequence[float]) -> list[float]:
    """Mean, and the interval of the mean over mixes."""
    half = 1.96 * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return [mean, mean - half, mean + half]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per task and figure, and write them."""
    parser = ArgumentParser(prog="shifted_mix", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a finished run with test posts")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    options = parser.parse_args(argv)
    config = options.run / "export" / CONFIG
    try:
        tasks = tasks_from(read_json(config)["tasks"], place=config)
        found = {}
        for task in tasks:
            file = options.run / "predictions/test" / f"{task.name}.jsonl"
            if adaptable(task) and task.rules.exclusive and task.score_prior and file.is_file():
                rows = [row for row in read_input("run", str(file)).rows if row.get("gold")]
                found[task.name] = shifted(task, rows)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(str(error))
    if not found:
        sys.exit(
            f"{config}: no task with one label per post, the mix that its scores are for "
            "(score_prior) and test predictions; train with this comoe."
        )
    write_json(options.output, found)
    for name, intervals in found.items():
        for what, (mean, low, high) in intervals.items():
            print(f"{name:<12} {what:<24} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
