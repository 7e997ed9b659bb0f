"""Aspect, opinion and implied polarity of posts, refined against the gold label round by round.

As in MT-ISA (arXiv:2412.09046), with the three questions of THOR (arXiv:2305.11255). Malformed
outputs are kept out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from comoe.augment.generator import Answer, Batched, Generator, Prompt, seed_of
from comoe.augment.posts import Post
from comoe.augment.prompts import Prompts, words_of

_QUOTES = "\"'`*“”‘’«»「」"


_LOOP = re.compile(r"(\b\w+\b)(?:\W+\1\b){3}", flags=re.IGNORECASE)
"""One word four times in a row."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An answer that was kept out."""

    round: int
    """Round, from 1."""
    part: str
    """aspect or opinion."""
    reason: str
    """Key of ``REASONS``."""
    text: str
    """What the model wrote."""


def tidy(text: str) -> str:
    """An answer without the blanks, quotes and full stop around it."""
    return text.strip().strip(_QUOTES).strip().removesuffix(".").strip().strip(_QUOTES).strip()


def fault_of(answer: Answer, part: str, *, prompts: Prompts) -> str | None:
    """Key of the first reason that applies to an answer, None for a good one.

    Args:
        answer: as the model wrote it.
        part: aspect or opinion.
        prompts: what was asked.
    """
    return next(
        (reason for reason, applies in REASONS.items() if applies(answer, part, prompts)), None
    )


def _is_empty(answer: Answer, part: str, prompts: Prompts) -> bool:
    return not words_of(answer.text)


def _has_several_lines(answer: Answer, part: str, prompts: Prompts) -> bool:
    return len(answer.text.strip().splitlines()) > 1


def _is_cut(answer: Answer, part: str, prompts: Prompts) -> bool:
    return not answer.ended


def _says_nothing(answer: Answer, part: str, prompts: Prompts) -> bool:
    return words_of(answer.text) in {words_of(phrase) for phrase in prompts.file.no_answer}


def _is_only_a_label(answer: Answer, part: str, prompts: Prompts) -> bool:
    # Told the gold label, a model that merely repeats it would always converge.
    known = {word for label in (*prompts.words, *prompts.labels) for word in words_of(label)}
    return set(words_of(answer.text)) <= known


def _echoes(answer: Answer, part: str, prompts: Prompts) -> bool:
    return prompts.echoes(answer.text)


def _repeats_itself(answer: Answer, part: str, prompts: Prompts) -> bool:
    return _LOOP.search(answer.text) is not None


def _is_too_long(answer: Answer, part: str, prompts: Prompts) -> bool:
    return len(tidy(answer.text).split()) > getattr(prompts.file.most_words, part)


