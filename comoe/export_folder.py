"""The folders of exports and checkpoints: which is which, whether an export's files fit one another."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from comoe.config import unknown_name

FORMAT_VERSION = 1
"""Counts changes of ``config.json`` and of the weights' names that older code cannot read."""
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def choose_checkpoint(run: Path, which: str) -> Path:
    """The best or last whole checkpoint of a run folder.

    Raises:
        ValueError: another word, or no such checkpoint.
    """
    if which not in CHOICES:
        raise unknown_name("choice of --which", which, CHOICES)
    whole = sorted(manifest.parent for manifest in (run / "checkpoints").glob("step-*/manifest.json"))
    if not whole:
        raise ValueError(f"{run} holds no whole checkpoint; give a run folder (with checkpoints/) or a checkpoint.")
    chosen = CHOICES[which](run / "checkpoints", whole)
    if chosen not in whole:
        names = ", ".join(path.name for path in whole)
        raise ValueError(f"{run} has no whole {which} checkpoint; give one of {names} in {run / 'checkpoints'}.")
    return chosen


def _best(checkpoints: Path, whole: Sequence[Path]) -> Path:
    """The checkpoint that an evaluation named; the newest one where none was."""
    named = checkpoints / "best.json"
    return checkpoints / f"step-{read_json(named)['step']:08d}" if named.is_file() else whole[-1]


def read_export_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an export.

    Raises:
        ValueError: no export, or one that another version made.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not an export: {' and '.join(missing)} missing; launch/export.py makes one from a run folder."
        )
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "comoe":
        raise ValueError(
            f"{folder / CONFIG} has model_type {config.get('model_type')!r} instead of 'comoe'; give the folder that "
            f"launch/export.py (or a run, as export/) wrote."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format_version {version}, made by comoe {config.get('comoe_version')}; this comoe "
            f"({installed_version()}) reads {FORMAT_VERSION}: install that version, or export the run again with "
            f"this one."
        )
    return config


def fill_in(model: nn.Module, weights: Mapping[str, Tensor], *, place: Path) -> None:
    """Give a model its weights, in place. A tensor of several names, as a tied output layer, comes under the first.

    Raises:
        ValueError: weights that are missing, of another shape, or not in the model; ``place`` names the file.
    """
    aliases = set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters()))
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    weights = {name: tensor for name, tensor in weights.items() if name not in aliases}
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    shapes = [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    problems = {"missing": missing, "not in the model": extra, "of another shape": shapes}
    told = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{place} does not fit {CONFIG}: weights {'; '.join(told)}. Export the run again.")
    model.load_state_dict(weights, strict=False)


def may_replace(folder: Path) -> bool:
    """True for an export and for an empty folder."""
    config = folder / CONFIG
    ours = config.is_file() and read_json(config).get("model_type") == "comoe"
    return folder.is_dir() and (ours or not any(folder.iterdir()))


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged.") from error


def installed_version() -> str:
    """The version of comoe."""
    try:
        return importlib.metadata.version("comoe")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


CHOICES = {"best": _best, "last": lambda checkpoints, whole: whole[-1]}
"""``--which`` -> (checkpoints folder, whole checkpoints) -> checkpoint."""
