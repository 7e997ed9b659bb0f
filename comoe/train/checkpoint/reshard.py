"""Checkpoints that move: from the layout that saved one to the layout that resumes it.

DeepSpeed's universal checkpoint holds each parameter and each moment whole. It writes one form for
ZeRO 1 and 2 and another for ZeRO 3, each for its own loader. The numbers are the same, so both are
rewritten into one form that either loader reads. It is made once, beside the checkpoint, and kept
out of the manifest: the checkpoint stays as it was.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from safetensors.torch import load_file
from torch import Tensor

from comoe.config.failure import doing, sentence
from comoe.distributed import barrier, broadcast_object, is_main
from comoe.models.moe.router import RouterProjection
from comoe.train.checkpoint.data_only import reading_data_only
from comoe.train.parallel.autoep import CooperativeRouter

UNIVERSAL = "any-layout"
"""Folder of the converted checkpoint, beside ``deepspeed/``."""

# It tells what it does, and draws bars.
ds_to_universal.print = lambda *words: None
ds_to_universal.tqdm = SimpleNamespace(tqdm=lambda work: work)


def convert(checkpoint: Path) -> Path:
    """Make the universal form of a checkpoint, on rank 0 while the others wait; done before, it is used again.

    Returns:
        The folder to load with ``"checkpoint": {"load_universal": true}``.

    Raises:
        ValueError: DeepSpeed could not convert it; its message is in this one.
    """
    done = checkpoint / UNIVERSAL
    problem = _convert(checkpoint, done) if is_main() and not done.is_dir() else ""
    problem = broadcast_object(problem)
    barrier()
    if problem:
        raise ValueError(f"{checkpoint} could not be converted for another layout: {problem}")
    return done


def _convert(checkpoint: Path, done: Path) -> str:
    aside = checkpoint / f".writing-{UNIVERSAL}"
    shutil.rmtree(aside, ignore_errors=True)
    # One worker each: then it starts no processes, which would inherit this rank's process group.
    how = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    places = {"input_folder": checkpoint / "deepspeed" / "state", "output_folder": aside / "state"}
    places = {key: str(place) for key, place in places.items()}
    try:
        ds_to_universal.main(Namespace(**places, **how, strict=True, inject_missing_state=True))
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        return f"{type(error).__name__}: {sentence(error)}"
    with doing("converting", checkpoint):
        _make_readable_at_every_stage(aside / "state")
    os.replace(aside, done)
    return ""


def _make_readable_at_every_stage(folder: Path) -> None:
    # The loaders look for these tables under different names. At ZeRO 1 and 2 they hold the weights
    # once more, which no loader reads here, and no rank of a ZeRO-3 run should.
    tables = sorted(folder.glob("*_model_states.pt"))
    about = torch.load(tables[0], weights_only=True) | {"module": {}}
    for table in tables:
        table.unlink()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(about, folder / name)
    zero = folder / "zero"
    with reading_data_only(zero):
        saved = torch.load(zero / "optimizer_state.pt", weights_only=True, map_location="cpu")
    parameters = [path.parent for path in sorted(zero.glob("*/exp_avg.pt"))]
    if "optimizer_state_dict" in saved:  # ZeRO 3
        step = saved["optimizer_state_dict"]["state"][0]["step"]
        for parameter in parameters:
            _as_at_zero_1_and_2(parameter, step)
    else:
        step = torch.load(parameters[0] / "step.pt", weights_only=True)
    groups = saved["param_groups"]
    torch.save(
        {
            "ds_version": about["ds_version"],
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        },
        zero / "optimizer_state.pt",
    )


def _as_at_zero_1_and_2(parameter: Path, step: Tensor) -> None:
    # Adam's count of steps lies beside each parameter there, and each tensor in a dict, which ZeRO
    # 3 reads too.
    torch.save(step, parameter / "step.pt")
    for name in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"):
        tensor = torch.load(parameter / name, weights_only=True)
        if isinstance(tensor, Tensor):  # experts' come in a dict
            torch.save({"param": tensor, "cat_dim": 0}, parameter / name)


def load_universal(engine: Any, checkpoint: Path) -> bool:
    """Load a converted checkpoint into a DeepSpeed engine that was built for it; True when DeepSpeed found it.

    The buffers (balance bias) come from the checkpoint's plain weights: the universal form holds
    parameters alone.
    """
    loaded, _ = engine.load_checkpoint(str(checkpoint / UNIVERSAL), tag="state")
    weights = load_file(checkpoint / "weights" / "model.safetensors")
    for name, module in engine.module.model.named_modules():
        if isinstance(module, (CooperativeRouter, RouterProjection)):
            gate = name.removesuffix(".router") + ".gate" * name.endswith(".router")
            bias_E: Tensor = weights[f"{gate}.e_score_correction_bias"]
            module.e_score_correction_bias.copy_(bias_E)
    return loaded is not None
