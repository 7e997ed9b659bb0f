"""The page of a report: its numbers with pictures, one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from comoe import __version__
from comoe.evaluation.prevalence import Shares
from comoe.reporting.figures import cross_figure, reliability_svg, shares_figure, time_figure
from comoe.reporting.report import MAX_LABELS, MAX_SLICES, UNEXPLAINED, ReportOptions


def render(report: Mapping[str, Any], *, title: str, options: ReportOptions) -> str:
    """HTML of what ``make_report`` gave. All text of posts is escaped; scripts and outside resources are forbidden."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = files("comoe.reporting").joinpath("report.html").read_text(encoding="utf-8")
    shown = dict(report)
    shown["tasks"] = [_task(task) for task in report["tasks"]]
    shown["cross"] = [
        table | {"figure": Markup(cross_figure(
            np.array(table["share"]), rows=table["row_labels"], columns=table["column_labels"]
        ))}
        for table in report["cross"]
    ]  # fmt: skip
    return environment.from_string(template).render(
        shown,
        title=title,
        interval=_interval,
        least=options.least,
        most=MAX_SLICES,
        version=__version__,
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
    if never := task.get("never_labeled"):
        found.append(
            f"No labeled post has {', '.join(never)}, so how the model errs there is not known; its share is a guess."
        )
    if (index := task.get("drift", {}).get("scores", 0.0)) > 0.25:
        found.append(
            f"The scores differ much from those of the labeled posts (population stability index {index:.2f}): label "
            "some of these posts and measure again."
        )
    return found


def _part(task: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A table, and over time a picture, of periods or values."""
    values = part["values"]
    shown = dict(part) | {"figure": "", "corrected": "corrected" in task}
    key = "corrected" if "corrected" in task else "counted"
    cells = {}
    for name, value in values.items():
        if "mean" in value:
            mean = value["mean"]
            cells[name] = [f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"]
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
    if part["is_time"] and len(cells) > 1:
        shown["figure"] = Markup(_over_time(task, {name: values[name] for name in cells}, key))
    return shown


def _over_time(task: Mapping[str, Any], values: Mapping[str, Any], key: str) -> str:
    if "mean" in task:
        means = [value["mean"] for value in values.values()]
        curve = tuple(np.array([one[name] for one in means]) for name in ("mean", "low", "high"))
        return time_figure(list(values), {task["name"]: curve}, unit="mean")
    largest = np.argsort(-np.array(task[key]["share"]), kind="stable")[:MAX_LABELS]
    curves = {
        task["labels"][place]: tuple(
            100 * np.array([value[key][name][place] for value in values.values()])
            for name in ("share", "low", "high")
        )
        for place in sorted(largest)
    }
    return time_figure(list(values), curves, unit="% of posts")


def _interval(shares: Mapping[str, Any], place: int) -> str:
    share, low, high = (100 * shares[name][place] for name in ("share", "low", "high"))
    return f"{share:.1f} % [{low:.1f}, {high:.1f}]"


def _shares(plain: Mapping[str, Any]) -> Shares:
    return Shares(*(np.array(plain[name]) for name in ("share", "low", "high")))
