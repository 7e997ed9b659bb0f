"""Posts that people have labeled in Label Studio: its JSON export as plain rows.

A row has the post's data, and for each control of the labeling interface a column of its name:

- choices: the label of most annotators (none where several lead), or, where somebody chose several,
  the labels that more than half chose; and ``<name>_votes``, a soft label: counts, or of several
  labels the share of the annotators that chose each.
- labels of spans: a tag per word (B-, I-, O), of the spans that more than half of the annotators
  marked; the words are in the column ``words``.
- number and rating: the mean. Text: what the first annotator wrote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.config.files import read_json
from comoe.data.reading.files import RawSplit
from comoe.data.report import BadRow
from comoe.tasks.agreement import krippendorff_alpha, set_distance, squared_distance
from comoe.tasks.labels import OUTSIDE, split_words

CHOICES, SPANS, NUMBER, TEXT = "choices", "labels", "number", "text"

RESULTS = {
    "choices": (CHOICES, "choices"),
    "labels": (SPANS, "labels"),
    "number": (NUMBER, "number"),
    "rating": (NUMBER, "rating"),
    "textarea": (TEXT, "text"),
}
"""Type of a result -> what it is, and the key of its value."""

WORDS, VOTES = "words", "_votes"
"""Column with the words that tags are of, and the ending of a column of soft labels."""

Opinions = list[dict[str, Any]]
"""Per annotator of one post: control -> a frozen set of choices, or of spans (start, end, label,
text), a number, or a text."""


def read_label_studio(path: Path) -> RawSplit:
    """The posts of a JSON export ("JSON", not "JSON-MIN") that somebody has labeled.

    ``notes`` of the result have the agreement of each control, as Krippendorff's alpha.

    Raises:
        ValueError: no such export.
    """
    tasks = read_json(path)
    if not (isinstance(tasks, list) and all(_is_task(task) for task in tasks)):
        raise ValueError(
            f"{path} is no export of Label Studio: it must be a JSON list of tasks with data and annotations; choose "
            "JSON there (not JSON-MIN), or correct the format."
        )
    kinds: dict[str, str] = {}
    found: list[tuple[int, Mapping[str, Any], Opinions]] = []
    bad: list[BadRow] = []
    for line, task in enumerate(tasks, start=1):
        try:
            if opinions := _opinions(task, kinds):
                found.append((line, task["data"], opinions))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Of our own sentences the last; else a result that is built in another way.
            rule = str(error) if type(error) is ValueError else "a result lacks what its type has."
            bad.append(BadRow(str(path), line, task["data"], rule))
    several = {
        name
        for _, _, opinions in found
        for told in opinions
        for name in told
        if kinds[name] == CHOICES and len(told[name]) > 1
    }
    rows, lines, units = [], [], {name: [] for name in kinds}
    for line, data, opinions in found:
        given = {name: _given(name, opinions, kinds[name], several) for name in kinds}
        try:
            for name in (name for name, kind in kinds.items() if kind == SPANS):
                given[name] = _in_characters(given[name], data)
            rows.append(_row(data, given, kinds, several))
        except ValueError as error:
            bad.append(BadRow(str(path), line, data, str(error)))
            continue
        lines.append(line)
        for name in kinds:
            units[name].append(given[name])
    notes = [f"{path}: {len(rows):,} of {len(tasks):,} posts are labeled"]
    for name, kind in kinds.items():
        notes += _agreement(path, name, units[name], kind, one=name not in several)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return RawSplit(str(path), rows, lines, columns, bad, notes=tuple(notes))


def _given(name: str, opinions: Opinions, kind: str, several: set[str]) -> list[Any]:
    """What each annotator says. Nobody has to tick one of several boxes or mark a span: an annotation without any
    says that."""
    if kind == SPANS or name in several:
        return [told.get(name, frozenset()) for told in opinions]
    found = [told[name] for told in opinions if name in told]
    return [next(iter(one)) for one in found if one] if kind == CHOICES else found


def _is_task(task: Any) -> bool:
    return (
        isinstance(task, Mapping)
        and isinstance(task.get("data"), Mapping)
        and isinstance(task.get("annotations"), list)
    )


def _opinions(task: Mapping[str, Any], kinds: dict[str, str]) -> Opinions:
    """What the annotators say; empty without an annotation. Notes the kind of each control."""
    opinions: Opinions = []
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        opinions.append({})
        for result in annotation["result"]:
            if result.get("type") not in RESULTS:
                continue
            name, (kind, key) = result["from_name"], RESULTS[result["type"]]
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"control {name} has results of different types.")
            _add(opinions[-1], name, kind, result["value"], key)
    return opinions


def _add(told: dict[str, Any], name: str, kind: str, value: Mapping[str, Any], key: str) -> None:
    if kind == CHOICES:
        told[name] = told.get(name, frozenset()) | {str(choice) for choice in value[key]}
    elif kind == SPANS:
        spans = {
            (int(value["start"]), int(value["end"]), str(label), str(value.get("text", "")))
            for label in value[key]
        }
        told[name] = told.get(name, frozenset()) | spans
    elif kind == NUMBER:
        told[name] = float(value[key])
    else:
        told.setdefault(name, " ".join(map(str, value[key])))


def _row(
    data: Mapping[str, Any],
    given: Mapping[str, Sequence[Any]],
    kinds: Mapping[str, str],
    several: set[str],
) -> dict[str, Any]:
    row = dict(data)
    for name, kind in kinds.items():
        cells = {name: None}
        if kind == CHOICES:
            cells = (_several if name in several else _one)(name, given[name])
        elif kind == SPANS:
            cells = _tags(name, given[name], data)
        elif given[name]:
            mean = sum(given[name]) / len(given[name]) if kind == NUMBER else None
            cells = {name: given[name][0] if mean is None else mean}
        for column, cell in cells.items():
            if column in data:
                raise ValueError(f"its data and a control both have {column}; rename one.")
            row[column] = cell
    return row


def _one(name: str, given: Sequence[str]) -> dict[str, Any]:
    votes = Counter(given)
    (label, most), *others = votes.most_common(2) or [(None, 0)]
    tied = bool(others) and others[0][1] == most
    return {name: None if tied else label, name + VOTES: dict(votes) or None}


def _several(name: str, given: Sequence[frozenset[str]]) -> dict[str, Any]:
    votes = Counter(choice for one in given for choice in one)
    chosen = [label for label, count in votes.items() if 2 * count > len(given)]
    return {name: chosen, name + VOTES: {label: n / len(given) for label, n in votes.items()}}


def _tags(name: str, given: Sequence[frozenset], data: Mapping[str, Any]) -> dict[str, Any]:
    """Tags of the words; a word that a span touches is in it."""
    votes = Counter(span for one in given for span in one)
    kept = [span for span, count in votes.items() if 2 * count > len(given)]
    text = _text_of(data, votes)
    words = split_words(text)
    places, at = [], 0
    for word in words:
        at = text.index(word, at)
        places.append((at, at := at + len(word)))
    tags = [OUTSIDE] * len(words)
    for start, end, label, _ in sorted(kept, key=lambda span: (span[0] - span[1], span)):
        inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
        # Of two spans that overlap the longer one counts.
        if inside and all(tags[i] == OUTSIDE for i in inside):
            for i in inside:
                tags[i] = f"{'I' if i > inside[0] else 'B'}-{label}"
    return {name: tags, WORDS: words}


def _in_characters(given: Sequence[frozenset], data: Mapping[str, Any]) -> list[frozenset]:
    """The spans with their places in characters: a browser may count an emoji as two."""
    text = _text_of(data, [span for one in given for span in one])
    return [frozenset((*_place(text, span), span[2], span[3]) for span in one) for one in given]


def _text_of(data: Mapping[str, Any], spans: Iterable[tuple]) -> str:
    for key in ("text", *data):
        text = data.get(key)
        if isinstance(text, str) and all(_place(text, span) for span in spans):
            return text
    raise ValueError("no text of its data has the marked spans where they are said to be.")


def _place(text: str, span: tuple[int, int, str, str]) -> tuple[int, int] | None:
    """First character of a span and the one behind it; None where the text has it not."""
    start, end, _, said = span
    if not said or text[start:end] == said:
        return (start, end) if 0 <= start < end <= len(text) else None
    units = text.encode("utf-16-le")
    if units[2 * start : 2 * end].decode("utf-16-le", "replace") != said:
        return None
    first = len(units[: 2 * start].decode("utf-16-le", "replace"))
    return first, first + len(said)


def _agreement(
    path: Path, name: str, units: Sequence[Sequence[Any]], kind: str, *, one: bool
) -> list[str]:
    """A sentence, if several annotators saw a post."""
    twice = sum(len(unit) > 1 for unit in units)
    if not twice or kind == TEXT:
        return []
    nominal = kind == CHOICES and one
    distance = None if nominal else squared_distance if kind == NUMBER else set_distance
    alpha = krippendorff_alpha(units, distance)
    told = "not defined, as all labels are the same" if math.isnan(alpha) else f"{alpha:.3f}"
    ties = sum(bool(unit) and _one(name, unit)[name] is None for unit in units) if nominal else 0
    shown = f"; {ties:,} posts where no label leads have a soft label only" if ties else ""
    return [
        f"{path}: {name} by several annotators in {twice:,} posts, Krippendorff's alpha {told}{shown}"
    ]
