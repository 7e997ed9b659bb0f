"""The table of all kinds."""

from __future__ import annotations

from comoe.tasks.kinds.base import Kind
from comoe.tasks.kinds.classification import MultiLabel, SingleLabel
from comoe.tasks.kinds.generation import LabelWords, Text
from comoe.tasks.kinds.regression import Regression
from comoe.tasks.kinds.tagging import Phrases, Tags
from comoe.tasks.kinds.unlabelled import Unlabelled

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
