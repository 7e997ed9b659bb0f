"""Folders of TweetEval: a file of posts, one of label ids beside it, and the names of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from comoe.data.reading.files import RawSplit, text_lines
from comoe.data.report import BadRow


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
