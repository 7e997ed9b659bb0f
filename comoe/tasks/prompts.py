"""Prompt templates: what an encoder reads of a post where a decoder answers, and the options that go with it."""

from __future__ import annotations

import string
from collections.abc import Sequence

from comoe.config.errors import unknown_name
from comoe.config.recipe import SCORED_INSTEAD, TaskConfig
from comoe.tasks.kinds.base import Kind

FIELDS = ("text", "pair")
"""What a template may stand for: the cleaned post, and its second text; in the order in which they
are shortened."""


_DEFAULTS = TaskConfig()


def prompt_parts(prompt: str) -> list[tuple[str, str | None]]:
    """A template as (plain text, field behind it or None), in order.

    Raises:
        ValueError: not a template ("{text" without end), or a field that is none of ``FIELDS``.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(
            f"is {prompt!r}: {error}; write {{{{ and }}}} for braces that are meant as such."
        ) from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in FIELDS or form or conversion):
            shown = f"{field}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(
                f"is {prompt!r}: {unknown_name('field of a prompt', f'{{{shown}}}', FIELDS)}"
            )
    return [(plain, field) for plain, field, _, _ in parts]


def wants_pair(prompt: str | None) -> bool:
    """Whether a template has the second text in it."""
    return prompt is not None and any(field == "pair" for _, field in prompt_parts(prompt))


def check_answering(name: str, config: TaskConfig, *, kind: Kind) -> None:
    """The options of tasks that a decoder answers, against the kind and one another.

    Args:
        name: of the task.
        config: its options.
        kind: the rules of its kind.

    Raises:
        ValueError: key, value, rule.
    """
    key = f"tasks.{name}"
    if kind.mode != "decoder":
        _refuse_others(key, config)
        return
    if config.prompt is None:
        raise ValueError(
            f"{key} is of kind {config.kind} and needs a prompt, which the encoder reads: "
            f"{key}.prompt='sentiment of: {{text}}' ({{pair}} stands for the second text)."
        )
    try:
        fields = [field for _, field in prompt_parts(config.prompt)]
    except ValueError as error:
        raise ValueError(f"{key}.prompt {error}") from error
    if "text" not in fields:
        raise ValueError(
            f"{key}.prompt is {config.prompt!r}; it must hold {{text}}, or it would be the same for all."
        )
    if "pair" in fields and config.pair is None:
        raise ValueError(
            f"{key}.prompt has {{pair}}; name the column of the second text: {key}.pair."
        )
    if config.contrastive is True:
        raise ValueError(
            f"{key}.contrastive is true, but a decoder answers the task; make it auto."
        )
    if config.label_smoothing:
        raise ValueError(
            f"{key}.label_smoothing has no meaning for a {config.kind} task; leave it out.{_why(config)}"
        )
    if kind.exclusive and (
        config.num_beams != 1 or config.max_answer_length != _DEFAULTS.max_answer_length
    ):
        option = "num_beams" if config.num_beams != 1 else "max_answer_length"
        raise ValueError(
            f"{key}.{option} has no meaning for kind {config.kind}, whose words are scored; leave it out.{_why(config)}"
        )
    if not kind.exclusive and config.label_words:
        raise ValueError(
            f"{key}.label_words needs {key}.labels, whose words they are; without them the text is free."
        )


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
            f"tasks.{name}.label_words has {len(words)} entries ({listed}) for {len(labels)} labels; give one for "
            f"each, in their order: {', '.join(labels)}."
        )
    if len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"tasks.{name}.label_words ({listed}) must all be different and not empty."
        )
    return words


def _why(config: TaskConfig) -> str:
    """That a task is not of the kind that was typed; empty where nothing was rewritten."""
    typed = [kind for kind, scored in SCORED_INSTEAD.items() if scored == config.kind]
    return (
        f" (Kind {typed[0]} with labels is {config.kind}; without labels it writes.)"
        if typed
        else ""
    )


def _refuse_others(key: str, config: TaskConfig) -> None:
    """Options that only a decoder reads."""
    given = {
        "prompt": config.prompt is not None,
        "label_words": bool(config.label_words),
        "max_answer_length": config.max_answer_length != _DEFAULTS.max_answer_length,
        "num_beams": config.num_beams != _DEFAULTS.num_beams,
    }
    for option, there in given.items():
        if there:
            raise ValueError(
                f"{key}.{option} has no meaning for a {config.kind} task; leave it out, or let a decoder answer: kind "
                "text or label_words."
            )
