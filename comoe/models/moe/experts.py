"""Experts as one module, and their arithmetic on a CPU and on a GPU.

On a CPU every row goes to its experts and back in one step of autograd, without spare copies.
Written out by hand, because what autograd makes of the plain form (gather, E small products,
scatter, weigh, add up) moves every routed row of width M seven more times through memory, and keeps
three of the copies for the backward pass. Here an expert's rows are gathered while they still fit
the cache, a route's weight is multiplied into the hidden state of width F (F is smaller than M, and
the output projection is linear), and only inputs and two hidden states are kept.

On a GPU all experts run at once, and the host never waits for the counts. bfloat16 goes through
PyTorch's grouped matrix product. It takes nothing else on most GPUs, so float32 (prediction from an
export, for one) goes through batched products over tiles: each expert's rows are filled up to whole
tiles, each tile meets its expert's weights, and how many tiles there may be at most follows from
the shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def sort_routes(indices_Sk: Tensor) -> Tensor:
    """Numbers of the S * k routes, those of expert 0 first, in the order of the tokens; int64, shape (N,)."""
    return torch.argsort(indices_Sk.reshape(-1), stable=True)


def mix_experts(
    x_SM: Tensor,
    weights_Sk: Tensor,
    order_N: Tensor,
    counts: Sequence[int],
    gate_EFM: Tensor,
    up_EFM: Tensor,
    down_EMF: Tensor,
) -> Tensor:
    """Weighted sum of the outputs of each row's experts: sum over j of weight_sj * down (silu(gate x_s) * (up x_s)).

    Args:
        x_SM: rows.
        weights_Sk: weight of each of a row's k routes; cast to the dtype of ``x_SM``.
        order_N: ``sort_routes`` of the experts' numbers.
        counts: routes per expert, E numbers on the host.
        gate_EFM: first projection of each expert, the gated part.
        up_EFM: first projection, the other part.
        down_EMF: second projection.

    Returns:
        Shape (S, M), the dtype of ``x_SM``. Differentiable once through rows, weights and the three
        projections; experts without rows get a gradient of zero.
    """
    return _MixExperts.apply(
        x_SM, weights_Sk.to(x_SM.dtype), order_N, list(counts), gate_EFM, up_EFM, down_EMF
    )


class _MixExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SM: Tensor,
        weights_Sk: Tensor,
        order_N: Tensor,
        counts: list[int],
        gate_EFM: Tensor,
        up_EFM: Tensor,
        down_EMF: Tensor,
    ) -> Tensor:
        k = weights_Sk.shape[1]
        rows_N, weights_N1 = order_N // k, weights_Sk.reshape(-1, 1).index_select(0, order_N)
        positions_N = torch.arange(len(order_N), device=order_N.device)
        if x_SM.dtype == torch.bfloat16:
            counts, positions_N, rows_N, weights_N1 = _whole_tiles(counts, rows_N, weights_N1)
        gated_NF, linear_NF = x_SM.new_empty((2, rows_N.shape[0], gate_EFM.shape[1]))
        outputs_NM = x_SM.new_empty(rows_N.shape[0], x_SM.shape[1])
        for expert, part in enumerate(_parts(counts)):
            x = x_SM.index_select(0, rows_N[part])
            torch.mm(x, gate_EFM[expert].t(), out=gated_NF[part])
            torch.mm(x, up_EFM[expert].t(), out=linear_NF[part])
            hidden = F.silu(gated_NF[part]).mul_(linear_NF[part]).mul_(weights_N1[part])
            torch.mm(hidden, down_EMF[expert].t(), out=outputs_NM[part])
        places_N = torch.empty_like(order_N)
        places_N[order_N] = positions_N
        places_Sk = places_N.view(-1, k)
        ctx.counts = counts
        ctx.save_for_backward(
            x_SM, rows_N, weights_N1, places_Sk, gated_NF, linear_NF, gate_EFM, up_EFM, down_EMF
        )  # fmt: skip
        return _sum_rows(outputs_NM, places_Sk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SM: Tensor) -> tuple[Tensor | None, ...]:
        x_SM, rows_N, weights_N1, places_Sk, gated_NF, linear_NF, gate_EFM, up_EFM, down_EMF = (
            ctx.saved_tensors
        )
        wants_x = ctx.needs_input_grad[0]
        d_x_NM = x_SM.new_empty(rows_N.shape[0], x_SM.shape[1]) if wants_x else None
        d_weights_N = torch.empty_like(weights_N1[:, 0])
        d_gate_EFM, d_up_EFM, d_down_EMF = (
            torch.empty_like(p) for p in (gate_EFM, up_EFM, down_EMF)
        )
        for expert, part in enumerate(_parts(ctx.counts)):
            gradient = gradient_SM.index_select(0, rows_N[part])
            x = x_SM.index_select(0, rows_N[part])
            gated, linear, weights = gated_NF[part], linear_NF[part], weights_N1[part]
            active = F.silu(gated)
            hidden = active * linear
            d_hidden = gradient @ down_EMF[expert]
            torch.sum(d_hidden * hidden, dim=1, out=d_weights_N[part])
            torch.mm(gradient.t(), hidden.mul_(weights), out=d_down_EMF[expert])
            d_hidden.mul_(weights)
            d_linear = active.mul_(d_hidden)
            d_gated = torch.ops.aten.silu_backward(d_hidden.mul_(linear), gated)
            torch.mm(d_gated.t(), x, out=d_gate_EFM[expert])
            torch.mm(d_linear.t(), x, out=d_up_EFM[expert])
            if d_x_NM is not None:
                torch.mm(d_gated, gate_EFM[expert], out=d_x_NM[part]).addmm_(
                    d_linear, up_EFM[expert]
                )
        d_weights_Sk = d_weights_N.index_select(0, places_Sk.reshape(-1)).view_as(places_Sk)
        d_x_SM = None if d_x_NM is None else _sum_rows(d_x_NM, places_Sk)
        return d_x_SM, d_weights_Sk, None, None, d_gate_EFM, d_up_EFM, d_down_EMF


BF16_TILE = 64
"""Rows that each expert's bfloat16 products are filled up to on a CPU."""


