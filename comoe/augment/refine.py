"""Aspect, opinion and implied polarity of posts, refined against the gold label round by round.

As in MT-ISA (arXiv:2412.09046), with the three questions of THOR (arXiv:2305.11255). Malformed
texts are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comoe.augment.generator import Generation, Generator, Prompt, in_batches, seed_of
from comoe.augment.posts import GOLD
from comoe.augment.prompts import Prompts, words_of
from comoe.config.ready_made import prompts_path
from comoe.data.posts import Post

PARTS = ("aspect", "opinion", "polarity")
"""What is extracted from a post."""
_QUOTES = "\"'`*“”‘’«»「」"
_LOOP = re.compile(r"(\b\w+\b)(?:\W+\1\b){3}", flags=re.IGNORECASE)
"""One word four times in a row."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A generated text that was left out."""

    round: int
    """Round, from 1."""
    part: str
    """aspect or opinion."""
    reason: str
    """What is wrong with it; see ``fault_of``."""
    text: str
    """What the model generated."""


def tidy(text: str) -> str:
    """A text without the blanks, quotes and full stop around it."""
    return text.strip().strip(_QUOTES).strip().removesuffix(".").strip().strip(_QUOTES).strip()


def fault_of(generation: Generation, part: str, *, prompts: Prompts) -> str | None:
    """The first reason to leave a text out, as counted and written; None for a well-formed one.

    Args:
        generation: as the model generated it.
        part: aspect or opinion.
        prompts: the prompts that it comes from.
    """
    text, words, file = generation.text, words_of(generation.text), prompts.file
    # Given the gold label, a model that merely repeats it would always converge.
    labels = {word for label in (*prompts.words, *prompts.labels) for word in words_of(label)}
    faults = {
        "empty": not words,
        "several lines": len(text.strip().splitlines()) > 1,
        "echoes the prompt": prompts.echoes(text),
        "repeats itself": _LOOP.search(text) is not None,
        "cut off": not generation.ended,
        "too many words": len(tidy(text).split()) > getattr(file.most_words, part),
        "says nothing": words in map(words_of, file.no_answer),
        "only a label": labels.issuperset(words),
    }
    return next((reason for reason, applies in faults.items() if applies), None)


@dataclass(frozen=True, slots=True)
class Settings:
    """How texts are refined."""

    rounds: int = 10
    """Maximum for a post with a gold label; a post without one has one."""
    batch_size: int = 16
    """Prompts per batch."""
    temperature: float = 0.7
    """Of sampling; 0 never samples, so that a prompt that comes back has the same text."""
    seed: int = 0
    """Of sampling."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The last complete, well-formed result: what the post expresses about its target."""

    aspect: str
    opinion: str
    polarity: str
    """The label that the model finds the most probable, given the other two."""
    aspect_confidence: float
    """Geometric mean of the probabilities of the aspect's tokens."""
    opinion_confidence: float
    """The same of the opinion's."""
    polarity_confidence: float
    """Share of the polarity's label word among all label words."""


@dataclass(slots=True)
class Outcome:
    """State of one post; the fields are what a journal holds."""

    index: int
    """Number of the post from 0, in the order of the file."""
    reading: Reading | None = None
    """None until a round was well formed."""
    rounds: int = 0
    """Rounds so far."""
    converged: bool | None = None
    """Whether the polarity is the gold label; None without one."""
    shortened: bool = False
    """A prompt was too long for the model, so the end of the post was left out."""
    malformed: list[Malformed] = field(default_factory=list)
    """Texts that were left out."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of ``dataclasses.asdict``."""
        reading = None if values["reading"] is None else Reading(**values["reading"])
        malformed = [Malformed(**item) for item in values["malformed"]]
        return cls(**{**values, "reading": reading, "malformed": malformed})


@dataclass(slots=True)
class _Case:
    """A post in work."""

    post: Post
    outcome: Outcome
    greedy: dict[Prompt, Generation] = field(default_factory=dict)
    """Greedy texts of earlier prompts."""


