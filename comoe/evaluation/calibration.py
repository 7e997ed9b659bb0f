"""Calibrated probabilities, fitted on the validation posts when a run ends.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599): one number per task, which its logits are
divided by. It changes no order of labels, so no prediction. Thresholds are a separate thing, see
``comoe.evaluation.thresholds``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comoe.evaluation.evaluate import Evaluation, compute_metrics
from comoe.evaluation.prior_shift import fit_prior
from comoe.evaluation.thresholds import FOLDS, Chosen, choose_for_labels, choose_for_two_classes
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.types import IGNORED

BINS = 15
"""Bins of equal width of the expected calibration error."""


FEWEST_POSTS = 20
"""Labeled posts below which nothing is fitted."""


COLDEST, HOTTEST = 0.1, 10.0
"""Range of temperatures; where every prediction is right the likelihood alone would go to 0."""


VALIDATION = "validation"
"""The split that is fitted on."""


Pairs = list[tuple[np.ndarray, np.ndarray]]
"""(probability, whether it came true), one pair of arrays per thing that has a calibration error of
its own."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The labeled posts of a split for one task."""

    logits_NY: np.ndarray
    """float64; a row is a post, or a word for kinds that label words."""
    gold: np.ndarray
    """Label ids (N,), or 0/1 (N, Y)."""
    posts_N: np.ndarray
    """Number of the post of each row."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of task makes probabilities of logits."""

    nll: Callable[[np.ndarray, np.ndarray], float]
    """(tempered logits, gold) -> mean negative log likelihood, nats."""
    probabilities: Callable[[np.ndarray], np.ndarray]
    """Tempered logits -> probabilities."""
    pairs: Callable[[np.ndarray, np.ndarray], Pairs]
    """(probabilities, gold) -> what is compared with what came true."""
    thresholds: Callable[[np.ndarray, np.ndarray, np.ndarray, Task], Chosen | None]
    """(probabilities, gold, part of each row, task) -> what was chosen; None where the task has no
    use for any."""


