"""The kind of task whose head gives a post a number, and the table of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from comoe.tasks.kinds.base import Kind
from comoe.tasks.kinds.classification import MultiLabel, SingleLabel
from comoe.tasks.kinds.generation import LabelWords, Text
from comoe.tasks.kinds.regression import Regression
from comoe.tasks.kinds.tagging import Phrases, Tags
from comoe.tasks.kinds.unlabelled import Unlabelled


def merge_answers(shares: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """One (gold, scores) of several that ``Kind.answers`` gave for parts of the same task's rows, in their order."""
    gold, scores = zip(*shares, strict=True)
    if isinstance(gold[0], list):
        return [row for part in gold for row in part], [row for part in scores for row in part]
    return np.concatenate(gold), np.concatenate(scores)


KINDS: dict[str, Kind] = {
    "single_label": SingleLabel(),
    "multi_label": MultiLabel(),
    "regression": Regression(),
    "tags": Tags(),
    "phrases": Phrases(),
    "unlabelled": Unlabelled(),
    "text": Text(),
    "label_words": LabelWords(),
}
