"""An export, read: safetensors and JSON only, and nothing in the folder is executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoTokenizer

from comoe.config.errors import unknown_name
from comoe.config.failure import parsing
from comoe.config.plugins import load_plugins
from comoe.config.recipe import DataConfig, ModelConfig, Recipe
from comoe.data.collator import Collator
from comoe.data.images.check import limits_of
from comoe.data.images.pixels import ImageProcessor, PixelReader, load_image_processor
from comoe.data.tokens.vocabulary import embedding_problem, prepare_causal, tokenizer_problem
from comoe.inference.checkpoint_folder import MANIFEST, manifest_problem
from comoe.inference.export_config import (
    CONFIG,
    IMAGES,
    WEIGHTS,
    read_export_config,
    recipe_of_export,
)
from comoe.inference.onnx_model import ONNX, OnnxModel
from comoe.tasks.task import Task, tasks_from

if TYPE_CHECKING:
    from comoe.models.model import MultiTaskModel

AGAIN = "copy or export the folder again"
"""What to do about a damaged export."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An export in memory."""

    model: MultiTaskModel | OnnxModel
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

    @property
    def backend(self) -> str:
        """What runs the model, key of ``BACKENDS``."""
        return "onnx" if isinstance(self.model, OnnxModel) else "torch"

    def collator(self) -> Collator:
        """Makes batches as training did."""
        pixels = None
        if self.image_processor is not None:
            pixels = PixelReader(self.image_processor, limits_of(self.data_config))
        route_by = self.model_config.moe.route_by
        most = self.data_config.max_posts
        return Collator(
            self.tokenizer, self.tasks, route_by=route_by, pixels=pixels, max_posts=most
        )


def load_exported(
    folder: str | Path,
    *,
    verify: bool = True,
    backend: str = "torch",
    threads: int | None = None,
) -> Exported:
    """Read an export: safetensors, ONNX and JSON only, nothing in the folder is executed.

    Args:
        folder: the export.
        verify: compare the digests of its files with those that were written.
        backend: key of ``BACKENDS``; only its file of weights is read.
        threads: of each operation, a setting of the process; None is what PyTorch takes.

    Raises:
        ValueError: no such folder, a file is missing or damaged, made by a newer comoe, weights
            that do not fit or are not finite, or no such backend.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    load, file = BACKENDS[backend]
    config = read_export_config(folder)
    if file != WEIGHTS and not (folder / file).is_file():
        raise ValueError(
            f"{folder} has no {file}; `comoe export --checkpoint {folder} --output {folder} --format {backend}` "
            "adds it."
        )
    # Older versions wrote no manifest.
    if verify and (folder / MANIFEST).is_file():
        if problem := manifest_problem(folder, needed=(CONFIG, file), verify=True):
            raise ValueError(
                f"{folder}: {problem}; copy or export the folder again, or give --no-verify where the change is yours."
            )
    load_plugins(config.get("plugins"), place=str(folder / CONFIG))
    with parsing(folder / CONFIG, AGAIN):
        tasks = tuple(tasks_from(config["tasks"], place=folder / CONFIG))
        recipe = recipe_of_export(config)
    if threads is not None:
        torch.set_num_threads(threads)
    model, longest = load(folder, config, recipe, tasks)
    tokenizer = _load_tokenizer(folder, config["encoder"])
    with parsing(folder / IMAGES, AGAIN):
        processor = read_image_processor(folder)
    if processor is None and config.get("tower") is not None:
        raise ValueError(
            f"{folder}: the model reads images, but {IMAGES} is missing; copy or export it again."
        )
    data = replace(recipe.data, max_length=min(recipe.data.max_length, longest))
    return Exported(model, tasks, tokenizer, processor, recipe.model, data, config, folder)


def _load_torch(
    folder: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
) -> tuple[MultiTaskModel, int]:
    place = folder / WEIGHTS
    with parsing(place, AGAIN), safe_open(place, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    with parsing(folder / CONFIG, AGAIN):
        model = _build(config, recipe, tasks, shapes, place=place)
    with parsing(place, AGAIN):
        weights = load_file(place)
    fill_in(model, weights, place=place)
    return model.eval(), model.longest_text


def _load_onnx(
    folder: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
) -> tuple[OnnxModel, int]:
    with parsing(folder / CONFIG, AGAIN):
        longest = int(config["onnx"]["max_length"])
    return OnnxModel(folder / ONNX), longest


BACKENDS = {"torch": (_load_torch, WEIGHTS), "onnx": (_load_onnx, ONNX)}
"""Name -> (reader of the model and of the most tokens that it takes, the file that it reads)."""


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
    # The library's models take seconds to import, and another backend wants none of them.
    from comoe.models.build import build_model

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
    with _Unfilled():
        return build_model(recipe.model, tasks, **options)


class _Unfilled(TorchFunctionMode):
    """Inside, random numbers that weights begin with are not drawn: all are read from the file."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            # Not left as it is: truncation draws again until what lay in memory is within its bounds.
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return function(*args, **(kwargs or {}))


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


def _aliases(model: nn.Module) -> set[str]:
    """Further names of parameters that have several."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return set(every) - set(dict(model.named_parameters()))


def read_image_processor(folder: Path) -> ImageProcessor | None:
    """How images become numbers, as an export or a run folder says; None where the model reads none."""
    return load_image_processor(str(folder)) if (folder / IMAGES).is_file() else None


def _load_tokenizer(folder: Path, encoder_config: Mapping[str, Any]) -> Any:
    # Left to itself, AutoTokenizer would read our config.json and warn of a model type that it does
    # not know.
    fields = dict(encoder_config)
    with parsing(f"{folder}: its tokenizer", AGAIN):
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=hf_config, trust_remote_code=False)
        prepare_causal(tokenizer)
        # It is tried, as some settings fail only then.
        problem = tokenizer_problem(tokenizer, folder) or embedding_problem(tokenizer, hf_config)
        if not problem and tokenizer.pad_token_id is None:
            problem = "its tokenizer has no padding token"
    if problem:
        raise ValueError(f"{folder}: {problem}; copy or export it again.")
    return tokenizer
