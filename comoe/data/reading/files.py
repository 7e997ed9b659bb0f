"""Parsers of text files of labeled posts: plain rows with line numbers, and what could not be read.

Lines end at a line feed only: U+2028 and its kin inside a post are harmless.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from comoe.config.files import DEFUSED, read_csv_text
from comoe.data.report import BadRow


@dataclass(frozen=True, slots=True)
class RawSplit:
    """The rows of one split as the file has them."""

    file: str
    """What messages call it."""
    rows: list[dict[str, Any]]
    """Column -> cell, one per row; a column may lack in some rows."""
    lines: list[int]
    """Line of each row from 1, its number where the format has no lines."""
    columns: tuple[str, ...]
    """All columns, in the order in which they appear."""
    bad: list[BadRow] = field(default_factory=list)
    """Rows that could not be read."""
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> names of its labels in the order of their ids, where the data set tells."""
    joined: str = ""
    """What to tell of rows that take several lines; empty where there are none."""
    notes: tuple[str, ...] = ()
    """What the user should be told of the file."""
    image_folder: str | None = None
    """Folder that paths of images start from; None: that of the file."""


Row = dict[str, Any]
"""Column -> cell."""
Rows = Iterator[tuple[int, Row | BadRow]]
"""(line, row or what is wrong with it), in the order of the lines."""


@dataclass(slots=True)
class Met:
    """What a reader has met in a file so far."""

    columns: dict[str, None] = field(default_factory=dict)
    """All columns, in the order in which they appear."""
    rows: int = 0
    """Rows that could be read."""
    bad: int = 0
    """Rows that could not."""
    joined: int = 0
    """Rows that take several lines."""
    first_joined: tuple[int, int] = (0, 0)
    """First and last line of the first of them."""

    def joined_lines(self, file: str) -> str:
        """What to tell of ``joined``: nobody can know whether its quotes were meant."""
        if not self.joined:
            return ""
        first, last = self.first_joined
        return (
            f"{file}: {self.joined:,} rows take several lines, as a quoted cell may, the first one "
            f"lines {first} to {last}; a stray quote joins lines too: look at them."
        )


_HARMFUL = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, with its line feed.

    U+2028 and its kin, which end a line for some readers, what a terminal may obey, and half a
    surrogate pair are escaped.

    Raises:
        ValueError, TypeError: a cell that JSON cannot hold.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


