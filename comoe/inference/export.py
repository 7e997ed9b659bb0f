"""Exports: a trained model as a folder in Hugging Face style, and back. No DeepSpeed, no pickle.

``model.safetensors`` (plain PyTorch names, float32), ``config.json`` (all that is needed to build
the model; tasks as a list because Hugging Face sorts the keys of dicts), the tokenizer's files, and
``README.md``, the model card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from comoe import __version__
from comoe.config.errors import unknown_name
from comoe.config.failure import doing, parsing
from comoe.config.files import lock_beside, locked, read_json, write_json
from comoe.config.legacy import keep_old_meanings
from comoe.config.load import load_saved_recipe, recipe_from_dict
from comoe.config.plugins import load_plugins
from comoe.config.recipe import DataConfig, ModelConfig, Recipe
from comoe.data.datasets import read_as_words
from comoe.data.images.pixels import ImageProcessor, load_image_processor
from comoe.data.reading.inputs import column_in_training, columns_in_training
from comoe.data.tokens.vocabulary import (
    embedding_problem,
    load_tokenizer,
    tokenizer_problem,
)
from comoe.evaluation.calibration import with_calibration
from comoe.inference.checkpoint_folder import (
    MANIFEST,
    checkpoint_of,
    manifest_problem,
    named_best,
    read_manifest,
    sorted_checkpoints,
    whats_wrong,
    write_manifest,
)
from comoe.inference.model_card import model_card
from comoe.models.model import MultiTaskModel, build_model
from comoe.models.moe.gate import GATES
from comoe.models.moe.router import build_gate
from comoe.tasks.labels import whole_characters
from comoe.tasks.task import Task, tasks_from

FORMAT_VERSION = 1
"""Counts changes of ``config.json`` and of the weights' names that older code cannot read."""


WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
IMAGES = "preprocessor_config.json"
"""How images become numbers; in an export of a model that reads them."""


def choose_checkpoint(run: Path, which: str, *, verify: bool = True) -> Path:
    """The best or last whole checkpoint of a run folder; ``verify`` also compares digests.

    Raises:
        ValueError: another word, or no such checkpoint; with what is wrong with a broken one.
    """
    if which not in CHOICES:
        raise unknown_name("choice of --which", which, CHOICES)
    folder = run / "checkpoints"
    whole, broken = sorted_checkpoints(folder, verify=verify)
    problems = "; ".join(f"{path.name}: {problem}" for path, problem in broken.items())
    if not whole:
        raise ValueError(
            f"{run} holds no whole checkpoint{f' ({problems})' if problems else ''}; give a run folder (with "
            "checkpoints/) or a checkpoint."
        )
    chosen = CHOICES[which](folder, whole)
    if chosen not in whole:
        names = ", ".join(path.name for path in whole)
        raise ValueError(
            f"{run} has no whole {which} checkpoint ({problems or f'{chosen.name} is gone'}); give one of {names} in "
            f"{folder}."
        )
    return chosen


def read_export_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an export.

    Raises:
        ValueError: no export, or one that another version made.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not an export: {' and '.join(missing)} missing; `comoe export` makes one from a run folder."
        )
    config = read_json(folder / CONFIG)
    config = config if isinstance(config, dict) else {}
    if config.get("model_type") != "comoe":
        raise ValueError(
            f"{folder / CONFIG} has model_type {config.get('model_type')!r} instead of 'comoe'; give the folder that "
            f"`comoe export` (or a run, as export/) wrote."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format_version {version}, made by comoe {config.get('comoe_version')}; this comoe "
            f"({__version__}) reads {FORMAT_VERSION}: install that version, or export the run again with "
            f"this one."
        )
    return config


def recipe_of_export(config: Mapping[str, Any]) -> Recipe:
    """The recipe's part of an export's ``config.json``: ``model``, and of ``data`` what concerns reading."""
    saved = {"model": config["model"], "data": config["data"]}
    keep_old_meanings(saved)
    return recipe_from_dict(saved, saved=True)


