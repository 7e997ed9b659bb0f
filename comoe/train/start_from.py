"""``model.start_from``: a run that begins with the weights of a finished one, its dense blocks as experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from comoe.config.recipe import ModelConfig, MoeConfig
from comoe.inference.export_config import WEIGHTS, read_export_config, recipe_of_export
from comoe.models.model import MultiTaskModel
from comoe.models.moe.block import CooperativeBlock
from comoe.models.moe.router import build_gate
from comoe.models.moe.upcycle import upcycle
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import TOGETHER, Task, head_tasks, masked_tasks
from comoe.train.parallel.setup import ADAPTERS, parameter_group, set_weights

PRE_TRAINED = ("encoder", "tower")
"""Parts of a model that the export must have whole; all else starts anew where it has none."""


def start_from_export(config: ModelConfig, model: MultiTaskModel) -> list[str]:
    """Put the export's weights into a new model, in place; nothing without ``model.start_from``.

    Optimizer moments and schedule begin anew: they belong to the run that made the export, and a
    router or a new head has none.

    Args:
        config: ``model`` of the recipe.
        model: whole, or its encoder in ZeRO-3's shares. Every rank must call it.

    Returns:
        What came from where, to be printed.

    Raises:
        ValueError: no export there, or one that does not fit.
    """
    if config.start_from is None:
        return []
    folder = Path(config.start_from).expanduser()
    try:
        exported = read_export_config(folder)
        with safe_open(folder / WEIGHTS, "pt") as file:
            source = _Source(file.get_tensor, frozenset(file.keys()), exported)
            lexicon = Lexicon.load(folder)
            source.lexicon = lexicon and lexicon.digest
            set_weights(model, _fitting(source, config, model))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"model.start_from ({folder}): {error}") from error
    heads = [task.name for task in model.tasks if source.number_of(task) is not None]
    moe = source.moe
    blocks = f"{moe.num_experts} experts" if moe.num_experts else "no experts"
    return [
        f"starting from {folder} ({blocks} per layer); tasks known there: {', '.join(heads) or 'none'}"
    ]


OF_EXPERTS = ("experts", "router")
"""Groups of parameters that are new beside a pre-trained encoder."""

ANY_BLOCK = "block.mixture.gate.weight"
"""End of a name that every block beside a feed-forward has."""


class _Source:
    """The export's weights by name, and its tasks."""

    def __init__(
        self, read: Callable[[str], Tensor], names: frozenset[str], config: Mapping[str, Any]
    ) -> None:
        self.read, self.names = read, names
        self.encoder = {_unwrapped(name): name for name in names if name.startswith("encoder.")}
        self.blocks = {
            name.removesuffix(ANY_BLOCK) for name in names if name.endswith(f".{ANY_BLOCK}")
        }
        self.moe: MoeConfig = recipe_of_export(config).model.moe
        self.lexicon: str | None = None
        self.tasks = [Task.from_dict(plain) for plain in config["tasks"]]

    def number_of(self, task: Task) -> int | None:
        """Place of the task of the same name, kind and labels, that reads as many posts."""

        def key(one: Task) -> tuple:
            return one.name, one.kind, one.labels, one.reads in TOGETHER and one.reads

        return next((n for n, own in enumerate(self.tasks) if key(own) == key(task)), None)

    def block(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a block by their names in it; empty where there is none."""
        found = (name for name in self.names if name.startswith(prefix))
        return {name.removeprefix(prefix): self.read(name) for name in found}


def _fitting(
    source: _Source, config: ModelConfig, model: MultiTaskModel
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what the export gives to the model."""
    blocks = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, CooperativeBlock)
    }
    if lost := source.blocks - {prefix.removesuffix("block.") for prefix in blocks}:
        raise ValueError(
            f"{len(lost)} layers have experts there and none here ({min(lost)}...); set "
            "model.moe.layers as in that run."
        )
    adapters = _check_adapters(source, config.moe, model)
    for prefix, block in blocks.items():
        for name, value in _of_block(source, prefix, block, config.moe, len(model.tasks)).items():
            yield prefix + name, value
    kept = [*model.named_parameters(), *model.named_buffers()]
    wanted = model.state_dict().keys()
    for name, place in kept:
        if name not in wanted or name.startswith(tuple(blocks)):
            continue
        # Its columns are the numbers of that lexicon.
        if name.startswith("lexicon.") and source.lexicon != model.lexicon.digest:
            continue
        if not adapters and parameter_group(name) in OF_EXPERTS and name.startswith("encoder."):
            continue
        theirs = _names_there(name, source, model.tasks)
        fits = bool(theirs) and source.names.issuperset(theirs)
        shape = getattr(place, "ds_shape", place.shape)
        if fits and (value := _mean([*map(source.read, theirs)])).shape == shape:
            yield name, value
        elif name.split(".")[0] in PRE_TRAINED:
            rule = "has another shape there" if fits else "is not there"
            raise ValueError(
                f"{name} {rule}; both runs need the same model.encoder, model.keep_layers, "
                "model.own_layers and model.vision.tower."
            )


