"""Options that are newer than a saved recipe."""

from pathlib import Path

import pytest

from comoe.config import legacy
from comoe.config.load import load_recipe, load_saved_recipe
from comoe.config.recipe import Recipe


def test_a_saved_recipe_keeps_what_it_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanings = {"train.betas": [0.5, 0.5], "tasks.*.weight": 3.0, "model.dropout": 0.5}
    monkeypatch.setattr(legacy, "OLD_MEANINGS", meanings)
    file = tmp_path / "config.yaml"
    file.write_text(
        "train: {seed: 3}\nmodel: {dropout: 0.25}\ntasks: {a: {path: a}, b: {path: b, weight: 2}}\n"
    )
    saved, typed = load_saved_recipe(file, ["tasks.c={path: c}"]), load_recipe(file)
    assert saved.train.betas == [0.5, 0.5]
    assert typed.train.betas == Recipe().train.betas
    assert saved.model.dropout == 0.25
    assert {name: task.weight for name, task in saved.tasks.items()} == {
        "a": 3.0,
        "b": 2.0,
        "c": 1.0,
    }


def test_every_old_meaning_is_of_an_option_with_another_default() -> None:
    from comoe.config.load import type_at

    for path in legacy.OLD_MEANINGS:
        assert type_at(path.replace("*", "any")) is not None, path
