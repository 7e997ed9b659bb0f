"""Prompt templates: what an encoder reads of a post where a decoder predicts, and the words of labels."""

from __future__ import annotations

import string
from collections.abc import Sequence

from comoe.config.fields import template_fields
from comoe.tasks.kinds.base import Kind

FIELDS = ("text", "pair")
"""What a template may stand for: the cleaned post, and its second text; in the order in which they
are shortened."""


def prompt_parts(prompt: str) -> list[tuple[str, str | None]]:
    """A template as (plain text, field of ``FIELDS`` behind it or None), in order."""
    return [(plain, field) for plain, field, _, _ in string.Formatter().parse(prompt)]


def wants_pair(prompt: str | None) -> bool:
    """Whether a template has the second text in it."""
    return prompt is not None and "pair" in template_fields(prompt)


def resolve_label_words(
    name: str, given: Sequence[str], *, kind: Kind, labels: Sequence[str]
) -> tuple[str, ...]:
    """The words of each label, the labels themselves where none are given; none for kinds whose words are not scored.

    Raises:
        ValueError: another number of them than of labels, or the same words twice.
    """
    if not (kind.mode == "decoder" and kind.exclusive):
        return ()
    words = tuple(word.strip() for word in given) or tuple(labels)
    listed = ", ".join(words)
    if len(words) != len(labels):
        raise ValueError(
            f"tasks.{name}.label_words has {len(words)} entries ({listed}) for {len(labels)} "
            f"labels; give one for each, in their order: {', '.join(labels)}."
        )
    if len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"tasks.{name}.label_words ({listed}) must all be different and not empty."
        )
    return words
