"""The experts' arithmetic on a CPU: every row to its experts and back in one step of autograd, without spare copies.

Written out by hand, because what autograd makes of the plain form (gather, E small products, scatter, weigh, add up)
moves every routed row of width M seven more times through memory, and keeps three of the copies for the backward pass.
Here an expert's rows are gathered while they still fit the cache, a route's weight is multiplied into the hidden state
of width F (F is smaller than M, and the output projection is linear), and only inputs and two hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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
    """Weighted sum of what each row's experts answer: sum over j of weight_sj * down (silu(gate x_s) * (up x_s)).

    Args:
        x_SM: rows.
        weights_Sk: weight of each of a row's k routes; cast to the dtype of ``x_SM``.
        order_N: ``sort_routes`` of the experts' numbers.
        counts: routes per expert, E numbers on the host.
        gate_EFM: first projection of each expert, the gated part.
        up_EFM: first projection, the other part.
        down_EMF: second projection.

    Returns:
        Shape (S, M), the dtype of ``x_SM``. Differentiable once through rows, weights and the three projections;
        experts without rows get a gradient of zero.
    """
    return _MixExperts.apply(x_SM, weights_Sk.to(x_SM.dtype), order_N, list(counts), gate_EFM, up_EFM, down_EMF)


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
        rows_N = order_N // k
        weights_N1 = weights_Sk.reshape(-1, 1).index_select(0, order_N)
        gated_NF, linear_NF = x_SM.new_empty((2, order_N.shape[0], gate_EFM.shape[1]))
        answers_NM = x_SM.new_empty(order_N.shape[0], x_SM.shape[1])
        for expert, part in enumerate(_parts(counts)):
            x = x_SM.index_select(0, rows_N[part])
            torch.mm(x, gate_EFM[expert].t(), out=gated_NF[part])
            torch.mm(x, up_EFM[expert].t(), out=linear_NF[part])
            hidden = F.silu(gated_NF[part]).mul_(linear_NF[part]).mul_(weights_N1[part])
            torch.mm(hidden, down_EMF[expert].t(), out=answers_NM[part])
        places_Sk = _inverse(order_N).view(-1, k)
        ctx.counts = counts
        ctx.save_for_backward(
            x_SM, rows_N, weights_N1, places_Sk, gated_NF, linear_NF, gate_EFM, up_EFM, down_EMF
        )  # fmt: skip
        return _sum_rows(answers_NM, places_Sk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SM: Tensor) -> tuple[Tensor | None, ...]:
        x_SM, rows_N, weights_N1, places_Sk, gated_NF, linear_NF, gate_EFM, up_EFM, down_EMF = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        d_x_NM = x_SM.new_empty(rows_N.shape[0], x_SM.shape[1]) if wants_x else None
        d_weights_N = torch.empty_like(weights_N1[:, 0])
        d_gate_EFM, d_up_EFM, d_down_EMF = (torch.empty_like(p) for p in (gate_EFM, up_EFM, down_EMF))
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
                torch.mm(d_gated, gate_EFM[expert], out=d_x_NM[part]).addmm_(d_linear, up_EFM[expert])
        d_weights_Sk = d_weights_N.index_select(0, places_Sk.reshape(-1)).view_as(places_Sk)
        d_x_SM = None if d_x_NM is None else _sum_rows(d_x_NM, places_Sk)
        return d_x_SM, d_weights_Sk, None, None, d_gate_EFM, d_up_EFM, d_down_EMF


def _parts(counts: Sequence[int]) -> list[slice]:
    parts, start = [], 0
    for count in counts:
        parts.append(slice(start, start + count))
        start += count
    return parts


def _inverse(order_N: Tensor) -> Tensor:
    places_N = torch.empty_like(order_N)
    places_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return places_N


def _sum_rows(rows_NM: Tensor, places_Sk: Tensor) -> Tensor:
    """Row s of the answer is the sum of the rows at ``places_Sk[s]``: one pass, in the order of the routes."""
    if places_Sk.shape[1] == 1:
        return rows_NM.index_select(0, places_Sk[:, 0])
    return F.embedding_bag(places_Sk, rows_NM, mode="sum")
