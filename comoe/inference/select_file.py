"""A file of posts in, a folder of posts to label out: what ``comoe select`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.config.files import (
    DEFUSED,
    check_target,
    csv_line,
    defused_columns,
    is_read_from,
    read_json,
    write_atomic,
    write_json,
)
from comoe.data.posts import Post
from comoe.data.reading.label_studio import is_labeled
from comoe.data.reading.sources import format_of
from comoe.inference.export_config import export_name
from comoe.inference.label_studio import PAIR, TEXT, interface, labeling_task
from comoe.inference.options import PredictOptions
from comoe.inference.post_stream import open_posts
from comoe.inference.predictor import Predictor
from comoe.inference.select import Candidate, Selection, Selector
from comoe.inference.writers import table_cells
from comoe.tasks.task import Task

TASKS, INTERFACE, TABLE = "posts.json", "interface.xml", "posts.csv"


def select_file(
    predictor: Predictor,
    source: Path | str,
    folder: Path,
    options: PredictOptions,
    *,
    strategy: str = "diverse",
    count: int = 200,
    exclude: Sequence[Path] = (),
    seed: int = 0,
) -> str:
    """Choose posts of a file and write them, the first to label first.

    Args:
        predictor: the model.
        source: as of ``comoe predict``.
        folder: gets ``posts.json``, ``interface.xml`` and ``posts.csv``; none of them may be there.
        options: tasks, columns and batch size.
        strategy: one of ``comoe.inference.select.STRATEGIES``.
        count: posts to choose.
        exclude: files of posts that are labeled already.
        seed: of the strategies that draw.

    Returns:
        A sentence on what was done.

    Raises:
        ValueError: a file, column, task or strategy that does not exist or does not fit; or no post
            is left to choose.
    """
    places = {name: folder / name for name in (TASKS, INTERFACE, TABLE)}
    _check_files(places, folder, (Path(source), *exclude), exclude)
    selector = Selector(
        predictor,
        strategy=strategy,
        tasks=options.tasks,
        seed=seed,
        batch_size=options.batch_size,
    )
    labeled = {
        selector.identity(post.text, post.pair)
        for path in exclude
        for post in _labeled(path, options, predictor, selector.tasks)
    }
    posts = open_posts(str(source), options, model=predictor, tasks=selector.tasks)
    for place in places.values():
        check_target(place)
    found = selector.choose(posts, count, excluded=labeled, root=posts.rows.root)
    if not found.chosen:
        raise ValueError(f"no post is left to choose: {_counted(found, source)}.")
    _write(found, selector, places, model=f"comoe {export_name(predictor.exported.folder)}")
    return f"{len(found.chosen):,} posts to label in {folder}; {_counted(found, source)}"


def _check_files(
    places: Mapping[str, Path], folder: Path, read: Sequence[Path], exclude: Sequence[Path]
) -> None:
    """ValueError before anything is predicted, where a file is missing or would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder.")
    for path in exclude:
        if not path.exists():
            raise ValueError(f"--exclude {path}: there is no such file.")
    for place in places.values():
        if any(is_read_from(place, path) for path in read):
            raise ValueError(f"{place} would replace what is read; name another --output.")
        # Labels may have been written into it.
        if place.exists():
            raise ValueError(
                f"{place} is there, perhaps with labels, and would be replaced; name another --output, or move it away."
            )


def _write(found: Selection, selector: Selector, places: Mapping[str, Path], *, model: str) -> None:
    with_pair = any(one.post.pair for one in found.chosen)
    tasks = [
        labeling_task(
            _data(one, with_pair), one.prediction, selector.tasks, model=model, score=_score(one)
        )
        for one in found.chosen
    ]
    places[TASKS].parent.mkdir(parents=True, exist_ok=True)
    write_atomic(places[INTERFACE], interface(selector.tasks, with_pair=with_pair))
    write_json(places[TASKS], tasks)
    write_atomic(places[TABLE], _table(found.chosen, selector.tasks, with_pair))


def _counted(found: Selection, source: Path | str) -> str:
    counted = {
        "labeled already": found.excluded,
        "like an earlier one": found.repeated,
        "without a prediction": found.unusable,
    }
    listed = ", ".join(f"{number:,} {what}" for what, number in counted.items() if number)
    return f"{source} has {found.seen:,}" + (f", of these {listed}" if listed else "")


def _labeled(
    path: Path, options: PredictOptions, predictor: Predictor, tasks: Sequence[Task]
) -> list[Post]:
    listed = _listed(path)
    if listed is not None:
        found = [task.get("data", task) for task in listed if is_labeled(task)]
        if not all(TEXT in data for data in found):
            raise ValueError(f"--exclude {path}: each of its tasks must have data with {TEXT}.")
        return [Post(text=data[TEXT], pair=data.get(PAIR)) for data in found]
    columns = PredictOptions(text_column=options.text_column, pair_column=options.pair_column)
    if format_of(path) == "txt":  # which has no columns
        columns = PredictOptions()
    return [
        post
        for post in open_posts(str(path), columns, model=predictor, tasks=tasks)
        if not post.error
    ]


def _listed(path: Path) -> list[Mapping[str, Any]] | None:
    """The tasks of a JSON list; None of another file, as a .json file may have JSON lines."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return None
    listed = read_json(path)
    return [task if isinstance(task, Mapping) else {} for task in listed]


def _data(one: Candidate, with_pair: bool) -> dict[str, Any]:
    pair = {PAIR: one.post.pair or ""} if with_pair else {}
    return {**one.post.columns, TEXT: one.post.text, **pair}


def _score(one: Candidate) -> float | None:
    """How sure the model is of the post, the mean over tasks that say so."""
    found = []
    for prediction in one.prediction.values():
        if isinstance(prediction, Mapping) and isinstance(prediction.get("scores"), Mapping):
            found.append(max(prediction["scores"].values()))
        elif isinstance(prediction, Mapping) and prediction.get("scores"):
            found.append(min(prediction["scores"]))
    return sum(found) / len(found) if found else None


def _table(chosen: Sequence[Candidate], tasks: Sequence[Task], with_pair: bool) -> str:
    """The posts as CSV: what a row of the predictions has, and how soon to label it."""
    kept = list(chosen[0].post.columns)
    heads = [
        "priority",
        *kept,
        TEXT,
        *([PAIR] if with_pair else []),
        *(task.name for task in tasks),
    ]
    rows = []
    for one in chosen:
        row = _data(one, with_pair) | table_cells(one.prediction, tasks)
        row["priority"] = one.priority
        rows.append(row | {DEFUSED: defused_columns(row)})
    if any(row[DEFUSED] for row in rows):
        heads.append(DEFUSED)
    heads = list(dict.fromkeys(heads))
    lines = [heads, *([row.get(head) for head in heads] for row in rows)]
    return "".join(map(csv_line, lines))
