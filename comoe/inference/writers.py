"""Formats of predictions: what stands in the output for each post."""

from __future__ import annotations

import gzip
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from comoe.config.errors import unknown_name
from comoe.config.files import csv_line, sync_replace
from comoe.data.posts import Post
from comoe.data.reading.files import json_line
from comoe.inference.columns import pair_problem, second_text, text_problem
from comoe.inference.explain import ATTENTION, check_explained, method_of
from comoe.inference.html import head, post_block
from comoe.inference.options import PredictOptions
from comoe.inference.parquet import check_parquet, write_parquet
from comoe.inference.predictor import Predictor
from comoe.inference.summary import Counts
from comoe.tasks.labels import whole_characters
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    # Without the time, which would make two files of the same predictions differ.
    ".gz": lambda chunk: gzip.compress(chunk, mtime=0),
    ".zst": lambda chunk: pyarrow.Codec("zstd").compress(chunk, asbytes=True),
}
"""Ending of the output -> how a piece of it is packed; readers take packed pieces behind one another."""


REMARKS = {"cut": ["truncated"], "windows": ["truncated", "windows"], "error": []}
"""``--long`` -> columns that say what became of a long post; also in windows a second text may be cut."""


def packer(writer: JsonLines, target: Path) -> Callable[[bytes], bytes]:
    """How pieces of an output are packed."""
    return PACKERS.get(target.suffix.lower(), bytes) if writer.packed else bytes


def make_writer(predictor: Predictor, options: PredictOptions) -> JsonLines:
    """The writer that some options ask for.

    Raises:
        ValueError: no such format, or one that has no place for what is asked.
    """
    names, format = options.tasks, options.format
    wanted = predictor.choose_tasks(names)
    tasks = [task for task in predictor.tasks if task in wanted]
    if names is None and len(tasks) < len(predictor.tasks):
        others = ", ".join(task.name for task in predictor.tasks if task not in tasks)
        print(f"{others}: answered per author, with --task", file=sys.stderr)
    if format not in WRITERS:
        raise unknown_name("--format", format, WRITERS)
    if options.keep and WRITERS[format] is TweetEval:
        raise ValueError(
            "--keep wants --format jsonl, csv or parquet; tweeteval has label ids alone."
        )
    method = method_of(options.explain)
    if method and not WRITERS[format].explains:
        raise ValueError(
            "--explain wants --format jsonl or html; the others have no place for what words weigh."
        )
    if method == ATTENTION and not any(task.mode == "pooled" for task in tasks):
        print(
            "--explain: none of these tasks has attention; only tasks with a pooled head have it",
            file=sys.stderr,
        )
    elif method:
        check_explained(method, tasks, predictor.exported.model)
    writer = WRITERS[format](predictor, tasks)
    writer.raw, writer.method = options.raw_csv, method
    return writer


class JsonLines:
    """One object per post: kept columns, ``text``, the prediction of each task, or ``error``."""

    explains = True
    """Whether there is a place for explanations."""
    packed = True
    """Whether an output that ends in .gz or .zst is packed."""

    def __init__(self, predictor: Predictor, tasks: Sequence[Task]) -> None:
        self.predictor, self.tasks, self.raw, self.method = predictor, tasks, False, None
        self.adapted: set[str] = set()
        self.labels: dict[str, Counter[str]] | None = None
        """Labels that were written, where they are others than those that were predicted."""
        self.reads_images = predictor.collator.pixels is not None

    def prepare(self, post: Post) -> Post:
        """The post as it is predicted."""
        return post

    def check(self, target: Path) -> None:
        """Refuse an output that could not be replaced."""
        if target.is_dir():
            raise ValueError(f"--output {target} is a folder; name a file.")

    def head(self) -> dict[str, str]:
        """What a resumed run must have in common with the lines that are written, once ``begin`` was called."""
        return {}

    def begin(self, kept: Sequence[str]) -> str:
        """What comes before the first prediction, of posts with these kept columns."""
        self.kept = tuple(kept)
        return ""

    def line(self, prediction: dict[str, Any]) -> str:
        """One prediction."""
        return json_line(prediction)

    def finish(self, part: Path, target: Path) -> None:
        """Give what was written the name of the output, replacing an older one."""
        sync_replace(part, target)

    def remark(self, counts: Counts) -> str:
        """What the user should know at the end."""
        bad = counts.set_aside.total()
        return f"; {bad} of them could not be predicted and have an error instead" if bad else ""


class Page(JsonLines):
    """A page of HTML: each post with its predictions, and words in the color of what they weigh."""

    def begin(self, kept: Sequence[str]) -> str:
        self.kept = tuple(kept)
        return head(self.method)

    def line(self, prediction: dict[str, Any]) -> str:
        names = [task.name for task in self.tasks]
        return whole_characters(post_block(prediction, names, self.kept))