class Calibrator:
    """Fits on the validation posts, then reads every split as the export will.

    ``tasks`` are those given, with ``temperature``, ``thresholds`` and ``prior`` from the moment
    that validation was taken on. Deterministic in the outputs, so it is the same on every rank that
    has them.

    Args:
        tasks: as trained.
        temperatures: fit them.
        thresholds: fit them.
    """

    def __init__(self, tasks: Sequence[Task], *, temperatures: bool, thresholds: bool) -> None:
        self.tasks = tuple(tasks)
        self._wanted = (temperatures, thresholds)
        self._report: dict[str, dict[str, Any]] = {}
        self.pairs: dict[tuple[str, str], tuple[Pairs, Pairs | None]] = {}
        """(split, task) -> pairs before, and after where a temperature was fitted."""

    def take(
        self,
        split: str,
        evaluation: Evaluation,
        *,
        texts: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[str | None]] | None = None,
    ) -> Evaluation:
        """The evaluation as the calibrated tasks read it.

        The validation split has no thresholds in it: they were chosen on these very posts and would
        flatter.

        Args:
            split: name of the split; ``validation`` is fitted on.
            evaluation: of that split, by the tasks as trained.
            texts: text per row of the split.
            columns: column -> its cell per row of the split, as for ``compute_metrics``.
        """
        found = {
            task.name: evidence(evaluation.outputs.get(task.name, ()), task) for task in self.tasks
        }
        if split == VALIDATION:
            self.tasks = tuple(self._fitted(task, found[task.name]) for task in self.tasks)
        for task in self.tasks:
            if found[task.name] is not None:
                self._look(split, task, found[task.name])
        tasks, shown = self.tasks, bool(evaluation.predictions)
        if split == VALIDATION:
            tasks = tuple(replace(task, thresholds=None) for task in tasks)
        found = compute_metrics(
            evaluation.outputs,
            tasks,
            texts=texts,
            columns=columns,
            predictions=shown,
            divergences=evaluation.divergences,
        )
        return replace(
            found,
            routing=evaluation.routing,
            embeddings=evaluation.embeddings,
            forward_seconds=evaluation.forward_seconds,
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """Task -> ``temperature``, ``thresholds``, ``prior``, ``score_prior`` and ``decision``
        (metric, at_half, held_out), each None where nothing was fitted; ``score_power``; and
        ``ece`` and ``nll``: split -> before, after. Plain numbers.
        """
        return {
            task.name: self._report[task.name] for task in self.tasks if task.name in self._report
        }

    def _fitted(self, task: Task, found: Evidence | None) -> Task:
        if found is None or len(np.unique(found.posts_N)) < FEWEST_POSTS:
            return task
        rule, (temperatures, thresholds) = RULES[task.kind], self._wanted
        if task.mode != "tokens":
            task = replace(task, prior=label_mix(found.gold, len(task.labels)))
        # A few posts can point anywhere: each half tests the temperature of the other.
        if temperatures and rule.nll(crossed(found, rule), found.gold) < rule.nll(
            found.logits_NY, found.gold
        ):
            task = replace(task, temperature=fit_temperature(found.logits_NY, found.gold, rule.nll))
        if thresholds:
            probabilities = rule.probabilities(found.logits_NY / (task.temperature or 1.0))
            chosen = rule.thresholds(
                probabilities, found.gold, parts_of(found.posts_N, FOLDS), task
            )
            if chosen is not None:
                entry = {
                    "metric": task.metric,
                    "at_half": chosen.at_half,
                    "held_out": chosen.held_out,
                }
                self._entry(task)["decision"] = entry
                task = replace(task, thresholds=chosen.thresholds)
        if task.mode != "tokens":
            tempered_NY = found.logits_NY / (task.temperature or 1.0)
            prior_Y, power = fit_prior(tempered_NY, found.gold, rule.probabilities)
            task = replace(task, score_prior=tuple(prior_Y.tolist()), score_power=power)
        return task

    def _look(self, split: str, task: Task, found: Evidence) -> None:
        rule, entry = RULES[task.kind], self._entry(task)
        entry |= {
            "temperature": task.temperature,
            "thresholds": task.thresholds and list(task.thresholds),
            "prior": task.prior and list(task.prior),
            "score_prior": task.score_prior and list(task.score_prior),
            "score_power": task.score_power,
        }
        after_NY = None
        if task.temperature is not None:
            # Each half of the fitted posts by the temperature of the other half: the rest would
            # flatter.
            halves = split == VALIDATION
            after_NY = crossed(found, rule) if halves else found.logits_NY / task.temperature
        logits = (found.logits_NY, after_NY)
        both = [
            None if z_NY is None else rule.pairs(rule.probabilities(z_NY), found.gold)
            for z_NY in logits
        ]
        self.pairs[split, task.name] = (both[0], both[1])
        numbers = {
            "ece": [None if pairs is None else expected_calibration_error(pairs) for pairs in both],
            "nll": [None if z_NY is None else rule.nll(z_NY, found.gold) for z_NY in logits],
        }
        for name, (before, after) in numbers.items():
            entry[name][split] = {"before": before, "after": after}

    def _entry(self, task: Task) -> dict[str, Any]:
        blank = dict.fromkeys(("temperature", "thresholds", "prior", "score_prior", "decision"))
        blank |= {"score_power": 1.0, "ece": {}, "nll": {}}
        return self._report.setdefault(task.name, blank)


def fit_temperature(
    logits_NY: np.ndarray, gold: np.ndarray, nll: Callable[[np.ndarray, np.ndarray], float]
) -> float:
    """The temperature with the smallest mean NLL, in [0.1, 10]; never a worse one than 1.

    The likelihood is concave in 1 / temperature, so there is one optimum.

    Args:
        logits_NY: float64.
        gold: as ``nll`` wants it.
        nll: (tempered logits, gold) -> mean negative log likelihood.
    """
    from scipy.optimize import minimize_scalar  # takes 0.3 s, which no prediction waits for

    found = minimize_scalar(
        lambda log: nll(logits_NY / math.exp(log), gold),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(math.exp(found.x)) if found.fun <= nll(logits_NY, gold) else 1.0


def crossed(found: Evidence, rule: Rule) -> np.ndarray:
    """Logits of each half of the posts over the temperature that the other half gives."""
    halves_N = parts_of(found.posts_N, 2)
    tempered_NY = np.empty_like(found.logits_NY)
    for half in (0, 1):
        here = halves_N == half
        tempered_NY[here] = found.logits_NY[here] / fit_temperature(
            found.logits_NY[~here], found.gold[~here], rule.nll
        )
    return tempered_NY


def expected_calibration_error(pairs: Pairs, *, bins: int = BINS) -> float:
    """Mean distance between how sure the model was and how often that came true, 0 to 1.

    Bins of equal width over [0, 1], upper ends included, weighted by their rows; the mean over
    pairs. Of classes the likeliest label counts, of independent labels each label's own
    probability.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    errors = []
    for sure_N, true_N in pairs:
        counts, sums, hits = reliability_bins([(sure_N, true_N)], bins=bins)
        errors.append(float(np.abs(sums - hits).sum() / max(counts.sum(), 1)))
    return float(np.mean(errors))


def reliability_bins(
    pairs: Pairs, *, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, sum of probabilities, and rows that came true, per bin; all pairs together."""
    sure = np.concatenate([sure for sure, _ in pairs])
    true = np.concatenate([true for _, true in pairs])
    places = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    weights = (None, sure, true.astype(np.float64))
    return tuple(np.bincount(places, weights=weight, minlength=bins) for weight in weights)


def evidence(outputs: Sequence[PostOutput], task: Task) -> Evidence | None:
    """The labeled rows of a split; None without probabilities or labels, or with broken logits."""
    if task.kind not in RULES or not outputs:
        return None
    logits, targets = task.rules.stack(outputs, task)
    present = targets != IGNORED if task.mode == "tokens" else task.rules.labelled(targets)
    posts = np.array([output.row for output in outputs])
    rows = np.nonzero(present.numpy())[0]
    logits_NY = logits[present].double().numpy()
    if not len(rows) or not np.isfinite(logits_NY).all():
        return None
    return Evidence(logits_NY, targets[present].long().numpy(), posts[rows])


def ece_of(outputs: Mapping[str, Sequence[PostOutput]], tasks: Sequence[Task]) -> dict[str, float]:
    """Task -> expected calibration error of the outputs as these tasks read them, where there is one."""
    errors = {}
    for task in tasks:
        found = evidence(outputs.get(task.name, ()), task)
        if found is not None:
            rule = RULES[task.kind]
            probabilities = rule.probabilities(found.logits_NY / (task.temperature or 1.0))
            errors[task.name] = expected_calibration_error(rule.pairs(probabilities, found.gold))
    return errors


def with_calibration(
    tasks: Iterable[Task], report: Mapping[str, Mapping[str, Any]] | None
) -> tuple[Task, ...]:
    """Tasks with the temperatures and thresholds of a ``Calibrator.report``."""
    fitted = []
    for task in tasks:
        entry = (report or {}).get(task.name, {})
        edges = entry.get("thresholds")
        edges = None if edges is None else tuple(edges)
        prior, score_prior = entry.get("prior"), entry.get("score_prior")
        fitted.append(
            replace(
                task,
                temperature=entry.get("temperature"),
                thresholds=edges,
                prior=None if prior is None else tuple(prior),
                score_prior=None if score_prior is None else tuple(score_prior),
                score_power=entry.get("score_power", 1.0),
            )
        )
    return tuple(fitted)


def label_mix(gold: np.ndarray, num_labels: int) -> tuple[float, ...]:
    """Share of the posts that have each label, with half a post more in each label, and, where
    labels are independent, half a post more without it: no share is 0 or 1.

    Args:
        gold: label ids (N,), or 0/1 (N, Y).
        num_labels: Y.
    """
    if gold.ndim == 1:
        counts_Y = np.bincount(gold, minlength=num_labels) + 0.5
        return tuple((counts_Y / counts_Y.sum()).tolist())
    return tuple(((gold.sum(axis=0) + 0.5) / (len(gold) + 1)).tolist())


def parts_of(posts_N: np.ndarray, count: int) -> np.ndarray:
    """Part of each row, from 0: posts dealt out in an order that does not follow the file's."""
    posts, of_row_N = np.unique(posts_N, return_inverse=True)
    return (np.random.default_rng(0).permutation(len(posts)) % count)[of_row_N]


def _class_nll(logits_NY: np.ndarray, gold_N: np.ndarray) -> float:
    return float(
        (
            np.logaddexp.reduce(logits_NY, axis=1)
            - np.take_along_axis(logits_NY, gold_N[:, None], axis=1)[:, 0]
        ).mean()
    )


def _two_classes(
    scores_NY: np.ndarray, gold_N: np.ndarray, folds_N: np.ndarray, task: Task
) -> Chosen | None:
    if scores_NY.shape[1] != 2:
        return None
    return choose_for_two_classes(scores_NY[:, 1], gold_N, folds_N=folds_N, task=task)


_CLASSES = Rule(
    nll=_class_nll,
    probabilities=lambda logits_NY: np.exp(
        logits_NY - np.logaddexp.reduce(logits_NY, axis=1, keepdims=True)
    ),
    pairs=lambda scores_NY, gold_N: [(scores_NY.max(axis=1), scores_NY.argmax(axis=1) == gold_N)],
    thresholds=_two_classes,
)


_LABELS = Rule(
    nll=lambda logits_NY, gold_NY: float(
        (np.logaddexp(0.0, logits_NY) - logits_NY * gold_NY).mean()
    ),
    probabilities=lambda logits_NY: np.exp(-np.logaddexp(0.0, -logits_NY)),
    pairs=lambda scores_NY, gold_NY: list(zip(scores_NY.T, gold_NY.T, strict=True)),
    thresholds=lambda scores, gold, folds, task: choose_for_labels(
        scores, gold, folds_N=folds, task=task
    ),
)


_WORDS = replace(_CLASSES, thresholds=lambda scores, gold, folds, task: None)


RULES: dict[str, Rule] = {
    "single_label": _CLASSES,
    # Log-probabilities of the labels' words: as logits they give each label's share.
    "label_words": _CLASSES,
    "multi_label": _LABELS,
    "tags": _WORDS,
    "phrases": _WORDS,
}
"""Kind of task -> how its probabilities are made and measured; kinds without any are not here."""
