"""What asking a generative model means here: prompts in, answers and scores of words out, with their probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

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
    """Geometric mean of the probabilities of the written tokens, the end token among them, in [0,
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


def in_batches(
    rows: Sequence[int],
    ask: Callable[[list[int]], list[Result]],
    *,
    prompts: Sequence[Prompt],
    size: int,
) -> dict[int, Result]:
    """Row -> result, asked in batches of prompts of similar length.

    Args:
        rows: of ``prompts`` to ask.
        ask: gives the results of at most ``size`` rows.
        prompts: all of them.
        size: rows per batch.
    """
    # Longest first: a batch that does not fit into memory fails at once.
    order = sorted(rows, key=lambda row: (-len(prompts[row].question), row))
    found: dict[int, Result] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        found |= zip(batch, ask(batch), strict=True)
    return found


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) made of numbers and words: the same on every machine, another one for other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
