"""The kinds of tasks that the decoder of an encoder-decoder answers: free text, and labels scored by their words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.tasks.kinds.base import Kind, TaskLike, weighted_sum, weights_of
from comoe.tasks.kinds.classification import SingleLabel, is_list
from comoe.tasks.labels import is_missing, label_name
from comoe.tasks.metrics import METRICS
from comoe.types import IGNORED

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class LabelWords(SingleLabel):
    """One label of several, each a few words whose probability the decoder gives; nothing is sampled. Parsed: int.

    Logits are log-probabilities of the labels' words, log P(words | post), so their softmax is the
    share of each label in the probability of all of them. The loss is that of a language model
    taught the words of the gold label.
    """

    generates = True
    contrastive = False

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """-log P(words of the gold label | post), summed over words and labelled rows; other labels are not read."""
        present = self.labelled(targets)
        gold_B = logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]
        if (weights_Y := weights_of(task, gold_B)) is not None:
            gold_B = gold_B * weights_Y[targets.clamp(min=0)]
        return weighted_sum(-torch.where(present, gold_B, gold_B * 0.0), weights_B)


class Text(Kind):
    """Any text, written by the decoder: cross-entropy of each of its tokens.

    A cell is a text, a number, or a list of those, which is joined by commas. An empty one is
    missing. Parsed: str, as it is to be written. Targets travel as code points, see
    ``Batch.labels``.
    """

    generates = True
    ragged = True
    contrastive = False
    weighted = False
    metrics = ("token_f1", "exact_match", "rouge_l")

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 0

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        return ()

    def parse(self, value: object, labels: Sequence[str]) -> str | None:
        items = [_item(item) for item in (value if is_list(value) else [value])]
        return ", ".join(item for item in items if item) or None

    def collate(
        self, values: Sequence[tuple[int, str] | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        """``values`` hold (tokens that are taught, text) here; 0 behind the code points of shorter texts."""
        width = 1 + max((len(value[1]) for value in values if value is not None), default=0)
        targets = torch.full((len(values), width), IGNORED, dtype=torch.int64)
        for row, value in enumerate(values):
            if value is not None:
                count, text = value
                targets[row] = torch.tensor(
                    [count, *map(ord, text), *[0] * (width - 1 - len(text))]
                )
        return targets

    def labelled(self, targets: Tensor) -> Tensor:
        return targets[:, 0] != IGNORED

    def units(self, targets: Tensor, task: TaskLike) -> Tensor:
        """Tokens of the labelled rows' texts, end signs included."""
        return torch.where(self.labelled(targets), targets[:, 0], 0).sum(dtype=torch.float64)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """-log P(own text | post), summed over tokens and labelled rows."""
        own_B = logits.float()[:, 0]
        return weighted_sum(-torch.where(self.labelled(targets), own_B, own_B * 0.0), weights_B)

    def decode(self, logits: Tensor, task: TaskLike) -> list[dict[str, Any]]:
        """``{"answer": what was written, "probability": of the whole of it, its end included, in [0, 1]}``.

        Long texts have small probabilities: it is the product over tokens, so that answers to one
        post compare.
        """
        logits = logits.detach().double()
        probabilities = logits[:, 1].exp().tolist()
        texts = [_spelled(row) for row in logits[:, 2:].tolist()]
        return [
            {"answer": text, "probability": value}
            for text, value in zip(texts, probabilities, strict=True)
        ]

    def gold(self, targets: Tensor, task: TaskLike) -> list[str | None]:
        return [None if row[0] == IGNORED else _spelled(row[1:]) for row in targets.tolist()]

    def answers(self, logits: Tensor, targets: Tensor) -> tuple[list[str], list[str]]:
        """Gold and written texts."""
        present = self.labelled(targets)
        gold = [_spelled(row[1:]) for row in targets[present].tolist()]
        return gold, [_spelled(row[2:]) for row in logits.detach()[present].tolist()]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[list[str], list[str]]:
        return [row["gold"] for row in rows], [row["answer"] for row in rows]

    def score(self, gold: list[str], scores: list[str], task: TaskLike) -> dict[str, float]:
        """The majority baseline writes the commonest text of ``gold``, the first of equally common ones."""
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
    return _LONE_SURROGATE.sub("\ufffd", text.strip())


def _spelled(codes: Sequence[float]) -> str:
    """Code points as text, up to the first that is none: 0 pads, and so does IGNORED."""
    letters = []
    for code in codes:
        if code <= 0:
            break
        letters.append(chr(int(code)))
    return "".join(letters)
