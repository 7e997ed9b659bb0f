"""Files of posts in, files of predictions out: what ``comoe predict`` does, in pieces of bounded size."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comoe.config.errors import unknown_name
from comoe.config.files import atomic_file, lock_beside, locked, same_file
from comoe.config.recipe import OWN_COLUMNS
from comoe.data.posts import Post
from comoe.data.reading.files import RawSplit, read_text
from comoe.data.reading.inputs import (
    USUAL_TEXT,
    check_columns,
    choose_column,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import cell_text, read_rows
from comoe.data.reading.sources import ENDINGS, read_input
from comoe.inference.options import PredictOptions
from comoe.inference.predictor import Predictor
from comoe.inference.writers import JsonLines, make_writer
from comoe.tasks.task import Task

DEFAULT = PredictOptions()


def read_post_file(
    path: Path,
    options: PredictOptions = DEFAULT,
    *,
    model: Predictor | None = None,
    tasks: Sequence[Task] = (),
) -> list[Post]:
    """The posts of a file; a line that cannot be read becomes a post with an error, and keeps its place.

    Columns that are not given are those that ``tasks`` of ``model`` had in training, if the file has
    them. In a .txt file every line is a post. Cells stay as they are: the predictor reports a wrong
    one.

    Args:
        path: the file.
        options: the columns to read and to keep.
        model: that predicts.
        tasks: to predict.

    Raises:
        ValueError: no such file or column, an ending that cannot be read, an image column for a
            model of texts, or a column to keep that the predictions have themselves.
    """
    raw, plain = _read_file(path)
    text_column, pair_column, image_column = (
        options.text_column,
        options.pair_column,
        options.image_column,
    )
    if plain or raw.rows:
        trained, names = model and model.image_column, None if plain else raw.columns
        image_column = choose_column(trained, asked=image_column, columns=names)
    if plain:
        text_column, pair_column = USUAL_TEXT, None
    elif raw.rows:
        known = {} if model is None else model.exported.config
        text_column = choose_text(known, tasks, asked=text_column, columns=raw.columns)
        pair_column = choose_pair(known, tasks, asked=pair_column, columns=raw.columns)
    kept = _kept_columns(options.keep, raw.columns, tasks)
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
    predictor: Predictor, source: Path, target: Path, options: PredictOptions = DEFAULT
) -> str:
    """Predict every post of a file, in order, one line per post; a terminal shows a progress bar.

    Args:
        predictor: the model.
        source: .txt (one post per line), .csv, .tsv, .jsonl, .parquet.
        target: the predictions; missing folders are made. Replaced whole.
        options: what to predict, and how it is written.

    Returns:
        One sentence on what was done, with the number of posts without a prediction.

    Raises:
        ValueError: a file, column, task or format that does not exist or does not fit, a target
            that is the source or that another process writes, or no post has a prediction.
    """
    writer = make_writer(predictor, options)
    if same_file(target, source):
        raise ValueError(f"--output {target} is the --input itself; name another file.")
    with _only_one(target):
        return _predict_into(target, writer, source, options)


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Make the folder of the predictions, and let one process at a time write them; pipes and devices take any."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        yield
        return
    with locked(lock_beside(target), f"--output {target}"):
        yield


def _predict_into(target: Path, writer: JsonLines, source: Path, options: PredictOptions) -> str:
    predictor = writer.predictor
    posts = read_post_file(source, options, model=predictor, tasks=writer.tasks)
    errors, without_image = [], 0
    # None: no bar where standard error is no terminal.
    bar = tqdm(total=len(posts), unit="post", disable=None, dynamic_ncols=True)
    with atomic_file(target, "w") as file, bar:
        writer.begin(file, next((post.columns for post in posts if not post.error), ()))
        for start in range(0, len(posts), CHUNK):
            chunk = [writer.prepare(post) for post in posts[start : start + CHUNK]]
            for prediction in _predict(predictor, chunk, source.parent, options):
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


def _predict(
    predictor: Predictor, posts: Sequence[Post], root: Path, options: PredictOptions
) -> list[dict[str, Any]]:
    predictions = predictor(
        [post.text for post in posts],
        pairs=[post.pair for post in posts],
        words=[post.words for post in posts],
        images=[post.image for post in posts],
        image_root=root,
        tasks=options.tasks,
        batch_size=options.batch_size,
        explain=options.explain,
    )
    for post, prediction in zip(posts, predictions, strict=True):
        if post.error:
            prediction["error"] = f"line {post.line} {post.error.rule}"
    return [
        {**post.columns, **prediction} for post, prediction in zip(posts, predictions, strict=True)
    ]
