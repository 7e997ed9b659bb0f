"""Cooperative LoRA experts: low-rank updates of a frozen model's linear maps, mixed by a gate.

With W a linear map, E experts of rank r and g the gate's weights of a token,

    y = W x + b + sum over e of g_e (alpha / r) B_e A_e x

All A lie in one matrix and all B in another, so the sum is two products of the width E r, with the
gate between them: B (g * (A x)), the same numbers at E times fewer products.

Source: LoRA, arXiv:2106.09685; four of them under one task gate: TaCL-CoMoE (IJCNLP 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import MoeConfig
from comoe.models.moe.block import ContextHolder, GatedBlock, RoutingContext
from comoe.models.moe.experts import input_std
from comoe.models.moe.router import ROUTES, PendingRoute, RouterProjection, build_gate


class LoraGate(GatedBlock):
    """The gate of one layer's maps, or of all maps: computed once per encode, before its first layer runs.

    Args:
        model_width: M.
        config: ``model.moe``.
        layer, holder, num_tasks: as for ``GatedBlock``.
    """

    def __init__(self, model_width: int, config: MoeConfig, **more: Any) -> None:
        inputs = ROUTES[config.route_by]
        super().__init__(model_width, config, norm=inputs.token, **more)
        self.gate = RouterProjection(model_width, config.num_experts)
        if not inputs.token:
            nn.init.zeros_(self.gate.weight)
            self.gate.weight.requires_grad_(False)
        self.router = PendingRoute(build_gate(config, model_width, self.num_tasks), inputs)

    @property
    def pending(self) -> PendingRoute:
        """Where the gate is."""
        return self.router

    @property
    def balance_bias_E(self) -> Tensor:
        """What moves the selection, float32, a buffer."""
        return self.gate.e_score_correction_bias

    def open(self, layer: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Pre-hook of the layer: routes the tokens that it reads. It runs once also where the layer
        is computed again for its backward pass."""
        context = self.holder.context
        assert context is not None, "set holder.context before running the encoder"
        x_BLM = inputs[0] if inputs else options["hidden_states"]
        if context.fan_out is not None:
            x_BLM = context.fan_out.to_rows(x_BLM)
        real_SM = x_BLM.reshape(-1, x_BLM.shape[-1]).index_select(0, context.real_index_S)
        x_SM = real_SM if self.norm is None else self.norm(real_SM)
        task_logits_SE, own_SE = self.of_tasks(context)
        self.router.prepare(task_logits_SE, context.selected.get(self.layer), own_SE)
        routing = self.router.route(self.gate, x_SM, self.balance_bias_E)
        self.router.collect()
        if not self.training:
            energies_S2 = routing.scores_SE.new_zeros(len(real_SM), 2)
            routing = replace(routing, energies_S2=energies_S2)
        context.routings[self.layer] = routing
        mixed_SE = torch.zeros_like(routing.scores_SE).scatter(
            1, routing.indices_Sk, routing.weights_Sk.to(routing.scores_SE.dtype)
        )
        positions = x_BLM.shape[0] * x_BLM.shape[1]
        context.mixing[self.layer] = mixed_SE.new_zeros(positions, self.num_experts).index_copy(
            0, context.real_index_S, mixed_SE
        )

    @torch.no_grad()
    def weights_of_tasks(self, embeddings_TD: Tensor) -> Tensor:
        """Weight of each expert for all tokens of a task, (T, E): of a gate that reads no tokens.

        Args:
            embeddings_TD: of the tasks, as many rows as there are tasks.
        """
        tasks_T = torch.arange(len(embeddings_TD), device=embeddings_TD.device)
        context = RoutingContext(tasks_T, tasks_T, embeddings_TD, tasks_T)
        logits_TE, own_TE = self.of_tasks(context)
        if logits_TE is None:
            logits_TE = embeddings_TD.new_zeros(len(tasks_T), self.num_experts)
        routing = self.router.gate(logits_TE, self.balance_bias_E, None, own_TE)
        return torch.zeros_like(routing.scores_SE).scatter(
            1, routing.indices_Sk, routing.weights_Sk.to(routing.scores_SE.dtype)
        )


class LoraLinear(nn.Module):
    """A linear map with its experts' updates.

    ``lora_A`` (E r, width in) has the rows of expert 0 first, ``lora_B`` (width out, E r) its
    columns.

    Args:
        inner: the map: ``nn.Linear``, or ``Conv1D`` of GPT-2.
        config: ``model.moe``.
        layer: of the gate, as in ``RoutingContext.mixing``.
        holder: where the context of the running encode is.
        dropout: probability on what all A read.
    """

    def __init__(
        self,
        inner: nn.Module,
        config: MoeConfig,
        *,
        layer: int,
        holder: ContextHolder,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.layer, self.holder = layer, holder
        self.num_experts, self.rank = config.num_experts, config.rank
        self.scale = config.alpha / config.rank
        in_width, out_width = widths_of(inner)
        columns = config.num_experts * config.rank
        self.lora_A = nn.Parameter(torch.empty(columns, in_width))
        self.lora_B = nn.Parameter(torch.empty(out_width, columns))
        nn.init.normal_(self.lora_A, std=input_std(config.expert_init, in_width))
        nn.init.normal_(self.lora_B, std=config.output_init)
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The map's own weight: some layers look at its dtype."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, L, width in) to (B, L, width out)."""
        output = self.inner(x)
        context = self.holder.context
        mixing_NE = context.mixing[self.layer]
        middle = F.linear(self.dropout(x), self.lora_A.to(x.dtype)).view(
            *mixing_NE.shape, self.rank
        )
        weighted = middle * (self.scale * mixing_NE).to(x.dtype)[:, :, None]
        update = F.linear(weighted.flatten(1), self.lora_B.to(x.dtype)).view_as(output)
        if self.holder.off:
            update = torch.zeros_like(update)
        if not self.training:
            self._measure(update, output)
        return output + update

    @torch.no_grad()
    def update(self, weights_E: Tensor) -> Tensor:
        """What the experts, weighted so, add to the map's weight: float64, (width out, width in)."""
        columns = weights_E.double().repeat_interleave(self.rank)
        return (self.scale * columns * self.lora_B.double()) @ self.lora_A.double()

    def _measure(self, update: Tensor, output: Tensor) -> None:
        """Add the squared norms of update and output to those of the gate's other maps."""
        context = self.holder.context
        routing = context.routings[self.layer]
        parts = [
            wide.flatten(0, -2).index_select(0, context.real_index_S).float().square().sum(dim=1)
            for wide in (update, output)
        ]
        energies_S2 = routing.energies_S2 + torch.stack(parts, dim=1)
        context.routings[self.layer] = replace(routing, energies_S2=energies_S2)


def widths_of(linear: nn.Module) -> tuple[int, int]:
    """Width in and width out of a linear map, whose weight may lie in shares."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and GPT-2's ``Conv1D``, the same with its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def adapters_of(model: nn.Module) -> list[LoraLinear]:
    """The linear maps with experts, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]
