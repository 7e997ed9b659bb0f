"""What a report says of a corpus, as plain numbers: shares, their course, slices, cross-tables, drift, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from comoe.evaluation.cross_tables import Choice, cross_tables, without_table
from comoe.evaluation.prevalence import (
    Shares,
    corrected_shares,
    counted_shares,
    counts_2x2,
    effective,
    population_stability,
    sampled_shares,
    weighted_mean,
)
from comoe.reporting.drift import Embedder, drift_of
from comoe.reporting.parts import Group, ReportOptions, groups_of
from comoe.reporting.predictions import (
    NUMBER,
    ONE,
    SEVERAL,
    SPANS,
    Corpus,
    TaskPredictions,
)

UNEXPLAINED = 0.03
"""Part of the predictions that no mix explains, from which a warning is given."""

OPEN = 0.9
"""Width of a corrected interval from which it is said to leave any share."""

MAX_LABELS = 12
"""Labels of a task that are shown over time."""

LEAST_LABELED = 100
"""Labeled posts of a part of the corpus from which its shares are taken from them (``sampled_shares``)."""

OTHER_KIND = 0.85
"""Area under the curve from which posts are called of another kind than the labeled ones."""

SURE = 0.05
"""Largest p-value with which posts are said to differ from the labeled ones."""

FEW = 10
"""Posts below which their number, and not the model, is why an interval leaves any share."""

BINS = 10
"""Of the reliability diagram."""

DRAWS, SLICE_DRAWS = 1000, 300
"""Draws for the intervals of a whole corpus and of its parts."""


def make_report(
    corpus: Corpus,
    labeled: Mapping[str, TaskPredictions],
    options: ReportOptions,
    embed: Embedder | None = None,
) -> dict[str, Any]:
    """All numbers of a report, ready for JSON.

    Args:
        corpus: the predictions.
        labeled: task -> predictions with gold labels by the same model, whose confusion corrects
            the shares; tasks without any are counted only.
        options: columns, limits.
        embed: gives embeddings, by which the corpus is compared with the labeled posts; None: words alone.

    Raises:
        ValueError: no such column or period, weights that are no positive numbers, or labeled posts
            of other tasks alone.
    """
    if labeled and not set(labeled) & set(corpus.tasks):
        raise ValueError(
            f"--labeled: no task in common: the labeled posts have {', '.join(labeled)}, {corpus.source} has "
            f"{', '.join(corpus.tasks)}. Name predictions/validation of the run that made the export."
        )
    weights_N = _weights(corpus, options)
    groups, notes = groups_of(corpus, options)
    known = {
        name: task.with_labels(labeled[name].labels)
        if name in labeled and task.what == labeled[name].what == ONE
        else task
        for name, task in corpus.tasks.items()
    }
    tasks = [
        _Section(corpus, task, labeled.get(name), weights_N, options, embed).made(groups)
        for name, task in known.items()
    ]
    choices = _choices(corpus, weights_N)
    tables = list(cross_tables(choices, weights_N))
    return {
        "source": corpus.source,
        "posts": len(corpus),
        "errors": corpus.errors,
        "truncated": corpus.truncated,
        "set_aside": list(corpus.bad[:10]),
        "weighted_by": options.weight,
        "effective_posts": effective(weights_N),
        "notes": notes,
        "warnings": _lost(labeled) + (_uncorrected(tasks) if labeled else []),
        "tasks": tasks,
        "cross": [one.to_dict() for table in tables for one in (table, table.turned)],
        "cross_left_out": list(without_table(choices)),
    }


def _lost(labeled: Mapping[str, TaskPredictions]) -> list[str]:
    """What to say of labeled posts that could not be read."""
    return [
        f"{name}: {len(task.bad):,} rows of the labeled posts could not be read and do not count "
        f"({len(task.values):,} do); the first: {task.bad[0]}"
        for name, task in labeled.items()
        if task.bad
    ]


def _uncorrected(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of tasks whose shares are counted alone, though others have labeled posts."""
    why = {NUMBER: "a number", SPANS: "spans"}
    found = [
        f"{task['name']} ({why.get(task['what'], 'not all labels are known there')})"
        if "labeled" in task
        else f"{task['name']} (no labeled posts)"
        for task in tasks
        if "corrected" not in task
    ]
    return [f"Not corrected: {', '.join(found)}."] if found else []


