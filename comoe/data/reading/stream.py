"""The rows of an input one after another, however many there are: files, Parquet folders, hub data sets, a pipe."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet

from comoe.config.errors import unknown_name
from comoe.data.reading.files import COMPRESSED, Met, Row, Rows, open_bytes
from comoe.data.reading.sources import ENDINGS, TEXT_ROWS, format_of
from comoe.data.reading.tables import class_names, load_hub, name_labels, parquet_features
from comoe.data.report import BadRow

STDIN, HUB = "-", "hf://"
"""Standard input; the beginning of a data set of the hub."""

PEEKED = 1024
"""Rows of an input that can be read only once, or whose columns no one has listed, that are looked
at for its columns."""

BATCH = 1024
"""Rows of a Parquet file that are unpacked at a time."""


@dataclass(frozen=True, slots=True)
class RowStream:
    """An input that is read as it is asked for."""

    source: str
    """As of ``open_stream``."""
    file: str
    """What messages call it."""
    start: Callable[[Met], Rows]
    """The rows from the first one on; of a pipe only once."""
    root: Path
    """Folder that paths of images start from."""
    plain: bool = False
    """Whether it has lines of text, without columns."""
    columns: tuple[str, ...] = ()
    """Its columns; of a pipe or a hub data set those of the first ``PEEKED`` rows."""
    rows: int = 0
    """Rows that can be read, as far as looked at; 0 means none."""
    total: int | None = None
    """Rows, also those that cannot be read; None where nobody knows before the end."""
    met: Met = field(default_factory=Met)
    """Filled while it is read."""
    project: Callable[[Iterable[str]], RowStream] | None = None
    """The same with some of the columns, where that is faster."""

    def read(self, columns: Iterable[str] = ()) -> Rows:
        """All rows, with at least these columns."""
        chosen = self.project(columns) if self.project else self
        return chosen.start(self.met)


def open_stream(source: str, *, format: str | None = None) -> RowStream:
    """Find an input, look at its columns, and count its rows where that is possible.

    A text file is read through once for that: it is then known whether it can be read at all, and
    which columns its JSON objects have.

    Args:
        source: a file, a folder of Parquet files, ``hf://name[:split]``, or - for standard input.
        format: key of ``TEXT_ROWS``, or parquet; None goes by the ending of the file.

    Raises:
        ValueError: nothing there, or it cannot be read.
    """
    if format is not None and format not in (*TEXT_ROWS, "parquet"):
        raise unknown_name("--input-format", format, (*TEXT_ROWS, "parquet"))
    if source.startswith(HUB):
        return _hub(source)
    if source == STDIN:
        if format not in TEXT_ROWS:
            raise ValueError(
                f"--input - wants --input-format, one of {', '.join(TEXT_ROWS)}; Parquet cannot be read from a pipe."
            )
        return _peeked(_text(source, format))
    path = Path(source)
    if path.is_dir():
        return _parquet(path)
    if not path.is_file():
        raise ValueError(f"--input {source}: there is no such file.")
    format = format or format_of(path)
    if format is None:
        ending = "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffix)
        what = unknown_name("ending that can be read", ending.lower(), ENDINGS)
        raise ValueError(f"--input {source}: {what}")
    return _parquet(path) if format == "parquet" else _counted(_text(source, format))


def _text(source: str, format: str) -> RowStream:
    """A text file, or standard input."""
    path, file = Path(source), "standard input" if source == STDIN else source
    read = TEXT_ROWS[format]
    if plain := format == "txt":
        read = partial(read, every_line=True)

    def start(met: Met) -> Rows:
        opened = open_bytes(path) if source != STDIN else contextlib.nullcontext(sys.stdin.buffer)
        with opened as pieces:
            yield from _counting(read(pieces, file, met), met)

    root = Path() if source == STDIN else path.parent
    return RowStream(source=source, file=file, start=start, root=root, plain=plain)


def _counting(rows: Rows, met: Met) -> Rows:
    for line, row in rows:
        if isinstance(row, BadRow):
            met.bad += 1
        else:
            met.rows += 1
        yield line, row


def _counted(stream: RowStream) -> RowStream:
    """What can be read twice, with all of its columns and the number of its rows."""
    met = Met()
    for _ in stream.start(met):
        pass
    if message := met.joined_lines(stream.file):
        print(f"warning: {message}", file=sys.stderr)
    return replace(
        stream, columns=tuple(met.columns), rows=met.rows, total=met.rows + met.bad, met=Met()
    )


def _peeked(stream: RowStream) -> RowStream:
    """What is read once, with the columns of its first rows."""
    met = Met()
    rows = stream.start(met)
    first = list(itertools.islice(rows, PEEKED))
    columns, count = tuple(met.columns), met.rows

    def start(_: Met) -> Rows:
        yield from itertools.chain(first, rows)
        if message := met.joined_lines(stream.file):
            print(f"warning: {message}", file=sys.stderr)

    total = met.rows + met.bad if len(first) < PEEKED else None
    return replace(stream, start=start, columns=columns, rows=count, total=total, met=met)


def _parquet(path: Path) -> RowStream:
    """A Parquet file, or all in a folder, in the order of their names; folders named ``column=value`` give a column."""
    files = {path: {}} if path.is_file() else _parquet_files(path)
    columns: dict[str, None] = {}
    features: dict[str, Any] = {}
    total = 0
    for file, named in files.items():
        with _parquet_errors(file):
            schema = pyarrow.parquet.read_schema(file)
            total += pyarrow.parquet.read_metadata(file).num_rows
        columns.update(dict.fromkeys((*schema.names, *named)))
        features |= parquet_features(schema)

    def start(met: Met, wanted: Iterable[str] = tuple(columns)) -> Rows:
        chosen, numbers = frozenset(wanted), itertools.count(1)
        for file, named in files.items():
            given = {column: value for column, value in named.items() if column in chosen}
            for row in _parquet_rows(file, chosen, features):
                met.rows += 1
                yield next(numbers), row | given

    stream = RowStream(
        source=str(path),
        file=str(path),
        start=start,
        root=path if path.is_dir() else path.parent,
        columns=tuple(columns),
        rows=total,
        total=total,
    )
    return replace(
        stream, project=lambda wanted: replace(stream, start=partial(start, wanted=tuple(wanted)))
    )


def _parquet_files(folder: Path) -> dict[Path, dict[str, str]]:
    """File -> columns that the names of its folders give (Hive's form); hidden files and those of a writer are none."""
    found = {}
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        if not any(part.startswith((".", "_")) for part in parts):
            pairs = (unquote(part).partition("=") for part in parts[:-1])
            found[file] = {name: value for name, sign, value in pairs if sign}
    if not found:
        raise ValueError(f"--input {folder}: the folder has no .parquet file.")
    return found


def _parquet_rows(file: Path, wanted: frozenset[str], features: Mapping[str, Any]) -> Iterator[Row]:
    with _parquet_errors(file):
        # Pages are read as they are needed: a row group may be the whole file.
        opened = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        with opened:
            columns = [name for name in opened.schema_arrow.names if name in wanted]
            known = class_names(columns, features)
            batches = opened.iter_batches(batch_size=BATCH, columns=columns, use_threads=False)
            for batch in batches:
                for row in batch.to_pylist():
                    yield name_labels(row, known, file=str(file))


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    # OverflowError and others: dates that Python has not; OSError: what cannot be unpacked.
    except (pyarrow.ArrowException, OSError, ArithmeticError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({error}); write it anew, or correct the format."
        ) from error


def _hub(source: str) -> RowStream:
    """A split of a data set of the hub, fetched while it is read. Its Python code is never run."""
    name, _, split = source.removeprefix(HUB).partition(":")
    loaded = load_hub("--input", name, streaming=True)
    if not split and len(loaded) > 1:
        raise ValueError(f"--input {source}: name a split: {HUB}{name}:{next(iter(loaded))}; "
                         f"there is {', '.join(loaded)}.")  # fmt: skip
    split = split or next(iter(loaded))
    if split not in loaded:
        raise ValueError(f"--input {source}: {unknown_name('split', split, loaded)}")
    data, file = loaded[split], f"{name} ({split})"
    features: dict[str, Any] = data.features.to_dict() if data.features else {}

    def start(met: Met) -> Rows:
        known = class_names(tuple(features), features)
        met.columns.update(dict.fromkeys(features))
        try:
            for number, row in enumerate(data, start=1):
                met.rows += 1
                met.columns.update(dict.fromkeys(row))
                yield number, name_labels(dict(row), known, file=file)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--input {source}: it could not be read on ({type(error).__name__}: {error}); try again."
            ) from error

    return _peeked(RowStream(source=source, file=file, start=start, root=Path()))
