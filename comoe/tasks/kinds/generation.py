"""Kinds in decoder mode: free text, and labels scored by their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import Detokenize, Kind, PostOutput, TaskLike, weighted_sum, weights_of
from comoe.tasks.kinds.classification import SingleLabel, is_list
from comoe.tasks.labels import is_missing, label_name, whole_characters
from comoe.tasks.metrics import METRICS
from comoe.types import Batch, ModelOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")


class LabelWords(SingleLabel):
    """One label of several, each a few words that the decoder scores; nothing is sampled. Parsed: int.

    Logits are log-probabilities of the labels' words, log P(words | post), so their softmax is the
    share of each label in the probability of all of them. The loss is that of a language model
    on the words of the gold label; with soft labels beside it the cross-entropy of these shares.
    """

    mode = "decoder"

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """-log P(words of the gold label | post), summed over tokens and labeled rows."""
        present = self.labelled(targets)
        gold_B = logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]
        if (weights_Y := weights_of(task, gold_B)) is not None:
            gold_B = gold_B * weights_Y[targets.clamp(min=0)]
        return weighted_sum(-torch.where(present, gold_B, gold_B * 0.0), weights_B)


class GeneratedText(NamedTuple):
    """What the decoder gives one post."""

    own_log_probability: float
    """Of the text that the post wants, nats, summed over its tokens; 0 where it wants none."""
    log_probability: float
    """Of the generated text, its end token included."""
    text: str
    """The generated text."""


class Text(Kind):
    """Any text, written by the decoder: cross-entropy of each of its tokens.

    A cell is a text, a number, or a list of those, which is joined by commas. An empty one is
    missing. Parsed: str, as it is to be generated; ``Batch.labels`` has its number of
    tokens, ``Batch.texts`` the text.
    """

    mode = "decoder"
    metrics = ("token_f1", "exact_match", "rouge_l")

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 0

    def parse(self, value: object, labels: Sequence[str]) -> str | None:
        items = [_item(item) for item in (value if is_list(value) else [value])]
        return ", ".join(item for item in items if item) or None

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        """Tokens of the labeled rows' texts, end tokens included."""
        return torch.where(self.labelled(targets), targets, 0).sum(dtype=torch.float64)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """-log P(own text | post), summed over tokens and labeled rows."""
        own_B = logits.float()[:, 0]  # ModelOutput.logits has the generated text's behind it
        return weighted_sum(-torch.where(self.labelled(targets), own_B, own_B * 0.0), weights_B)

    def outputs(
        self,
        output: ModelOutput,
        batch: Batch,
        rows: Sequence[int],
        *,
        task: TaskLike,
        detokenize: Detokenize | None = None,
    ) -> list[PostOutput]:
        """Of texts: what the decoder generated, and the text that each row wants."""
        logits, counts = self._of_rows(output, batch, rows, task)
        texts = detokenize(output.generated[task.name][rows])
        posts, wanted = batch.row_ids_B[rows].tolist(), batch.texts[task.name]
        return [
            PostOutput(
                post,
                GeneratedText(*scores, text),
                None if wanted[row] is None else (count, wanted[row]),
            )
            for row, post, scores, text, count in zip(
                rows, posts, logits.tolist(), texts, counts.tolist(), strict=True
            )
        ]

    def stack(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Tensor, Tensor]:
        own = [[output.logits.own_log_probability] for output in outputs]
        counts = [None if output.target is None else output.target[0] for output in outputs]
        targets = self.collate(counts, labels=(), length=0)
        return torch.tensor(own, dtype=torch.float32).reshape(-1, 1), targets

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"answer": the generated text, "probability": of it and its end, in [0, 1]}``.

        Long texts have small probabilities: it is the product over tokens, so that those of one
        post compare.
        """
        texts = [output.logits for output in outputs]
        logs = torch.tensor([text.log_probability for text in texts], dtype=torch.float64)
        return [
            {"answer": text.text, "probability": value}
            for text, value in zip(texts, logs.exp().tolist(), strict=True)
        ]

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[str | None]:
        return [None if target is None else target[1] for target in targets]

    def gold_and_scores(
        self, outputs: Sequence[PostOutput], task: TaskLike
    ) -> tuple[list[str], list[str]]:
        """Gold and generated texts."""
        present = [output for output in outputs if output.target is not None]
        return [output.target[1] for output in present], [one.logits.text for one in present]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[list[str], list[str]]:
        return [row["gold"] for row in rows], [row["answer"] for row in rows]

    def score(self, gold: list[str], scores: list[str], task: TaskLike) -> dict[str, float]:
        """The majority baseline predicts the commonest text of ``gold``."""
        (commonest, _), *_ = Counter(gold).most_common(1) or [("", 0)]
        baseline = METRICS[task.metric](gold, [commonest] * len(gold), ())
        return {name: METRICS[name](gold, scores, ()) for name in self.metrics} | {
            f"majority/{task.metric}": baseline
        }


def _item(value: object) -> str:
    """One text of a cell, "" where there is none."""
    if is_missing(value):
        return ""
    if not isinstance(value, (str, bool, int, float, np.generic)):
        raise ValueError(f"{value!r} is no text; give the answer as a text, or a list of texts.")
    text = value if isinstance(value, str) else label_name(value)
    if "\x00" in text:
        raise ValueError(f"{value!r} holds a NUL character; remove it.")
    return whole_characters(text.strip())
