"""Files of predictions read back: those of ``comoe predict``, and the validation posts of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.config.files import read_csv_text
from comoe.data.reading.files import RawSplit
from comoe.data.reading.sources import format_of, read_input
from comoe.data.reading.stream import open_stream
from comoe.tasks.metrics import entities

ONE, SEVERAL, NUMBER, SPANS = "one label", "several labels", "number", "spans"
"""What a task predicts for a post."""


@dataclass(frozen=True, slots=True)
class TaskPredictions:
    """What a model says of one task for N posts; a post without a prediction has NaN in its row."""

    name: str
    what: str
    """ONE, SEVERAL, NUMBER or SPANS."""
    labels: tuple[str, ...]
    """K of them; none for numbers."""
    values: np.ndarray
    """(N, K) of 0 and 1: which labels a post has; of spans how many; of numbers (N, 1)."""
    scores: np.ndarray
    """(N, K): score of each label; the values where the file has none."""
    gold: np.ndarray | None = None
    """(N, K) like ``values``, where the file has gold labels; NaN for a post without one."""
    texts: Sequence[str] = ()
    """Of the posts, where gold labels are."""
    rows: np.ndarray | None = None
    """Numbers of the posts in the corpus that they are a sample of, if they are."""
    bad: Sequence[str] = ()
    """Rows with gold labels that could not be read."""

    @property
    def predicted(self) -> np.ndarray:
        """Whether a post has a prediction, (N,) bool."""
        return ~np.isnan(self.values).any(1)

    def with_labels(self, labels: Sequence[str]) -> TaskPredictions:
        """With these labels too, which no post has: predictions without scores name those that occur alone."""
        new = [label for label in labels if label not in self.labels]
        count = (len(self.values), len(new))
        none_NK = np.where(self.predicted[:, None], 0.0, np.full(count, np.nan))
        values_NK, scores_NK = (np.hstack([some, none_NK]) for some in (self.values, self.scores))
        return replace(self, labels=(*self.labels, *new), values=values_NK, scores=scores_NK)


@dataclass(frozen=True, slots=True)
class Corpus:
    """N posts with what was predicted of them."""

    source: str
    texts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    """What else a row has, kept columns of the input above all."""
    tasks: Mapping[str, TaskPredictions]
    errors: int
    """Posts without any prediction."""
    truncated: int
    bad: Sequence[str] = field(default_factory=tuple)
    """Rows that could not be read."""

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str, *, flag: str) -> Sequence[Any]:
        """A column of the rows.

        Raises:
            ValueError: there is none; names ``flag``.
        """
        if name not in self.columns:
            raise unknown_name(
                f"column of the predictions ({flag}; --keep of comoe predict copies columns)",
                name,
                self.columns,
            )
        return self.columns[name]


RESULT_KEYS = ("label", "labels", "value", "spans")
"""What stands under a task in a line of predictions; the first that is there decides."""

CELLS = ("csv", "tsv")
"""Formats whose rows are flat and whose text may be defused (``csv_line``)."""

OWN = ("text", "error", "truncated", "windows", "image_error")
"""Keys of a row that are no columns."""


def read_corpus(path: Path) -> Corpus:
    """Read what ``comoe predict`` wrote, or a table in that form.

    Args:
        path: jsonl or csv (there tasks that have scores), also packed; Parquet, a file or a folder of shards.

    Raises:
        ValueError: no such file, one that cannot be read, or without a prediction.
    """
    raw, format = _read_rows(path)
    if any(_is_adapted(row) for row in raw.rows):
        raise ValueError(
            f"{path} was predicted with scores adapted to another mix of labels (prior); a report "
            "estimates the mix itself: predict without --assume-rate and --adapt-prior."
        )
    rows = _nested(raw.rows) if format in CELLS else [dict(row) for row in raw.rows]
    names = dict.fromkeys(key for row in rows for key, cell in row.items() if _kind(cell))
    bad = [str(row) for row in raw.bad]
    for line, row in zip(raw.lines, rows, strict=True):
        for task in [task for task in row if task in names and _problem(row[task])]:
            bad.append(f"{path}:{line}: {task} {_problem(row.pop(task))}.")
    if not names:
        raise ValueError(
            f"{path} has no predictions: each line needs an object with one of {', '.join(RESULT_KEYS)} under the name "
            "of a task, or in a csv columns task and task/label, as comoe predict writes them."
        )
    tasks = {name: _task(name, [row.get(name) for row in rows], place=path) for name in names}
    kept = [name for name in dict.fromkeys(key for row in rows for key in row)]
    columns = {name: [row.get(name) for row in rows] for name in kept if name not in (*names, *OWN)}
    none = sum(not any(name in row for name in names) for row in rows)
    return Corpus(
        source=str(path),
        texts=[str(row.get("text") or "") for row in rows],
        columns=columns,
        tasks=tasks,
        errors=none + len(raw.bad),
        truncated=sum(bool(row.get("truncated")) for row in rows),
        bad=tuple(bad),
    )


def _read_rows(path: Path) -> tuple[RawSplit, str | None]:
    """The rows of predictions, and their format."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file.")
    if not path.is_dir():
        raw, format = read_input("predictions", str(path)), format_of(path)
    elif next(path.rglob("*.parquet"), None) is None:
        raise ValueError(f"{path} is a folder without a .parquet file; name the predictions.")
    else:
        stream, format = open_stream(str(path)), "parquet"
        lines, rows = zip(*stream.read(stream.columns), strict=True) if stream.rows else ((), ())
        raw = RawSplit(str(path), list(rows), list(lines), stream.columns)
    if format == "parquet":
        # An empty cell there is a key that a line of JSON lacks.
        filled = [{key: cell for key, cell in row.items() if cell is not None} for row in raw.rows]
        raw = replace(raw, rows=filled)
    return raw, format


