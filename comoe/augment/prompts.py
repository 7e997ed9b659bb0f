"""The prompts of auxiliary data: one YAML file with templates, label words and examples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from comoe.augment.generator import Prompt
from comoe.config.errors import place_of, unknown_name
from comoe.config.fields import Count, Text, section
from comoe.config.load import load_settings

ECHO_WORDS = 5
"""A text that shares this many consecutive words with the prompts' own words echoes them."""
_WORD = re.compile(r"\w+")


@section
class Example:
    """A solved post before the question; one without a field that a template needs is left out there."""

    text: Text | None = None
    """The post."""
    target: Text | None = None
    """What the sentiment is about."""
    aspect: Text | None = None
    """The right aspect."""
    opinion: Text | None = None
    """The right opinion."""
    gold: Text | None = None
    """The label, a key of ``labels``."""
    previous_aspect: Text | None = None
    """A wrong aspect, for the templates that refine."""
    previous_opinion: Text | None = None
    """A wrong opinion."""
    previous_polarity: Text | None = None
    """The label that they implied."""


@section
class Templates:
    """Templates with fields in braces; see ``FIELDS``."""

    aspect: Text = ""
    """First question: the aspect of the target that the post speaks of."""
    opinion: Text = ""
    """Second question: the opinion on that aspect."""
    polarity: Text = ""
    """Third question: the sentiment that the opinion implies; the label words are scored."""
    refine_aspect: Text = ""
    """Instead of ``aspect``, once a result implied another label than the gold one."""
    refine_opinion: Text = ""
    """Instead of ``opinion``, likewise."""


@section
class MostWords:
    """A longer text is malformed."""

    aspect: Count = 8
    """Words of an aspect."""
    opinion: Count = 16
    """Words of an opinion."""


@section
class PromptFile:
    """The content of the file."""

    templates: Templates = field(default_factory=Templates)
    """Templates."""
    labels: dict[Text, Text] = field(default_factory=dict)
    """Label as the posts have it -> the word that is scored."""
    no_target: Text = "it"
    """{target} of a post without one."""
    most_words: MostWords = field(default_factory=MostWords)
    """When a text is too long."""
    no_answer: list[Text] = field(default_factory=list)
    """Texts that say nothing ("none", "not mentioned"); upper and lower case count as equal."""
    examples: list[Example] = field(default_factory=list)
    """Solved posts before the question."""


class Prompts:
    """A checked file of prompts.

    Args:
        file: its content.
        path: where it was read.
    """

    def __init__(self, file: PromptFile, path: Path) -> None:
        self.file, self.path = file, path
        self.labels, self.words = tuple(file.labels), tuple(file.labels.values())
        self._templates = dataclasses.asdict(file.templates)
        examples = [
            {name: text for name, text in dataclasses.asdict(example).items() if text is not None}
            for example in file.examples
        ]
        self._examples = [{"target": file.no_target, "labels": "", **item} for item in examples]
        own = [
            " ".join(literal for literal, *_ in string.Formatter().parse(template))
            for template in self._templates.values()
        ]
        own += [text for item in examples for text in item.values()]
        self._own = frozenset(run for text in own for run in _runs(words_of(text)))

    @property
    def digest(self) -> str:
        """Changes with any word of the content."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self.file)).encode()).hexdigest()

    def build(self, part: str, values: Mapping[str, str]) -> Prompt:
        """The prompt of one template, its examples included.

        Args:
            part: field of ``Templates``.
            values: field -> text; ``gold`` and ``previous_polarity`` are labels of the posts.
        """
        template, target = self._templates[part], TARGETS[part]
        needed = fields_of(template) | {target}
        examples = tuple(
            (self._fill(template, example), self._worded(target, example[target]))
            for example in self._examples
            if needed <= example.keys()
        )
        return Prompt(question=self._fill(template, values), examples=examples)

    def echoes(self, text: str) -> bool:
        """True where a text repeats a run of words of the prompts themselves, of templates or examples."""
        return not self._own.isdisjoint(_runs(words_of(text)))

    def _fill(self, template: str, values: Mapping[str, str]) -> str:
        worded = {name: self._worded(name, text) for name, text in values.items()}
        listed = ", ".join(self.words[:-1]) + f" or {self.words[-1]}"
        return template.strip().format_map(worded | {"labels": listed})

    def _worded(self, field_name: str, text: str) -> str:
        """A label becomes its word."""
        return self.file.labels.get(text, text) if field_name in LABEL_FIELDS else text


def load_prompts(path: Path) -> Prompts:
    """Read and check a file of prompts.

    Raises:
        ValueError: no such file; an unknown or missing key; a template with a wrong field, or
            without one that it needs; fewer than two labels, or two with one word.
    """
    file, origins = load_settings(path, PromptFile)
    for name, text in dataclasses.asdict(file.templates).items():
        key = f"templates.{name}"
        _check_template(text, name, key=f"{place_of(key, origins)}{key}")
    where = f"{place_of('labels', origins)}labels"
    words = [word.strip().lower() for word in file.labels.values()]
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"{where} is {file.labels!r}; it must give each of at least two labels of the posts a "
            "word of its own, such as positive: positive."
        )
    for number, example in enumerate(file.examples, start=1):
        for label in (example.gold, example.previous_polarity):
            if label is not None and label not in file.labels:
                where = f"{place_of('examples', origins)}examples, number {number}: label"
                raise unknown_name(where, label, file.labels)
    return Prompts(file, path)


def _check_template(template: str, part: str, *, key: str) -> None:
    allowed, required = FIELDS[part]
    try:
        found = fields_of(template)
    except ValueError as error:
        rule = "a field is a name in braces, {text}; a brace itself is doubled."
        raise ValueError(f"{key}: {error}; {rule}") from error
    for name in sorted(found - set(allowed)):
        more = (
            " Only the templates that refine may have it: else every prediction would agree."
            if name == "gold"
            else ""
        )
        raise ValueError(f"{key} has the field {{{name}}}; it may have {_braced(allowed)}.{more}")
    if missing := [name for name in required if name not in found]:
        raise ValueError(f"{key} lacks the field {_braced(missing)}; the model needs it. Add it.")


def _braced(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def fields_of(template: str) -> set[str]:
    """Names of a template's fields.

    Raises:
        ValueError: a brace without its partner, or a field that is more than a name.
    """
    names = set()
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not name.isidentifier():
            raise ValueError(f"{{{name}}} is not a plain field")
        names.add(name)
    return names


def words_of(text: str) -> tuple[str, ...]:
    """Words in lower case, without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[at : at + ECHO_WORDS] for at in range(len(words) - ECHO_WORDS + 1)}


LABEL_FIELDS = ("gold", "previous_polarity")
"""Fields that hold a label, which the prompt names by its word."""


FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "aspect": (("text", "target"), ("text",)),
    "opinion": (("text", "target", "aspect"), ("text", "aspect")),
    "polarity": (("text", "target", "aspect", "opinion", "labels"), ("opinion",)),
    "refine_aspect": (
        ("text", "target", "gold", "previous_aspect", "previous_opinion", "previous_polarity"), ("text", "gold"),
    ),
    "refine_opinion": (
        ("text", "target", "aspect", "gold", "previous_aspect", "previous_opinion", "previous_polarity"),
        ("text", "aspect", "gold"),
    ),
}  # fmt: skip
"""Template -> the fields that it may have, and those that it must have."""


TARGETS = {
    "aspect": "aspect", "opinion": "opinion", "polarity": "gold",
    "refine_aspect": "aspect", "refine_opinion": "opinion",
}  # fmt: skip
"""Template -> field of an example that is its right text."""
