"""What is refused once posts and encoder are both known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModel, BertConfig

from comoe.config.load import load_recipe
from comoe.config.recipe import ModelConfig, Recipe
from comoe.train.build import _build_objective, check_names
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
    assert _build_objective(recipe, TASKS, splits, None, shape=False).model.moe_layers()
    splits["validation"] = Tokens(lengths=np.array([21]))
    refusal = r"data.max_length \(128\) lets posts of 21 tokens .* set data.max_length to 20"
    with pytest.raises(ValueError, match=refusal):
        _build_objective(recipe, TASKS, splits, None, shape=False)


SMOKE = Path(__file__).parents[3] / "launch/configs/smoke.yaml"
WRONG = {
    "data.mixing=uniforn": "data.mixing is 'uniforn', which does not exist; did you mean uniform?",
    "data.mixing=temperature data.mixing_temperature=0.5": "data.mixing_temperature (0.5) must be at least 1",
    "loss.weighting=equals": "loss.weighting is 'equals', which does not exist; did you mean equal?",
    "model.moe.gate=sigmod": "model.moe.gate is 'sigmod', which does not exist; did you mean sigmoid?",
    "model.moe.top_k=4": "set model.moe.balance to none",
    "tasks.mood.kind=singel": "tasks.mood.kind is 'singel', which does not exist",
    "tasks.mood.format=jsnl": "tasks.mood.format is 'jsnl', which does not exist; did you mean jsonl?",
    "tasks.mood.metric=macro_f2": "tasks.mood.metric is 'macro_f2', which does not exist; did you mean macro_f1?",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_name_that_no_table_holds_is_refused_before_anything_is_read(words):
    # Not later: run.overwrite clears the old run away once posts and encoder are read.
    with pytest.raises(ValueError) as caught:
        check_names(load_recipe(SMOKE, words.split()))
    assert WRONG[words] in str(caught.value)


@pytest.mark.parametrize("name", ["smoke", "starter", "tweeteval"])
def test_the_recipes_hold_good_names(name):
    check_names(load_recipe(SMOKE.with_name(f"{name}.yaml")))
    check_names(load_recipe(SMOKE.with_name(f"{name}.yaml"), ["model.moe.num_experts=0"]))
