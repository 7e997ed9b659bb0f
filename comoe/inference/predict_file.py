"""Files of posts in, files of predictions out: what ``launch/predict.py`` does, in pieces of bounded size."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from comoe.config.errors import unknown_name
from comoe.config.files import atomic_file, same_file
from comoe.data.posts import Post
from comoe.data.reading.files import json_line, read_text
from comoe.data.reading.inputs import check_columns, choose_column, choose_pair
from comoe.data.reading.rows import read_rows
from comoe.data.reading.sources import ENDINGS, read_input
from comoe.inference.predictor import Predictor, pair_problem, second_text, text_problem
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task


def read_posts(
    path: Path,
    *,
    text_column: str = "text",
    pair_column: str | None = None,
    image_column: str | None = None,
    model: Predictor | None = None,
    tasks: Sequence[Task] = (),
) -> list[Post]:
    """The posts of a file; a line that cannot be read becomes a post with an error, and keeps its place.

    The image column of ``model`` is read unless ``image_column`` names another, and the column of
    second texts that ``tasks`` had in training unless ``pair_column`` names another. In a .txt file
    every line is a post. Cells stay as they are: the predictor says what is wrong with one.

    Raises:
        ValueError: no such file or column, an ending that cannot be read, or an image column for a
            model of texts.
    """
    if not path.is_file():
        raise ValueError(f"--input {path}: there is no such file.")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"--input {path}: {unknown_name('ending that can be read', ending, ENDINGS)}"
        )
    plain = ENDINGS[ending] == "txt"
    raw = read_text(path, every_line=True) if plain else read_input("--input", str(path))
    if plain or raw.rows:
        image_column = choose_column(
            None if model is None else model.image_column,
            asked=image_column,
            columns=None if plain else raw.columns,
        )
    if plain:
        text_column, pair_column = "text", None
    elif raw.rows:
        known = {} if model is None else model.exported.config
        pair_column = choose_pair(known, tasks, asked=pair_column, columns=raw.columns)
    wanted = {
        "--text-column": text_column,
        "--pair-column": pair_column,
        "--image-column": image_column,
    }
    check_columns(raw, wanted)

    def read(row: Mapping[str, Any]) -> Post:
        cell = row.get(text_column)
        words = cell if isinstance(cell, list) else None
        return Post(
            text=cell if words is None else " ".join(map(str, words)),
            words=words,
            pair=row.get(pair_column),
            image=row.get(image_column),
        )

    return list(read_rows(raw, read))


CHUNK = 1024
"""Posts answered before they are written; they are sorted by length within a chunk."""


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    *,
    format: str = "jsonl",
    tasks: Sequence[str] | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    image_column: str | None = None,
    explain: bool = False,
    batch_size: int = 64,
    progress: bool = True,
) -> str:
    """Predict every post of a file, in order, one line per post.

    Args:
        predictor: the model.
        source: .txt (one post per line), .csv, .tsv, .jsonl.
        target: the predictions; missing folders are made. Replaced whole.
        format: key of ``WRITERS``.
        tasks: names of the tasks; None is all.
        text_column: column with the post, unless the file is .txt.
        pair_column: column with the second text; None takes that of training, if it is there.
        image_column: column with the image, a path; None takes that of training, or ``image``.
        explain: add the attention weight of each word (jsonl; tasks with a pooled head).
        batch_size: posts per forward pass.
        progress: show a bar.

    Returns:
        One sentence on what was done, with the number of posts without a prediction.

    Raises:
        ValueError: a file, column, task or format that does not exist or does not fit, a target
            that is the source, or no post has a prediction.
    """
    chosen = [task for task in predictor.tasks if tasks is None or task.name in tasks]
    writer = _writer(format, predictor, chosen, explain=explain)
    if same_file(target, source):
        raise ValueError(f"--output {target} is the --input itself; name another file.")
    columns = {"text_column": text_column, "pair_column": pair_column, "image_column": image_column}
    posts = read_posts(source, **columns, model=predictor, tasks=chosen)
    errors, blind = [], 0
    target.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(posts), unit="post", disable=not progress, dynamic_ncols=True)
    with atomic_file(target, "w") as file, bar:
        writer.begin(file)
        for start in range(0, len(posts), CHUNK):
            chunk = [writer.prepare(post) for post in posts[start : start + CHUNK]]
            options = {"tasks": tasks, "explain": explain, "batch_size": batch_size}
            for found in _answer(predictor, chunk, **options, root=source.parent):
                writer.write(file, found)
                errors += [found["error"]] if "error" in found else []
                blind += "image_error" in found
            bar.update(len(chunk))
    if posts and len(errors) == len(posts):
        why = f"see {target}; the first: {errors[0]}"
        raise ValueError(f"none of the {len(posts)} posts could be predicted, {why}.")
    done = f"{len(posts)} posts predicted in {target}{writer.remark(len(errors))}"
    return f"{done}; {blind} of them without their bad image (image_error)" if blind else done


def _writer(
    format: str, predictor: Predictor, tasks: Sequence[Task], *, explain: bool
) -> JsonLines:
    if format not in WRITERS:
        raise unknown_name("--format", format, WRITERS)
    if explain and WRITERS[format] is not JsonLines:
        raise ValueError(
            "--explain wants --format jsonl; the others have no place for the weights of words."
        )
    if explain and not any(task.mode == "pooled" for task in tasks):
        print(
            "--explain: none of these tasks has attention; only tasks with a pooled head have it",
            file=sys.stderr,
        )
    return WRITERS[format](predictor, tasks)


class JsonLines:
    """One object per post: ``text``, the answer of each task, or ``error``."""

    def __init__(self, predictor: Predictor, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.sees = predictor.collator.pixels is not None

    def prepare(self, post: Post) -> Post:
        """The post as it is to be answered."""
        return post

    def begin(self, file: TextIO) -> None:
        """Write what comes before the first answer."""

    def write(self, file: TextIO, answer: dict[str, Any]) -> None:
        """Write one answer."""
        file.write(json_line(answer))

    def remark(self, bad: int) -> str:
        """What the user should know at the end."""
        return f"; {bad} of them could not be answered and have an error instead" if bad else ""


class Table(JsonLines):
    """CSV: text, then per task the answer and the score of every label, and the error."""

    def begin(self, file: TextIO) -> None:
        self.columns = ["text"]
        for task in self.tasks:
            self.columns += [task.name] + [
                f"{task.name}/{label}" for label in task.labels if task.mode != "tokens"
            ]
        self.columns += ["error", "image_error"] if self.sees else ["error"]
        csv.writer(file, lineterminator="\n").writerow(self.columns)

    def write(self, file: TextIO, answer: dict[str, Any]) -> None:
        row = {
            "text": answer["text"],
            "error": answer.get("error", ""),
            "image_error": answer.get("image_error", ""),
        }
        for task in self.tasks:
            if task.name in answer:
                row[task.name] = _cell(task, answer[task.name])
                scores = {} if task.mode == "tokens" else answer[task.name].get("scores", {})
                row |= {f"{task.name}/{label}": score for label, score in scores.items()}
        csv.writer(file, lineterminator="\n").writerow(
            [row.get(column, "") for column in self.columns]
        )


class TweetEval(JsonLines):
    """One label id per line, one line per post, nothing else: the format of TweetEval's own scorer.

    Every line needs an id, so a line that cannot be read or is empty is answered as if it were a
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

    def write(self, file: TextIO, answer: dict[str, Any]) -> None:
        file.write(f"{self.task.labels.index(answer[self.task.name]['label'])}\n")

    def remark(self, bad: int) -> str:
        if self.filled:
            what = (
                "a text, or the second text that the prompt wants,"
                if wants_pair(self.task.prompt)
                else "a text"
            )
            print(
                f"{self.filled} lines without {what} were answered as {self.filler!r}",
                file=sys.stderr,
            )
        return ""


def _answer(
    predictor: Predictor,
    posts: Sequence[Post],
    *,
    tasks: Sequence[str] | None,
    explain: bool,
    batch_size: int,
    root: Path,
) -> list[dict[str, Any]]:
    answers = predictor(
        [post.text for post in posts],
        pairs=[post.pair for post in posts],
        words=[post.words for post in posts],
        images=[post.image for post in posts],
        image_root=root,
        tasks=tasks,
        batch_size=batch_size,
        explain=explain,
        progress=False,
    )
    for post, answer in zip(posts, answers, strict=True):
        if post.error:
            answer["error"] = f"line {post.line} {post.error.rule}"
    return answers


def _cell(task: Task, answer: dict[str, Any]) -> Any:
    """The answer itself: a label, a number, or names with blanks (tags, one per word) or ; (labels) between them."""
    if task.mode == "tokens":
        return " ".join(answer["tags"])
    value = next(iter(answer.values()))
    return ";".join(value) if isinstance(value, list) else value


WRITERS: dict[str, type[JsonLines]] = {"jsonl": JsonLines, "csv": Table, "tweeteval": TweetEval}
"""``--format`` -> writer."""