def _weights(corpus: Corpus, options: ReportOptions) -> np.ndarray:
    if options.weight is None:
        return np.ones(len(corpus))
    cells = corpus.column(options.weight, flag="--weight")
    weights = []
    for number, cell in enumerate(cells, start=1):
        try:
            weights.append(float(cell))
        except (TypeError, ValueError):
            weights.append(np.nan)
        if not (np.isfinite(weights[-1]) and weights[-1] >= 0):
            raise ValueError(
                f"{corpus.source}: post {number} has {cell!r} as {options.weight} (--weight); a "
                "weight must be a number from 0 up."
            )
    if not sum(weights):
        raise ValueError(f"{corpus.source}: all weights ({options.weight}) are 0.")
    return np.array(weights)


@dataclass(frozen=True, slots=True)
class _Section:
    """One task of a report."""

    corpus: Corpus
    task: TaskPredictions
    labeled: TaskPredictions | None
    weights_N: np.ndarray
    options: ReportOptions
    embed: Embedder | None

    def made(self, groups: Sequence[Group]) -> dict[str, Any]:
        task, every_N = self.task, np.arange(len(self.corpus))
        if self.labeled is not None and self.labeled.what != task.what:
            raise ValueError(
                f"--labeled: task {task.name} predicts {self.labeled.what} there, but {task.what} "
                f"in {self.corpus.source}."
            )
        made: dict[str, Any] = {"name": task.name, "what": task.what, "labels": list(task.labels)}
        made |= {"posts": int(task.predicted.sum()), **self.shares(every_N, draws=DRAWS)}
        made["parts"] = [self.part(group) for group in groups]
        if self.labeled is not None:
            made["labeled"] = len(self.labeled.values)
            made |= self.against_labeled()
        if task.what == ONE and self.options.examples:
            made["examples"] = self.examples()
        return made

    def part(self, group: Group) -> dict[str, Any]:
        """The shares of each period or value that has enough posts with a prediction."""
        counts = {name: int(self.task.predicted[rows].sum()) for name, rows in group.rows.items()}
        kept = [name for name, count in counts.items() if count >= self.options.least]
        lost = sum(count for name, count in counts.items() if name not in kept)
        found = {
            name: {"posts": counts[name], **self.shares(group.rows[name], draws=SLICE_DRAWS)}
            for name in kept
        }
        return {
            "column": group.column,
            "periods": list(group.periods),
            "values": found,
            "left_out": group.left_out + lost,
        }

    def shares(self, rows: np.ndarray, *, draws: int) -> dict[str, Any]:
        """Shares of labels, or the mean of numbers, of some posts."""
        rows = rows[self.task.predicted[rows]]
        values, weights = self.task.values[rows], self.weights_N[rows]
        if not len(rows) or not weights.sum():
            return {}
        if self.task.what == NUMBER:
            return {"mean": weighted_mean(values[:, 0], weights)}
        # Of spans: posts with at least one of a type.
        there = (values > 0).astype(float)
        size = effective(weights)
        counts_K = (weights @ there) * size / weights.sum()
        if self.task.what == ONE:
            counted = counted_shares(counts_K)
            corrected = self.corrected(counts_K, draws=draws)
        else:
            both = [counted_shares(np.array([size - count, count])) for count in counts_K]
            counted = _second(both)
            corrected = self.corrected_each(counts_K, size, draws=draws)
        if self.labeled is not None and self.labeled.rows is not None:
            corrected = self.sampled(rows, weights @ there / weights.sum(), size) or corrected
        found = {"counts": (weights @ there).tolist(), "counted": _plain(counted)}
        return found | ({} if corrected is None else {"corrected": _plain(corrected)})

    def sampled(self, rows: np.ndarray, mean_K: np.ndarray, size: float) -> Shares | None:
        """By the labeled posts among these alone, where there are enough."""
        labeled, ours = self.labeled, np.isin(self.labeled.rows, rows)
        if self.task.what not in (ONE, SEVERAL) or ours.sum() < LEAST_LABELED:
            return None
        return sampled_shares(
            mean_K, size, labeled.values[ours], labeled.gold[ours],
            self.weights_N[labeled.rows[ours]], exclusive=self.task.what == ONE,
        )  # fmt: skip

    def corrected(self, counts_K: np.ndarray, *, draws: int) -> Shares | None:
        if self.labeled is None:
            return None
        return corrected_shares(counts_K, self.confusion(), draws=draws, seed=self.options.seed)

    def corrected_each(self, counts_K: np.ndarray, size: float, *, draws: int) -> Shares | None:
        """Each label against its absence; the confusion of spans is not one of posts."""
        if self.labeled is None or self.task.what == SPANS:
            return None
        found = []
        for label, count in zip(self.task.labels, counts_K, strict=True):
            if label not in self.labeled.labels:
                return None
            place = self.labeled.labels.index(label)
            confusion = counts_2x2(self.labeled.gold[:, place], self.labeled.values[:, place])
            pair = np.array([size - count, count])
            found.append(corrected_shares(pair, confusion, draws=draws, seed=self.options.seed))
        return _second(found)

    def confusion(self) -> np.ndarray:
        """(gold, predicted) of the labeled posts, in the order of this task's labels."""
        labeled = self.labeled
        if unknown := set(self.task.labels) - set(labeled.labels):
            raise ValueError(
                f"--labeled: task {self.task.name} has no label {', '.join(sorted(unknown))} "
                "there; are these predictions by another model?"
            )
        order = [labeled.labels.index(label) for label in self.task.labels]
        both = ~np.isnan(labeled.gold).any(1) & labeled.predicted
        return labeled.gold[both][:, order].T @ labeled.values[both][:, order]

    def against_labeled(self) -> dict[str, Any]:
        """How far the corpus lies from the labeled posts, and how right the scores are there."""
        task, drift = self.task, self.drift()
        if task.what != ONE:
            return {"drift": drift}
        confusion, labeled = self.confusion(), self.labeled
        both = labeled.predicted & ~np.isnan(labeled.gold).any(1)
        here_K = task.values[task.predicted].sum(0)
        certain, certain_there = (
            np.histogram(some.scores[some.predicted].max(1), bins=BINS, range=(0, 1))[0]
            for some in (task, labeled)
        )
        top_N = labeled.scores[both].max(1)
        right_N = (labeled.gold * labeled.values)[both].sum(1)
        place_N = np.minimum((top_N * BINS).astype(int), BINS - 1)
        bins = [
            (float(top_N[in_bin].mean()), float(right_N[in_bin].mean()), int(in_bin.sum()))
            for number in range(BINS)
            if (in_bin := place_N == number).any()
        ]
        return {
            "confusion": confusion.astype(int).tolist(),
            "accuracy": float(right_N.mean()),
            "reliability": bins,
            "drift": {
                "labels": population_stability(confusion.sum(0), here_K),
                "scores": population_stability(certain_there, certain),
                **drift,
            },
            "never_labeled": [
                label for label, row in zip(task.labels, confusion, strict=True) if not row.sum()
            ],
        }

    def drift(self) -> dict[str, Any]:
        """What tells the posts with a prediction from the labeled ones."""
        texts, options = self.corpus.texts, self.options
        texts = [texts[row] for row in np.flatnonzero(self.task.predicted)]
        more = {"embed": self.embed, "quoted": bool(options.examples), "seed": options.seed}
        return drift_of(self.labeled.texts, texts, task=self.task.name, **more)

    def examples(self) -> dict[str, Any]:
        """Label -> texts of highest score, and those nearest to another label, each text once."""
        found = {}
        for number, label in enumerate(self.task.labels):
            rows = np.flatnonzero(self.task.values[:, number] == 1)
            ranked = np.sort(self.task.scores[rows], axis=1)
            margin = ranked[:, -1] - ranked[:, -2] if ranked.shape[1] > 1 else ranked[:, -1]
            typical, borderline = (
                self.texts(rows[np.argsort(key, kind="stable")], number)
                for key in (-margin, margin)
            )
            found[label] = {"typical": typical, "borderline": borderline}
        return found

    def texts(self, rows: np.ndarray, label: int) -> list[tuple[str, float]]:
        seen = {}
        for row in rows:
            seen.setdefault(self.corpus.texts[row], float(self.task.scores[row, label]))
            if len(seen) == self.options.examples:
                break
        return list(seen.items())


def _plain(shares: Shares) -> dict[str, Any]:
    found = {name: np.asarray(value).tolist() for name, value in asdict(shares).items()}
    return {"share": found["share_K"], "low": found["low_K"], "high": found["high_K"],
            "unexplained": found["unexplained"]}  # fmt: skip


def _second(shares: Sequence[Shares]) -> Shares:
    """Of shares of (absence, presence) per label, those of presence."""
    three = (
        np.array([getattr(one, name)[1] for one in shares])
        for name in ("share_K", "low_K", "high_K")
    )
    return Shares(*three, unexplained=max((one.unexplained for one in shares), default=0.0))


def _choices(corpus: Corpus, weights_N: np.ndarray) -> dict[str, Choice]:
    """Each task with one label per post; a post without weight has none."""
    return {
        task.name: (
            task.labels,
            np.where(task.predicted & (weights_N > 0), np.nan_to_num(task.values).argmax(1), -1),
        )
        for task in corpus.tasks.values()
        if task.what == ONE
    }
