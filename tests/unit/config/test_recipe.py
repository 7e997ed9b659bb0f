"""The words of a recipe are those that modules implement; the reference has every option."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import Any

import pytest
import yaml

from comoe.config.fields import words_of
from comoe.config.load import recipe_from_dict, recipe_to_dict, type_at
from comoe.config.recipe import ModelConfig, MoeConfig, Recipe, TaskConfig
from comoe.config.reference import options, options_markdown, recipe_json_schema
from comoe.config.validate import (
    BY_ADAPTERS,
    BY_DECODER,
    BY_GRADIENTS,
    BY_TEMPERATURE,
    UNLABELLED,
    validate,
)
from comoe.data.posts import HIDINGS
from comoe.data.reading.sources import NAMES, READERS
from comoe.data.sampling.mixing import MIXINGS, by_temperature
from comoe.data.text.noise import NOISES
from comoe.data.text.normalize import PRESETS
from comoe.losses.image_text import HARD
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.encoders.attach import FORMS, SCOPES, TARGETS
from comoe.models.encoders.families import LAYER_CHOICES, TRAINED_LAYERS
from comoe.models.moe.gate import BALANCES, GATES
from comoe.models.moe.router import ROUTES
from comoe.models.vision.fusion import FUSIONS
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.metrics import METRICS
from comoe.tasks.task import CONFIDENCE_STRATEGIES
from comoe.train.memory_plan import MOMENTS
from comoe.train.state import SCHEDULES

TABLES = {
    "data.hide": HIDINGS,
    "data.mixing": MIXINGS,
    "data.normalize.preset": PRESETS,
    "loss.image_text.negatives": HARD,
    "loss.weighting": WEIGHTINGS,
    "model.moe.balance": BALANCES,
    "model.moe.form": FORMS,
    "model.moe.gate": GATES,
    "model.moe.gate_scope": SCOPES,
    "model.moe.layers": LAYER_CHOICES,
    "model.moe.route_by": ROUTES,
    "model.moe.targets": TARGETS,
    "model.train_layers": {"auto": None, **TRAINED_LAYERS},
    "model.vision.fusion": FUSIONS,
    "tasks.t.confidence_strategy": CONFIDENCE_STRATEGIES,
    "tasks.t.format": {"auto": None, **READERS},
    "tasks.t.kind": KINDS,
    "tasks.t.metric": {"auto": None, **METRICS},
    "train.optimizer": MOMENTS,
    "train.schedule": SCHEDULES,
}


@pytest.mark.parametrize("path", TABLES)
def test_the_words_of_an_option_are_the_keys_of_the_table_that_implements_it(path: str):
    assert words_of(type_at(path)) == tuple(TABLES[path])


def test_words_within_lists_and_rules_are_those_of_the_tables_too():
    assert words_of(type_at("data.noise").__args__[0].__args__[0]) == tuple(NOISES)
    assert words_of(type_at("tasks.t.splits").__args__[0]) == tuple(NAMES)
    for word, reads in ROUTES.items():
        assert ModelConfig(moe=MoeConfig(route_by=word)).row_per_task == reads.task
    assert BY_DECODER == tuple(name for name, kind in KINDS.items() if kind.mode == "decoder")
    assert BY_ADAPTERS == tuple(name for name, form in FORMS.items() if form.freezes)
    assert (UNLABELLED,) == tuple(name for name, kind in KINDS.items() if not kind.scored)
    assert BY_GRADIENTS == tuple(n for n, kind in WEIGHTINGS.items() if kind.reads_gradients)
    assert BY_TEMPERATURE == tuple(
        n for n, mixing in MIXINGS.items() if mixing.rates is by_temperature
    )


def test_the_defaults_obey_the_rules():
    recipe = Recipe(tasks={"mood": TaskConfig(path="mood.csv")})
    validate(recipe)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    with pytest.raises(ValueError, match="weight"):
        TaskConfig(path="mood.csv", weight=-1.0)


@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.path)
def test_an_option_takes_its_default_and_refuses_what_is_of_another_type(option: Any):
    assert len(option.meaning) > 10 and option.allowed
    *sections, name = option.path.replace("<name>", "t").split(".")
    for value in (copy.deepcopy(option.default), {"no": "option"}, [[]]):
        nested = {name: value}
        for section in reversed(sections):
            nested = {section: nested}
        if value == option.default:
            recipe_from_dict(nested)
        elif not option.allowed.startswith("a mapping"):
            with pytest.raises(ValueError, match=rf"^{'.'.join([*sections, name])}"):
                recipe_from_dict(nested)


def test_the_condition_of_an_option_speaks_of_options_and_their_words():
    conditions = [option.read_when for option in options() if option.read_when]
    parts = set(itertools.chain.from_iterable(text.split(" and ") for text in conditions))
    for part in parts - {"images are read"}:
        path, sign, wanted = part.split(" ", 2)
        expected = type_at(path)
        if sign == ">":
            assert float(wanted) >= 0 and expected is not None
        else:
            items = [expected, *getattr(getattr(expected, "__origin__", None), "__args__", ())]
            assert sign == "="
            assert set(wanted.split(" or ")) <= {w for item in items for w in words_of(item)}


def test_the_reference_has_a_row_per_option():
    rows = [row for row in options_markdown().splitlines() if row.startswith("| `")]
    assert len(rows) == len(list(options())) > 100
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
    (row,) = [row for row in rows if row.startswith("| `train.momentum` |")]
    assert row.startswith(
        "| `train.momentum` | `0.0` | a number, at least 0, below 1 | Momentum of sgd."
    )
    assert row.endswith("Read when `train.optimizer = sgd`. |")


def test_the_json_schema_bounds_values_and_closes_sections():
    schema = recipe_json_schema()
    moe = schema["$defs"]["MoeConfig"]
    assert moe["additionalProperties"] is False and moe["properties"]["top_k"]["minimum"] == 1
    assert moe["properties"]["gate"]["enum"] == list(GATES)
    assert schema["$defs"]["TrainConfig"]["properties"]["momentum"]["exclusiveMaximum"] == 1
    assert "ge" not in yaml.safe_dump(schema).split()


def test_the_recipe_is_read_without_torch():
    code = "import sys, comoe.config.load, comoe.config.reference; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
