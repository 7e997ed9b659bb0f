"""How often the intervals of ``comoe report`` hold the truth when the mix of labels is another.

    python -m comoe.reporting.coverage runs/starter

Corpora of 1,000 posts with known labels are drawn from the run's test predictions, each with a mix
drawn evenly from the simplex; the confusion is that of its validation predictions.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from comoe.evaluation.prevalence import corrected_shares, counted_shares
from comoe.evaluation.tables import markdown_table
from comoe.reporting.predictions import ONE, TaskPredictions, read_labeled

POSTS, CORPORA, DRAWS = 1000, 200, 200


def coverage(
    validation: TaskPredictions, test: TaskPredictions, *, corpora: int, seed: int = 0
) -> tuple[float, float, float, float]:
    """Share of intervals with the truth, corrected and counted; mean absolute errors of both."""
    order = [validation.labels.index(label) for label in test.labels]
    confusion = validation.gold[:, order].T @ validation.values[:, order]
    of_label = [np.flatnonzero(gold_N == 1) for gold_N in test.gold.T]
    generator = np.random.default_rng(seed)
    held, errors = [], []
    for number in range(corpora):
        each_K = generator.multinomial(POSTS, generator.dirichlet(np.ones(len(of_label))))
        drawn = [generator.choice(rows, n) for rows, n in zip(of_label, each_K, strict=True)]
        counts_K, truth_K = test.values[np.concatenate(drawn)].sum(0), each_K / POSTS
        both = (
            corrected_shares(counts_K, confusion, draws=DRAWS, seed=number),
            counted_shares(counts_K),
        )
        held.append([((one.low_K <= truth_K) & (truth_K <= one.high_K)).mean() for one in both])
        errors.append([np.abs(one.share_K - truth_K).mean() for one in both])
    return (*np.mean(held, axis=0), *np.mean(errors, axis=0))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, a row per task with one label per post."""
    parser = ArgumentParser(
        prog="coverage", description="Coverage of the intervals of comoe report."
    )
    parser.add_argument("run", type=Path, help="a finished run with validation and test posts")
    run = parser.parse_args(argv).run
    try:
        validation, test = (
            read_labeled(run / "predictions" / split) for split in ("validation", "test")
        )
    except ValueError as error:
        sys.exit(str(error))
    head = (
        "task",
        "holds, corrected",
        "holds, counted",
        "mean error, corrected",
        "mean error, counted",
    )
    rows = [
        (name, *(f"{value:.3f}" for value in coverage(validation[name], task, corpora=CORPORA)))
        for name, task in test.items()
        if name in validation and task.what == ONE
    ]
    print("\n".join(markdown_table(head, rows)))


if __name__ == "__main__":
    main()
