"""Interface of a generative model: prompts in, generated texts and scores of given texts out, with probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A filled template."""

    question: str
    """The generated text follows right behind it."""
    examples: tuple[tuple[str, str], ...] = ()
    """(question, text) of examples that precede it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text."""

    text: str
    """Without the sign that ends it."""
    probability: float
    """Geometric mean of the probabilities of the generated tokens, the end token included,
    in [0, 1]: of each under the model itself (temperature 1), given the prompt and the tokens before
    it."""
    ended: bool
    """False: cut off at the maximum of tokens."""


class Generator(Protocol):
    """A generative model. Equal calls give equal results, and no prompt's result depends on the others'."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What results depend on: name, digest of weights and tokenizer, precision, settings."""
        ...

    @property
    def limit(self) -> str:
        """How much the model reads, for messages."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int | None]
    ) -> list[Generation]:
        """Generate one text per prompt: greedily where ``seeds`` has None, else sampled with that seed."""
        ...

    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each given text per prompt, as shares that sum to 1. Nothing is sampled."""
        ...

    def excess(self, prompt: Prompt) -> int:
        """Tokens by which prompt and generated text together exceed what the model can read; 0 if they fit."""
        ...


def in_batches(
    rows: Sequence[int],
    call: Callable[[list[int]], list[Result]],
    *,
    prompts: Sequence[Prompt],
    size: int,
) -> dict[int, Result]:
    """Row of ``prompts`` -> result of ``call``, given at most ``size`` rows of similar length."""
    # Longest first: a batch that does not fit into memory fails at once.
    order = sorted(rows, key=lambda row: (-len(prompts[row].question), row))
    results: dict[int, Result] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        results |= zip(batch, call(batch), strict=True)
    return results


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) from numbers and words: the same on every machine, different for other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
