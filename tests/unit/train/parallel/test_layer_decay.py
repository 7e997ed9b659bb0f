"""A rate for each layer of the encoder."""

import re

import pytest
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from comoe.config.recipe import Recipe
from comoe.models.encoders.families import layers_above
from comoe.train.parallel.setup import parameter_groups
from tests.helpers_model import HF_CONFIGS, moe_config, tiny_objective

ABOVE = {
    "bert": {r"embeddings\.": 3, r"encoder\.layer\.0\.": 2, r"encoder\.layer\.1\.": 1, r"encoder\.layer\.2\.": 0},
    "modernbert": {r"embeddings\.": 3, r"layers\.0\.": 2, r"layers\.1\.": 1, r"layers\.2\.|final_norm": 0},
    "mpnet": {r"embeddings\.|encoder\.relative": 3, r"encoder\.layer\.0\.": 2, r"encoder\.layer\.1\.": 1,
              r"encoder\.layer\.2\.": 0},
}  # fmt: skip
"""Family -> pattern of a weight's name -> layers that run behind it, by hand."""


@pytest.mark.parametrize("family", ABOVE)
def test_each_layer_learns_slower_than_the_one_above_it(family):
    objective = tiny_objective(moe_config(), family=family)
    recipe = Recipe()
    recipe.train.layer_decay, recipe.train.learning_rate = 0.5, 0.08
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups, plain = parameter_groups(objective, recipe), parameter_groups(objective, Recipe())
    rates, usual, decays, usual_decays = (
        {names[id(p)]: group[key] for group in each for p in group["params"]}
        for key in ("lr", "weight_decay")
        for each in (groups, plain)
    )
    assert rates.keys() == set(names.values()) and decays == usual_decays
    assert len({group["name"] for group in groups}) == len(groups)
    seen = set()
    for name, rate in rates.items():
        path = name.removeprefix("model.encoder.")
        if path == name or ".block." in name:
            assert rate == usual[name], name
        else:
            (above,) = [n for pattern, n in ABOVE[family].items() if re.match(pattern, path)]
            assert rate == pytest.approx(0.08 * 0.5**above, rel=1e-12), name
            seen.add(above)
    assert seen == {0, 1, 2, 3}
    assert {group["role"] for group in groups} == {group["role"] for group in plain}


def test_stacks_of_an_encoder_decoder_are_counted_apart():
    for output in ("shared", "lm_head"):
        encoder = AutoModelForSeq2SeqLM.from_config(HF_CONFIGS["t5"])
        if output == "lm_head":
            encoder.lm_head.weight = nn.Parameter(encoder.lm_head.weight.detach().clone())
        found = layers_above(encoder)
        above = {name: found[id(parameter)] for name, parameter in encoder.named_parameters()}
        expected = {"shared.": 3, "encoder.block.0.": 2, "encoder.block.2.": 0, "encoder.final": 0,
                    "decoder.block.0.": 1, "decoder.block.1.": 0, "decoder.final": 0,
                    f"{output}.": 3 if output == "shared" else 0}  # fmt: skip
        for start, count in expected.items():
            assert {n for name, n in above.items() if name.startswith(start)} == {count}, start
