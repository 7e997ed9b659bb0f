"""What asking a generative model means here: prompts in, answers and scores of words out, with their probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked."""

    question: str
    """Filled template; the answer goes right behind it."""
    examples: tuple[tuple[str, str], ...] = ()
    """(question, answer) of examples that go before it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote."""

    text: str
    """As it was written, without the sign that ends it."""
    probability: float
    """Geometric mean of the probabilities of the written tokens, the end sign among them, in [0,
    1]: of each under the model itself (temperature 1), given the prompt and the tokens before
    it."""
    ended: bool
    """False: cut off at the largest number of tokens."""


class Generator(Protocol):
    """A generative model. Equal calls give equal results, and no prompt's result depends on the others'."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What the results depend on: name, digest of weights and tokenizer, precision, settings."""
        ...

    @property
    def limit(self) -> str:
        """How much the model reads, as a message says it."""
        ...

    def answer(self, prompts: Sequence[Prompt], *, draws: Sequence[int | None]) -> list[Answer]:
        """One answer per prompt: the most probable token each time where ``draws`` has None, else drawn with that seed.

        Args:
            prompts: one batch.
            draws: seed per prompt, or None.
        """
        ...

    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """How probable each of the given answers is, per prompt, as shares that sum to one. Nothing is drawn."""
        ...

    def excess(self, prompt: Prompt) -> int:
        """Tokens by which prompt and answer together go beyond what the model can read; 0 where they fit."""
        ...


class Batched:
    """A generator that gets its prompts in batches of similar length, the longest first.

    Args:
        generator: gets at most ``batch_size`` prompts at once.
        batch_size: prompts.
    """

    def __init__(self, generator: Generator, *, batch_size: int) -> None:
        self._generator = generator
        self._batch_size = batch_size

    def answer(self, prompts: Sequence[Prompt], *, draws: Sequence[int | None]) -> list[Answer]:
        """As ``Generator.answer``, for any number of prompts; results are in the order of the prompts."""
        return self._in_batches(
            prompts,
            lambda rows: self._generator.answer(
                [prompts[row] for row in rows], draws=[draws[row] for row in rows]
            ),
        )

    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As ``Generator.score``, for any number of prompts; results are in the order of the prompts."""
        return self._in_batches(
            prompts,
            lambda rows: self._generator.score([prompts[row] for row in rows], choices=choices),
        )

    def _in_batches(
        self, prompts: Sequence[Prompt], ask: Callable[[list[int]], list[Result]]
    ) -> list[Result]:
        # Longest first: a batch that does not fit into memory fails at once.
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].question), row))
        found: dict[int, Any] = {}
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            found |= zip(rows, ask(rows), strict=True)
        return [found[row] for row in range(len(prompts))]


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) made of numbers and words: the same on every machine, another one for other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