def read_labeled(folder: Path) -> dict[str, TaskPredictions]:
    """Predictions with gold labels by task: ``predictions/validation`` of a run folder, or files like those.

    Raises:
        ValueError: no such folder, no file in it has gold labels, or one where no row can be read.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found = {}
    for path in files:
        raw = read_input("labeled", str(path))
        rows, bad = [], [str(row) for row in raw.bad]
        if raw.rows and not any("gold" in row for row in raw.rows):
            continue
        for line, row in zip(raw.lines, map(_with_spans, raw.rows), strict=True):
            # What a decoder generates is not reported.
            if problem := "answer" not in row and (_problem(row) or _gold_problem(row)):
                bad.append(f"{path}:{line}: it {problem}.")
            elif _kind(row) and row["gold"] is not None:
                rows.append(row)
        if bad and not rows:
            raise ValueError(
                f"--labeled {path}: none of its posts can be read, the first: {bad[0]} Copy the "
                "file again, or take it out of the folder."
            )
        if rows:
            gold = [row["gold"] for row in rows]
            task = _task(path.stem, rows, place=path, gold=gold)
            texts = [str(row.get("text") or "") for row in rows]
            found[path.stem] = replace(task, texts=texts, bad=tuple(bad))
    if not found:
        raise ValueError(
            f"--labeled {folder}: no file there has predictions with gold labels; name "
            "predictions/validation of the run that made the export."
        )
    return found


def _with_spans(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a run with the spans that ``comoe predict`` writes where the run has a tag per word."""
    if not (_are_texts(row.get("tags")) and _are_texts(row.get("gold"))):
        return row
    spans = [{"type": kind} for kind, _, _ in entities(row["tags"])]
    return {**row, "spans": spans, "gold": [kind for kind, _, _ in entities(row["gold"])]}


def _gold_problem(row: Mapping[str, Any]) -> str:
    """What is wrong with the gold label of a prediction; empty if nothing is. A post without one has None."""
    if "gold" not in row:
        return "has no gold, as other lines have"
    gold, kind = row["gold"], _kind(row)
    one = kind == "label" and not isinstance(gold, (list, Mapping))
    several = kind in ("labels", "spans") and _are_texts(gold)
    right = gold is None or one or several or (kind == "value" and _is_number(gold))
    return "" if right else f"has {gold!r} as gold beside {kind}"


def labeled_of(corpus: Corpus, task: str, column: str) -> TaskPredictions:
    """The posts of a corpus with a gold label of a task in a column; cells without one are empty.

    Raises:
        ValueError: no such task or column, or no cell with a label.
    """
    if task not in corpus.tasks:
        raise unknown_name("task of the predictions (--gold)", task, corpus.tasks)
    cells = corpus.column(column, flag="--gold")
    found = corpus.tasks[task]
    rows = [row for row, cell in enumerate(cells) if cell not in (None, "")]
    rows = [row for row in rows if found.predicted[row]]
    if not rows:
        raise ValueError(f"--gold {task}={column}: no post with a prediction has a label there.")
    gold = [cells[row] for row in rows]
    if found.what == NUMBER:
        known = np.array([_number(cell) for cell in gold], dtype=float)[:, None]
        for row in np.flatnonzero(~np.isfinite(known[:, 0])):
            raise ValueError(
                f"{corpus.source}: post {rows[row] + 1} has {gold[row]!r} as {column} (--gold "
                f"{task}={column}); task {task} predicts numbers: give a number, or an empty cell."
            )
    else:
        for row, cell in zip(rows, gold, strict=True):
            for label in set(_listed(cell)) - set(found.labels):
                place = f"--gold {task}={column}, post {row + 1} of {corpus.source}"
                raise unknown_name(f"label of task {task} ({place})", label, found.labels)
        known = _indicators([_listed(cell) for cell in gold], found.labels)
    return replace(
        found,
        values=found.values[rows],
        scores=found.scores[rows],
        gold=known,
        texts=[corpus.texts[row] for row in rows],
        rows=np.array(rows),
    )