class Table(JsonLines):
    """CSV: kept columns, text, then per task the prediction and the score of every label, and what was remarked."""

    explains = False

    def begin(self, kept: Sequence[str]) -> str:
        self.columns = [*kept, "text"]
        for task in self.tasks:
            self.columns += [task.name] + [
                f"{task.name}/{label}" for label in task.labels if task.mode != "tokens"
            ]
            self.columns += [prior_column(task)] if task.name in self.adapted else []
        self.columns += ["error", "image_error"] if self.reads_images else ["error"]
        self.columns += REMARKS[self.predictor.long.mode]
        return csv_line(self.columns, raw=self.raw)

    def head(self) -> dict[str, str]:
        # Only the first line names them.
        return {"the columns": ",".join(self.columns)}

    def line(self, prediction: dict[str, Any]) -> str:
        row = dict(prediction) | table_cells(prediction, self.tasks)
        if prediction.get("truncated"):
            row["truncated"] = "true"
        cells = (row.get(column, "") for column in self.columns)
        whole = (whole_characters(cell) if isinstance(cell, str) else cell for cell in cells)
        return csv_line(whole, raw=self.raw)


class Parquet(JsonLines):
    """The objects of ``JsonLines`` as rows of typed columns: one file, or a folder of shards."""

    explains = packed = False

    def check(self, target: Path) -> None:
        check_parquet(target)

    def finish(self, part: Path, target: Path) -> None:
        write_parquet(part, target, kept=self.kept, tasks=[task.name for task in self.tasks])


class TweetEval(JsonLines):
    """One label id per line, one line per post, nothing else: the format of TweetEval's own scorer.

    Every line needs an id, so a line that cannot be read or is empty is predicted as if it were a
    lone user name.
    """

    explains = False

    def __init__(self, predictor: Predictor, tasks: Sequence[Task]) -> None:
        super().__init__(predictor, tasks)
        names = ", ".join(task.name for task in predictor.tasks)
        if len(tasks) != 1:
            raise ValueError(
                f"--format tweeteval writes one task: choose it with --task ({names})."
            )
        self.task = tasks[0]
        if not self.task.rules.exclusive:
            raise ValueError(
                f"--format tweeteval wants a task with one label per post; {self.task.name} is a {self.task.kind} task."
            )
        self.filler = predictor.exported.data_config.normalize.user or "@user"

    def prepare(self, post: Post) -> Post:
        authors = self.task.reads == "author"
        readable = not (post.error or text_problem(post.text, post.words, authors=authors))
        lacks_pair = bool(pair_problem(second_text(post.pair), [self.task]))
        if readable and not lacks_pair:
            return post
        return Post(
            text=post.text if readable else self.filler,
            words=post.words if readable else None,
            pair=self.filler if lacks_pair else post.pair,
            image=post.image,
        )

    def line(self, prediction: dict[str, Any]) -> str:
        if self.task.name not in prediction:
            raise ValueError(f"{prediction['error']}; a line of tweeteval has no place for that.")
        return f"{self.task.labels.index(prediction[self.task.name]['label'])}\n"

    def remark(self, counts: Counts) -> str:
        if counts.filled:
            what = (
                "a text, or the second text that the prompt wants,"
                if wants_pair(self.task.prompt)
                else "a text"
            )
            print(
                f"{counts.filled} lines without {what} were predicted as {self.filler!r}",
                file=sys.stderr,
            )
        return ""


def table_cells(prediction: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """Cells of a flat table: of each task that has one the prediction, and the score of every label."""
    row = {}
    for task in tasks:
        if task.name in prediction:
            row[task.name] = _cell(task, prediction[task.name])
            scores = {} if task.mode == "tokens" else prediction[task.name].get("scores", {})
            row |= {f"{task.name}/{label}": score for label, score in scores.items()}
            if "prior" in prediction[task.name]:
                row[prior_column(task)] = prediction[task.name]["prior"]
    return row


def prior_column(task: Task) -> str:
    """The column of a table that says how scores were adapted: ``task/prior``, with _ behind it where a label is so."""
    column = f"{task.name}/prior"
    while column.removeprefix(f"{task.name}/") in task.labels:
        column += "_"
    return column


def _cell(task: Task, prediction: dict[str, Any]) -> Any:
    """The prediction itself: a label, a number, or names joined by blanks (tags, one per word) or ; (labels)."""
    if task.mode == "tokens":
        return " ".join(prediction["tags"])
    value = next(iter(prediction.values()))
    return ";".join(value) if isinstance(value, list) else value


WRITERS: dict[str, type[JsonLines]] = {
    "jsonl": JsonLines,
    "csv": Table,
    "parquet": Parquet,
    "tweeteval": TweetEval,
    "html": Page,
}
"""``--format`` -> writer."""
