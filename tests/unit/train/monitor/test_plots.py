"""The pictures show the numbers that they were given, and survive the odd ones."""

import numpy as np
import pytest

from comoe.evaluation.embedding_stats import TaskEmbeddings
from comoe.train.monitor.embedding_plots import embedding_figure, map_figure
from comoe.train.monitor.plots import (
    confusion_figure,
    figure_pixels,
    loss_figure,
    metric_figure,
    reliability_figure,
    save_figure,
    share_figure,
    task_share_figure,
)


def texts(panel):
    return [text.get_text() for text in panel.texts]


def panels(figure):
    return [panel for panel in figure.axes if panel.get_visible()]


def test_a_loss_figure_has_a_panel_per_term_and_starts_with_the_whole():
    curves = {"mood": [(1, 2.0), (2, 1.0)], "loss": [(1, 3.0), (2, float("nan")), (3, 2.0)]}
    figure = loss_figure(curves, {"mood": [(2, 1.5)]})
    assert [panel.get_title() for panel in panels(figure)] == ["all terms", "mood"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [3.0, 2.0]
    assert figure.axes[1].lines[-1].get_ydata().tolist() == [1.5]
    assert figure.axes[1].get_legend() is not None


def test_a_metric_figure_draws_the_majority_baseline_where_there_is_one():
    curves = {"a: macro_f1": [(5, 0.4), (10, 0.6)], "b: pearson": [(5, 0.1)]}
    figure = metric_figure(curves, {"a: macro_f1": 0.2})
    assert texts(figure.axes[0]) == ["majority"] and texts(figure.axes[1]) == []
    for draw in (metric_figure, loss_figure):  # nothing logged yet still gives pictures
        assert figure_pixels(draw({}, {})).ndim == 3


def test_a_share_figure_writes_percent_and_leaves_rows_without_tokens_empty():
    shares = np.array([[0.75, 0.25], [np.nan, np.nan]])
    figure = share_figure(shares, rows=["1", "3"], title="share", row_axis="layer")
    assert texts(figure.axes[0]) == ["75", "25"]
    assert figure_pixels(figure).dtype == np.uint8
    figure = task_share_figure(np.full((3, 2, 4), 0.25), layers=[1, 3, 5], tasks=["a", "b"])
    assert [panel.get_title() for panel in panels(figure)] == ["layer 1", "layer 3", "layer 5"]


@pytest.mark.parametrize(("size", "numbers"), [(2, 4), (12, 144), (13, 0), (40, 0)])
def test_a_confusion_figure_drops_the_numbers_when_they_no_longer_fit(size, numbers):
    figure = confusion_figure(
        np.eye(size, dtype=int), labels=[f"label number {i}" for i in range(size)], title="t"
    )
    assert len(texts(figure.axes[0])) == numbers


def test_labels_of_a_confusion_figure_do_not_overlap():
    names = ["a rather long label, one", "a rather long label, two", "short", "mid size"]
    figure = confusion_figure(np.eye(4, dtype=int), labels=names, title="t")
    figure_pixels(figure)
    panel = figure.axes[0]
    assert len({label.get_text() for label in panel.get_yticklabels()}) == 4
    boxes = sorted(
        (label.get_window_extent() for label in panel.get_yticklabels()), key=lambda box: box.y0
    )
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False))


def test_a_saved_figure_is_a_png_and_leaves_nothing_aside(tmp_path):
    save_figure(loss_figure({"loss": [(1, 1.0)]}, {}), tmp_path / "plots" / "loss.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


ODD_NAMES = ("$_$", r"$\\frac$", "$x^", "_hidden", "%s {0}", "😀", "a\nb", "x" * 230, "")
"""Labels that a library of plots may take for a formula, a format or nothing."""


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:The label", "ignore:No artists")
def test_any_label_can_be_drawn(name):
    share = np.full((2, 4), 0.25)
    points, bins = np.eye(4)[:3], (np.ones(2), np.ones(2) / 2, np.ones(2))
    figures = [
        confusion_figure(np.eye(2, dtype=int), labels=[name, "b"], title=name),
        embedding_figure(points, [name, "b", name], title=name),
        map_figure({name: TaskEmbeddings({}, points, ["a", name, "b"])}, how="pca", title=name),
        share_figure(share, rows=[name, "b"], title=name or "share", row_axis=name),
        task_share_figure(share[None], layers=[1], tasks=[name, "b"]),
        loss_figure({"loss": [(1, 1.0)], name: [(1, 1.0)]}, {name: [(1, 2.0)]}),
        metric_figure({name: [(1, 1.0)]}, {name: 0.5}),
        reliability_figure({name: bins}, title=name),
    ]
    for figure in figures:
        assert figure_pixels(figure).min() < 255