REASONS: dict[str, Callable[[Answer, str, Prompts], bool]] = {
    "empty": _is_empty,
    "several lines": _has_several_lines,
    "echoes the prompt": _echoes,
    "repeats itself": _repeats_itself,
    "cut off": _is_cut,
    "too many words": _is_too_long,
    "says nothing": _says_nothing,
    "only a label": _is_only_a_label,
}
"""Reason, as it is counted and written -> whether it applies to (answer, part, prompts); the first
one counts."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are refined."""

    rounds: int = 10
    """At most, for a post with a gold label; a post without one has one."""
    batch_size: int = 16
    """Prompts that the model reads at once."""
    temperature: float = 0.7
    """Of drawn answers; 0 never draws, so that a question that comes back has the same answer."""
    seed: int = 0
    """Of drawn answers."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One whole, well-formed answer: what the post says about its target."""

    aspect: str
    """What of the target."""
    opinion: str
    """What is thought of it."""
    polarity: str
    """The label that the model finds the most probable, having read the other two."""
    aspect_confidence: float
    """Geometric mean of the probabilities of the aspect's tokens."""
    opinion_confidence: float
    """The same of the opinion's."""
    polarity_confidence: float
    """Share of the polarity's label word among all label words."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one post."""

    index: int
    """Number of the post."""
    reading: Reading | None
    """The last well-formed answer, None where there was none."""
    rounds: int
    """Rounds that were asked."""
    converged: bool | None
    """Whether the polarity is the gold label; None without a gold label."""
    shortened: bool
    """Whether the post did not fit the model's length and lost its end."""
    malformed: tuple[Malformed, ...]
    """Answers that were kept out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """What ``to_dict`` gave."""
        reading = None if values["reading"] is None else Reading(**values["reading"])
        malformed = tuple(Malformed(**item) for item in values["malformed"])
        return cls(**{**values, "reading": reading, "malformed": malformed})


@dataclass(slots=True)
class _Case:
    """A post on its way."""

    post: Post
    greedy: dict[Prompt, Answer] = field(default_factory=dict)
    """Questions that had their most probable answer already."""
    kept: Reading | None = None
    rounds: int = 0
    shortened: bool = False
    malformed: list[Malformed] = field(default_factory=list)

    @property
    def converged(self) -> bool | None:
        if self.post.gold is None:
            return None
        return self.kept is not None and self.kept.polarity == self.post.gold

    @property
    def is_open(self) -> bool:
        return self.rounds == 0 or self.converged is False

    def outcome(self) -> Outcome:
        return Outcome(
            self.post.index, self.kept, self.rounds, self.converged, self.shortened, tuple(self.malformed)
        )  # fmt: skip


class Refiner:
    """Asks, checks, and asks again.

    A question is first answered by the most probable tokens. A question that comes back unchanged
    would have the same answer for ever, so from then on it is drawn, with a seed made of
    ``settings.seed``, post, round and part: neither the batch nor an interruption changes it.

    Args:
        generator: the model.
        prompts: what it is asked.
        settings: how often.
    """

    def __init__(self, generator: Generator, prompts: Prompts, settings: Settings) -> None:
        self._generator = generator
        self._batched = Batched(generator, batch_size=settings.batch_size)
        self._prompts = prompts
        self._settings = settings

    def __call__(
        self,
        posts: Sequence[Post],
        *,
        watch: Callable[[int, int], object] = lambda number, left: None,
    ) -> list[Outcome]:
        """Answer some posts.

        Args:
            posts: in any order.
            watch: called before each round with its number and how many posts take part.
        """
        cases = [_Case(post) for post in posts]
        for number in range(1, self._settings.rounds + 1):
            taking_part = [case for case in cases if case.is_open]
            if not taking_part:
                break
            watch(number, len(taking_part))
            self._round(taking_part, number)
        return [case.outcome() for case in cases]

    def _round(self, cases: Sequence[_Case], number: int) -> None:
        for case in cases:
            case.rounds = number
        aspects = self._ask(cases, "aspect", number, known=[{} for _ in cases])
        having = [row for row, answer in enumerate(aspects) if answer is not None]
        known = [{"aspect": tidy(aspects[row].text)} for row in having]
        opinions = self._ask([cases[row] for row in having], "opinion", number, known=known)
        whole = [
            (cases[row], given | {"opinion": tidy(opinion.text)}, (aspects[row], opinion))
            for row, given, opinion in zip(having, known, opinions, strict=True)
            if opinion is not None
        ]
        prompts = [self._prompt(case, "polarity", given) for case, given, _ in whole]
        scores = self._batched.score(prompts, choices=self._prompts.words)
        for (case, given, (aspect, opinion)), shares in zip(whole, scores, strict=True):
            best = max(range(len(shares)), key=shares.__getitem__)
            case.kept = Reading(
                given["aspect"], given["opinion"], self._prompts.labels[best],
                *(round(value, 6) for value in (aspect.probability, opinion.probability, shares[best])),
            )  # fmt: skip

    def _ask(
        self, cases: Sequence[_Case], part: str, number: int, *, known: Sequence[Mapping[str, str]]
    ) -> list[Answer | None]:
        """The answers to one of the two free questions, None where it was malformed."""
        prompts = [
            self._prompt(case, part if case.kept is None else f"refine_{part}", given)
            for case, given in zip(cases, known, strict=True)
        ]
        draws = self._settings.temperature > 0
        fresh = [
            row for row, (case, prompt) in enumerate(zip(cases, prompts, strict=True))
            if draws or prompt not in case.greedy
        ]  # fmt: skip
        seeds = [
            seed_of(self._settings.seed, cases[row].post.index, number, part)
            if prompts[row] in cases[row].greedy else None
            for row in fresh
        ]  # fmt: skip
        said = dict(
            zip(
                fresh,
                self._batched.answer([prompts[row] for row in fresh], draws=seeds),
                strict=True,
            )
        )
        answers: list[Answer | None] = []
        for row, (case, prompt) in enumerate(zip(cases, prompts, strict=True)):
            answer = said.get(row) or case.greedy[prompt]
            case.greedy.setdefault(prompt, answer)
            fault = fault_of(answer, part, prompts=self._prompts)
            if fault is not None and row in said:
                case.malformed.append(Malformed(number, part, fault, answer.text))
            answers.append(answer if fault is None else None)
        return answers

    def _prompt(self, case: _Case, part: str, known: Mapping[str, str]) -> Prompt:
        """The filled question; the end of a post that makes it too long for the model is left out."""
        values = {
            "target": case.post.target or self._prompts.file.no_target,
            "gold": case.post.gold or "",
            **known,
        }
        if case.kept is not None:
            values |= {
                f"previous_{name}": getattr(case.kept, name)
                for name in ("aspect", "opinion", "polarity")
            }
        words = case.post.text.split()
        while True:
            prompt = self._prompts.build(part, values | {"text": " ".join(words)})
            excess = self._generator.excess(prompt)
            if not excess:
                return prompt
            if not words:
                raise ValueError(
                    f"the question {part} alone is {excess:,} tokens too long for the model, without any post: "
                    f"{self._generator.limit}. Copy launch/configs/augment_prompts.yaml, shorten its templates or "
                    "take examples out, and give the copy with --prompts; or take a --model that reads more, such as "
                    "kit:smollm2."
                )
            # A word has at least one token, so this may cut a little more than it must.
            words = words[: max(len(words) - excess, 0)]
            case.shortened = True
