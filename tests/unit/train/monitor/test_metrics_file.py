"""``metrics.jsonl`` after a crash and a resume, ``results.json``, and the closing table."""

import json
import math
from dataclasses import replace

import numpy as np
import torch

from comoe.config.files import plain
from comoe.evaluation.tables import format_results_table, noise_lines, slice_lines
from comoe.tasks.task import Task
from comoe.train.monitor.metrics_file import read_metrics, truncate_metrics, write_results


def task(name, metric="macro_f1"):
    return Task(name, "single_label", ("no", "yes"), metric, 1.0, None, 0.0, True)


def test_resume_drops_later_lines_and_a_torn_one_and_leaves_a_mark(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, after_step=0)
    assert read_metrics(path) == [{"split": "resume", "step": 0}]
    first = {"step": 1, "split": "train", "loss": 1 / 3}  # every digit is kept
    lines = [first, {"split": "event", "what": "start"}, {"step": 2}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    truncate_metrics(path, after_step=2)
    assert read_metrics(path) == [*lines[:3], {"split": "resume", "step": 2}]
    truncate_metrics(path, after_step=1)
    assert [line.get("step") for line in read_metrics(path)] == [1, None, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    for text in ("", "\n\n", "[1]\n3\n"):
        path.write_text(text)
        assert read_metrics(path) == []


def test_results_hold_null_where_a_number_is_not_finite(tmp_path):
    write_results(tmp_path, {"loss": math.nan, "f1": np.float32(0.5), "count": torch.tensor(3)})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == {"loss": None, "f1": 0.5, "count": 3}
    assert plain({"a": (1, np.array([1.0, np.inf]))}) == {"a": [1, [1.0, None]]}


def test_the_table_has_a_line_per_task_and_a_dash_where_nothing_was_measured():
    metrics = {
        "validation": {"mood": {"macro_f1": 0.71234, "majority/macro_f1": 0.2, "n": 10}, "irony": {"macro_f1": 0.5}},
        "test": {"mood": {"macro_f1": 0.6, "majority/macro_f1": 0.25, "n": 20}},
    }  # fmt: skip
    rows = format_results_table(metrics, [task("mood"), task("irony")]).splitlines()
    assert rows[0].split() == ["task", "metric", "validation", "test", "majority", "n"]
    assert set(rows[1]) == {"-"} and len({len(row) for row in rows}) == 1
    assert rows[2].split() == ["mood", "macro_f1", "0.712", "0.600", "0.250", "20"]
    assert rows[3].split() == ["irony", "macro_f1", "0.500", "-", "-", "-"]
    # Held-out posts have a column, auxiliary tasks a mark.
    metrics = {split: {"mood": {"macro_f1": 0.5, "n": 4}} for split in ("validation", "unseen")}
    helper = replace(task("mood"), auxiliary=True)
    head, _, mood = format_results_table(metrics, [helper]).splitlines()
    assert head.split() == ["task", "metric", "validation", "test", "unseen", "majority", "n"]
    assert mood.split() == ["mood", "(auxiliary)", "macro_f1", "0.500", "-", "0.500", "-", "4"]


def test_slices_and_noise_have_tables_of_their_own_and_are_left_out_where_there_are_none():
    sliced = {"accuracy@implicit=true": 0.25, "n@implicit=true": 8.0}
    # A label may be called anything: this one is no slice.
    metrics = {
        "validation": {"mood": {"macro_f1": 0.5, "f1/:@x=": 1.0} | sliced},
        "test": {"mood": {"macro_f1": 0.625}},
        "validation+typos": {"mood": {"macro_f1": 0.375} | sliced},
    }
    _, head, _, row = slice_lines(metrics, [task("mood")])
    assert head.split() == ["task", "slice", "metric", "validation", "test", "n"]
    assert row.split() == ["mood", "implicit=true", "accuracy", "0.250", "-", "8"]
    _, head, _, row = noise_lines(metrics, [task("mood"), task("irony")])
    assert head.split() == ["task", "metric", "validation", "typos"]
    assert row.split() == ["mood", "macro_f1", "0.500", "0.375", "(-0.125)"]
    plain_run = {"validation": {"mood": {"macro_f1": 0.5}}}
    assert slice_lines(plain_run, [task("mood")]) == noise_lines(plain_run, [task("mood")]) == []
