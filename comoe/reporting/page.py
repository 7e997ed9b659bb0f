"""The page of a report: its numbers with figures, one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from comoe import __version__
from comoe.evaluation.prevalence import Shares
from comoe.reporting.figures import cross_figure, reliability_svg, shares_figure, time_figure
from comoe.reporting.parts import MAX_SLICES, ReportOptions
from comoe.reporting.report import (
    FEW,
    MAX_LABELS,
    OPEN,
    OTHER_KIND,
    SURE,
    UNEXPLAINED,
)


def render(report: Mapping[str, Any], *, title: str, options: ReportOptions) -> str:
    """HTML of what ``make_report`` gave. All text of posts is escaped; scripts and outside resources are forbidden."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = files("comoe.reporting").joinpath("report.html").read_text(encoding="utf-8")
    shown = dict(report)
    shown["tasks"] = [_task(task) for task in report["tasks"]]
    shown["cross"] = [
        table | {"counted": _counted(table, report["weighted_by"]), "figure": Markup(cross_figure(
            np.array(table["share"]), rows=table["row_labels"], columns=table["column_labels"]
        ))}
        for table in report["cross"]
    ]  # fmt: skip
    return environment.from_string(template).render(
        shown,
        title=title,
        interval=_interval,
        mean=_mean,
        sure=SURE,
        least=options.least,
        most=MAX_SLICES,
        version=__version__,
    )


def _counted(table: Mapping[str, Any], weighted_by: str | None) -> str:
    """What a cross-table counts, and how many of them each row has."""
    rows = zip(table["row_labels"], table["counts"], strict=True)
    each = ", ".join(f"{label} {count:,.6g}" for label, count in rows)
    if weighted_by is None:
        return f"{table['posts']:,} posts: {each}."
    return (
        f"{table['posts']:,} posts, counted by the sum of their {weighted_by}: {each}. They are "
        f"worth {table['effective_posts']:,.0f} equally weighted posts, for which V is corrected."
    )


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(task) | {"warnings": _warnings(task)}
    if "counted" in task:
        corrected = _shares(task["corrected"]) if "corrected" in task else None
        shown["figure"] = Markup(shares_figure(task["labels"], _shares(task["counted"]), corrected))
    shown["parts"] = [_part(task, part) for part in task["parts"]]
    if "reliability" in task:
        score_B, right_B, count_B = np.array(task["reliability"]).T
        shown["reliability_figure"] = Markup(reliability_svg(score_B, right_B, count_B))
    return shown


def _warnings(task: Mapping[str, Any]) -> list[str]:
    found = []
    unexplained = task.get("corrected", {}).get("unexplained", 0.0)
    if unexplained > UNEXPLAINED:
        found.append(
            f"No mix of labels explains {100 * unexplained:.0f} % of these predictions: the model errs here otherwise "
            "than on the labeled posts, and the corrected shares cannot be trusted."
        )
    open_, posts = _open(task), task["posts"]
    if open_ and posts < FEW:
        found.append(
            f"So few posts say next to nothing of shares ({posts:,} with a prediction): the "
            f"intervals of {', '.join(open_)} reach from about 0 to 100 %."
        )
    elif open_:
        confusion = np.array(task.get("confusion", ()))
        only = np.flatnonzero(confusion.sum(0)) if confusion.any() else ()
        alone = f" (it predicts {task['labels'][only[0]]} alone)" if len(only) == 1 else ""
        found.append(
            f"The predictions say next to nothing of the share of {', '.join(open_)}: on the labeled posts the model "
            f"hardly tells these labels from others{alone}, so nearly any mix explains the predictions, and the "
            "intervals reach from about 0 to 100 %. Label some 200 of these posts, drawn at "
            "random, and give them with --gold."
        )
    if never := task.get("never_labeled"):
        found.append(
            f"No labeled post has {', '.join(never)}, so how the model errs there is not known; its share is a guess."
        )
    drift = task.get("drift", {})
    by = "embeddings" if drift.get("embeddings") else "words"
    if drift.get(by) and (area := drift[by]["auc"]) > OTHER_KIND:
        wrong = ", and then the corrected shares are wrong" if "corrected" in task else ""
        found.append(
            f"These posts are of another kind than the labeled ones: their {by} tell them apart (area under the curve "
            f"{area:.2f}). The model may err otherwise here{wrong}: label some 200 of these posts, "
            "drawn at random, and give them with --gold."
        )
    if (index := drift.get("scores", 0.0)) > 0.25:
        found.append(
            "The scores differ much from those of the labeled posts (population stability index "
            f"{index:.2f}): label some of these posts and measure again."
        )
    return found


