"""The recipes, DeepSpeed files and prompts that come with comoe, found by name."""

from __future__ import annotations

from pathlib import Path

from comoe.config.errors import unknown_name

PACKAGE = Path(__file__).resolve().parents[1]
PROMPTS = "augment_prompts"
"""Name of the file beside the recipes that is none."""


def recipe_path(given: str | Path) -> Path:
    """The file that a path means, or the name of a ready recipe.

    Raises:
        ValueError: a bare name that neither a file nor a recipe has.
    """
    files = _folder("recipes", "launch/configs").glob("*.yaml")
    return _find("recipe", given, {file.stem: file for file in files if file.stem != PROMPTS})


def settings_path(given: str | Path) -> Path:
    """The DeepSpeed file of a path, or of the name of a ready one; raises as ``recipe_path``."""
    folder = _folder("ds_configs", "ds_configs")
    return _find("DeepSpeed file", given, {file.stem: file for file in folder.glob("*.json")})


def prompts_path() -> Path:
    """The prompts of ``comoe augment``."""
    return _folder("recipes", "launch/configs") / f"{PROMPTS}.yaml"


def _folder(installed: str, in_checkout: str) -> Path:
    """Inside the installed package, or in the checkout around it."""
    inside = PACKAGE / installed
    return inside if inside.is_dir() else PACKAGE.parent / in_checkout


def _find(what: str, given: str | Path, ready: dict[str, Path]) -> Path:
    path, name = Path(given), str(given)
    if path.is_file() or path.suffix or path.parent != Path("."):
        return path
    if name not in ready:
        raise unknown_name(what, name, sorted(ready))
    return ready[name]
