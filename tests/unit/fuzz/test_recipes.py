"""Recipes and DeepSpeed files, changed in any way: read, or refused in one sentence."""

import json
import tempfile
import time
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from comoe.config.failure import is_foreign
from comoe.config.load import load_recipe, recipe_to_yaml
from comoe.train.parallel.ds_config import fill_settings, load_settings, plan_layout
from tests.unit.fuzz.mutations import HANG, damaged, files_below, fuzz, mutated

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "launch/configs").glob("*.yaml"))
RECIPES = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES]
RECIPES = [tree for tree in RECIPES if "tasks" in tree]
BYTES = [path.read_bytes() for path in FILES]
SETTINGS = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]


def one_sentence(error):
    """Of comoe, not of a library, and short."""
    said = str(error)
    assert said.strip() and len(said) < 20_000 and not is_foreign(error), said[:500]


@fuzz(60)
@given(
    written=st.one_of(
        mutated(RECIPES).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode()),
        damaged(BYTES),
    )
)
def test_a_recipe_is_read_or_refused_in_one_sentence(written):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "recipe.yaml"
        file.write_bytes(written)
        began = time.process_time()
        try:
            recipe = load_recipe(file)
        except ValueError as error:
            one_sentence(error)
        else:
            # What a run writes down must be the recipe that it had.
            file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
            assert load_recipe(file) == recipe
        assert time.process_time() - began < HANG
        assert files_below(Path(place)) == {"recipe.yaml"}


@fuzz(60)
@given(
    written=st.one_of(
        mutated(SETTINGS).map(lambda tree: json.dumps(tree).encode()),
        damaged([json.dumps(tree, indent=1).encode() for tree in SETTINGS]),
    ),
    ranks=st.sampled_from([1, 2, 8]),
)
def test_a_deepspeed_file_is_filled_or_refused_in_one_sentence(written, ranks):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "ds.json"
        file.write_bytes(written)
        recipe = load_recipe("smoke")
        try:
            settings = load_settings(file)
            layout = plan_layout(recipe, settings, world_size=ranks, gpu=False)
            filled = fill_settings(settings, recipe, layout, gpu=False)
        except ValueError as error:
            one_sentence(error)
            return
        assert '"auto"' not in json.dumps(filled)
