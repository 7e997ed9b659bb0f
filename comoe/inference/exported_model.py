"""The model of an export in PyTorch: built from ``config.json``, and filled with the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from comoe.config.failure import parsing
from comoe.config.recipe import Recipe
from comoe.inference.export_config import AGAIN, CONFIG, WEIGHTS
from comoe.inference.onnx_model import ONNX
from comoe.models.build import build_model
from comoe.models.encoders.bert import BertEncoder
from comoe.models.model import MultiTaskModel
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import Task


def load_model(
    folder: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    plain: bool = False,
) -> MultiTaskModel:
    """The model of an export, with its weights, on the CPU, in evaluation mode.

    Args:
        folder: of the export.
        config: its ``config.json``.
        recipe: that it says.
        tasks: likewise.
        plain: as of ``comoe.models.encoders.build.build_encoder_from_config``.

    Raises:
        ValueError: a file is damaged or missing, or weights that do not fit or are not finite.
    """
    place = folder / WEIGHTS
    if not place.is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}, but {ONNX} alone: take --backend onnx, or {AGAIN}."
        )
    with parsing(place, AGAIN), safe_open(place, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    with parsing(folder / CONFIG, AGAIN):
        model = _build(config, recipe, tasks, shapes, place=place, plain=plain)
    with parsing(place, AGAIN):
        weights = load_file(place)
    fill_in(model, weights, place=place)
    return model.eval()


def _build(
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    place: Path,
    plain: bool,
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
    options = {
        "encoder_config": dict(config["encoder"]),
        "tower_config": config.get("tower"),
        "plain": plain,
        "lexicon": Lexicon.load(place.parent),
    }
    if not config.get("plugins"):  # code that the user trusts may not know tensors without numbers
        with torch.device("meta"), _Unfilled():
            shape = build_model(recipe.model, tasks, **options)
        check_fit(shape, shapes, place=place)
        if isinstance(shape.encoder, BertEncoder):
            # Nothing of it is computed when it is built: all its numbers come from the file.
            return shape
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

    A model on the meta device gets memory for them.

    Raises:
        ValueError: weights that are missing, of another shape, not in the model, or not finite;
            ``place`` names the file.
    """
    aliases = _aliases(model)
    weights = {name: tensor for name, tensor in weights.items() if name not in aliases}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_fit(model, shapes, broken=broken, place=place)
    own = model.state_dict()
    on_meta = any(tensor.is_meta for tensor in own.values())
    if on_meta:
        # Not the file's memory, which is aligned in another way: other last bits of products.
        weights = {
            name: torch.empty(tensor.shape, dtype=own[name].dtype).copy_(tensor)
            for name, tensor in weights.items()
        }
    model.load_state_dict(weights, strict=False, assign=on_meta)


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
