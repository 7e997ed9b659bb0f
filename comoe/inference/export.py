"""Exports: a trained model as a folder in Hugging Face style. No DeepSpeed, no pickle.

``model.safetensors`` (plain PyTorch names, float32), ``config.json`` (``export_config``), the
tokenizer's files, ``lexicon.json`` where the model reads a lexicon, and ``README.md``, the model
card. ``exported`` reads them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from comoe.config.failure import doing, parsing
from comoe.config.files import lock_beside, locked, read_json, write_json
from comoe.config.load import load_saved_recipe
from comoe.config.recipe import Recipe
from comoe.data.images.pixels import ImageProcessor
from comoe.data.reading.inputs import column_in_training
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.evaluation.calibration import with_calibration
from comoe.inference.checkpoint_folder import (
    CARD,
    MANIFEST,
    SEEN,
    SPARED,
    checkpoint_of,
    choose_checkpoint,
    read_manifest,
    whats_wrong,
    write_manifest,
)
from comoe.inference.export_config import CONFIG, WEIGHTS, export_config
from comoe.inference.exported import describe_tokenizer, load_exported, read_image_processor
from comoe.inference.model_card import model_card
from comoe.models.moe.router import build_gate
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import Task, tasks_from

FOR_TRAINING = "image_text."
"""Beginning of the names of weights that only losses read."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """What belongs to the pre-trained parts of a model, besides their weights."""

    encoder_config: Mapping[str, Any]
    """``encoder.config.to_dict()``."""
    tokenizer: Any
    """The encoder's tokenizer."""
    tower_config: Mapping[str, Any] | None = None
    """``tower.inner.config.to_dict()``; None where the model has no vision tower."""
    image_processor: ImageProcessor | None = None
    """The vision tower's; None where the model reads no images."""
    lexicon: Lexicon | None = None
    """The run's; None where it has none."""


def export_model(
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor],
    recipe: Recipe,
    tasks: Sequence[Task],
    backbone: Backbone,
    results: Mapping[str, Any] | None = None,
    seen: Path | None = None,
) -> None:
    """Write an export, read it back to prove that it loads, and only then give it its name.

    Args:
        folder: the export; an older export there is replaced.
        state_dict: weights and buffers of ``MultiTaskModel`` by their plain names, whole, float32.
        recipe: the resolved recipe of the run.
        tasks: in the order of the model's heads.
        backbone: what belongs to the pre-trained parts.
        results: the run's ``results.json``, measured on these very weights, for the model card.
        seen: the filter of its training posts (``comoe.data.seen_posts``); None or no file: none.

    Raises:
        ValueError: the folder holds something that is no export, or weights and recipe do not fit.
    """
    folder = Path(folder)
    recipe, state_dict = _averaged(recipe, state_dict)
    image_processor = backbone.image_processor
    config = export_config(
        recipe,
        tasks,
        encoder_config=backbone.encoder_config,
        tower_config=backbone.tower_config,
    )
    config["image_column"] = image_processor and column_in_training(recipe.tasks.values())
    with replacing(folder) as aside:
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state_dict.items()
            if not name.startswith(FOR_TRAINING)
        }
        with doing("writing", folder / WEIGHTS):
            save_file(_each_once(weights), aside / WEIGHTS, metadata={"format": "pt"})
        backbone.tokenizer.save_pretrained(str(aside))
        describe_tokenizer(aside, config)
        write_json(aside / CONFIG, config)
        # safetensors writes for the owner alone; others may read what the umask lets them.
        (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode & 0o777)
        if image_processor is not None:
            image_processor.save(aside)
        if backbone.lexicon is not None and recipe.model.lexicon.input:
            backbone.lexicon.save(aside)
        about = {"recipe": recipe, "tasks": tasks, "config": config, "results": results}
        (aside / CARD).write_text(_card(folder.name, **about), encoding="utf-8")
        if seen is not None and seen.is_file():
            shutil.copyfile(seen, aside / SEEN)
        write_manifest(aside, spared=SPARED)
        load_exported(aside, verify=False)


def _card(name: str, **about: Any) -> str:
    try:
        return model_card(name, **about)
    except Exception as error:  # a card is no reason to lose a run
        print(f"warning: no model card ({type(error).__name__}: {error})", file=sys.stderr)
        return f"# {name}\n"


