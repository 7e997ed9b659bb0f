"""From the plain PyTorch model to a DeepSpeed engine: process group, AutoEP with our gate, ZeRO, parameter groups.

The contact with DeepSpeed's internals (AutoEP is unversioned) is all here, held by one contract
test.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from itertools import pairwise
from typing import Any

import deepspeed
import deepspeed.comm
import numpy as np
import torch
from deepspeed.module_inject import auto_ep_layer
from torch import Tensor, nn

from comoe.config.recipe import Recipe
from comoe.distributed import all_gather_in_group, join_alone
from comoe.losses.objective import Objective
from comoe.models.encoders.families import layers_above
from comoe.models.encoders.own_layers import OwnLayer
from comoe.models.encoders.pretrained import split_as_it_loads
from comoe.train.environment import M_MMAP_THRESHOLD, set_thresholds
from comoe.train.parallel.autoep import CooperativeRouter, our_classes

BLOCK_CHILDREN = ("norm", "task_projection", "mixture", "shared", "gate")
"""Modules of a ``GatedBlock``; a path that merely holds the word block, as every layer of a
T5 does, goes on with another."""


ROUTING_CHILDREN = ("mixture.gate", "task_projection", "gate")
"""Modules of a ``GatedBlock`` that make the gate's logits."""

ADAPTERS = ("lora_A", "lora_B")
"""Weights of a ``LoraLinear``."""

LAYER_WEIGHTS = ".mixture.weights"
"""End of the name of a ``LayerMixture``'s: logits over layers, as a gate's over experts."""


def parameter_group(name: str) -> str:
    """Which learning rate a parameter follows: "encoder", "experts", "router" or "heads", from its path.

    "router" is what makes a gate's logits, the task embedding included, and a head's logits over
    layers. The rest of the blocks and
    private parts are "experts": all that is new beside or behind the pre-trained layers.
    """
    parts = name.split(".")
    child = next((part for part in parts if part in PARAMETER_GROUPS), None)
    assert child, (
        f"{name} lies in none of the modules {', '.join(PARAMETER_GROUPS)} of MultiTaskModel"
    )
    # The blocks live inside the encoder they are attached to.
    in_block = any(
        part == "block" and following in BLOCK_CHILDREN for part, following in pairwise(parts)
    )
    if child == "encoder" and in_block:
        routes = any(f".block.{part}." in name for part in ROUTING_CHILDREN)
        return "router" if routes else "experts"
    if parts[-1] in ADAPTERS:
        return "experts"
    if name.endswith(LAYER_WEIGHTS):
        return "router"
    return PARAMETER_GROUPS[child]


PARAMETER_GROUPS: dict[str, str] = {
    "encoder": "encoder",
    "task_embedding": "router",
    "heads": "heads",
    "masked_heads": "heads",
    "projection": "heads",
    "tower": "encoder",
    "fusion": "heads",
    "image_text": "heads",
    "private": "experts",
    "task_attention": "heads",
    "lexicon": "heads",
}
"""Child of ``MultiTaskModel`` -> group of its parameters."""

ROUTER_RATE = 10
"""Rate of the router over that of the experts, under ``train.router_learning_rate: auto``."""

MOST_ROUTER_RATE = 0.01
"""Largest rate of the router under auto. A step of Adam changes a logit by up to the rate times the
model's width, and rates of encoders that start from nothing are high already."""


