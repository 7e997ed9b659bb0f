"""Texts by the library's own search, with experts: every step of it has a context of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comoe.distributed import world_size
from comoe.models.encoders.families import longest_input
from comoe.models.moe.block import (
    ContextHolder,
    CooperativeBlock,
    ExpertMixture,
    RoutingContext,
)
from comoe.tasks.task import Task
from comoe.types import IGNORED


class Beginning(NamedTuple):
    """What a search begins with, for R rows."""

    arguments: dict[str, Any]
    """Of the library's ``generate``."""
    mask_RD: Tensor
    """1 on real tokens of what the stack reads first; the text follows."""


class TextGenerator:
    """Generates the texts of tasks of free text. Holds no weights of its own, and nothing outlives a call.

    Every rank runs every search where a pass needs other ranks; a model that is whole in its process
    waits for no other, and generates only what is asked for.

    Args:
        encoder: a whole model of ``build_encoder``, blocks attached.
        stack: the part of it that writes.
        holder: where its blocks find the context.
        embed: tasks (N,) -> their embeddings, where the gate reads tasks; else None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        stack: nn.Module,
        holder: ContextHolder,
        embed: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.encoder, self.stack = encoder, stack
        self.holder, self.embed = holder, embed
        ends = encoder.generation_config.eos_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [ends] * (ends is not None)

    @torch.no_grad()
    def generate(
        self,
        tasks_B: Tensor,
        number: int,
        task: Task,
        begin: Callable[[Tensor], Beginning],
        refine: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Token ids (B, D) of the rows of one task, end token included, IGNORED behind it and elsewhere.

        Args:
            tasks_B: task of each row.
            number, task: the task.
            begin: rows (R,) -> what their search begins with.
            refine: last states of the stack -> what the output layer reads; None for the same.
        """
        mine_R = (tasks_B == number).nonzero().squeeze(1)
        together = self._lies_on_ranks()
        if not len(mine_R) and not together:
            return tasks_B.new_full((len(tasks_B), 1), IGNORED)
        rows_R = mine_R if len(mine_R) else mine_R.new_zeros(1)
        settings = copy.deepcopy(self.encoder.generation_config)
        settings.update(
            num_beams=task.num_beams, max_new_tokens=task.max_answer_length, do_sample=False
        )
        if settings.pad_token_id is None:
            # What stands behind an end is cut off below.
            settings.pad_token_id = self.ends[0]
        arguments, mask_RD = begin(rows_R)
        hooks = self._hooks(tasks_B[rows_R], mask_RD, refine)
        try:
            # Ranks end together: the experts of one may be asked for by another.
            ids_RD = self.encoder.generate(
                **arguments, generation_config=settings, synced_gpus=together
            )[:, mask_RD.shape[1] :]
        finally:
            for hook in hooks:
                hook.remove()
            self.holder.context = None
        ends_RD = torch.isin(ids_RD, torch.tensor(self.ends, device=ids_RD.device))
        behind_RD = ends_RD.cumsum(dim=1) - ends_RD.long() > 0
        ids_RD = torch.where(behind_RD, IGNORED, ids_RD)
        texts_BD = ids_RD.new_full((len(tasks_B), ids_RD.shape[1]), IGNORED)
        return texts_BD.index_copy(0, mine_R, ids_RD[: len(mine_R)])

    def _hooks(
        self, tasks_R: Tensor, mask_RD: Tensor, refine: Callable[[Tensor], Tensor] | None
    ) -> list[Any]:
        """What runs before and behind each pass of the stack."""
        of_tasks = self.of_tasks(tasks_R)

        def enter(stack: nn.Module, inputs: Any, options: Mapping[str, Any]) -> None:
            ids_ND = inputs[0] if inputs else options["input_ids"]
            self.holder.context = _step_context(ids_ND, mask_RD, of_tasks)

        def leave(stack: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = refine(output.last_hidden_state)
            return output

        hooks = [self.stack.register_forward_pre_hook(enter, with_kwargs=True)]
        return hooks if refine is None else [*hooks, self.stack.register_forward_hook(leave)]

    def ended(self, texts_BD: Tensor) -> Tensor:
        """As ``ModelOutput.generated``: -1 from the end token on."""
        ends_BD = torch.isin(texts_BD, torch.tensor(self.ends, device=texts_BD.device))
        return torch.where(ends_BD | (texts_BD == IGNORED), -1, texts_BD)

    def of_tasks(self, tasks_N: Tensor) -> tuple[Tensor | None, Tensor]:
        """The rows' task embeddings, where the gate reads tasks, and their tasks."""
        tasks_N = tasks_N.clamp_min(0)
        return None if self.embed is None else self.embed(tasks_N), tasks_N

    def _lies_on_ranks(self) -> bool:
        """True where a pass needs other ranks: for experts that AutoEP took over, or ZeRO-3's
        shares. An export that is loaded in one of several processes needs none."""
        if world_size() == 1:
            return False
        blocks = [
            module for module in self.encoder.modules() if isinstance(module, CooperativeBlock)
        ]
        split = any(hasattr(weight, "ds_id") for weight in self.encoder.parameters())
        return split or any(not isinstance(block.mixture, ExpertMixture) for block in blocks)


def _step_context(
    ids_ND: Tensor, mask_RD: Tensor, of_tasks: tuple[Tensor | None, Tensor]
) -> RoutingContext:
    """Of one step of a search, which reads what it begins with or a token; the beams of a row lie together."""
    N, D = ids_ND.shape
    real_ND = torch.ones_like(ids_ND)
    if D == mask_RD.shape[1]:
        real_ND = mask_RD.repeat_interleave(N // len(mask_RD), dim=0)
    index_S = real_ND.flatten().nonzero().squeeze(1)
    beams = [
        None if value is None else value.repeat_interleave(N // len(value), dim=0)
        for value in of_tasks
    ]
    return RoutingContext(index_S, index_S // D, *beams)


def check_lengths(encoder: nn.Module, tasks: Sequence[Task]) -> None:
    """ValueError where a text may be longer than the model can number."""
    longest = max(tasks, key=lambda task: task.max_answer_length)
    limit = longest_input(encoder.config)
    if longest.max_answer_length > limit:
        raise ValueError(
            f"tasks.{longest.name}.max_answer_length ({longest.max_answer_length}) must be at most "
            f"{limit}, the positions that the decoder of model.encoder numbers."
        )


def together(texts: Mapping[int, Tensor]) -> Tensor:
    """The texts of several tasks side by side, of which each row has one: IGNORED where none has a token."""
    width = max(text_BD.shape[1] for text_BD in texts.values())
    padded = [
        nn.functional.pad(text_BD, (0, width - text_BD.shape[1]), value=IGNORED)
        for text_BD in texts.values()
    ]
    return torch.stack(padded).amax(dim=0)
