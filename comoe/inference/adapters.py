"""LoRA experts as adapters of peft: one low-rank update per task, which peft and transformers load and merge."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comoe.config.failure import doing
from comoe.config.files import write_json
from comoe.config.load import load_saved_recipe
from comoe.inference.export import export_checkpoint
from comoe.inference.exported import Exported, load_exported
from comoe.models.encoders.attach import trained_layers
from comoe.models.encoders.families import is_whole
from comoe.models.moe.lora import LoraLinear, adapters_of
from comoe.models.moe.router import ROUTES

_WHOLE = "export the model whole, without --adapters"

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of a folder of peft."""


def checkpoint_adapters(
    path: str | Path, out: str | Path, *, which: str = "best", verify: bool = True
) -> Path:
    """Make adapters from a checkpoint; arguments and result as of ``export_checkpoint``.

    Raises:
        ValueError: as ``export_checkpoint`` and ``export_adapters``.
    """
    check_free(Path(out))
    with tempfile.TemporaryDirectory() as place:
        used = export_checkpoint(path, Path(place) / "export", which=which, verify=verify)
        if start := load_saved_recipe(used.parent.parent / "config.yaml").model.start_from:
            raise ValueError(
                f"model.start_from is {start}: the run began with another model than "
                f"model.encoder, to which adapters would be added; {_WHOLE}."
            )
        export_adapters(Path(out), load_exported(Path(place) / "export", verify=False))
    return used


def export_adapters(folder: Path, exported: Exported) -> None:
    """Write ``<folder>/<task>`` for each task: ``adapter_config.json`` and ``adapter_model.safetensors``.

    With g the gate's weights of a task, sum of g_e (alpha / r) B_e A_e is one LoRA of rank E r, the
    same numbers: A of all experts one below the other, g_e B_e side by side.

    Args:
        folder: new, or empty.
        exported: a model with LoRA experts.

    Raises:
        ValueError: no such experts, a gate that differs from token to token, or something else in
            the folder.
    """
    check_free(folder)
    gates = gates_of_tasks(exported, _WHOLE)
    config = exported.model_config
    if trained_layers(config) != "none" or config.private_width or config.own_layers:
        raise ValueError(
            "more than LoRA experts and heads was trained (model.train_layers, model.private_width, "
            f"model.own_layers), and adapters are added to the pre-trained model; {_WHOLE}."
        )
    maps = adapted_maps(exported.model.encoder)
    for number, task in enumerate(exported.tasks):
        place = folder / task.name
        place.mkdir(parents=True)
        weights = {}
        for name, module in maps.items():
            weights |= _of_task(name, module, gates[module.layer][number])
        with doing("writing", place / WEIGHTS):
            save_file(weights, place / WEIGHTS, metadata={"format": "pt"})
        write_json(place / CONFIG, _config(exported, maps))
        # safetensors writes for the owner alone; others may read what the umask lets them.
        (place / WEIGHTS).chmod((place / CONFIG).stat().st_mode & 0o777)


def gates_of_tasks(exported: Exported, instead: str) -> dict[int, Tensor]:
    """Layer of each gate -> weight of each expert for every token of a task, (T, E).

    Args:
        exported: a model.
        instead: what to do where there are no such weights.

    Raises:
        ValueError: no LoRA experts, a gate that differs from token to token, or a lexicon that the
            encoder reads.
    """
    model, moe = exported.model, exported.model_config.moe
    if not adapters_of(model.encoder):
        raise ValueError(f"the model has no LoRA experts (model.moe.form: lora); {instead}.")
    if model.lexicon is not None:
        rule = "what a lexicon says of a word has no place in a model that reads token ids alone"
        raise ValueError(f"model.lexicon.input is true: {rule}; {instead}.")
    if ROUTES[moe.route_by].token and moe.num_experts > 1:
        raise ValueError(
            f"model.moe.route_by is {moe.route_by}: the experts' weights differ from token to "
            f"token, which one low-rank update for a task cannot say; {instead}."
        )
    embeddings_TD = torch.zeros(len(exported.tasks), 1)
    if model.task_embedding is not None:
        embeddings_TD = model.task_embedding.weight.detach()
    return {gate.layer: gate.weights_of_tasks(embeddings_TD) for gate in model.moe_layers()}


def adapted_maps(encoder: nn.Module) -> dict[str, LoraLinear]:
    """Path of a linear map in the plain encoder -> the map with its experts."""
    return {
        name.replace(".inner", ""): module
        for name, module in encoder.named_modules()
        if isinstance(module, LoraLinear)
    }


def check_free(folder: Path) -> None:
    """ValueError where there is more than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another one.")


def _of_task(name: str, module: LoraLinear, weights_E: Tensor) -> dict[str, Tensor]:
    rank = module.lora_A.shape[0] // len(weights_E)
    key = f"base_model.model.{name}"
    scaled = module.lora_B.detach() * weights_E.repeat_interleave(rank)
    return {
        f"{key}.lora_A.weight": module.lora_A.detach().contiguous(),
        f"{key}.lora_B.weight": scaled.contiguous(),
    }


def _config(exported: Exported, maps: Mapping[str, LoraLinear]) -> dict[str, Any]:
    one = next(iter(maps.values()))
    rank = one.lora_A.shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_whole(exported.model.encoder) else "FEATURE_EXTRACTION",
        "base_model_name_or_path": exported.model_config.encoder,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not isinstance(one.inner, nn.Linear),
        "inference_mode": True,
        "target_modules": sorted(maps),
    }
