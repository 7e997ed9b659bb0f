"""Checkpoints: written aside, manifest last, then renamed; a cut-short one is noticed and the one before is used.

``<run>/checkpoints/step-00000120/`` holds ``deepspeed/`` (weights and moments as DeepSpeed shards
them), ``weights/model.safetensors`` (plain names, float32: what exports are made of, with
``train.average_weights`` the averages, with ``train.reptile_steps`` those where the inner loop began),
``carried.safetensors`` (what the losses remember), ``random-<rank>.pt``, ``state.json`` and
``manifest.json``. ``best.json`` names the best step.
"""

from __future__ import annotations

import os
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from comoe.config.failure import doing, parsing
from comoe.config.files import read_json, write_atomic, write_json
from comoe.distributed import barrier, broadcast_object, is_main, rank, world_size
from comoe.inference.checkpoint_folder import OWNER, checkpoint_of, whats_wrong, write_manifest
from comoe.train.checkpoint.data_only import reading_data_only
from comoe.train.checkpoint.folder import ASIDE, prune
from comoe.train.checkpoint.reshard import convert, load_universal
from comoe.train.parallel.ds_config import Layout
from comoe.train.parallel.engine import Engine
from comoe.train.state import TrainState, diverged

CARRIED = "carried.safetensors"
"""File of a checkpoint with the buffers of the losses."""


AGAIN = "remove this checkpoint to use the one before"
"""What to do about a damaged file of a checkpoint."""


class Diverged(ValueError):
    """Weights that no checkpoint may keep; the message names some."""


def save_checkpoint(
    folder: Path, engine: Engine, state: TrainState, layout: Layout, *, keep: int
) -> Path:
    """Write a checkpoint; every rank must call it. Prunes all but the ``keep`` newest and the best.

    Raises:
        Diverged: weights are not finite, or beyond all measure; nothing is written.
        OSError: the disk is full or not writable; what was there before stays good.
    """
    weights = engine.full_state()
    if problem := broadcast_object(diverged(weights) if is_main() else None):
        raise Diverged(problem)
    final = checkpoint_of(folder, state.step)
    with doing("writing", final):
        _write(final, weights, engine, state, layout)
        if is_main():
            prune(folder, keep=keep)
    barrier()
    return final


def _write(
    final: Path, weights: dict[str, Tensor], engine: Engine, state: TrainState, layout: Layout
) -> None:
    """Write the checkpoint beside its place, then rename it."""
    folder = final.parent
    aside = folder / f"{ASIDE}{final.name}"
    if is_main():
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "weights").mkdir(parents=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            aside / "weights/model.safetensors",
        )
    weights.clear()
    barrier()
    engine.deepspeed.save_checkpoint(str(aside / "deepspeed"), tag="state", save_latest=False)
    torch.save(_random_state(engine), aside / f"random-{rank()}.pt")
    if is_main():
        # What the losses carry from step to step beside parameters (queues): the same on all ranks.
        carried = {
            name: buffer.cpu().clone()
            for name, buffer in engine.objective.named_buffers()
            if not name.startswith("model.")
        }
        save_file(carried, aside / CARRIED)
        about = {
            "layout": _layout_dict(layout),
            "threads": torch.get_num_threads(),
            **state.to_dict(),
        }
        write_json(aside / "state.json", about)
    barrier()
    if is_main():
        if not (folder / OWNER).is_file():
            write_atomic(folder / OWNER, uuid.uuid4().hex)
        write_manifest(aside, step=state.step, run=(folder / OWNER).read_text())
        if final.exists():
            # The same step again, at the end of a run: deleting takes long, and may be the last
            # whole one's end.
            shutil.rmtree(older := folder / f"{ASIDE}older-{final.name}", ignore_errors=True)
            os.replace(final, older)
        os.replace(aside, final)


