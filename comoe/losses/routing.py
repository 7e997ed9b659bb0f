"""Losses on the gates over the batch of all ranks: even load over experts, small logits, tasks on different experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from comoe.config.recipe import MoeConfig
from comoe.distributed import sum_over_ranks, sum_with_gradient
from comoe.models.moe.router import build_gate
from comoe.types import TARGET_TOKENS, TOKENS, Batch, ModelOutput, Routing, labelled_rows


class RunningSums:
    """What all ranks have summed since the step began, with the gradient of the present micro-step.

    For terms that are no mean over rows: such a term is taken of all that the step has seen so far.
    ``add`` is a collective of all ranks, in the backward pass too.
    """

    def __init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the sums: a new optimizer step begins."""
        self._earlier: Tensor | None = None
        self._calls = 0

    def add(self, own: Tensor) -> Tensor:
        """The sums with this rank's share of one more micro-step."""
        sums = sum_with_gradient(own)
        self._calls += 1
        if self._earlier is not None:
            # The step's mean over micro-steps divides this gradient by their number, while a sum
            # over more tokens turns less: together that would count a token of a late micro-step
            # for less than one of the first.
            sums = self._earlier + sums.detach() + self._calls * (sums - sums.detach())
        self._earlier = sums.detach()
        return sums


def balance_loss(scores_SE: Tensor, counts_E: Tensor, *, num_tokens: Tensor | float) -> Tensor:
    """How unevenly tokens spread over experts: 1.0 when even, at most E/k; this rank's share of it.

    Sigmoid scores do not sum to one, so each token's scores are normalized first; otherwise the
    loss could be lowered by shrinking every score.

    Args:
        scores_SE: gate scores of this rank's tokens, float32.
        counts_E: routes per expert that decide the shares f_i, over all ranks, no gradient.
        num_tokens: tokens on all ranks; the sum of the shares over ranks is the global value.

    Returns:
        Scalar, float32, no unit: E * sum of f_i p_i. Differentiable through ``scores_SE`` only.

    Source: Switch Transformer, arXiv:2101.03961, with k routes per token; global batch:
    arXiv:2501.11873.
    """
    share_E = counts_E.to(scores_SE.dtype) / counts_E.sum().clamp_min(1)
    tiny = torch.finfo(scores_SE.dtype).tiny
    normalized_SE = scores_SE / scores_SE.sum(dim=1, keepdim=True).clamp_min(tiny)
    likely_E = normalized_SE.sum(dim=0) / num_tokens
    return scores_SE.shape[1] * (share_E * likely_E).sum()


class BalanceLoss:
    """Mean of ``balance_loss`` over layers, with the load of the whole optimizer step so far.

    One micro-batch may well be of one topic; to demand an even load of it kills specialization. So
    the shares f_i are counted over all ranks and over the micro-steps since ``begin_step``, and p_i
    is the mean over the tokens of the whole optimizer step (``Batch.unit_scale_T``), however they
    are cut into micro-steps; in a decoder's layers over its target tokens. Every call is a
    collective of all ranks.
    """

    def __init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the counts: a new optimizer step begins."""
        self._earlier: Tensor | None = None

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share of the term; term ``balance``, detached."""
        routings = output.routings
        counts = sum_over_ranks(torch.stack([routing.counts_E for routing in routings]))
        if self._earlier is not None:
            counts = counts + self._earlier
        self._earlier = counts
        losses = [
            scale * balance_loss(routing.scores_SE, counts_E, num_tokens=1.0)
            for routing, counts_E, scale in zip(
                routings, counts, scales_of(output, batch), strict=True
            )
        ]
        total = torch.stack(losses).mean()
        return total, {"balance": total.detach()}


def scales_of(output: ModelOutput, batch: Batch) -> list[Tensor]:
    """Per routing the factor that makes a sum over its tokens this micro-step's share of a mean over the step's."""
    own = len(output.routings) - output.num_answer_layers
    scales = batch.unit_scale_T
    return [scales[TOKENS]] * own + [scales[TARGET_TOKENS]] * output.num_answer_layers


class ZLoss:
    """Mean penalty on the size of the gates' logits; the gate knows which penalty suits it.

    The mean is over layers and over the tokens of the whole optimizer step on all ranks
    (``Batch.unit_scale_T``).

    Args:
        penalty: logits (S, E) -> penalty per token (S,).
    """

    def __init__(self, penalty: Callable[[Tensor], Tensor]) -> None:
        self.penalty = penalty

    @classmethod
    def of(cls, config: MoeConfig, model_width: int) -> ZLoss:
        """With the penalty of the gate that ``model.moe`` asks for."""
        return cls(build_gate(config, model_width).z_penalty)

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share of the term; term ``z``, detached."""
        scales = scales_of(output, batch)
        sums = [
            scale * self.penalty(routing.logits_SE).sum()
            for routing, scale in zip(output.routings, scales, strict=True)
        ]
        total = torch.stack(sums).mean()
        return total, {"z": total.detach()}


def task_separation(gates_LTE: Tensor) -> Tensor:
    """How alike the tasks use the experts: 1.0 when every task has the same gate, 0.0 when no two share an expert.

    Args:
        gates_LTE: each task's sum (or mean: only directions count) of gate vectors per layer, no
            number below 0; a task without tokens has a row of zeros and takes no part.

    Returns:
        Scalar, the dtype of ``gates_LTE``, in [0, 1]: the mean over layers of the mean cosine over
        pairs of tasks. 0 with a gradient of 0 where fewer than two tasks have tokens.

    Source: TRMoE-ISA, arXiv:2605.20916.
    """
    length_LT = torch.linalg.vector_norm(gates_LTE, dim=2)
    present_LT = length_LT > 0
    unit_LTE = gates_LTE / torch.where(present_LT, length_LT, 1.0).unsqueeze(2)
    pair_LTT = torch.triu(present_LT.unsqueeze(2) & present_LT.unsqueeze(1), diagonal=1)
    cosine_LTT = (unit_LTE @ unit_LTE.transpose(1, 2)) * pair_LTT
    return (cosine_LTT.sum(dim=(1, 2)) / pair_LTT.sum(dim=(1, 2)).clamp_min(1)).mean()


def gate_vectors(routing: Routing) -> Tensor:
    """Each token's weights of all experts, 0 for those not selected: (S, E), float32, differentiable."""
    return torch.zeros_like(routing.scores_SE).scatter(1, routing.indices_Sk, routing.weights_Sk)


class TaskSeparationLoss:
    """``task_separation`` of the batch of all ranks. A token counts for each task that its row has a label of.

    Under accumulation the mean gates are those of the optimizer step so far, as in ``BalanceLoss``.

    Args:
        tasks: names of all tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._gates = RunningSums()

    def begin_step(self) -> None:
        """Forget the gates: a new optimizer step begins."""
        self._gates.begin_step()

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The global term, the same on every rank; term ``task_separation``, detached."""
        labelled_BT = labelled_rows(batch, self.tasks)
        own = [
            labelled_BT[rows_S].T.to(routing.weights_Sk.dtype) @ gate_vectors(routing)
            for routing, rows_S in zip(output.routings, output.layer_rows, strict=True)
        ]
        total = task_separation(self._gates.add(torch.stack(own)))
        return total, {"task_separation": total.detach()}
