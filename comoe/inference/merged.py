"""Models with their LoRA experts merged into the weights: a folder per task that plain transformers loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from comoe.inference.adapters import adapted_maps, check_free, gates_of_tasks
from comoe.inference.export import export_checkpoint, replacing
from comoe.inference.export_config import CONFIG
from comoe.inference.exported import Exported, load_exported
from comoe.models.encoders.build import ANSWERING, build_encoder_from_config
from comoe.models.encoders.families import family_of, is_whole


def checkpoint_merged(
    path: str | Path, out: str | Path, *, which: str = "best", verify: bool = True
) -> Path:
    """Merge a checkpoint, or an export; arguments and result as of ``export_checkpoint``.

    Raises:
        ValueError: as ``export_checkpoint`` and ``export_merged``.
    """
    check_free(Path(out))
    if (Path(path) / CONFIG).is_file():
        export_merged(Path(out), load_exported(path, verify=verify))
        return Path(path)
    with tempfile.TemporaryDirectory() as place:
        used = export_checkpoint(path, Path(place) / "export", which=which, verify=verify)
        export_merged(Path(out), load_exported(Path(place) / "export", verify=False))
    return used


def export_merged(folder: Path, exported: Exported) -> None:
    """Write ``<folder>/<task>`` for each task: the library's own model and tokenizer, for ``from_pretrained``.

    With g the gate's weights of a task, each map's weight is W + sum of g_e (alpha / r) B_e A_e. Heads
    have no place in such a folder: they stay in the export.

    Args:
        folder: new, or empty.
        exported: a model with LoRA experts.

    Raises:
        ValueError: no such experts, a gate that differs from token to token, private parts,
            layers of the tasks' own, or something else in the folder.
    """
    check_free(folder)
    model, whole = exported.model, is_whole(exported.model.encoder)
    gates = gates_of_tasks(exported, "export the model without --merged")
    if model.private is not None:
        raise ValueError(
            "model.private_width is not 0: what a task adds behind the encoder has no place in a "
            "plain model; export the model without --merged."
        )
    if model.own_layers:
        raise ValueError(
            "model.own_layers is not 0: each task has layers of its own, which are merged for no "
            "task; export the model without --merged."
        )
    if (family := family_of(model.encoder.config.model_type)).stacks and not (
        whole or family.causal
    ):
        raise ValueError(
            f"the model is the encoder of a {model.encoder.config.model_type} alone, of which "
            "transformers has no folder; export it without --merged."
        )
    weights = {
        name.replace(".inner.", "."): value for name, value in model.encoder.state_dict().items()
    }
    maps = adapted_maps(model.encoder)
    with replacing(folder) as aside:
        for number, task in enumerate(exported.tasks):
            plain = build_encoder_from_config(dict(exported.config["encoder"]), generates=whole)
            merged = {
                f"{name}.weight": _merged(module.inner, module.update(gates[module.layer][number]))
                for name, module in maps.items()
            }
            filled = weights | merged
            plain.load_state_dict({name: filled[name] for name in plain.state_dict()})
            # What only comoe reads; the rest of it is in generation_config.json.
            vars(plain.config).pop(ANSWERING, None)
            plain.save_pretrained(aside / task.name)
            exported.tokenizer.save_pretrained(aside / task.name)


@torch.no_grad()
def _merged(inner: nn.Module, update: Tensor) -> Tensor:
    # GPT-2 has its weights the other way round.
    turned = update if isinstance(inner, nn.Linear) else update.T
    return (inner.weight.double() + turned).to(inner.weight.dtype)