def _open(task: Mapping[str, Any]) -> list[str]:
    """Labels whose corrected interval leaves nearly any share, though there are labeled posts of them."""
    shares = task.get("corrected", {"low": (), "high": ()})
    wide = zip(task["labels"], shares["low"], shares["high"], strict=False)
    never = task.get("never_labeled", ())
    return [label for label, low, high in wide if high - low > OPEN and label not in never]


def _part(task: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A table, and over time a figure, of periods or values."""
    values = part["values"]
    shown = dict(part) | {"figure": "", "corrected": "corrected" in task}
    key = "corrected" if "corrected" in task else "counted"
    cells = {}
    for name, value in values.items():
        if "mean" in value:
            cells[name] = [_mean(value["mean"])]
        elif key in value:
            cells[name] = [_interval(value[key], place) for place in range(len(task["labels"]))]
    shown["heads"] = list(task["labels"]) or ["mean"]
    unfit = {
        name for name in cells if values[name].get(key, {}).get("unexplained", 0.0) > UNEXPLAINED
    }
    shown["unfit"] = bool(unfit)
    shown["rows"] = [
        {
            "name": f"{name} *" if name in unfit else name,
            "posts": values[name]["posts"],
            "cells": row,
        }
        for name, row in cells.items()
    ]
    if part["periods"] and len(cells) > 1:
        periods = part["periods"]
        first, last = (periods.index(name) for name in (min(cells), max(cells)))
        shown["figure"] = Markup(_over_time(task, values, periods[first : last + 1], key))
    return shown


def _over_time(
    task: Mapping[str, Any], values: Mapping[str, Any], periods: Sequence[str], key: str
) -> str:
    """The lines break where a period has too few posts."""
    if "mean" in task:
        means = [values.get(period, {}).get("mean", {}) for period in periods]
        curve = tuple(_column(means, name) for name in ("mean", "low", "high"))
        return time_figure(periods, {task["name"]: curve}, unit="mean")
    largest = np.argsort(-np.array(task[key]["share"]), kind="stable")[:MAX_LABELS]
    found = [values.get(period, {}).get(key, {}) for period in periods]
    curves = {
        task["labels"][place]: tuple(
            100 * _column(found, name, place) for name in ("share", "low", "high")
        )
        for place in sorted(largest)
    }
    return time_figure(periods, curves, unit="% of posts")


def _column(found: Sequence[Mapping[str, Any]], name: str, place: int | None = None) -> np.ndarray:
    """A value of each period, NaN where it has none."""
    cells = (one.get(name) for one in found)
    return np.array(
        [np.nan if cell is None else cell if place is None else cell[place] for cell in cells]
    )


def _interval(shares: Mapping[str, Any], place: int) -> str:
    share, low, high = (100 * shares[name][place] for name in ("share", "low", "high"))
    return f"{share:.1f} % [{low:.1f}, {high:.1f}]"


def _mean(found: Mapping[str, float | None]) -> str:
    if found["low"] is None:
        return f"{found['mean']:.3f} (one post: no interval)"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _shares(plain: Mapping[str, Any]) -> Shares:
    return Shares(*(np.array(plain[name]) for name in ("share", "low", "high")))