def fill_in(model: nn.Module, weights: Mapping[str, Tensor], *, place: Path) -> None:
    """Give a model its weights, in place. A tensor of several names, as a tied output layer, comes under the first.

    Raises:
        ValueError: weights that are missing, of another shape, not in the model, or not finite;
            ``place`` names the file.
    """
    aliases = _aliases(model)
    weights = {name: tensor for name, tensor in weights.items() if name not in aliases}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_fit(model, shapes, broken=broken, place=place)
    model.load_state_dict(weights, strict=False)


def _aliases(model: nn.Module) -> set[str]:
    """Further names of parameters that have several."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return set(every) - set(dict(model.named_parameters()))


def check_fit(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    broken: Sequence[str] = (),
    place: Path,
) -> None:
    """Compare the weights of a model, or of its shape, with those of a file.

    Args:
        model: on any device.
        shapes: of the file, by name.
        broken: names of weights that are not finite.
        place: the file.

    Raises:
        ValueError: they differ.
    """
    aliases = _aliases(model)
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in aliases}
    shapes = {name: shape for name, shape in shapes.items() if name not in aliases}
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    differ = [name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]]
    problems = {"missing": missing, "not in the model": extra, "of another shape": differ}
    problems["not finite"] = broken
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])})"
        for what, names in problems.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"{place} does not fit {CONFIG}: weights {'; '.join(problems)}. Export the run again."
        )


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill beside an export, which takes its place when the block ends without an error.

    Raises:
        ValueError: another process is at it, or something else than an older export is in the way.
    """
    aside = folder.with_name(f".{folder.name}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(folder), str(folder)):
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


def _in_the_way(folder: Path) -> str:
    """Why an export may not replace what is there; empty for nothing, an empty folder and an older export."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    config = folder / CONFIG
    content = read_json(config) if config.is_file() else None
    if not isinstance(content, dict) or content.get("model_type") != "comoe":
        return "exists and is not an export of comoe"
    # Older versions wrote no manifest.
    own = {MANIFEST, CARD, *read_manifest(folder).get("files", {})}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    foreign = sorted(found - own) if MANIFEST in found else []
    return f"also holds files that comoe did not write ({', '.join(foreign[:3])})" * bool(foreign)


CHOICES = {
    # The newest one where no evaluation named the best.
    "best": lambda folder, whole: named_best(folder) or whole[-1],
    "last": lambda folder, whole: whole[-1],
}
"""``--which`` -> (checkpoints folder, whole checkpoints) -> checkpoint."""


DATA_KEYS = ("max_length", "normalize", "hide", "max_image_pixels", "max_image_bytes")
"""Options of ``data`` that decide how a post becomes numbers."""


FOR_TRAINING = "image_text."
"""Beginning of the names of weights that only losses read."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An export in memory."""

    model: MultiTaskModel
    """With its weights, on the CPU, in evaluation mode."""
    tasks: tuple[Task, ...]
    """In the order of the model's heads."""
    tokenizer: Any
    """The encoder's tokenizer."""
    image_processor: ImageProcessor | None
    """The vision tower's; None where the model reads no images."""
    model_config: ModelConfig
    """How the model is built; ``encoder`` names what it was trained from."""
    data_config: DataConfig
    """How posts were read: ``max_length``, ``normalize``, ``hide`` and the limits of images count
    here."""
    config: Mapping[str, Any]
    """``config.json`` as it is."""
    folder: Path
    """Where it was read from."""


def export_model(
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor],
    recipe: Recipe,
    tasks: Sequence[Task],
    encoder_config: Mapping[str, Any],
    tokenizer: Any,
    tower_config: Mapping[str, Any] | None = None,
    image_processor: ImageProcessor | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write an export, read it back to prove that it loads, and only then give it its name.

    Args:
        folder: the export; an older export there is replaced.
        state_dict: weights and buffers of ``MultiTaskModel`` by their plain names, whole, float32.
        recipe: the resolved recipe of the run.
        tasks: in the order of the model's heads.
        encoder_config: ``encoder.config.to_dict()``.
        tokenizer: the encoder's tokenizer.
        tower_config: ``tower.inner.config.to_dict()``; None where the model has no vision tower.
        image_processor: the vision tower's; None where the model reads no images.
        results: the run's ``results.json``, measured on these very weights, for the model card.

    Raises:
        ValueError: the folder holds something that is no export, or weights and recipe do not fit.
    """
    folder = Path(folder)
    recipe, state_dict = _averaged(recipe, state_dict)
    config = _config(recipe, tasks, encoder_config, tower_config)
    config["image_column"] = image_processor and column_in_training(recipe.tasks.values())
    with _replacing(folder) as aside:
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state_dict.items()
            if not name.startswith(FOR_TRAINING)
        }
        with doing("writing", folder / WEIGHTS):
            save_file(_each_once(weights), aside / WEIGHTS, metadata={"format": "pt"})
        write_json(aside / CONFIG, config)
        # safetensors writes for the owner alone; others may read what the umask lets them.
        (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode & 0o777)
        with doing("writing", folder):
            tokenizer.save_pretrained(str(aside))
        if image_processor is not None:
            image_processor.save(aside)
        about = {"recipe": recipe, "tasks": tasks, "config": config, "results": results}
        (aside / CARD).write_text(_card(folder.name, **about), encoding="utf-8")
        # The card is there to be edited.
        write_manifest(aside, spared=(CARD,))
        load_exported(aside, verify=False)


def _card(name: str, **about: Any) -> str:
    try:
        return whole_characters(model_card(name, **about))
    except Exception as error:  # a card is no reason to lose a run
        print(f"warning: no model card ({type(error).__name__}: {error})", file=sys.stderr)
        return f"# {name}\n"


def load_exported(folder: str | Path, *, verify: bool = True) -> Exported:
    """Read an export: safetensors and JSON only, nothing in the folder is executed.

    Args:
        folder: the export.
        verify: compare the digests of its files with those that were written.

    Raises:
        ValueError: no such folder, a file is missing or damaged, made by a newer comoe, or weights
            that do not fit or are not finite.
    """
    folder = Path(folder)
    config = read_export_config(folder)
    # Older versions wrote no manifest.
    if verify and (folder / MANIFEST).is_file():
        if problem := manifest_problem(folder, needed=(CONFIG, WEIGHTS), verify=True):
            raise ValueError(
                f"{folder}: {problem}; copy or export the folder again, or give --no-verify where the change is yours."
            )
    load_plugins(config.get("plugins"), place=str(folder / CONFIG))
    with parsing(folder / CONFIG, AGAIN):
        tasks = tuple(tasks_from(config["tasks"], place=folder / CONFIG))
        recipe = recipe_of_export(config)
    with parsing(folder / WEIGHTS, AGAIN), safe_open(folder / WEIGHTS, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    with parsing(folder / CONFIG, AGAIN):
        model = _build(config, recipe, tasks, shapes, place=folder / WEIGHTS)
    with parsing(folder / WEIGHTS, AGAIN):
        weights = load_file(folder / WEIGHTS)
    fill_in(model, weights, place=folder / WEIGHTS)
    model.eval()
    tokenizer = _load_tokenizer(folder, config["encoder"])
    with parsing(folder / IMAGES, AGAIN):
        processor = _image_processor(folder)
    if processor is None and config.get("tower") is not None:
        raise ValueError(
            f"{folder}: the model reads images, but {IMAGES} is missing; copy or export it again."
        )
    data = replace(recipe.data, max_length=min(recipe.data.max_length, model.longest_text))
    return Exported(model, tasks, tokenizer, processor, recipe.model, data, config, folder)


AGAIN = "copy or export the folder again"
"""What to do about a damaged export."""


def _build(
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    place: Path,
) -> MultiTaskModel:
    """The model of an export, once its shape alone has proved to be that of the weights.

    A damaged number could ask for any memory and time otherwise.
    """
    for part in ("encoder", "tower"):
        for key, value in dict(config.get(part) or {}).items():
            if "layers" in key and isinstance(value, int) and value > len(shapes):
                raise ValueError(
                    f"{place} does not fit {CONFIG}: {part}.{key} is {value} for {len(shapes)} weights; {AGAIN}."
                )
    options = {"encoder_config": dict(config["encoder"]), "tower_config": config.get("tower")}
    if not config.get("plugins"):  # code that the user trusts may not know tensors without numbers
        with torch.device("meta"):
            shape = build_model(recipe.model, tasks, **options)
        check_fit(shape, shapes, place=place)
    return build_model(recipe.model, tasks, **options)


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
        encoder_config=read_json(run / "encoder_config.json"),
        tower_config=read_json(tower) if (tower := run / "tower_config.json").is_file() else None,
        tokenizer=load_tokenizer(str(run / "tokenizer")),
        image_processor=_image_processor(run / "tokenizer"),
        results=results,
    )
    return checkpoint


def _averaged(
    recipe: Recipe, state_dict: Mapping[str, Tensor]
) -> tuple[Recipe, Mapping[str, Tensor]]:
    """Recipe and weights with the mean in the place of experts that training drew from; others as they are."""
    moe = recipe.model.moe
    if not moe.num_experts or not GATES[moe.gate].draws:
        return recipe, state_dict
    scale = build_gate(moe, model_width=1).scale
    weights = dict(state_dict)
    for name, weight in state_dict.items():
        if ".block.mixture.gate." in name:
            weights[name] = weight[:1]
        elif ".block.mixture.experts." in name:
            mean = weight.mean(dim=0, keepdim=True)
            weights[name] = scale * mean if name.endswith("down_proj") else mean
    one = {"num_experts": 1, "gate": "sigmoid", "gate_scale": 1.0, "cooperation_threshold": 0.0}
    model = dataclasses.replace(recipe.model, moe=dataclasses.replace(moe, **one))
    return dataclasses.replace(recipe, model=model), weights


def _config(
    recipe: Recipe,
    tasks: Sequence[Task],
    encoder_config: Mapping[str, Any],
    tower_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    model = dataclasses.asdict(recipe.model)
    # The paths of the machine that trained are of no use to others.
    model["encoder"] = base_model(recipe.model.encoder)
    model["start_from"] = None
    if recipe.model.vision.tower is not None:
        model["vision"]["tower"] = base_model(recipe.model.vision.tower)
    return {
        "architectures": [MultiTaskModel.__name__],
        "model_type": "comoe",
        "format_version": FORMAT_VERSION,
        "comoe_version": __version__,
        "dtype": "float32",
        "num_local_experts": recipe.model.moe.num_experts,
        "num_experts_per_tok": recipe.model.moe.top_k,
        "max_length": recipe.data.max_length,
        "tasks": [task.to_dict() for task in tasks],
        "as_words": list(read_as_words(recipe)),
        "columns": columns_in_training(recipe.tasks),
        **({"plugins": recipe.plugins} if recipe.plugins else {}),
        "model": model,
        "data": {
            key: value for key, value in dataclasses.asdict(recipe.data).items() if key in DATA_KEYS
        },
        "encoder": _without_path(encoder_config),
        **({} if tower_config is None else {"tower": _without_path(tower_config)}),
    }


def _each_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under the first of its names: tied ones are one tensor, and no file may hold it twice."""
    kept: dict[tuple[int, Any], str] = {}
    for name, tensor in weights.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else (0, name), name)
    return {name: weights[name] for name in kept.values()}


def _without_path(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hf_config.items() if key != "_name_or_path"}


def base_model(encoder: str) -> str:
    """Hub name of the encoder, or the last part of its folder."""
    return Path(encoder).name if Path(encoder).exists() or encoder.count("/") > 1 else encoder


def _image_processor(folder: Path) -> ImageProcessor | None:
    return load_image_processor(str(folder)) if (folder / IMAGES).is_file() else None


def _load_tokenizer(folder: Path, encoder_config: Mapping[str, Any]) -> Any:
    # Left to itself, AutoTokenizer would read our config.json and warn of a model type that it does
    # not know.
    fields = dict(encoder_config)
    with parsing(f"{folder}: its tokenizer", AGAIN):
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=hf_config, trust_remote_code=False)
        # It is tried, as some settings fail only then.
        problem = tokenizer_problem(tokenizer, folder) or embedding_problem(tokenizer, hf_config)
    if problem:
        raise ValueError(f"{folder}: {problem}; copy or export it again.")
    return tokenizer
