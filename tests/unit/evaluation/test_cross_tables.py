"""Cross-tables of two tasks' labels: against scipy, by hand, and as a run and a report write them."""

import csv
import json

import numpy as np
import pytest
from scipy.stats.contingency import association

from comoe.config.recipe import RunConfig
from comoe.evaluation.cross_tables import cramers_v, cross_tables, without_table
from comoe.evaluation.evaluate import Evaluation
from comoe.tasks.task import Task
from comoe.train.cross_tables import write_cross_tables
from comoe.train.monitor.monitor import Monitor


@pytest.mark.parametrize("seed", range(5))
def test_v_is_that_of_scipy_and_its_correction_the_formula_of_bergsma(seed):
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(2, 7, size=2))
    counts = generator.integers(1, 40, size=shape)
    assert cramers_v(counts) == pytest.approx(association(counts, method="cramer"), rel=1e-12)
    n, (r, c) = counts.sum(), shape
    expected = np.outer(counts.sum(1), counts.sum(0)) / n
    phi2 = ((counts - expected) ** 2 / expected).sum() / n
    phi2 = max(0, phi2 - (r - 1) * (c - 1) / (n - 1))
    least = min(size - (size - 1) ** 2 / (n - 1) for size in (r, c)) - 1
    assert cramers_v(counts, corrected=True) == pytest.approx((phi2 / least) ** 0.5, rel=1e-12)


def test_the_correction_takes_the_bias_of_independent_labels_and_leaves_certainty():
    generator = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(200):
        (table,) = cross_tables(
            {name: (tuple("abcd"), generator.integers(0, 4, 60)) for name in ("one", "two")}
        )
        plain.append(cramers_v(table.counts_RC))
        corrected.append(cramers_v(table.counts_RC, corrected=True))
    assert np.mean(plain) > 0.2 and np.mean(corrected) < 0.09
    assert cramers_v(np.diag([20, 30, 10]), corrected=True) == pytest.approx(1)


def test_shares_are_of_the_posts_that_have_both_labels():
    mood, topic = np.array([0, 0, 1, 1, 1, -1]), np.array([0, 0, 0, 2, 2, 2])
    labels = {"mood": (("bad", "good"), mood), "topic": (("a", "never", "b"), topic)}
    (table,) = cross_tables(labels, np.array([1, 1, 2, 1, 1, 9.0]))
    assert (table.row_labels, table.column_labels) == (("bad", "good"), ("a", "b"))
    assert table.counts_RC.tolist() == [[2, 0], [2, 2]]
    assert (table.posts, table.worth) == (5, pytest.approx(36 / 8))
    assert table.corrected_v == cramers_v(table.counts_RC * 0.75, corrected=True)
    assert table.share_RC.tolist() == [[1, 0], [0.5, 0.5]]
    assert table.turned.share_RC.tolist() == [[0.5, 0.5], [0, 1]]
    assert [cell["share_of_column"] for cell in table.cells()] == [0.5, 0, 0.5, 1]
    constant = {"mood": (("bad", "good"), np.zeros(6, int)), "topic": labels["topic"]}
    assert list(cross_tables(constant)) == []
    assert list(without_table(constant)) == ["mood and topic: all posts have bad as mood."]
    apart = {"mood": (("bad",), np.array([0, -1])), "topic": (("a",), np.array([-1, 0]))}
    assert list(cross_tables(apart)) == []
    assert list(without_table(apart)) == ["mood and topic: no post has both."]
    assert list(without_table(labels)) == []


def test_a_run_writes_its_tables_of_gold_and_predicted_labels_with_a_figure(tmp_path):
    tasks = [
        Task("mood", "single_label", ("bad", "good"), "accuracy"),
        Task("topic", "single_label", ("a", "b"), "accuracy"),
        Task("marks", "multi_label", ("x",), "macro_f1"),
    ]
    gold = {"mood": ["bad", "bad", "good", "good", None], "topic": ["a", "b", "b", "b", "a"]}
    found = {"mood": ["bad", "bad", "bad", "good", "good"], "topic": ["a", "a", "b", "b", "b"]}
    shown = {
        name: [
            {"row": row, "gold": gold[name][row], "label": found[name][row]}
            for row in (range(5) if name == "mood" else reversed(range(5)))
        ]
        for name in gold
    }
    shown_by = RunConfig(histograms=False)
    monitor = Monitor(tmp_path, enabled=True, tasks=tasks, recipe_text="", shown=shown_by)
    evaluation = Evaluation({}, {}, shown | {"marks": []})
    write_cross_tables(tmp_path, {"validation": evaluation}, tasks, monitor=monitor, step=3)
    monitor.close()
    tables = json.loads((tmp_path / "cross_tables.json").read_text())
    heads = [(one["labels"], one["rows"], one["columns"]) for one in tables]
    assert heads == [(source, *pair) for source in ("gold", "predicted")
                     for pair in (("mood", "topic"), ("topic", "mood"))]  # fmt: skip
    assert tables[0]["share"] == [[0.5, 0.5], [0, 1]] and tables[0]["counts"] == [2, 2]
    assert tables[2]["share"] == [[2 / 3, 1 / 3], [0, 1]] and tables[2]["counts"] == [3, 2]
    with (tmp_path / "cross_tables.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 8
    assert cells[4] | {"split": "", "labels": ""} == {
        "split": "", "labels": "", "rows": "mood", "columns": "topic", "row_label": "bad",
        "column_label": "a", "count": "2.0", "share_of_row": str(2 / 3), "share_of_column": "1.0",
    }  # fmt: skip
    picture = tmp_path / "plots/cross_validation_mood_topic.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
