"""Files of posts in, files of predictions out: what ``comoe predict`` does, in pieces of bounded size."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from comoe.config.errors import unknown_name
from comoe.config.files import atomic_file, csv_line, lock_beside, locked, same_file
from comoe.config.recipe import OWN_COLUMNS
from comoe.data.posts import Post
from comoe.data.reading.files import RawSplit, json_line, read_text
from comoe.data.reading.inputs import (
    USUAL_TEXT,
    check_columns,
    choose_column,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import cell_text, read_rows
from comoe.data.reading.sources import ENDINGS, read_input
from comoe.inference.columns import pair_problem, second_text, text_problem
from comoe.inference.predictor import Predictor
from comoe.tasks.labels import whole_characters
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task


def read_post_file(
    path: Path,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    image_column: str | None = None,
    keep: Sequence[str] | None = None,
    model: Predictor | None = None,
    tasks: Sequence[Task] = (),
) -> list[Post]:
    """The posts of a file; a line that cannot be read becomes a post with an error, and keeps its place.

    Columns that are not given are those that ``tasks`` of ``model`` had in training, if the file has
    them. In a .txt file every line is a post. Cells stay as they are: the predictor reports a wrong
    one.

    Args:
        path: the file.
        text_column: column with the post.
        pair_column: column with the second text.
        image_column: column with the image.
        keep: columns to copy to the predictions; None is ``id``, if there is one.
        model: that predicts.
        tasks: to predict.

    Raises:
        ValueError: no such file or column, an ending that cannot be read, an image column for a
            model of texts, or a column to keep that the predictions have themselves.
    """
    raw, plain = _read_file(path)
    if plain or raw.rows:
        trained, names = model and model.image_column, None if plain else raw.columns
        image_column = choose_column(trained, asked=image_column, columns=names)
    if plain:
        text_column, pair_column = USUAL_TEXT, None
    elif raw.rows:
        known = {} if model is None else model.exported.config
        text_column = choose_text(known, tasks, asked=text_column, columns=raw.columns)
        pair_column = choose_pair(known, tasks, asked=pair_column, columns=raw.columns)
    kept = _kept_columns(keep, raw.columns, tasks)
    wanted = {"--text-column": text_column, "--pair-column": pair_column}
    for some in (wanted | {"--image-column": image_column}, *({"--keep": name} for name in kept)):
        check_columns(raw, some)

    def read(row: Mapping[str, Any]) -> Post:
        cell = row.get(text_column)
        words = cell if isinstance(cell, list) else None
        return Post(
            text=cell if words is None else " ".join(map(str, words)),
            words=words,
            pair=row.get(pair_column),
            image=row.get(image_column),
            # Text and whole numbers stay, anything else becomes text.
            columns={
                column: cell if isinstance(cell := row.get(column), (str, int)) else cell_text(cell)
                for column in kept
            },
        )

    return list(read_rows(raw, read))


def _read_file(path: Path) -> tuple[RawSplit, bool]:
    """The rows, and whether they are lines of plain text."""
    if not path.is_file():
        raise ValueError(f"--input {path}: there is no such file.")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"--input {path}: {unknown_name('ending that can be read', ending, ENDINGS)}"
        )
    if ENDINGS[ending] == "txt":
        return read_text(path, every_line=True), True
    raw = read_input("--input", str(path))
    if raw.joined:
        print(f"warning: {raw.joined_lines()}", file=sys.stderr)
    return raw, False


def _kept_columns(
    keep: Sequence[str] | None, columns: Sequence[str], tasks: Sequence[Task]
) -> list[str]:
    own = {*OWN_COLUMNS, *(task.name for task in tasks)}
    if keep is None:
        return [column for column in ("id",) if column in columns and column not in own]
    for column in keep:
        if column.partition("/")[0] in own:
            raise ValueError(
                f"--keep {column}: the predictions have this name themselves; rename the column."
            )
    return list(dict.fromkeys(keep))


CHUNK = 1024
"""Posts predicted before they are written; they are sorted by length within a chunk."""


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    *,
    format: str = "jsonl",
    tasks: Sequence[str] | None = None,
    explain: bool = False,
    batch_size: int = 64,
    raw_csv: bool = False,
    **columns: Any,
) -> str:
    """Predict every post of a file, in order, one line per post; a terminal shows a progress bar.

    Args:
        predictor: the model.
        source: .txt (one post per line), .csv, .tsv, .jsonl, .parquet.
        target: the predictions; missing folders are made. Replaced whole.
        format: key of ``WRITERS``.
        tasks: names of the tasks; None is all.
        explain: add the attention weight of each word (jsonl; tasks with a pooled head).
        batch_size: posts per forward pass.
        raw_csv: leave text in a CSV file as it is, also where a spreadsheet would run it as a formula.
        columns: ``text_column``, ``pair_column``, ``image_column`` and ``keep`` of ``read_post_file``.

    Returns:
        One sentence on what was done, with the number of posts without a prediction.

    Raises:
        ValueError: a file, column, task or format that does not exist or does not fit, a target
            that is the source or that another process writes, or no post has a prediction.
    """
    chosen = [task for task in predictor.tasks if tasks is None or task.name in tasks]
    writer_class = _writer_class(format, chosen, explain=explain, keep=columns.get("keep"))
    writer = writer_class(predictor, chosen)
    if raw_csv and not isinstance(writer, Table):
        raise ValueError("--raw-csv wants --format csv; the others hold text as it is.")
    writer.raw = raw_csv
    if same_file(target, source):
        raise ValueError(f"--output {target} is the --input itself; name another file.")
    with _only_one(target):
        return _predict_into(
            target, writer, source, tasks=tasks, explain=explain, batch_size=batch_size, **columns
        )


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Make the folder of the predictions, and let one process at a time write them; pipes and devices take any."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        yield
        return
    with locked(lock_beside(target), f"--output {target}"):
        yield


def _predict_into(
    target: Path,
    writer: JsonLines,
    source: Path,
    *,
    tasks: Sequence[str] | None,
    explain: bool,
    batch_size: int,
    **columns: Any,
) -> str:
    predictor = writer.predictor
    posts = read_post_file(source, **columns, model=predictor, tasks=writer.tasks)
    errors, without_image = [], 0
    # None: no bar where standard error is no terminal.
    bar = tqdm(total=len(posts), unit="post", disable=None, dynamic_ncols=True)
    with atomic_file(target, "w") as file, bar:
        writer.begin(file, next((post.columns for post in posts if not post.error), ()))
        for start in range(0, len(posts), CHUNK):
            chunk = [writer.prepare(post) for post in posts[start : start + CHUNK]]
            options = {"tasks": tasks, "explain": explain, "batch_size": batch_size}
            for prediction in _predict(predictor, chunk, root=source.parent, **options):
                writer.write(file, prediction)
                errors += [prediction["error"]] if "error" in prediction else []
                without_image += "image_error" in prediction
            bar.update(len(chunk))
    if not posts:
        return f"{source} has no posts; {target} has no predictions"
    if len(errors) == len(posts):
        why = f"see {target}; the first: {errors[0]}"
        raise ValueError(f"none of the {len(posts)} posts could be predicted, {why}.")
    done = f"{len(posts)} posts predicted in {target}{writer.remark(len(errors))}"
    if without_image:
        done += f"; {without_image} of them without their bad image (image_error)"
    return done


def _writer_class(
    format: str, tasks: Sequence[Task], *, explain: bool, keep: Sequence[str] | None
) -> type[JsonLines]:
    if format not in WRITERS:
        raise unknown_name("--format", format, WRITERS)
    if keep and WRITERS[format] is TweetEval:
        raise ValueError("--keep wants --format jsonl or csv; tweeteval has label ids alone.")
    if explain and WRITERS[format] is not JsonLines:
        raise ValueError(
            "--explain wants --format jsonl; the others have no place for the weights of words."
        )
    if explain and not any(task.mode == "pooled" for task in tasks):
        print(
            "--explain: none of these tasks has attention; only tasks with a pooled head have it",
            file=sys.stderr,
        )
    return WRITERS[format]


class JsonLines:
    """One object per post: kept columns, ``text``, the prediction of each task, or ``error``."""

    def __init__(self, predictor: Predictor, tasks: Sequence[Task]) -> None:
        self.predictor, self.tasks, self.raw = predictor, tasks, False
        self.reads_images = predictor.collator.pixels is not None

    def prepare(self, post: Post) -> Post:
        """The post as it is predicted."""
        return post

    def begin(self, file: TextIO, kept: Iterable[str]) -> None:
        """Write what comes before the first prediction, of posts with these kept columns."""

    def write(self, file: TextIO, prediction: dict[str, Any]) -> None:
        """Write one prediction."""
        file.write(json_line(prediction))

    def remark(self, bad: int) -> str:
        """What the user should know at the end."""
        return f"; {bad} of them could not be predicted and have an error instead" if bad else ""


class Table(JsonLines):
    """CSV: kept columns, text, then per task the prediction and the score of every label, and the error."""

    def begin(self, file: TextIO, kept: Iterable[str]) -> None:
        self.columns = [*kept, "text"]
        for task in self.tasks:
            self.columns += [task.name] + [
                f"{task.name}/{label}" for label in task.labels if task.mode != "tokens"
            ]
        self.columns += ["error", "image_error"] if self.reads_images else ["error"]
        file.write(csv_line(self.columns, raw=self.raw))

    def write(self, file: TextIO, prediction: dict[str, Any]) -> None:
        row = dict(prediction)
        for task in self.tasks:
            if task.name in prediction:
                row[task.name] = _cell(task, prediction[task.name])
                scores = {} if task.mode == "tokens" else prediction[task.name].get("scores", {})
                row |= {f"{task.name}/{label}": score for label, score in scores.items()}
        cells = (row.get(column, "") for column in self.columns)
        whole = (whole_characters(cell) if isinstance(cell, str) else cell for cell in cells)
        file.write(csv_line(whole, raw=self.raw))


class TweetEval(JsonLines):
    """One label id per line, one line per post, nothing else: the format of TweetEval's own scorer.

    Every line needs an id, so a line that cannot be read or is empty is predicted as if it were a
    lone user name.
    """

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
        self.filled = 0

    def prepare(self, post: Post) -> Post:
        readable = not (post.error or text_problem(post.text, post.words))
        lacks_pair = bool(pair_problem(second_text(post.pair), [self.task]))
        if readable and not lacks_pair:
            return post
        self.filled += 1
        return Post(
            text=post.text if readable else self.filler,
            words=post.words if readable else None,
            pair=self.filler if lacks_pair else post.pair,
            image=post.image,
        )

    def write(self, file: TextIO, prediction: dict[str, Any]) -> None:
        if self.task.name not in prediction:
            raise ValueError(f"{prediction['error']}; a line of tweeteval has no place for that.")
        file.write(f"{self.task.labels.index(prediction[self.task.name]['label'])}\n")

    def remark(self, bad: int) -> str:
        if self.filled:
            what = (
                "a text, or the second text that the prompt wants,"
                if wants_pair(self.task.prompt)
                else "a text"
            )
            print(
                f"{self.filled} lines without {what} were predicted as {self.filler!r}",
                file=sys.stderr,
            )
        return ""


def _predict(
    predictor: Predictor, posts: Sequence[Post], *, root: Path, **options: Any
) -> list[dict[str, Any]]:
    predictions = predictor(
        [post.text for post in posts],
        pairs=[post.pair for post in posts],
        words=[post.words for post in posts],
        images=[post.image for post in posts],
        image_root=root,
        **options,
    )
    for post, prediction in zip(posts, predictions, strict=True):
        if post.error:
            prediction["error"] = f"line {post.line} {post.error.rule}"
    return [
        {**post.columns, **prediction} for post, prediction in zip(posts, predictions, strict=True)
    ]


def _cell(task: Task, prediction: dict[str, Any]) -> Any:
    """The prediction itself: a label, a number, or names joined by blanks (tags, one per word) or ; (labels)."""
    if task.mode == "tokens":
        return " ".join(prediction["tags"])
    value = next(iter(prediction.values()))
    return ";".join(value) if isinstance(value, list) else value


WRITERS: dict[str, type[JsonLines]] = {"jsonl": JsonLines, "csv": Table, "tweeteval": TweetEval}
"""``--format`` -> writer."""
