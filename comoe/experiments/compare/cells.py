"""Numbers of a comparison as the cells of its tables show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from comoe.evaluation.evaluate import TEACHER_KL
from comoe.experiments.compare.results import LOSS, METRIC
from comoe.experiments.compare.statistics import Difference, Estimate

NAMES = {METRIC: "mean", LOSS: "loss", TEACHER_KL: "KL to the teachers"}
"""Measure -> head of its column."""


def cell(item: Estimate | None, *, signed: bool = False, digits: int = 3) -> str:
    """A number with its interval, if it has one; empty for None."""
    if item is None:
        return ""
    form = f"{'+' if signed else ''}.{digits}f"
    mean = format(item.mean, form)
    return f"{mean} [{item.low:{form}}, {item.high:{form}}]" if math.isfinite(item.low) else mean


def number(value: Any) -> str:
    """A number in a few digits, any other value as text; empty for None."""
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 20 else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean over seeds and their sample standard deviation; empty without values."""
    if not values:
        return ""
    deviation = f" ± {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return number(math.fsum(values) / len(values)) + deviation


def gain(item: Difference | None, *, digits: int = 3) -> str:
    """A difference with its sign and interval, bold where it is significant; empty for None."""
    if item is None:
        return ""
    text = cell(item, signed=True, digits=digits)
    return f"**{text}**" if item.verdict else text


def p_value(item: Difference | None) -> str:
    """The p-value, adjusted where it is; empty without one."""
    if item is None or math.isnan(item.p):
        return ""
    p = item.p if math.isnan(item.adjusted) else item.adjusted
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def digits_of(measure: str) -> int:
    """Decimals of the differences: losses are finer."""
    return 3 if measure == METRIC else 4