def _check_adapters(source: _Source, config: MoeConfig, model: MultiTaskModel) -> bool:
    """Whether the export has LoRA experts; ValueError where the model has others, or none."""
    if not any(name.endswith(ADAPTERS) for name in source.names):
        return False
    width = model.config.hidden_size
    fields = ("form", "num_experts", "rank", "alpha", "route_by", "gate_scope")
    ours, theirs = (
        ([getattr(moe, field) for field in fields], build_gate(moe, width, num_tasks))
        for moe, num_tasks in ((config, len(model.tasks)), (source.moe, len(source.tasks)))
    )
    places = [
        {_unwrapped(name) for name in names if name.endswith(ADAPTERS)}
        for names in (model.state_dict(), source.names)
    ]
    if ours != theirs or places[0] != places[1]:
        fields = (*fields, "targets", "layers")
        raise ValueError(
            "it has LoRA experts, which stay in their linear maps: take the same model.moe "
            f"({', '.join(f'{field}={getattr(source.moe, field)}' for field in fields)}, and its gate)."
        )
    return True


def _unwrapped(name: str) -> str:
    """A name in the encoder as it is where no block is attached."""
    return ".".join(part for part in name.split(".") if part != "inner")


def _names_there(name: str, source: _Source, tasks: Sequence[Task]) -> list[str]:
    """How the export names a weight: heads and private parts go by the number of their task.

    Of a task's own layer it is the copy of the same task, or the layer that all share there; for a new
    task all copies, whose mean it starts from.
    """
    part, _, rest = name.partition(".")
    if part in ("task_embedding", "task_attention"):
        alike = [task.name for task in source.tasks] == [task.name for task in tasks]
        return [name] * alike
    if part == "encoder":
        above, copy, below = _unwrapped(name).partition(".copies.")
        number, _, below = below.partition(".")
        known = source.number_of(tasks[int(number)]) if copy else None
        own = range(len(source.tasks)) if known is None else [known]
        names = [f"{above}{copy}{n}.{below}" for n in own] if copy else []
        names = [source.encoder[each] for each in names if each in source.encoder]
        shared = source.encoder.get(f"{above}.{below}" if copy else above)
        return names or ([] if shared is None else [shared])
    if part not in _NUMBERED:
        return [name]
    number, _, rest = rest.partition(".")
    ours, theirs = (_NUMBERED[part](found) for found in (tasks, source.tasks))
    place = source.number_of(ours[int(number)])
    return [] if place is None else [f"{part}.{theirs.index(source.tasks[place])}.{rest}"]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(dim=0)


_NUMBERED: dict[str, Callable[[Sequence[Task]], list[Task]]] = {
    "heads": lambda tasks: [*head_tasks(tasks).values()],
    "masked_heads": lambda tasks: [*masked_tasks(tasks).values()],
    "private": list,
}
"""Part of the model that is a list -> tasks -> the task of each of its members."""


def _of_block(
    source: _Source, prefix: str, block: CooperativeBlock, config: MoeConfig, num_tasks: int
) -> dict[str, Tensor]:
    """What the export's block of the same layer gives to a block; nothing where it has none."""
    theirs, fresh = source.block(prefix), dict(block.state_dict())
    if not theirs:
        return {}
    if source.moe.num_experts == 1:
        return upcycle(theirs, fresh, source=source.moe, config=config, num_tasks=num_tasks)
    shapes = [{name: value.shape for name, value in names.items()} for names in (theirs, fresh)]
    width = fresh["norm.weight"].shape[0]
    gates = [
        build_gate(source.moe, width, len(source.tasks)),
        build_gate(config, width, num_tasks),
    ]
    if shapes[0] != shapes[1] or gates[0] != gates[1]:
        raise ValueError(
            f"layer {block.layer} has other experts there ({source.moe.num_experts}, top_k {source.moe.top_k}) or "
            "another gate; give a run with the same model.moe, with one dense block per layer "
            "(model.moe.num_experts=1 model.moe.top_k=1), or without experts."
        )
    return theirs