def saved_elsewhere(path: Path, layout: Layout) -> str:
    """How a checkpoint's layout differs from this start's, in words; empty when it does not."""
    with parsing(path / "state.json", AGAIN):
        saved = read_json(path / "state.json")["layout"]
    now = _layout_dict(layout)
    if saved == now:
        return ""
    return f"{path.name} was saved with {_layout_text(saved)}, this start has {_layout_text(now)}"


def needs_conversion(path: Path, layout: Layout) -> bool:
    """Whether the engine must be built with ``"checkpoint": {"load_universal": true}``.

    So it must be for this checkpoint, or for the best one of its run, which is loaded when the run
    ends.
    """
    with parsing(path / "state.json", AGAIN):
        best = read_json(path / "state.json")["best_step"]
        both = (path, checkpoint_of(path.parent, best))
    return any(saved_elsewhere(each, layout) for each in both if not whats_wrong(each))


def load_checkpoint(path: Path, engine: Engine, layout: Layout) -> TrainState:
    """Restore weights, moments, random state and ``TrainState``; every rank must call it.

    DeepSpeed's files are pickles; ``reading_data_only`` lets none of them run code. On another
    layout than the saved one the checkpoint is converted first, and dropout draws other numbers
    from there on.

    Raises:
        ValueError: the checkpoint was saved over another layout, and the engine was not built to
            load such a one or the optimizer is SGD; or it holds more than numbers.
    """
    with parsing(path / "state.json", AGAIN):
        about = read_json(path / "state.json")
        threads = about.pop("threads")
        del about["layout"]
        state = TrainState(**about)
    moved = saved_elsewhere(path, layout)
    if moved and not engine.deepspeed.load_universal_checkpoint():
        raise ValueError(f"{moved}; the engine was not built for that.")
    if moved and engine.recipe.train.optimizer == "sgd":
        # DeepSpeed's converter asks for Adam's.
        raise ValueError(
            f"{moved}. SGD's moments do not move; resume on the layout that saved them."
        )
    if threads != torch.get_num_threads() and is_main():
        print(
            f"note: saved with {threads} threads per rank, now {torch.get_num_threads()}: "
            "sums may differ in the last digit."
        )
    with reading_data_only(path):
        if engine.deepspeed.load_universal_checkpoint():
            convert(path)
            whole = load_universal(engine.deepspeed, path)
        else:
            saved, _ = engine.deepspeed.load_checkpoint(str(path / "deepspeed"), tag="state")
            whole = saved is not None
    if not whole:
        raise ValueError(
            f"{path}: DeepSpeed could not load it; remove the folder to use the one before."
        )
    engine.restore_groups()
    if engine.beside is not None:
        with safe_open(path / "weights/model.safetensors", "pt") as file:
            engine.beside.load(file.get_tensor)
    carried = load_file(path / CARRIED) if (path / CARRIED).is_file() else {}
    for name, buffer in engine.objective.named_buffers():
        if name in carried:
            # The universal form holds parameters alone.
            buffer.copy_(carried[name])
    own = path / f"random-{rank()}.pt"
    if moved or not own.is_file():
        # Ranks do not map onto each other: a fresh stream per rank and step.
        torch.manual_seed(hash((engine.recipe.train.seed, rank(), about["step"])) % 2**63)
    else:
        _restore_random_state(torch.load(own, weights_only=True), engine)
    return state


def _layout_dict(layout: Layout) -> dict[str, int | bool]:
    return {
        "world_size": layout.world_size,
        "ep_size": layout.ep_size,
        "stage": layout.stage,
        "bf16": layout.bf16,
    }


def _layout_text(layout: dict[str, Any]) -> str:
    precision = "bf16" if layout["bf16"] else "float32"
    return f"{layout['world_size']} ranks, ep_size {layout['ep_size']}, ZeRO {layout['stage']}, {precision}"


def _random_state(engine: Engine) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "world_size": world_size(),
    }
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any], engine: Engine) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if engine.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