def _is_adapted(row: Mapping[str, Any]) -> bool:
    """Whether ``comoe predict`` adapted a task of a row, of lines of JSON or of a csv."""
    return any(
        (isinstance(cell, Mapping) and "prior" in cell and _kind(cell) is not None)
        or (key.rstrip("_").endswith("/prior") and cell in ("assumed", "em"))
        for key, cell in row.items()
    )


def _kind(cell: Any) -> str | None:
    return next((key for key in RESULT_KEYS if isinstance(cell, Mapping) and key in cell), None)


def _problem(cell: Any) -> str:
    """What is wrong with the prediction of a task; empty if nothing is."""
    kind = _kind(cell)
    if kind is None:
        return "is no prediction, as in other lines"
    found, scores = cell[kind], cell.get("scores", {})
    right = {
        "label": isinstance(found, str),
        "labels": _are_texts(found),
        "value": _is_number(found),
        "spans": isinstance(found, list)
        and all(isinstance(span, Mapping) and isinstance(span.get("type"), str) for span in found),
    }[kind]
    if not right:
        return f"has {found!r} as {kind}"
    if kind in ("label", "labels"):
        if not (isinstance(scores, Mapping) and all(map(_is_number, scores.values()))):
            return f"has {scores!r} as scores"
    return ""


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


def _nested(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Flat rows of a csv with their scores under the task, as lines of JSON have them."""
    rows = [
        {key: read_csv_text(cell) if isinstance(cell, str) else cell for key, cell in row.items()}
        for row in rows
    ]
    scored = [_scores(row) for row in rows]
    # One label per post: what is predicted is one of the labels, and their scores sum to 1.
    several = {
        task
        for row, scores in zip(rows, scored, strict=True)
        for task, by_label in scores.items()
        if str(row[task]) not in by_label or abs(sum(by_label.values()) - 1) > 1e-3
    }
    found = []
    for row, scores in zip(rows, scored, strict=True):
        rest = {key: cell for key, cell in row.items() if key.partition("/")[0] not in scores}
        for task, by_label in scores.items():
            value = str(row[task])
            chosen = (
                {"labels": [label for label in value.split(";") if label]}
                if task in several
                else {"label": value}
            )
            rest[task] = chosen | {"scores": by_label}
        found.append({key: cell for key, cell in rest.items() if cell not in ("", None)})
    return found


def _scores(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> label -> score, of the columns ``task/label`` of a row."""
    scores: dict[str, dict[str, float]] = {}
    for key, cell in row.items():
        task, slash, label = key.partition("/")
        if slash and task in row and (number := _number(cell)) is not None:
            scores.setdefault(task, {})[label] = number
    return scores


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _task(
    name: str, cells: Sequence[Any], *, place: Path, gold: Sequence[Any] | None = None
) -> TaskPredictions:
    kinds = Counter(kind for cell in cells if (kind := _kind(cell)))
    if len(kinds) > 1:
        raise ValueError(
            f"{place}: task {name} has {' and '.join(sorted(kinds))} in different lines."
        )
    (key,) = kinds
    what = dict(zip(RESULT_KEYS, (ONE, SEVERAL, NUMBER, SPANS), strict=True))[key]
    found = [cell if _kind(cell) else None for cell in cells]
    if what == NUMBER:
        values = np.array([[np.nan if cell is None else float(cell[key])] for cell in found])
        known = None if gold is None else np.array(gold, dtype=float)[:, None]
        return TaskPredictions(name, what, (), values, values, known)
    plain = (
        cell and ([span["type"] for span in cell[key]] if key == "spans" else cell[key])
        for cell in found
    )
    chosen = [None if labels is None else _listed(labels) for labels in plain]
    scored = [cell["scores"] for cell in found if cell and isinstance(cell.get("scores"), Mapping)]
    truth = None if gold is None else [_listed(cell) for cell in gold]
    labels = dict.fromkeys(scored[0] if scored else ())
    labels |= dict.fromkeys(label for some in (*chosen, *(truth or ())) for label in some or ())
    values = _indicators(chosen, tuple(labels))
    scores = values.copy()
    for row, cell in enumerate(found):
        if cell and isinstance(cell.get("scores"), Mapping):
            scores[row] = [cell["scores"].get(label, 0.0) for label in labels]
    known = None if truth is None else _indicators(truth, tuple(labels))
    return TaskPredictions(name, what, tuple(labels), values, scores, known)


def _listed(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else [str(value)]


def _indicators(chosen: Sequence[Sequence[str] | None], labels: tuple[str, ...]) -> np.ndarray:
    place = {label: number for number, label in enumerate(labels)}
    values = np.zeros((len(chosen), len(labels)))
    for row, some in enumerate(chosen):
        if some is None:
            values[row] = np.nan
        for label in some or ():
            values[row, place[label]] += 1
    return values
