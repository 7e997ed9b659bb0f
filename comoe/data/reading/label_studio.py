"""Posts that people have labeled in Label Studio: its JSON export as plain rows.

A row has the post's data, and for each control of the labeling interface a column of its name:

- choices: the label of most annotators (none where several lead), or, for a task of several labels,
  the labels that more than half chose; and ``<name>_votes``, a soft label: counts, or of several
  labels the share of the annotators that chose each.
- labels of spans: a tag per word (B-, I-, O), of the spans that more than half of the annotators
  marked; the words are in the column ``words`` (``tokens`` where a control is called words).
- number and rating: the mean. Text: what the first annotator wrote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comoe.config.files import read_json
from comoe.data.reading.files import RawSplit
from comoe.data.report import BadRow
from comoe.tasks.agreement import krippendorff_alpha, set_distance, squared_distance
from comoe.tasks.kinds.base import Kind
from comoe.tasks.kinds.classification import MultiLabel
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

WORDS, TOKENS, VOTES = "words", "tokens", "_votes"
"""Column with the words that tags are of, that column where a control has its name, and the ending
of a column of soft labels."""

Opinions = list[dict[str, Any]]
"""Per annotator of one post: control -> a frozen set of choices, or of spans (start, end, label,
text), a number, or a text."""


@dataclass(slots=True)
class _Export:
    """What the tasks of a file have."""

    path: Path
    total: int
    """Tasks, labeled or not."""
    found: list[tuple[int, Mapping[str, Any], Opinions]] = field(default_factory=list)
    """Number, data and opinions of those that somebody labeled."""
    bad: list[BadRow] = field(default_factory=list)
    controls: dict[str, str] = field(default_factory=dict)
    """Control -> what its results are."""
    objects: Counter[str] = field(default_factory=Counter)
    """Name of the text that spans are marked in -> spans."""
    unread: Counter[str] = field(default_factory=Counter)
    """Type that is not read -> results."""
    words: str = WORDS
    """Column with the words."""


def read_label_studio(
    path: Path,
    *,
    text: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    option: str = "tasks.<name>.text",
) -> RawSplit:
    """The posts of a JSON export ("JSON", not "JSON-MIN") that somebody has labeled.

    ``notes`` of the result have the agreement of each control, as Krippendorff's alpha.

    Args:
        path: the file.
        text: column with the post, which spans are marked in where a task has them; its cells then
            become lists of words.
        kinds: of the tasks, by the column of their labels. They say whether a column has sets of
            labels; of a column that no task has, its posts do. None reads every control.
        option: what sets ``text``, for messages.

    Raises:
        ValueError: no such export; two controls make the same column; or nothing says which column
            the spans are marked in.
    """
    kinds = kinds or {}
    export = _opened(path)
    _drop_spans(export, text, kinds)
    _check_columns(export)
    several = _several_of(export, kinds)
    of_tags = any(kind == SPANS for kind in export.controls.values())
    marked = _text_column(export, text, option) if of_tags else None
    rows, lines, units = [], [], {name: [] for name in export.controls}
    for line, data, opinions in export.found:
        try:
            given = {
                name: _given(name, opinions, kind, several)
                for name, kind in export.controls.items()
            }
            for name, kind in export.controls.items():
                if kind == SPANS:
                    given[name] = _in_characters(given[name], data, marked)
            row = _row(data, given, export, several, marked)
        except ValueError as error:
            export.bad.append(BadRow(str(path), line, data, str(error)))
            continue
        if marked is not None and marked == text:
            row[marked] = row[export.words]
        rows.append(row)
        lines.append(line)
        for name, found in given.items():
            units[name].append(found)
    notes = [f"{path}: {len(rows):,} of {export.total:,} posts are labeled"]
    if export.unread:
        types = ", ".join(f"{count:,} {name}" for name, count in export.unread.most_common())
        notes.append(
            f"{path}: {export.unread.total():,} results of types that are not read: {types}"
        )
    for name, kind in export.controls.items():
        notes += _agreement(path, name, units[name], kind, one=name not in several)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return RawSplit(str(path), rows, lines, columns, export.bad, notes=tuple(notes))


def _opened(path: Path) -> _Export:
    tasks = read_json(path)
    if not (isinstance(tasks, list) and all(_is_task(task) for task in tasks)):
        raise ValueError(
            f"{path} is no export of Label Studio: it must be a JSON list of tasks with data and "
            "annotations; choose JSON there (not JSON-MIN), or correct the format."
        )
    export = _Export(path, len(tasks))
    for line, task in enumerate(tasks, start=1):
        try:
            if opinions := _opinions(task, export):
                export.found.append((line, task["data"], opinions))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            # Of our own sentences the last; else a result that is built in another way.
            rule = str(error) if type(error) is ValueError else "a result lacks what its type has."
            export.bad.append(BadRow(str(path), line, task["data"], rule))
    export.words = TOKENS if WORDS in export.controls else WORDS
    return export


def _drop_spans(export: _Export, text: str | None, kinds: Mapping[str, Kind]) -> None:
    """Spans that no task learns from need no text: they may be of another one."""
    if kinds and text != export.words:
        wanted = {name for name, kind in kinds.items() if kind.mode == "tokens"}
        export.controls = {
            name: kind for name, kind in export.controls.items() if kind != SPANS or name in wanted
        }


def _check_columns(export: _Export) -> None:
    """ValueError where two controls would write the same column."""
    made = Counter(list(export.controls))
    made.update(name + VOTES for name, kind in export.controls.items() if kind == CHOICES)
    made.update([export.words] if SPANS in export.controls.values() else [])
    for column, count in made.items():
        if count > 1:
            raise ValueError(
                f"{export.path}: two of the controls {', '.join(export.controls)} make the column {column} (of choices "
                f"also <name>{VOTES}, of spans the words in {export.words}); rename one (its from_name)."
            )


def _several_of(export: _Export, kinds: Mapping[str, Kind]) -> set[str]:
    """The controls with sets of labels."""
    guessed = {
        name
        for _, _, opinions in export.found
        for opinion in opinions
        for name, one in opinion.items()
        if export.controls.get(name) == CHOICES and len(one) > 1
    }
    return {
        name
        for name, kind in export.controls.items()
        if kind == CHOICES
        and (isinstance(kinds[name], MultiLabel) if name in kinds else name in guessed)
    }


def _text_column(export: _Export, text: str | None, option: str) -> str:
    """The column that the spans of all posts are marked in: the one that is asked for, or that fits the most posts."""
    spans_of = [
        (data, [span for opinion in opinions for name in export.controls
                if export.controls[name] == SPANS for span in opinion.get(name, ())])
        for _, data, opinions in export.found
    ]  # fmt: skip
    columns = dict.fromkeys(
        key for data, _ in spans_of for key, cell in data.items() if isinstance(cell, str)
    )
    if text in columns:
        return text
    marked = [(data, spans) for data, spans in spans_of if spans]
    fitting = {
        column: sum(_fits(data.get(column), spans) for data, spans in marked) for column in columns
    }
    best = [column for column in columns if fitting[column] == max(fitting.values())]
    if len(named := [column for column in best if column in export.objects]) == 1:
        return named[0]
    if len(best) == 1:
        return best[0]
    which = f"they fit {', '.join(best)}" if best else "no post has a text"
    raise ValueError(
        f"{export.path}: nothing says which column of the data the spans are marked in: {which}; "
        f"set {option} to it, and the post is read from there as words."
    )


def _fits(text: Any, spans: Iterable[tuple]) -> bool:
    return isinstance(text, str) and all(_place(text, span) for span in spans)


def _given(name: str, opinions: Opinions, kind: str, several: set[str]) -> list[Any]:
    """What each annotator says. Nobody has to tick one of several boxes or mark a span: an
    annotation without any says that."""
    if kind == SPANS or name in several:
        return [opinion.get(name, frozenset()) for opinion in opinions]
    found = [opinion[name] for opinion in opinions if name in opinion]
    if kind != CHOICES:
        return found
    for one in found:
        if len(one) > 1:
            raise ValueError(
                f"an annotator chose {' and '.join(sorted(one))} of {name}, whose task has one "
                "label per post; use kind: multi_label, or correct the annotation."
            )
    return [next(iter(one)) for one in found if one]


def _is_task(task: Any) -> bool:
    return (
        isinstance(task, Mapping)
        and isinstance(task.get("data"), Mapping)
        and isinstance(task.get("annotations"), list)
    )


def is_labeled(task: Mapping[str, Any]) -> bool:
    """False for a task of an export that nobody has labeled, or that all have skipped; a plain post is."""
    if not isinstance(task.get("annotations"), list):
        return True
    return any(
        isinstance(one, Mapping) and not one.get("was_cancelled") for one in task["annotations"]
    )


def _opinions(task: Mapping[str, Any], export: _Export) -> Opinions:
    """What the annotators say; empty without an annotation. Notes what the controls are."""
    opinions: Opinions = []
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        opinions.append({})
        for result in annotation["result"]:
            if result.get("type") not in RESULTS:
                export.unread[str(result.get("type"))] += 1
                continue
            name, (kind, key) = result["from_name"], RESULTS[result["type"]]
            if export.controls.setdefault(name, kind) != kind:
                raise ValueError(f"control {name} has results of different types.")
            if kind == SPANS:
                export.objects[str(result.get("to_name"))] += 1
            elif "start" in result["value"]:
                raise ValueError(
                    f"control {name} labels a part of the post (its value has start), not the "
                    "post; remove perRegion from the control."
                )
            _add(opinions[-1], name, kind, result["value"], key)
    return opinions


def _add(opinion: dict[str, Any], name: str, kind: str, value: Mapping[str, Any], key: str) -> None:
    if kind == CHOICES:
        opinion[name] = opinion.get(name, frozenset()) | {str(choice) for choice in value[key]}
    elif kind == SPANS:
        spans = {
            (int(value["start"]), int(value["end"]), str(label), str(value.get("text", "")))
            for label in value[key]
        }
        opinion[name] = opinion.get(name, frozenset()) | spans
    elif kind == NUMBER:
        opinion[name] = float(value[key])
        if not math.isfinite(opinion[name]):
            raise ValueError(f"control {name} has {opinion[name]}, which is no number; correct it.")
    else:
        opinion.setdefault(name, " ".join(map(str, value[key])))


def _row(
    data: Mapping[str, Any],
    given: Mapping[str, Sequence[Any]],
    export: _Export,
    several: set[str],
    marked: str | None,
) -> dict[str, Any]:
    row = dict(data)
    for name, kind in export.controls.items():
        cells = {name: None}
        if kind == CHOICES:
            cells = (_several if name in several else _one)(name, given[name])
        elif kind == SPANS:
            words, tags = _tags(given[name], data[marked])
            cells = {name: tags, export.words: words}
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
    votes = Counter(choice for one in given for choice in sorted(one))
    chosen = [label for label, count in votes.items() if 2 * count > len(given)]
    return {name: chosen, name + VOTES: {label: n / len(given) for label, n in votes.items()}}


def _tags(given: Sequence[frozenset], text: str) -> tuple[list[str], list[str]]:
    """Words and their tags; a word that a span touches is in it."""
    votes = Counter(span for one in given for span in one)
    kept = [span for span, count in votes.items() if 2 * count > len(given)]
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
    return words, tags


def _in_characters(
    given: Sequence[frozenset], data: Mapping[str, Any], marked: str
) -> list[frozenset]:
    """The spans with their places in characters: a browser may count an emoji as two."""
    text = data.get(marked)
    if not _fits(text, (span for one in given for span in one)):
        raise ValueError(
            f"its column {marked} lacks the marked spans where they are said to be."
            if isinstance(text, str)
            else f"its data has no text in column {marked}, which spans are marked in."
        )
    return [frozenset((*_place(text, span), span[2], span[3]) for span in one) for one in given]


def _place(text: str, span: tuple[int, int, str, str]) -> tuple[int, int] | None:
    """First character of a span and the one behind it; None where the text has it not."""
    start, end, _, marked = span
    if not marked or text[start:end] == marked:
        return (start, end) if 0 <= start < end <= len(text) else None
    units = text.encode("utf-16-le")
    if units[2 * start : 2 * end].decode("utf-16-le", "replace") != marked:
        return None
    first = len(units[: 2 * start].decode("utf-16-le", "replace"))
    return first, first + len(marked)


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
    agreement = "not defined, as all labels are the same" if math.isnan(alpha) else f"{alpha:.3f}"
    ties = sum(bool(unit) and _one(name, unit)[name] is None for unit in units) if nominal else 0
    shown = f"; {ties:,} posts where no label leads have a soft label only" if ties else ""
    return [
        f"{path}: {name} by several annotators in {twice:,} posts, Krippendorff's alpha {agreement}{shown}"
    ]