COMPRESSED = (".gz", ".zst")
"""Endings of compressed text files, behind that of the format."""


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it ends in .gz or .zst.

    Raises:
        ValueError: what is read in the block cannot be unpacked.
    """
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".gz":
                yield gzip.open(file)
            elif path.suffix.lower() == ".zst":
                yield io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 20)
            else:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        # What the system refuses has a number; what is unpacked wrongly has none.
        if path.suffix.lower() not in COMPRESSED or getattr(error, "errno", None):
            raise
        raise ValueError(
            f"{path} cannot be unpacked ({error}); it is damaged or cut short: fetch it again."
        ) from error


def numbered_lines(pieces: Iterable[bytes], file: str) -> Iterator[tuple[int, str, BadRow | None]]:
    """(number, line without its end, what is wrong: not UTF-8, or a NUL byte) of a text file, read as it is asked for.

    Args:
        pieces: lines with their line feeds.
        file: for messages.

    Raises:
        ValueError: the whole file is in another encoding, or its lines end otherwise.
    """
    for number, piece in enumerate(pieces, start=1):
        if number == 1:
            if piece.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{file} is UTF-16; save it as UTF-8.")
            if not piece.endswith(b"\n") and b"\r" in piece[:-1]:
                raise ValueError(
                    f"{file} ends its lines with a carriage return alone; save it with line feeds (Unix or Windows)."
                )
            piece = piece.removeprefix(b"\xef\xbb\xbf")
            if not piece:
                return
        piece = piece.removesuffix(b"\n").removesuffix(b"\r")
        bad = None
        try:
            line = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            line = piece.decode("utf-8", errors="replace")
            rule = (
                f"is not valid UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
            )
            bad = BadRow(file, number, piece, rule)
        else:
            if "\x00" in line:
                rule = "holds a NUL byte; is the file UTF-16, or damaged? Save it as UTF-8."
                bad = BadRow(file, number, line, rule)
        yield number, line, bad


def text_lines(path: Path) -> tuple[list[str], list[BadRow]]:
    """All lines of a text file without their ends, and what is wrong with some; see ``numbered_lines``."""
    with open_bytes(path) as file:
        found = list(numbered_lines(file, str(path)))
    return [line for _, line, _ in found], [bad for _, _, bad in found if bad is not None]


def jsonl_rows(pieces: Iterable[bytes], file: str, met: Met) -> Rows:
    """JSON lines: one object per line; blank lines are passed over."""
    for number, line, bad in numbered_lines(pieces, file):
        if bad is None and not line.strip():
            continue
        row = bad or _json_row(line, file, number)
        if not isinstance(row, BadRow):
            met.columns.update(dict.fromkeys(row))
        yield number, row


def _json_row(line: str, file: str, number: int) -> Row | BadRow:
    try:
        row = json.loads(
            line, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_without_twins
        )
    # ValueError also covers whole numbers of thousands of digits; RecursionError, nesting without
    # end.
    except (ValueError, RecursionError) as error:
        what = (
            f"{error.msg}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        rule = f"is not valid JSON ({what}); there must be one whole object per line."
        return BadRow(file, number, line, rule)
    if not isinstance(row, dict):
        rule = 'is not a JSON object; write each post as {"text": ..., "label": ...}.'
        return BadRow(file, number, line, rule)
    return row


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON; write null where there is none")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twin = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twin!r} is there twice; keep one")
    return row


def text_rows(pieces: Iterable[bytes], file: str, met: Met, *, every_line: bool = False) -> Rows:
    """Plain text: one post per line in a column ``text``, no labels; ``every_line``: also blank lines."""
    met.columns["text"] = None
    for number, line, bad in numbered_lines(pieces, file):
        if bad is not None or every_line or line.strip():
            yield number, bad or {"text": line}


LONGEST_ROW = 1 << 24
"""Characters of a cell of a CSV file beyond which its quote counts as stray, so that memory is bounded."""


def csv_rows(
    pieces: Iterable[bytes],
    file: str,
    met: Met,
    *,
    delimiter: str = ",",
    quoting: int = csv.QUOTE_MINIMAL,
) -> Rows:
    """Comma separated, quoted where needed, names of the columns in the first line.

    Cells that the column ``defused`` names lose the apostrophes that keep spreadsheets from running them.

    Raises:
        ValueError: the line that names the columns is missing or damaged, or names one twice,
            or the cells are separated by another character.
    """
    lines = numbered_lines(pieces, file)
    header: list[str] | None = None
    for first, last, raw, cells in _csv_cells(lines, delimiter=delimiter, quoting=quoting):
        damaged = [bad for _, _, bad in raw if bad is not None]
        if damaged or cells == []:
            if header is None and cells:
                raise ValueError(f"{damaged[0]} It is the line that names the columns.")
            yield from ((bad.line, bad) for bad in damaged)
        elif isinstance(cells, str):
            rule = f"is not valid CSV ({cells}); check the quotes."
            yield first, BadRow(file, first, raw[0][1], rule)
        elif header is None:
            header = [name.strip() for name in cells]
            other = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), None)
            if other is not None:
                raise ValueError(
                    f"{file}:{first}: its columns are separated by {json.dumps(other)} and not by "
                    f"{json.dumps(delimiter)}; save it with commas, or with tabs as .tsv."
                )
            met.columns.update(dict.fromkeys(header))
            if len(met.columns) < len(header):
                names = ", ".join(header)
                raise ValueError(
                    f"{file}:{first}: two columns have the same name ({names}); rename one."
                )
        elif len(cells) != len(header):
            rule = f"has {len(cells)} cells for {len(header)} columns; quote a text that holds the separator."
            yield first, BadRow(file, first, raw[0][1], rule)
        else:
            if last > first:
                met.first_joined = met.first_joined if met.joined else (first, last)
                met.joined += 1
            row = dict(zip(header, cells, strict=True))
            for name in row.get(DEFUSED, "").split(";") if DEFUSED in row else ():
                if name in row:
                    row[name] = read_csv_text(row[name])
            yield first, row
    if header is None:
        raise ValueError(f"{file} is empty; its first line must name the columns.")


Numbered = tuple[int, str, BadRow | None]


def _csv_cells(
    lines: Iterator[Numbered], *, delimiter: str, quoting: int
) -> Iterator[tuple[int, int, list[Numbered], list[str] | str]]:
    """(first line, last line, these lines, cells or what is wrong) of every row.

    A quote that is not closed takes in lines up to the next quote, to the end, or to
    ``LONGEST_ROW``: only the line that it stands in is lost, and reading goes on behind it.
    """
    again: deque[Numbered] = deque()
    taken: list[Numbered] = []

    def rest() -> Iterator[str]:
        while found := again.popleft() if again else next(lines, None):
            taken.append(found)
            yield f"{found[1]}\n"

    reader = csv.reader(rest(), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        try:
            with _wide_cells():
                cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            cells = str(error)
            reader = csv.reader(rest(), delimiter=delimiter, quoting=quoting, strict=True)
        yield taken[0][0], taken[-1][0], taken.copy(), cells
        taken.clear()


@contextlib.contextmanager
def _wide_cells() -> Iterator[None]:
    """csv refuses cells above 128 KiB, in the whole process; our own limit has a message with file and line."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def tsv_rows(pieces: Iterable[bytes], file: str, met: Met) -> Rows:
    """Tab separated; quotes are characters like any other, as in most collections of tweets."""
    return csv_rows(pieces, file, met, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_whole(path: Path, read: Callable[[Iterable[bytes], str, Met], Rows]) -> RawSplit:
    """All rows of a text file.

    Args:
        path: the file.
        read: one of ``jsonl_rows``, ``csv_rows``, ``tsv_rows``, ``text_rows``.
    """
    met, file = Met(), str(path)
    with open_bytes(path) as pieces:
        found = list(read(pieces, file, met))
    good = [(line, row) for line, row in found if not isinstance(row, BadRow)]
    return RawSplit(
        file=file,
        rows=[row for _, row in good],
        lines=[line for line, _ in good],
        columns=tuple(met.columns),
        bad=[row for _, row in found if isinstance(row, BadRow)],
        joined=met.joined_lines(file),
    )