def start_ranks(*, timeout_seconds: float, verbose: bool = False) -> torch.device:
    """Join the process group that the launcher described; returns this rank's device."""
    # DeepSpeed sets up its logger on import, after the environment was read.
    if not verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce first: a minute, a lock file that
    # outlives a killed process, 69 MB per rank that stay in /dev/shm for ever, and nothing that
    # training calls (only ``inference_all_reduce`` does).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gpu = torch.cuda.is_available()
    # Ranges for NVIDIA's profiler around each hook of ZeRO 3.
    deepspeed.utils.nvtx.enable_nvtx = gpu
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if gpu else "gloo"
    if os.environ.get("WORLD_SIZE") == "1":
        # DeepSpeed takes the group that it finds; its own would open a port for a store.
        join_alone(backend, seconds=timeout_seconds)
    # It prints, past every logger, that it built its shared-memory collectives.
    with nullcontext() if verbose else redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def seed_random(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def building(settings: Mapping[str, Any]) -> Iterator[None]:
    """The context to build the objective in: at ZeRO 3 its encoder is split over the ranks while it is read.

    Always at stage 3, whatever the size: so what is tested on small encoders is what large ones
    run.

    Args:
        settings: complete DeepSpeed configuration.
    """
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    with _memory_goes_back(), split_as_it_loads(settings):
        yield


@contextmanager
def _memory_goes_back() -> Iterator[None]:
    # glibc learns from each large block that is freed to keep the next ones, up to 32 MiB. Whole
    # weights between shares that stay then leave holes, measured as large as the whole encoder.
    # Afterwards it keeps what it kept before, or would have learned to, which is fast: batches come
    # and go.
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        set_thresholds(libc)


def build_deepspeed_engine(
    objective: Objective, recipe: Recipe, settings: Mapping[str, Any]
) -> Any:
    """Shard experts and optimizer over the ranks.

    Args:
        objective: plain PyTorch, the same on every rank, built in the context of ``building``.
        settings: complete DeepSpeed configuration, see
            ``comoe.train.parallel.ds_config.fill_settings``.
    """
    groups = parameter_groups(objective, recipe)
    split = [hasattr(parameter, "ds_id") for parameter in objective.parameters()]
    if any(split) and settings["bf16"]["enabled"]:
        # Where a part came split already, DeepSpeed takes the precision of the rest as it is.
        for parameter, done in zip(objective.parameters(), split, strict=True):
            parameter.data = parameter.data if done else parameter.data.bfloat16()
    if objective.model.own_layers and settings["zero_optimization"]["stage"] == 3:
        # Whole together: what holds the tasks' copies together reads all of them.
        deepspeed.utils.set_z3_leaf_modules(objective, [OwnLayer])
    with our_classes(recipe.model.moe, len(objective.tasks)):
        engine, _, _, _ = deepspeed.initialize(
            model=objective, model_parameters=groups, config=dict(settings)
        )
    for module in engine.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Where a part came split already, DeepSpeed moves no buffer.
            module._buffers[name] = buffer.to(engine.device)
        if isinstance(module, CooperativeRouter):
            # bf16 casts buffers too, and a step of 0.001 is lost in it.
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    return engine


def parameter_groups(objective: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups: encoder, experts, router, heads, each with and without weight decay, and
    what a weighting learns. Frozen parameters are left out. With ``train.layer_decay`` below 1 the
    encoder has a group for each layer (arXiv:1801.06146)."""
    router_rate = recipe.train.router_learning_rate
    if router_rate == "auto":
        expert_rate = recipe.train.expert_learning_rate
        router_rate = max(expert_rate, min(ROUTER_RATE * expert_rate, MOST_ROUTER_RATE))
    rates = {
        "encoder": recipe.train.learning_rate,
        "experts": recipe.train.expert_learning_rate,
        "router": router_rate,
        "heads": recipe.train.head_learning_rate,
        "weighting": recipe.loss.weighting_rate,
    }
    groups: dict[tuple[str, bool, int], list[nn.Parameter]] = {}
    # One group per layer only where their rates differ: checkpoints know the groups.
    above = layers_above(objective.model.encoder) if recipe.train.layer_decay < 1 else {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            # Norms, biases and single vectors have one dimension, a task's pooling query too.
            # A split weight is flat.
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            # What a loss learns (temperatures) follows the heads: as new as they are.
            role = {"losses": "heads", "weighting": "weighting"}.get(
                name.split(".")[0]
            ) or parameter_group(name)
            if role == "router" and router_rate is None:
                role = "experts"
            depth = above.get(id(parameter), 0) if role == "encoder" else 0
            groups.setdefault((role, matrix, depth), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{role}{f'-{depth}' if depth else ''}/{'decay' if decay else 'plain'}",
            "role": role,
            "lr": rates[role] * recipe.train.layer_decay**depth,
            "weight_decay": recipe.train.weight_decay if decay else 0.0,
        }
        for (role, decay, depth), parameters in groups.items()
    ]


@torch.no_grad()
def set_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give parameters and buffers other values, in place, before the engine is built.

    Args:
        model: as it was built in the context of ``building``.
        weights: names and whole values; the same on every rank, and every rank must call it.
    """
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in weights:
        place = places[name]
        split = hasattr(place, "ds_id")
        with deepspeed.zero.GatheredParameters([place], modifier_rank=0, enabled=split):
            place.data.copy_(value)


def gather_full_state(engine: Any, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All weights and buffers under the plain model's names, float32, on the CPU. Every rank must call it.

    Experts are gathered over the ranks that share them and put back into AutoEP's source layout.
    Rank 0 gets all; the other ranks an empty dict.

    Args:
        engine: DeepSpeed's.
        values: name of a parameter in the engine's model -> what this rank has in its place.
    """
    keep, values = deepspeed.comm.get_rank() == 0, values or {}
    state: dict[str, Tensor] = {}
    # ZeRO 3 fetches ahead what a backward pass would read, which an evaluation lets wait.
    engine.empty_partition_cache()
    model = engine.module.model
    layers = _expert_layers(model)
    for name, layer in layers.items():
        parts = {
            key: _gather_experts(
                layer, getattr(layer.experts, key), values.get(f"{name}.experts.{key}")
            )
            for key in ("w1", "w2", "w3")
        }
        state[f"{name}.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        state[f"{name}.experts.down_proj"] = parts["w2"]
        if not keep:
            state.clear()
    buffers = [
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if any(name.startswith(f"{layer}.experts.") for layer in layers):
            continue
        if name in values:
            whole = _whole(tensor, values[name])
            if keep:
                state[_plain_name(name, layers)] = _to_host(whole)
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if keep:
                state[_plain_name(name, layers)] = _to_host(tensor)
    return state


def local_shares(
    engine: Any, read: Callable[[str], Tensor], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """The other way round: this rank's part of whole weights, by the names of ``parameters``.

    Args:
        engine: DeepSpeed's.
        read: plain name -> the whole weight.
        parameters: of the engine's model, by their names in it.
    """
    layers = _expert_layers(engine.module.model)
    for name, parameter in parameters.items():
        place, _, key = name.rpartition(".experts.")
        if (layer := layers.get(place)) is None:
            whole = read(_plain_name(name, layers))
        elif key == "w2":
            whole = _of_rank(layer, read(f"{place}.experts.down_proj"))
        else:
            gate, up = read(f"{place}.experts.gate_up_proj").chunk(2, dim=1)
            whole = _of_rank(layer, up if key == "w3" else gate)
        yield name, _share(parameter, whole)


def _expert_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, auto_ep_layer.AutoEPMoELayer)
    }


def _of_rank(layer: Any, experts: Tensor) -> Tensor:
    return experts.narrow(0, layer.ep_rank * layer.num_local_experts, layer.num_local_experts)


def _share(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A rank's part of a whole weight: at ZeRO 3 an even share of its numbers, zeros behind."""
    if not hasattr(parameter, "ds_id"):
        return whole
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    ranks = deepspeed.comm.get_world_size(group=group)
    flat = nn.functional.pad(whole.flatten(), (0, size * ranks - whole.numel()))
    return flat.narrow(0, size * deepspeed.comm.get_rank(group=group), size)


def _whole(parameter: nn.Parameter, share: Tensor) -> Tensor:
    """``_share`` undone; every rank must call it."""
    if not hasattr(parameter, "ds_id"):
        return share
    flat = all_gather_in_group(share.flatten(), parameter.ds_process_group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def _gather_experts(layer: Any, parameter: nn.Parameter, value: Tensor | None) -> Tensor:
    if value is not None:
        return all_gather_in_group(_whole(parameter, value), layer.ep_group).float().cpu()
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        local = parameter.detach().clone()
    return all_gather_in_group(local, layer.ep_group).float().cpu()


def _plain_name(name: str, layers: Mapping[str, Any]) -> str:
    for layer in layers:
        name = name.replace(f"{layer}.router.gate.", f"{layer}.gate.")
        name = name.replace(
            f"{layer}.router.e_score_correction_bias", f"{layer}.gate.e_score_correction_bias"
        )
    return name


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
