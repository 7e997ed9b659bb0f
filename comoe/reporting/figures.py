"""The figures of a report, as SVG to stand in a page; letters are the reader's fonts, so any script shows."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from comoe.evaluation.prevalence import Shares
from comoe.train.monitor.cross_plots import cross_panel
from comoe.train.monitor.plots import BLUE, COLORS, GREY, new_figure

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "comoe", "font.size": 9, "text.parse_math": False}
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, the same for the same figure."""
    page = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(page, format="svg", metadata={"Date": None})
    drawn = _HEAD.sub("", page.getvalue(), count=1)
    # Names of parts would be in the page once per figure; what others point at keeps its own.
    wanted = set(re.findall(r"#([\w-]+)", drawn))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in wanted else "", drawn)


def shares_figure(labels: Sequence[str], counted: Shares, corrected: Shares | None) -> str:
    """Shares of one task's labels with their intervals, corrected ones beside the counted."""
    with rc_context(STYLE):
        figure = new_figure(6.4, 0.7 + 0.34 * len(labels))
        panel = figure.add_subplot()
        rows = np.arange(len(labels))[::-1]
        drawn = [(counted, GREY, "counted")]
        drawn += [(corrected, BLUE, "corrected")] if corrected is not None else []
        for number, (shares, color, name) in enumerate(drawn):
            # Side by side, so that neither hides the other.
            places = rows + (0.14 - 0.28 * number if len(drawn) > 1 else 0)
            whiskers = [shares.share_K - shares.low_K, shares.high_K - shares.share_K]
            panel.errorbar(
                100 * shares.share_K,
                places,
                xerr=100 * np.maximum(whiskers, 0),
                fmt="o",
                color=color,
                markersize=4,
                linewidth=1.6,
                label=name,
            )
        panel.set_yticks(rows, labels)
        panel.set_ylim(-0.6, len(labels) - 0.4)
        panel.set_xlim(left=0)
        _axes(panel, "% of posts")
        if len(drawn) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return svg(figure)


def time_figure(
    periods: Sequence[str],
    shares: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    unit: str,
) -> str:
    """A line per label over periods with the band of its interval.

    Args:
        periods: names, in order.
        shares: label -> (value, low, high) per period, NaN where a period has no posts.
        unit: of the values.
    """
    with rc_context(STYLE):
        figure = new_figure(8.4, 3.2)
        panel = figure.add_subplot()
        places = np.arange(len(periods))
        for (label, (middle, low, high)), color in zip(shares.items(), cycle(COLORS)):
            panel.plot(
                places, middle, color=color, linewidth=1.6, marker="o", markersize=3, label=label
            )
            panel.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        step = max(1, -(-len(periods) // 12))
        panel.set_xticks(places[::step], list(periods)[::step], rotation=30, ha="right")
        panel.set_ylabel(unit)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if len(shares) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return svg(figure)


def cross_figure(share_RC: np.ndarray, *, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Heatmap of shares, each row of which sums to 1, in percent."""
    with rc_context(STYLE):
        figure = new_figure(2.6 + 0.62 * len(columns), 1.3 + 0.32 * len(rows))
        panel = figure.add_subplot()
        cross_panel(panel, share_RC, rows=rows, columns=columns)
        return svg(figure)


def reliability_svg(score_B: np.ndarray, right_B: np.ndarray, count_B: np.ndarray) -> str:
    """How often predictions of a score are right; dots as large as the number of posts."""
    with rc_context(STYLE):
        figure = new_figure(3.4, 3.1)
        panel = figure.add_subplot()
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
        panel.scatter(
            score_B, right_B, s=12 + 120 * count_B / max(count_B.max(), 1), color=BLUE, alpha=0.8
        )
        panel.set(xlim=(0, 1.02), ylim=(0, 1.02), ylabel="share that is right")
        _axes(panel, "mean score of the prediction")
        return svg(figure)


def _axes(panel, label: str) -> None:
    panel.set_xlabel(label)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
