"""Checkpoints: written aside, manifest last, then renamed; a cut-short one is noticed and the one before is used.

``<run>/checkpoints/step-00000120/`` holds ``deepspeed/`` (weights and moments as DeepSpeed shards them),
``weights/model.safetensors`` (plain names, float32: what exports are made of), ``random-<rank>.pt``, ``state.json`` and
``manifest.json``. ``best.json`` names the best step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from comoe.distributed import barrier, broadcast_object, is_main, rank, world_size
from comoe.train.engine import Engine
from comoe.train.parallel import gather_full_state
from comoe.train.settings import Layout
from comoe.train.state import TrainState

MANIFEST = "manifest.json"
BEST = "best.json"


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint to go on from."""

    path: Path
    """Its folder."""
    step: int
    """Its step."""
    broken: tuple[str, ...]
    """What is wrong with newer ones that were passed over, one sentence each."""


def save_checkpoint(folder: Path, engine: Engine, state: TrainState, layout: Layout, *, keep: int) -> Path:
    """Write one checkpoint; every rank must call it. Prunes all but the ``keep`` newest and the best.

    Raises:
        OSError: the disk is full or not writable; what was there before stays good.
    """
    final = folder / f"step-{state.step:08d}"
    aside = folder / f".writing-{final.name}"
    if is_main():
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "weights").mkdir(parents=True)
    barrier()
    engine.deepspeed.save_checkpoint(str(aside / "deepspeed"), tag="state", save_latest=False)
    torch.save(_random_state(engine), aside / f"random-{rank()}.pt")
    weights = gather_full_state(engine.deepspeed)
    if is_main():
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside / "weights/model.safetensors")
        about = {"layout": _layout_dict(layout), "threads": torch.get_num_threads(), **state.to_dict()}
        _write_json(aside / "state.json", about)
    barrier()
    if is_main():
        sizes = {str(path.relative_to(aside)): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
        _write_json(aside / MANIFEST, {"step": state.step, "files": sizes})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _prune(folder, keep=keep)
    barrier()
    return final


def mark_best(folder: Path, step: int) -> None:
    """Name the best checkpoint; it is never pruned."""
    if is_main():
        _write_json(folder / BEST, {"step": step})


def best_checkpoint(folder: Path) -> Path | None:
    """Folder of the best checkpoint, if one was named and is whole."""
    if not (folder / BEST).is_file():
        return None
    path = folder / f"step-{json.loads((folder / BEST).read_text())['step']:08d}"
    return path if path.is_dir() and not whats_wrong(path) else None


def find_checkpoint(folder: Path) -> Found | None:
    """The newest whole checkpoint, decided by rank 0 for all; None where there is none at all.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    found, broken = None, []
    if is_main():
        for path in sorted(folder.glob("step-*"), reverse=True):
            problem = whats_wrong(path)
            if not problem:
                found = path
                break
            broken.append(f"{path.name}: {problem}")
    found, broken = broadcast_object((found, broken))
    if found is None and broken:
        raise ValueError(f"{folder}: no whole checkpoint is left ({'; '.join(broken)}); start the run anew.")
    return None if found is None else Found(found, int(found.name.removeprefix("step-")), tuple(broken))


def whats_wrong(path: Path) -> str:
    """Why a checkpoint cannot be used; empty when it is whole."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return "it has no manifest, so its writing was cut short"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return "its manifest is damaged"
    for name, size in files.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            return f"{name} has {actual if actual is not None else 'no'} bytes instead of {size}"
    return ""


def load_checkpoint(path: Path, engine: Engine, layout: Layout) -> TrainState:
    """Restore weights, moments, random state and ``TrainState``; every rank must call it.

    DeepSpeed unpickles its files, so resume only from folders that you trust.

    Raises:
        ValueError: the checkpoint was saved over another layout.
    """
    about = json.loads((path / "state.json").read_text(encoding="utf-8"))
    saved, threads = about.pop("layout"), about.pop("threads")
    now = _layout_dict(layout)
    if saved != now:
        raise ValueError(
            f"{path} was saved with {_in_words(saved)}; this start has {_in_words(now)}. Resume with the saved layout."
        )
    if threads != torch.get_num_threads() and is_main():
        print(f"note: saved with {threads} threads per rank, now {torch.get_num_threads()}: sums may differ in the last digit.")
    loaded, _ = engine.deepspeed.load_checkpoint(str(path / "deepspeed"), tag="state")
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed could not load it; remove the folder to use the one before.")
    engine.restore_groups()
    _restore_random_state(torch.load(path / f"random-{rank()}.pt", weights_only=True), engine)
    return TrainState(**about)


def _layout_dict(layout: Layout) -> dict[str, int | bool]:
    return {"world_size": layout.world_size, "ep_size": layout.ep_size, "stage": layout.stage, "bf16": layout.bf16}


def _in_words(layout: dict[str, Any]) -> str:
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


def _prune(folder: Path, *, keep: int) -> None:
    best = json.loads((folder / BEST).read_text())["step"] if (folder / BEST).is_file() else None
    spared = {f"step-{best:08d}"} if best is not None else set()
    newest = sorted(path.name for path in folder.glob("step-*"))[-max(1, keep) :]
    for path in folder.glob("step-*"):
        if path.name not in spared and path.name not in newest:
            shutil.rmtree(path)


def _write_json(path: Path, content: Any) -> None:
    aside = path.with_suffix(".aside")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
