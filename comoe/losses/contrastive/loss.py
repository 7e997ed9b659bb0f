"""Task-adaptive contrastive loss over all ranks, with fixed or learned temperatures per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import ContrastiveConfig
from comoe.distributed import gather_detached, world_size
from comoe.losses.contrastive.closed_form import (
    KEEP_BYTES,
    MIN_TEMPERATURE,
    AnchorSums,
    ClosedForm,
    OtherAnchors,
    Repulsion,
    TaskRows,
    hidden_pairs,
)
from comoe.losses.contrastive.queue import Queue
from comoe.losses.contrastive.scales import Scales
from comoe.tasks.task import Task
from comoe.types import Batch, ModelOutput

HALF_ID = 20
"""Bits of a post's number per float32 column: whole numbers to 2^24 are exact there, and numbers to
2^40 are enough."""


class Gather(Protocol):
    """Rows of all ranks in rank order, without gradient, and where this rank's begin."""

    def __call__(self, rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
        """``sizes``: rows of each rank; None: the same number on all."""
        ...


def alone(rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """The gather of a rank that compares its own rows alone."""
    return rows.detach(), 0


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one task: (post, view) pairs that have a label."""

    rows_NP: Tensor
    keys_NK: Tensor
    posts_N: Tensor


def has_views(task: Task, config: ContrastiveConfig) -> bool:
    """Whether the loss wants a second dropout view of the posts that have a label of the task."""
    return task.views or config.views == 2


class ContrastiveLoss(nn.Module):
    """Weighted sum over tasks of their contrastive losses; the mean over ranks of its gradient is the global one.

    L_i = logsumexp over candidates j of s_ij - weighted mean over positives p of s_ip, s = cosine /
    temperature; a task's loss is the mean over its anchors with a positive, on all ranks. What a
    positive is, and what it weighs, is the affinity of the task's kind. Candidates are all other
    rows of the task, of all ranks and of the queue, but for copies of the anchor's own post; where
    there are views, these are positives. Under ``negatives: all`` the rows of all other tasks are
    candidates too, never positives, again but for those of the anchor's own post.

    A learned temperature at its floor falls no further: where the sum over ranks of its gradient
    would lead there, it is 0 on all of them. Under ``over: local`` each rank decides by its own.

    Two gathers per call, none in the backward pass; every rank must reach them, with rows or
    without. Memory grows with the rows of all ranks, not with their square.

    Args:
        tasks: those that take part, in the same order on all ranks.
        config: ``loss.contrastive``; its ``weight`` and ``chunk_size`` are the objective's.
        width: P of the embeddings.
        gather: the collective.
        ranks: number W that the gradient is averaged over; None: all of the run.

    Raises:
        ValueError: a temperature below 0.01.

    Source: supervised contrastive learning, arXiv:2004.11362, per task as in TaCL-CoMoE; two
    dropout views as positives, arXiv:2002.05709; the closed form of ``closed_form``.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: ContrastiveConfig,
        *,
        width: int,
        gather: Gather = gather_detached,
        ranks: int | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        local = config.over == "local"
        self.gather: Gather = alone if local else gather
        self.factor = 1 if local else ranks or world_size()
        self.queue_warmup = config.queue_warmup
        self.across = config.negatives == "all"
        self.viewed = {task.name for task in self.tasks if has_views(task, config)}
        given = [task.contrastive_temperature or config.temperature for task in self.tasks]
        assert min(given) >= MIN_TEMPERATURE
        self.learned = config.learn_temperature
        self.scales = Scales(given, learned=self.learned)
        self.num_keys = max(task.rules.num_keys(task.labels) for task in self.tasks)
        self.queue = None
        if config.queue_size:
            sizes = {"size": config.queue_size, "width": width, "num_keys": self.num_keys}
            self.queue = Queue(len(self.tasks), **sizes)

    def begin_step(self) -> None:
        """Count the optimizer steps that the queue waits for."""
        if self.queue is not None and self.training:
            self.queue.steps += 1

    def forward(
        self, output: ModelOutput, batch: Batch, scales_T: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share, to be averaged over ranks.

        Args:
            output: ``embeddings`` and ``views`` are read, of one micro-batch or of a whole
                optimizer step.
            batch: ``labels`` and ``row_ids_B`` are read.
            scales_T: the tasks' inverse temperatures; None runs ``scales``.

        Returns:
            Scalar, differentiable; and detached terms, whose mean over ranks is the global value:
            ``contrastive``, and per task, unweighted, ``contrastive/<task>``,
            ``positives_per_anchor/<task>`` (the mean over anchors of the weights of their
            positives) and, where it is learned, ``temperature/<task>``.
        """
        own = [self._own_rows(task, output, batch) for task in self.tasks]
        # Rows per rank and task, and this rank's index.
        counts_WT, rank = self.gather(
            torch.tensor([[len(rows.rows_NP) for rows in own]], device=own[0].rows_NP.device)
        )
        counts_WT = counts_WT.tolist()
        sizes = [sum(counts) for counts in counts_WT]
        everyone = self._gather_rows(own, counts_WT, sizes)
        scales_T = self.scales() if scales_T is None else scales_T
        spans = [
            {"start": sum(counts[i] for counts in counts_WT[:rank]), "num_own": counts_WT[rank][i]}
            for i in range(len(own))
        ]
        scales = scales_T.tolist()
        all_sums = self._anchor_sums(everyone, spans, scales)
        # The second gather: what the gradient of this rank's rows takes from the anchors of the
        # others.
        numbers = [sums.reciprocals() for sums in all_sums]
        if self.learned:
            numbers = [
                torch.cat([reciprocals_N2, sums.slopes()[:, None].double()], dim=1)
                for reciprocals_N2, sums in zip(numbers, all_sums, strict=True)
            ]
        numbers_GX, _ = self.gather(torch.cat(numbers), sizes=sizes)
        of_all = [_of_task(numbers_GX, counts_WT, index) for index in range(len(own))]
        total, terms = self._terms(own, all_sums, of_all, scales_T)
        if self.across:
            total = total + self._repulsions(own, everyone, of_all, scales)
        return total, {"contrastive": total.detach(), **terms}

    def _terms(
        self,
        own: Sequence[_Rows],
        all_sums: Sequence[AnchorSums],
        of_all: Sequence[Tensor],
        scales_T: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the tasks' terms, and what is logged of each."""
        total, terms = 0.0, {}
        for index, (task, sums) in enumerate(zip(self.tasks, all_sums, strict=True)):
            of_all_R2, scale = of_all[index][:, :2], scales_T[index]
            if self.learned:
                # All ranks decide by the sum over all: the share of one may lead the other way.
                stuck = (scale >= 1 / MIN_TEMPERATURE) & (of_all[index][:, 2].sum() < 0)
                scale = torch.where(stuck, scale.detach(), scale)
            anchors = _anchors(of_all_R2)
            value = ClosedForm.apply(
                own[index].rows_NP, scale, sums, of_all_R2, self.factor / anchors
            )
            total = total + task.contrastive_weight * value
            terms[f"contrastive/{task.name}"] = value.detach()
            weights_R = torch.where(of_all_R2[:, 1] > 0, 1 / of_all_R2[:, 1], 0.0)
            terms[f"positives_per_anchor/{task.name}"] = (weights_R.sum() / anchors).to(value.dtype)
            if self.learned:
                terms[f"temperature/{task.name}"] = 1 / scale.detach()
        return total, terms

    def _repulsions(
        self,
        own: Sequence[_Rows],
        everyone: Sequence[_Rows],
        of_all: Sequence[Tensor],
        scales: Sequence[float],
    ) -> Tensor:
        """0, with what the anchors of other tasks, of all ranks, do to this rank's rows of each."""
        total, numbers = 0.0, range(len(self.tasks))
        factors = [
            task.contrastive_weight * self.factor / _anchors(of_all_R) * of_all_R[:, 0]
            for task, of_all_R in zip(self.tasks, of_all, strict=True)
        ]
        for index in numbers:
            others = [number for number in numbers if number != index]
            if not others:
                continue
            posts_O = torch.cat([everyone[number].posts_N for number in others])
            factors_O = torch.cat([factors[number] for number in others])
            scales_O = torch.cat(
                [torch.full_like(factors[number], scales[number]) for number in others]
            )
            anchors = OtherAnchors(
                torch.cat([everyone[number].rows_NP for number in others]),
                scales_O,
                factors_O,
                *hidden_pairs(own[index].posts_N, posts_O),
            )
            total = total + Repulsion.apply(own[index].rows_NP, anchors)
        return total

    def _anchor_sums(
        self, everyone: Sequence[_Rows], spans: Sequence[Mapping[str, int]], scales: Sequence[float]
    ) -> list[AnchorSums]:
        """Per task the sums of this rank's anchors over the rows of all ranks and of the queue."""
        added, waits, repeats = self._host_numbers(everyone)
        keep, all_sums = KEEP_BYTES // len(self.tasks), []
        past: list[_Rows | None] = [
            _Rows(*self.queue.read(index, added=count)) if count and not waits else None
            for index, count in enumerate(added)
        ]
        for index, (rows, scale) in enumerate(zip(everyone, scales, strict=True)):
            found = [of_task for of_task in (*everyone, *past) if of_task is not None]
            others = [one for one in found if one is not rows and one is not past[index]]
            compared = _task_rows(
                self.tasks[index],
                rows,
                past[index],
                others if self.across else (),
                **spans[index],
                repeats=repeats[index],
            )
            all_sums.append(
                AnchorSums(compared, scale=scale, keep_bytes=keep, moments=self.learned)
            )
        # Only now: past rows are parts of the queue's own tensors.
        if self.queue is not None and self.training:
            for index, rows in enumerate(everyone):
                self.queue.put(index, rows.rows_NP, rows.keys_NK, rows.posts_N, added=added[index])
        return all_sums

    def _own_rows(self, task: Task, output: ModelOutput, batch: Batch) -> _Rows:
        labels, embeddings_BP = batch.labels[task.name], output.embeddings[task.name]
        labelled = task.rules.labelled(labels).nonzero()[:, 0]
        rows, posts = [embeddings_BP[labelled]], [batch.row_ids_B[labelled]]
        if task.name in self.viewed:
            rows.append(output.views[task.name][labelled])
            posts *= 2
        rows_NP = torch.cat(rows)
        # Similarities in float32 also where the model is not; float64 stays.
        rows_NP = rows_NP if rows_NP.dtype == torch.float64 else rows_NP.float()
        keys_BK = task.rules.keys(labels[labelled]).to(rows_NP.dtype)
        return _Rows(
            rows_NP,
            F.pad(keys_BK, (0, self.num_keys - keys_BK.shape[1])).repeat(len(posts), 1),
            torch.cat(posts),
        )

    def _gather_rows(
        self, own: Sequence[_Rows], counts_WT: list[list[int]], sizes: list[int]
    ) -> list[_Rows]:
        """The rows of all ranks, per task: one packed gather of [rows | keys | post]."""
        posts_N = torch.cat([rows.posts_N for rows in own])
        halves_N2 = torch.stack([posts_N >> HALF_ID, posts_N & ((1 << HALF_ID) - 1)], dim=1)
        rows_NP = torch.cat([rows.rows_NP.detach() for rows in own])
        packed_NQ = torch.cat(
            [rows_NP, torch.cat([rows.keys_NK for rows in own]), halves_N2.to(rows_NP.dtype)], dim=1
        )
        packed_GQ, _ = self.gather(packed_NQ, sizes=sizes)
        everyone, width = [], rows_NP.shape[1]
        for index in range(len(own)):
            of_task_RQ = _of_task(packed_GQ, counts_WT, index)
            posts_R = (of_task_RQ[:, -2].long() << HALF_ID) + of_task_RQ[:, -1].long()
            everyone.append(
                _Rows(of_task_RQ[:, :width].contiguous(), of_task_RQ[:, width:-2], posts_R)
            )
        return everyone

    def _host_numbers(self, everyone: Sequence[_Rows]) -> tuple[list[int], bool, list[int]]:
        """Rows ever put into the queue, per task; whether it is not to be read yet; whether some
        post of a task without views is there more than once. One wait for the device."""
        flags = []
        for task, rows in zip(self.tasks, everyone, strict=True):
            flag = rows.posts_N.new_zeros(())
            # With views every post is there more than once, and nothing is to be hidden.
            if task.name not in self.viewed:
                sorted_R = rows.posts_N.sort().values
                flag = (sorted_R[1:] == sorted_R[:-1]).any().to(flag)
            flags.append(flag)
        if self.queue is None:
            return [0] * len(self.tasks), True, torch.stack(flags).tolist()
        steps, *numbers = torch.cat(
            [self.queue.steps[None], self.queue.added_T, torch.stack(flags)]
        ).tolist()
        count = len(self.tasks)
        return numbers[:count], max(steps - 1, 0) < self.queue_warmup, numbers[count:]


def _anchors(of_all_R2: Tensor) -> Tensor:
    """How many rows of all ranks are anchors, at least 1, float64 scalar; of their reciprocals."""
    return (of_all_R2[:, 1] > 0).sum().clamp_min(1).double()


def _task_rows(
    task: Task,
    rows: _Rows,
    past: _Rows | None,
    foreign: Sequence[_Rows],
    *,
    start: int,
    num_own: int,
    repeats: int,
) -> TaskRows:
    """Rows of all ranks, past ones, and those of other tasks, as the columns that the anchors are
    compared with."""
    columns_CP, keys_CK, posts_C = rows.rows_NP, rows.keys_NK, rows.posts_N
    own_posts_N = posts_C[start : start + num_own]
    hidden_rows_X = hidden_columns_X = posts_C.new_zeros(0)
    if repeats:
        found_X, columns_X = hidden_pairs(own_posts_N, posts_C)
        others = found_X + start != columns_X
        hidden_rows_X, hidden_columns_X = found_X[others], columns_X[others]
    if past is not None:
        found_X, columns_X = hidden_pairs(own_posts_N, past.posts_N)
        hidden_rows_X = torch.cat([hidden_rows_X, found_X])
        hidden_columns_X = torch.cat([hidden_columns_X, columns_X + len(posts_C)])
        columns_CP = torch.cat([columns_CP, past.rows_NP.to(columns_CP.dtype)])
        keys_CK = torch.cat([keys_CK, past.keys_NK.to(keys_CK.dtype)])
        posts_C = torch.cat([posts_C, past.posts_N])
    # Rows of one post are alike where a kind has no labels to compare.
    keys = posts_C[:, None] if task.views else keys_CK[:, : task.rules.num_keys(task.labels)]
    keys_UK, groups_K = _different(keys)
    if foreign:
        found_X, columns_X = hidden_pairs(own_posts_N, torch.cat([one.posts_N for one in foreign]))
        hidden_rows_X = torch.cat([hidden_rows_X, found_X])
        hidden_columns_X = torch.cat([hidden_columns_X, columns_X + len(columns_CP)])
        columns_CP = torch.cat([columns_CP, *(one.rows_NP.to(columns_CP) for one in foreign)])
    return TaskRows(
        columns_CP=columns_CP,
        num_rows=len(rows.rows_NP),
        start=start,
        num_own=num_own,
        groups_K=groups_K,
        keys_UK=keys_UK,
        affinity=partial(task.rules.affinity, task=task) if task.rules.graded else None,
        hidden_rows_X=hidden_rows_X,
        hidden_columns_X=hidden_columns_X,
    )


def _different(keys_CK: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows (U, K), and which of them each row is (C,), int64. By columns: by rows torch is far slower."""
    found_U, groups_C = torch.unique(keys_CK[:, 0], return_inverse=True)
    for keys_C in keys_CK.unbind(dim=1)[1:]:
        values, codes_C = torch.unique(keys_C, return_inverse=True)
        found_U, groups_C = torch.unique(groups_C * len(values) + codes_C, return_inverse=True)
    # All rows that write to one place write the same.
    keys_UK = keys_CK.new_empty(len(found_U), keys_CK.shape[1]).index_copy_(0, groups_C, keys_CK)
    return keys_UK, groups_C


def _of_task(everyone_GX: Tensor, counts_WT: Sequence[Sequence[int]], task: int) -> Tensor:
    """The rows of one task, of all ranks: each rank sent its tasks one after another."""
    parts, begin = [], 0
    for counts in counts_WT:
        at = begin + sum(counts[:task])
        parts.append(everyone_GX[at : at + counts[task]])
        begin += sum(counts)
    return torch.cat(parts)