def _whole_tiles(
    counts: Sequence[int], rows_N: Tensor, weights_N1: Tensor
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Fill each expert's routes up to whole tiles, with copies of row 0 that weigh 0.

    oneDNN, which multiplies bfloat16, compiles a kernel for each new shape: 1 to 2 ms, ten times
    the product itself, and the number of routes is new for every expert in every step.

    Returns:
        Filled counts, position of each route among the filled ones, filled rows, filled weights.
    """
    filled = [-(-count // BF16_TILE) * BF16_TILE for count in counts]
    spare_E = torch.tensor(filled) - torch.tensor(counts)
    shift_N = (spare_E.cumsum(0) - spare_E).repeat_interleave(torch.tensor(counts))
    positions_N = torch.arange(len(rows_N)) + shift_N
    rows = rows_N.new_zeros(sum(filled)).index_copy_(0, positions_N, rows_N)
    weights = weights_N1.new_zeros(sum(filled), 1).index_copy_(0, positions_N, weights_N1)
    return filled, positions_N, rows, weights


def _parts(counts: Sequence[int]) -> list[slice]:
    parts, start = [], 0
    for count in counts:
        parts.append(slice(start, start + count))
        start += count
    return parts


def _sum_rows(rows_NM: Tensor, places_Sk: Tensor) -> Tensor:
    """Row s is the sum of the rows at ``places_Sk[s]``: one pass, in the order of the routes."""
    if places_Sk.shape[1] == 1:
        return rows_NM.index_select(0, places_Sk[:, 0])
    return F.embedding_bag(places_Sk, rows_NM, mode="sum")


LEAST_TILE, MOST_TILE = 16, 1024
"""Rows of one tile."""


TILES_PER_EXPERT = 4
"""An even load gives each expert at least so many tiles. Larger tiles mean more padding, half a
tile per expert on average; smaller ones more copies of the experts' weights, one per tile."""


def run_grouped(x_NM: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """All experts in two grouped matrix products.

    Args:
        x_NM: rows, those of expert 0 first; bfloat16.
        counts_E: rows per expert, int64, on the same device.
        gate_up_proj: (E, 2F, M), F and M multiples of 8.
        down_proj: (E, M, F).

    Returns:
        The output of each row's expert, shape (N, M).
    """
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_NF = gated(F.grouped_mm(x_NM, gate_up_proj.transpose(1, 2), offs=ends_E))
    return F.grouped_mm(hidden_NF, down_proj.transpose(1, 2), offs=ends_E)


def run_tiled(x_NM: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The same for any dtype and width, by batched products over tiles of rows of one expert."""
    (N, M), E = x_NM.shape, counts_E.shape[0]
    tile = tile_rows(N, E)
    tiles = N // tile + E
    needed_E = (counts_E + tile - 1) // tile
    # The last group takes the tiles that nobody needs: with it the sum is known without asking the
    # device.
    spare = tiles - needed_E.sum(dim=0, keepdim=True)
    owners = torch.arange(E + 1, device=x_NM.device).remainder(E)
    owner_of_tile = owners.repeat_interleave(torch.cat([needed_E, spare]), output_size=tiles)
    expert_of_row = torch.arange(E, device=x_NM.device).repeat_interleave(counts_E, output_size=N)
    moved_E = (needed_E.cumsum(0) - needed_E) * tile - (counts_E.cumsum(0) - counts_E)
    places_N = torch.arange(N, device=x_NM.device) + moved_E[expert_of_row]
    padded = x_NM.new_zeros(tiles * tile, M).index_copy(0, places_N, x_NM).view(tiles, tile, M)
    hidden = gated(padded @ gate_up_proj[owner_of_tile].transpose(1, 2))
    return (hidden @ down_proj[owner_of_tile].transpose(1, 2)).view(-1, M).index_select(0, places_N)


def tile_rows(rows: int, num_experts: int) -> int:
    """Rows per tile: a power of two, from the shapes alone."""
    even = max(1, rows // (TILES_PER_EXPERT * num_experts))
    return min(MOST_TILE, max(LEAST_TILE, 1 << (even.bit_length() - 1)))


def gated(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half of the last axis."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def input_std(expert_init: float | str, model_width: int) -> float:
    """Standard deviation of a gated feed-forward's first projections at the start.

    Args:
        expert_init: ``model.moe.expert_init``: itself, or fan_in: 1 / sqrt(M), which gives a
            normalized row pre-activations of variance 1, whatever the width.
        model_width: M.
    """
    return model_width**-0.5 if expert_init == "fan_in" else float(expert_init)


class Experts(nn.Module):
    """E gated feed-forwards in two tensors: ``down @ (silu(gate @ x) * (up @ x))``, no biases.

    ``gate_up_proj`` [E, 2F, M] holds the gate rows first, then the up rows; ``down_proj`` is [E, M,
    F]. Names and layout are what DeepSpeed AutoEP shards.

    Args:
        num_experts: E.
        model_width: M.
        expert_width: F.
        expert_init: as for ``input_std``.
        output_init: standard deviation of ``down_proj``; 0 makes every output 0.
    """

    def __init__(
        self,
        num_experts: int,
        model_width: int,
        expert_width: int,
        *,
        expert_init: float | str = "fan_in",
        output_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_width, model_width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, model_width, expert_width))
        nn.init.normal_(self.gate_up_proj, std=input_std(expert_init, model_width))
        nn.init.normal_(self.down_proj, std=output_init)

    def mean(self, x_SM: Tensor) -> Tensor:
        """Output of the one expert whose weights are the mean of all, shape (S, M)."""
        weights = (weight.mean(dim=0).to(x_SM.dtype) for weight in self.parameters())
        return run_dense(x_SM, *weights)

    def forward(
        self,
        x_SM: Tensor,
        counts_E: Tensor,
        order_N: Tensor | None = None,
        weights_Sk: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of each row's experts.

        Args:
            x_SM: rows.
            counts_E: routes per expert, int64, sum N = S * k.
            order_N: ``sort_routes`` of the selected experts; None: one route per row, rows sorted by expert.
            weights_Sk: weight of each route; None: 1.

        Returns:
            Shape (S, M), the dtype of ``x_SM``.
        """
        if order_N is None or weights_Sk is None:
            order_N = torch.arange(x_SM.shape[0], device=x_SM.device)
            weights_Sk = torch.ones((x_SM.shape[0], 1), device=x_SM.device)
        gate_up, down = self.gate_up_proj.to(x_SM.dtype), self.down_proj.to(x_SM.dtype)
        if not x_SM.is_cuda:
            return mix_experts(
                x_SM, weights_Sk, order_N, counts_E.tolist(), *gate_up.chunk(2, dim=1), down
            )
        # The grouped kernel wants bfloat16 rows of a multiple of 16 bytes.
        aligned = all(width % 8 == 0 for width in down.shape[1:])
        run = run_grouped if x_SM.dtype == torch.bfloat16 and aligned else run_tiled
        outputs_NM = run(
            x_SM.index_select(0, order_N // weights_Sk.shape[1]), counts_E, gate_up, down
        )
        routed_NM = torch.zeros_like(outputs_NM).index_copy(0, order_N, outputs_NM)
        routed_SkM = routed_NM.view(*weights_Sk.shape, -1)
        return (routed_SkM * weights_Sk.unsqueeze(-1)).sum(dim=1).to(x_SM.dtype)


def run_dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One gated feed-forward on all rows.

    Args:
        x: shape (S, M).
        gate_up: (2F, M), in the dtype of ``x``.
        down: (M, F).
    """
    return F.linear(gated(F.linear(_in_tiles(x), gate_up)), down)[: x.shape[0]]


def _in_tiles(x: Tensor) -> Tensor:
    """Packed tokens, a new number in every step, filled up where ``_whole_tiles`` says why."""
    if x.dim() == 2 and x.dtype == torch.bfloat16 and not x.is_cuda:
        return F.pad(x, (0, 0, 0, -x.shape[0] % BF16_TILE))
    return x


class GatedFeedForward(nn.Module):
    """The expert that every token visits: the same gated form as ``Experts``, dense.

    Args:
        model_width: M.
        width: its hidden width.
        expert_init: as for ``input_std``.
        output_init: standard deviation of the output projection.
    """

    def __init__(
        self,
        model_width: int,
        width: int,
        *,
        expert_init: float | str = "fan_in",
        output_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(model_width, 2 * width, bias=False)
        self.down = nn.Linear(width, model_width, bias=False)
        nn.init.normal_(self.gate_up.weight, std=input_std(expert_init, model_width))
        nn.init.normal_(self.down.weight, std=output_init)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., M) to (..., M)."""
        return self.down(gated(self.gate_up(_in_tiles(x))))[: x.shape[0]]
