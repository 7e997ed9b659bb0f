"""Recipes and DeepSpeed files that come with comoe are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from comoe.config.load import load_recipe
from comoe.config.ready_made import prompts_path, recipe_path, settings_path

ROOT = Path(__file__).parents[3]


def test_ready_files_are_found_by_name_from_any_folder_and_paths_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("smoke") == load_recipe(ROOT / "launch/configs/smoke.yaml")
    assert settings_path("zero3").samefile(ROOT / "ds_configs/zero3.json")
    assert prompts_path().is_file()
    for given in ("mine.yaml", "mine/smoke"):
        assert recipe_path(given) == Path(given)
    (tmp_path / "smoke").write_text("a file of that name is nearer than a ready recipe")
    assert recipe_path("smoke") == Path("smoke")


def test_a_name_that_nothing_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"twetteval is not a recipe; did you mean tweeteval\?"):
        recipe_path("twetteval")
    with pytest.raises(ValueError, match="zero4 is not a DeepSpeed file; did you mean zero"):
        settings_path("zero4")
    with pytest.raises(ValueError, match="augment_prompts is not a recipe"):
        recipe_path("augment_prompts")
