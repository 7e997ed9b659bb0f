"""Parsers of text files of labeled posts: plain rows with line numbers, and what could not be read.

Lines end at a line feed only: U+2028 and its kin inside a post are harmless.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    joined: list[tuple[int, int]] = field(default_factory=list)
    """First and last line of each row that takes several."""
    notes: tuple[str, ...] = ()
    """What the user should be told of the file."""

    def joined_lines(self) -> str:
        """What to tell of ``joined``: nobody can know whether its quotes were meant."""
        first, last = self.joined[0]
        return (
            f"{self.file}: {len(self.joined):,} rows take several lines, as a quoted cell may, the first one lines "
            f"{first} to {last}; a stray quote joins lines too: look at them."
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


def text_lines(path: Path) -> tuple[list[str], list[BadRow]]:
    """The lines of a text file without their ends, and those that are not UTF-8 or hold a NUL byte.

    Raises:
        ValueError: the whole file is in another encoding, or its lines end otherwise.
    """
    lines, bad = [], []
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8.")
    if b"\n" not in content and b"\r" in content[:-1]:
        raise ValueError(
            f"{path} ends its lines with a carriage return alone; save it with line feeds (Unix or Windows)."
        )
    pieces = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not pieces[-1]:
        pieces.pop()
    for number, piece in enumerate(pieces, start=1):
        piece = piece.removesuffix(b"\r")
        try:
            lines.append(piece.decode("utf-8"))
        except UnicodeDecodeError as error:
            lines.append(piece.decode("utf-8", errors="replace"))
            rule = (
                f"is not valid UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
            )
            bad.append(BadRow(str(path), number, piece, rule))
        else:
            if "\x00" in lines[-1]:
                rule = "holds a NUL byte; is the file UTF-16, or damaged? Save it as UTF-8."
                bad.append(BadRow(str(path), number, lines[-1], rule))
    return lines, bad


def read_jsonl(path: Path) -> RawSplit:
    """JSON lines: one object per line; blank lines are passed over."""
    lines, bad = text_lines(path)
    damaged = {row.line for row in bad}
    rows, numbers, columns = [], [], {}
    for number, line in enumerate(lines, start=1):
        if number in damaged or not line.strip():
            continue
        try:
            row = json.loads(
                line,
                parse_constant=_no_number,
                parse_float=_finite,
                object_pairs_hook=_without_twins,
            )
        # ValueError also covers whole numbers of thousands of digits; RecursionError, nesting
        # without end.
        except (ValueError, RecursionError) as error:
            what = (
                f"{error.msg}, column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            rule = f"is not valid JSON ({what}); there must be one whole object per line."
            bad.append(BadRow(str(path), number, line, rule))
            continue
        if not isinstance(row, dict):
            rule = 'is not a JSON object; write each post as {"text": ..., "label": ...}.'
            bad.append(BadRow(str(path), number, line, rule))
            continue
        rows.append(row)
        numbers.append(number)
        columns.update(dict.fromkeys(row))
    return RawSplit(str(path), rows, numbers, tuple(columns), sorted(bad, key=lambda row: row.line))


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


def read_text(path: Path, *, every_line: bool = False) -> RawSplit:
    """Plain text: one post per line in a column ``text``, no labels.

    Args:
        path: the file.
        every_line: also blank lines; else they are passed over.
    """
    lines, bad = text_lines(path)
    damaged = {row.line for row in bad}
    kept = {
        number: line
        for number, line in enumerate(lines, start=1)
        if number not in damaged and (every_line or line.strip())
    }
    rows = [{"text": line} for line in kept.values()]
    return RawSplit(str(path), rows, list(kept), ("text",), bad)


def read_csv(path: Path, *, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> RawSplit:
    """Comma separated, quoted where needed, names of the columns in the first line."""
    lines, bad = text_lines(path)
    damaged = {row.line for row in bad}
    rows, numbers, joined = [], [], []
    header: list[str] | None = None
    for first, last, cells in _csv_rows(lines, delimiter=delimiter, quoting=quoting):
        if not damaged.isdisjoint(range(first, last + 1)) or cells == []:
            if header is None and cells:
                raise ValueError(f"{bad[0]} It is the line that names the columns.")
            continue
        if isinstance(cells, str):
            bad.append(
                BadRow(
                    str(path),
                    first,
                    lines[first - 1],
                    f"is not valid CSV ({cells}); check the quotes.",
                )
            )
        elif header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                names = ", ".join(header)
                raise ValueError(
                    f"{path}:{first}: two columns have the same name ({names}); rename one."
                )
        elif len(cells) != len(header):
            rule = f"has {len(cells)} cells for {len(header)} columns; quote a text that holds the separator."
            bad.append(BadRow(str(path), first, lines[first - 1], rule))
        else:
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(first)
            joined += [(first, last)] if last > first else []
    bad.sort(key=lambda row: row.line)
    return RawSplit(str(path), rows, numbers, tuple(header or ()), bad, joined=joined)


def _csv_rows(
    lines: list[str], *, delimiter: str, quoting: int
) -> Iterator[tuple[int, int, list[str] | str]]:
    """(first line, last line, cells or what is wrong) of every row.

    A quote that is not closed takes in lines up to the next quote, or to the end: only the line that
    it stands in is lost, and reading goes on behind it.
    """
    # csv refuses cells above 128 KiB; our own limit has a message with file and line.
    before = csv.field_size_limit(sys.maxsize)
    done = 0
    try:
        while done < len(lines):
            rest = (f"{lines[number]}\n" for number in range(done, len(lines)))
            reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True)
            start = done
            try:
                for cells in reader:
                    yield done + 1, start + reader.line_num, cells
                    done = start + reader.line_num
            except csv.Error as error:
                yield done + 1, done + 1, str(error)
                done += 1
    finally:
        csv.field_size_limit(before)


def read_tsv(path: Path) -> RawSplit:
    """Tab separated; quotes are characters like any other, as in most collections of tweets."""
    return read_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_tweeteval(
    text_file: Path, label_file: Path | None, mapping: Mapping[str, str]
) -> RawSplit:
    """One split of a TweetEval folder: line n of ``label_file`` is the label of line n of ``text_file``.

    Args:
        text_file: one post per line.
        label_file: one label per line, None where there are no labels.
        mapping: what ``read_mapping`` gave; labels outside it are bad rows, unless it is empty.

    Raises:
        ValueError: the files differ in length; there is no telling which label belongs where.
    """
    texts, bad = text_lines(text_file)
    labels: list[str | None] = [None] * len(texts)
    if label_file is not None:
        found, bad_labels = text_lines(label_file)
        if len(found) != len(texts):
            raise ValueError(
                f"{text_file} has {len(texts):,} lines and {label_file} has {len(found):,}; line n of one belongs to "
                "line n of the other, so they must be as many. Lines end at a line feed only."
            )
        labels = [label.strip() for label in found]
        known = ", ".join(f"{key} {name}" for key, name in mapping.items())
        bad += bad_labels
        damaged = {row.line for row in bad}
        bad += [
            BadRow(str(label_file), number, label, f"is not an id of mapping.txt ({known}).")
            for number, label in enumerate(labels, start=1)
            if mapping and label and label not in mapping and number not in damaged
        ]
    # One bad row per line, also where both files are damaged there.
    bad_by_line = {row.line: row for row in reversed(bad)}
    kept = [number for number in range(1, len(texts) + 1) if number not in bad_by_line]
    named = [mapping.get(label or "", label) for label in labels]
    return RawSplit(
        file=str(text_file),
        rows=[{"text": texts[number - 1], "label": named[number - 1]} for number in kept],
        lines=kept,
        columns=("text", "label") if label_file is not None else ("text",),
        bad=[bad_by_line[line] for line in sorted(bad_by_line)],
        label_names={"label": tuple(mapping.values())} if mapping else {},
    )


def read_mapping(path: Path) -> dict[str, str]:
    """Id -> name of ``mapping.txt`` in the order of ids, empty where there is no such file."""
    if not path.is_file():
        return {}
    lines, bad = text_lines(path)
    if bad:
        raise ValueError(str(bad[0]))
    pairs = [line.split("\t") for line in lines if line.strip()]
    ids = [pair[0].strip() for pair in pairs]
    if any(len(pair) < 2 or not pair[1].strip() for pair in pairs) or sorted(ids) != sorted(
        map(str, range(len(ids)))
    ):
        raise ValueError(
            f"{path} must hold one line per label: its id from 0, a tab, its name; it holds {lines!r}."
        )
    return {
        pair[0].strip(): pair[1].strip() for pair in sorted(pairs, key=lambda pair: int(pair[0]))
    }
