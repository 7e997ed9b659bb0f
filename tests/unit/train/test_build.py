"""What is refused once posts and encoder are both known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModel, BertConfig

from comoe.config.recipe import ModelConfig, Recipe
from comoe.train.build import build_model
from tests.helpers_model import BERT_LIKE, TASKS


class Tokens(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.lengths)


def test_posts_longer_than_the_position_table_are_refused_before_training(tmp_path):
    AutoModel.from_config(BertConfig(**BERT_LIKE, max_position_embeddings=20)).save_pretrained(
        tmp_path
    )
    recipe = Recipe(model=ModelConfig(encoder=str(tmp_path)))
    splits = {
        "train": Tokens(lengths=np.array([3, 20])),
        "test": Tokens(lengths=np.array([], dtype=np.int32)),
    }
    # The option may be larger than the table as long as no post is.
    collator = SimpleNamespace(tasks=TASKS, domains=None)
    assert build_model(recipe, splits, collator).model.moe_layers()
    splits["validation"] = Tokens(lengths=np.array([21]))
    refusal = r"data.max_length \(128\) lets posts of 21 tokens .* set data.max_length to 20"
    with pytest.raises(ValueError, match=refusal):
        build_model(recipe, splits, collator)