class Refiner:
    """Generates, checks, and generates again.

    A prompt is first continued by the most probable tokens. A prompt that comes back unchanged
    would have the same text forever, so from then on it is sampled, with a seed made of
    ``settings.seed``, post, round and part: neither the batch nor an interruption changes it.

    Args:
        generator: the model.
        prompts: templates and examples.
        settings: rounds and sampling.
    """

    def __init__(self, generator: Generator, prompts: Prompts, settings: Settings) -> None:
        self._generator, self._prompts, self._settings = generator, prompts, settings

    def __call__(
        self,
        posts: Mapping[int, Post],
        *,
        watch: Callable[[int, int], object] = lambda number, left: None,
    ) -> list[Outcome]:
        """Process some posts.

        Args:
            posts: by their number.
            watch: called before each round with its number and how many posts take part.
        """
        cases = [_Case(post, Outcome(index)) for index, post in posts.items()]
        open_cases = cases
        for number in range(1, self._settings.rounds + 1):
            if not open_cases:
                break
            watch(number, len(open_cases))
            self._round(open_cases, number)
            open_cases = [case for case in open_cases if case.outcome.converged is False]
        return [case.outcome for case in cases]

    def _round(self, cases: Sequence[_Case], number: int) -> None:
        aspects = self._generate(cases, "aspect", number, known=[{} for _ in cases])
        having = [row for row, aspect in enumerate(aspects) if aspect is not None]
        known = [{"aspect": tidy(aspects[row].text)} for row in having]
        opinions = self._generate([cases[row] for row in having], "opinion", number, known=known)
        complete = [
            (cases[row], given | {"opinion": tidy(opinion.text)}, (aspects[row], opinion))
            for row, given, opinion in zip(having, known, opinions, strict=True)
            if opinion is not None
        ]
        prompts = [self._prompt(case, "polarity", given) for case, given, _ in complete]
        scores = in_batches(
            range(len(prompts)),
            lambda rows: self._generator.score(
                [prompts[row] for row in rows], choices=self._prompts.words
            ),
            prompts=prompts,
            size=self._settings.batch_size,
        )
        for row, (case, given, generations) in enumerate(complete):
            shares = scores[row]
            best = max(range(len(shares)), key=shares.__getitem__)
            confidences = (*(item.probability for item in generations), shares[best])
            case.outcome.reading = Reading(
                given["aspect"],
                given["opinion"],
                self._prompts.labels[best],
                *(round(value, 6) for value in confidences),
            )
        for case in cases:
            outcome, gold = case.outcome, case.post.labels[GOLD]
            outcome.rounds = number
            if gold is not None:
                outcome.converged = outcome.reading is not None and outcome.reading.polarity == gold

    def _generate(
        self, cases: Sequence[_Case], part: str, number: int, *, known: Sequence[Mapping[str, str]]
    ) -> list[Generation | None]:
        """The texts of one of the two generated parts, None for a malformed one."""
        prompts = [
            self._prompt(case, part if case.outcome.reading is None else f"refine_{part}", given)
            for case, given in zip(cases, known, strict=True)
        ]
        # Row -> seed of a prompt that comes back; None for a new one.
        seeds = {
            row: seed_of(self._settings.seed, case.outcome.index, number, part)
            if prompt in case.greedy
            else None
            for row, (case, prompt) in enumerate(zip(cases, prompts, strict=True))
            if self._settings.temperature > 0 or prompt not in case.greedy
        }
        found = in_batches(
            list(seeds),
            lambda rows: self._generator.generate(
                [prompts[row] for row in rows], seeds=[seeds[row] for row in rows]
            ),
            prompts=prompts,
            size=self._settings.batch_size,
        )
        kept: list[Generation | None] = []
        for row, (case, prompt) in enumerate(zip(cases, prompts, strict=True)):
            generation = found.get(row) or case.greedy[prompt]
            case.greedy.setdefault(prompt, generation)
            fault = fault_of(generation, part, prompts=self._prompts)
            if fault is not None and row in found:
                case.outcome.malformed.append(Malformed(number, part, fault, generation.text))
            kept.append(generation if fault is None else None)
        return kept

    def _prompt(self, case: _Case, part: str, known: Mapping[str, str]) -> Prompt:
        """The filled template, without the end of a post that makes it too long for the model."""
        values = {
            "target": case.post.pair or self._prompts.file.no_target,
            "gold": case.post.labels[GOLD] or "",
            **known,
        }
        if case.outcome.reading is not None:
            values |= {f"previous_{name}": getattr(case.outcome.reading, name) for name in PARTS}
        words = case.post.text.split()
        while True:
            prompt = self._prompts.build(part, values | {"text": " ".join(words)})
            excess = self._generator.excess(prompt)
            if not excess:
                return prompt
            if not words:
                raise ValueError(
                    f"the question {part} alone is {excess:,} tokens too long for the model, without any post: "
                    f"{self._generator.limit}. Copy {prompts_path()}, shorten its templates or "
                    "take examples out, and give the copy with --prompts; or take a --model that "
                    "reads more, such as kit:smollm2."
                )
            # A word has at least one token, so this may cut a little more than it must.
            words = words[: max(len(words) - excess, 0)]
            case.outcome.shortened = True