def export_checkpoint(
    path: str | Path, out: str | Path, *, which: str = "best", verify: bool = True
) -> Path:
    """Make an export from a checkpoint, whatever its ranks, EP and ZeRO stage: its full weights lie in the checkpoint.

    Args:
        path: a run folder, or one checkpoint of it (``<run>/checkpoints/step-...``).
        out: the export; calibrated as ``results.json`` says where that was measured on this very
            checkpoint.
        which: best or last, where ``path`` is a run folder.
        verify: compare the digests of the checkpoint's files with those that were written.

    Returns:
        The checkpoint that was used.

    Raises:
        ValueError: no whole checkpoint there, or a file of the run is missing.

    Example:
        >>> comoe.export_checkpoint("runs/smoke", "exported", which="last").name
        'step-00000120'
    """
    path = Path(path).resolve()
    named = path.name.startswith("step-") and not (path / "checkpoints").is_dir()
    is_checkpoint = named or (path / "weights").is_dir()
    checkpoint = path if is_checkpoint else choose_checkpoint(path, which, verify=verify)
    if problem := whats_wrong(checkpoint, verify=verify):
        raise ValueError(f"{checkpoint}: {problem}; use another one in {checkpoint.parent}.")
    run = checkpoint.parent.parent
    for name in ("config.yaml", "tasks.json", "encoder_config.json", "tokenizer"):
        if not (run / name).exists():
            raise ValueError(
                f"{run / name} is missing; --checkpoint wants a run folder or a checkpoint inside of one."
            )
    with parsing(checkpoint / "weights" / WEIGHTS, f"use another one in {checkpoint.parent}"):
        weights = load_file(checkpoint / "weights" / WEIGHTS)
    results = read_json(run / "results.json") if (run / "results.json").is_file() else None
    # What was measured and fitted on these weights does not hold for those of another step.
    if results is not None and checkpoint != checkpoint_of(
        checkpoint.parent, results.get("best_step", -1)
    ):
        results = None
    with parsing(run / "tasks.json", "copy it from a backup, or train the run again"):
        tasks = tasks_from(read_json(run / "tasks.json"), place=run / "tasks.json")
    export_model(
        Path(out),
        state_dict=weights,
        recipe=load_saved_recipe(run / "config.yaml"),
        tasks=with_calibration(tasks, (results or {}).get("calibration")),
        backbone=Backbone(
            read_json(run / "encoder_config.json"),
            load_tokenizer(str(run / "tokenizer")),
            read_json(tower) if (tower := run / "tower_config.json").is_file() else None,
            read_image_processor(run / "tokenizer"),
            Lexicon.load(run / "tokenizer"),
        ),
        results=results,
        seen=run / SEEN,
    )
    return checkpoint


def _averaged(
    recipe: Recipe, state_dict: Mapping[str, Tensor]
) -> tuple[Recipe, Mapping[str, Tensor]]:
    """Recipe and weights with the mean in the place of experts that training drew from; others as they are."""
    moe = recipe.model.moe
    gate = build_gate(moe, model_width=1) if moe.num_experts else None
    if gate is None or not gate.draws:
        return recipe, state_dict
    weights = dict(state_dict)
    for name, weight in state_dict.items():
        if ".block.mixture.gate." in name:
            weights[name] = weight[:1]
        elif ".block.mixture.experts." in name:
            mean = weight.mean(dim=0, keepdim=True)
            weights[name] = gate.scale * mean if name.endswith("down_proj") else mean
    one = {"num_experts": 1, "gate": "sigmoid", "gate_scale": 1.0, "cooperation_threshold": 0.0}
    model = replace(recipe.model, moe=replace(moe, **one))
    return replace(recipe, model=model), weights


def _each_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under the first of its names: tied ones are one tensor, and no file may hold it twice."""
    kept: dict[tuple[int, Any], str] = {}
    for name, tensor in weights.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else (0, name), name)
    return {name: weights[name] for name in kept.values()}


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill beside an export, which takes its place when the block ends without an error.

    Raises:
        ValueError: another process is at it, or something else than an older export is in the way.
    """
    aside = folder.with_name(f".{folder.name}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with doing("writing", folder), locked(lock_beside(folder), str(folder)):
        if problem := _in_the_way(folder):
            raise ValueError(f"{folder} {problem}; choose another folder, or remove it first.")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def make_room(folder: Path) -> None:
    """Remove the older export of a run; one with files of others is set aside, and a warning says where."""
    try:
        problem = _in_the_way(folder)
    except ValueError as error:
        problem = str(error)
    if not problem:
        shutil.rmtree(folder, ignore_errors=True)
        return
    names = (folder.with_name(f"{folder.name}.kept-{number}") for number in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    folder.rename(kept)
    print(f"warning: {folder} {problem}; it was renamed to {kept.name}", file=sys.stderr)


_USUAL = re.compile(
    r"[a-z_]*token[a-z_]*\.json|preprocessor_config\.json|vocab\.(txt|json)|merges\.txt|bpe\.codes|\w+\.model"
    r"|chat_template\.jinja"
)
"""Files of a tokenizer or image processor in exports of older versions, which had no manifest."""


def _in_the_way(folder: Path) -> str:
    """Why an export may not replace what is there; empty for nothing, an empty folder and an older export."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    config = folder / CONFIG
    content = read_json(config) if config.is_file() else None
    if not isinstance(content, dict) or content.get("model_type") != "comoe":
        return "exists and is not an export of comoe"
    own = {MANIFEST, *SPARED, *read_manifest(folder).get("files", {})}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if MANIFEST not in found:
        own |= {WEIGHTS, CONFIG, *filter(_USUAL.fullmatch, found)}
    foreign = sorted(found - own)
    return f"also holds files that comoe did not write ({', '.join(foreign[:3])})" * bool(foreign)
