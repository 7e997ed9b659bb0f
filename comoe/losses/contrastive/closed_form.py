"""The contrastive loss of one task in closed form: tiles forward, tiles backward, no collective in either.

With s_ij = scale z_i z_j (scale = 1 / temperature), w_ij the affinity of two rows, a_i = 1 where an
anchor has a positive, A anchors on all ranks, E_i = sum over candidates of exp(s_ij) and S_i = sum over
candidates of w_ij:

    L       = 1/A sum_i a_i (log E_i - sum_j w_ij s_ij / S_i)
    dL/dz_i = scale/A sum_j (exp(s_ij) (a_i/E_i + a_j/E_j) - w_ij (a_i/S_i + a_j/S_j)) z_j

Past rows of the queue are candidates and positives, and never anchors: a_j = 0 there. Rows of other
tasks may be candidates too, never positives (w_ij = 0); what their own anchors do to a row is
``Repulsion``. The loss in words: docs/method.md, Contrastive loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_TEMPERATURE = 0.01
"""Below it exp(s) leaves the range even of float64 rows that are nearly of unit length."""


SAFE_SCALE = 40.0
"""Up to here exp(s) and its sums over a billion rows keep full precision in float32, without a
shift."""


TILE_BYTES = {"cpu": 4 << 20}
"""Device type -> bytes of one tile: on a CPU it should stay in the cache, a GPU wants more work per
launch."""


TILE_BYTES_ELSEWHERE = 64 << 20
"""The same of all other devices."""


KEEP_BYTES = 64 << 20
"""Tiles of the forward pass are kept for the backward pass while they take no more than this; else
made again."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one task as this rank's anchors see them.

    C columns are its K rows, those of all ranks and then past ones, and behind them rows of other
    tasks, which are candidates alone.
    """

    columns_CP: Tensor
    """Unit-length rows, float32 or float64, without gradient."""
    num_rows: int
    """How many columns are rows of this step, which are anchors too."""
    start: int
    """Column of this rank's first row."""
    num_own: int
    """Rows of this rank N."""
    groups_K: Tensor
    """Column of the task itself -> index of its key among the different ones, int64."""
    keys_UK: Tensor
    """The different keys."""
    affinity: Callable[[Tensor, Tensor], Tensor] | None
    """Keys (N, K) and (U, K) -> w (N, U), symmetric, in [0, 1]; None: 1 for equal keys, else 0."""
    hidden_rows_X: Tensor
    """Own row of each (own row, other column) pair of one post: neither a candidate nor a positive.
    A pair of rows of this step is hidden from both. Within the task both have the same key: a post
    does not change its label."""
    hidden_columns_X: Tensor
    """Column of each such pair, of this step or past, of the task or of another."""

    @property
    def own_NP(self) -> Tensor:
        """This rank's rows."""
        return self.columns_CP[self.start : self.start + self.num_own]

    @property
    def own_groups_N(self) -> Tensor:
        """Groups of this rank's rows."""
        return self.groups_K[self.start : self.start + self.num_own]


class AnchorSums:
    """Sums over the candidates of this rank's anchors; made once per task and step, in the forward pass.

    Args:
        rows: what is compared.
        scale: multiplies the cosines; at most 1 / ``MIN_TEMPERATURE``.
        keep_bytes: how much may stay in memory until the backward pass.
        moments: also take the mean of s under the softmax, which the gradient of the scale needs.
    """

    def __init__(
        self, rows: TaskRows, *, scale: float, keep_bytes: int = KEEP_BYTES, moments: bool
    ) -> None:
        self.rows, self.scale = rows, scale
        columns_CP = rows.columns_CP
        self.work = columns_CP.dtype if scale <= SAFE_SCALE else torch.float64
        width = len(columns_CP) + (0 if rows.affinity is None else len(rows.keys_UK))
        self._keeps = rows.num_own * width * self.work.itemsize <= keep_bytes
        self._kept: dict[str, list[tuple[slice, slice, Tensor]]] = {}
        self.sums_N = columns_CP.new_zeros(rows.num_own, dtype=self.work)
        """E_i."""
        self.moments_N = torch.zeros_like(self.sums_N) if moments else None
        """Mean of s_ij under exp(s_ij) / E_i."""
        for part, _, exponentials in self._tiles("similarity", self._exponentials, len(columns_CP)):
            self.sums_N[part] += exponentials.sum(dim=1)
            if self.moments_N is not None:
                # s = log exp(s), and 0 where exp(s) was set to 0.
                self.moments_N[part] += torch.xlogy(exponentials, exponentials).sum(dim=1)
        if self.moments_N is not None:
            self.moments_N /= self.sums_N.clamp_min(torch.finfo(self.work).tiny)
        self._self_affinity_N = columns_CP.new_ones(rows.num_own)
        ones_C = columns_CP.new_ones(len(columns_CP))
        self.pulls_NP, self.weights_N = self._pulled(columns_CP, ones_C)
        """Sum over j of w_ij z_j, and S_i."""

    def loss(self) -> Tensor:
        """Sum over this rank's anchors of L_i, scalar."""
        return (torch.log(self._divisors(self.sums_N)) - self.attractions()) @ self.anchors()

    def attractions(self) -> Tensor:
        """Weighted mean over an anchor's positives of s_ip, (N,)."""
        products_N = (self.rows.own_NP * self.pulls_NP).sum(dim=1) * self.scale
        return (products_N / self._divisors(self.weights_N)).to(self.work)

    def anchors(self) -> Tensor:
        """1 where a row has a positive, else 0, (N,)."""
        return (self.weights_N > 0).to(self.work)

    def reciprocals(self) -> Tensor:
        """a_i/E_i and a_i/S_i, (N, 2), float64: what the other ranks must know of this rank's anchors."""
        sums = torch.stack([self._divisors(self.sums_N), self._divisors(self.weights_N)], dim=1)
        return self.anchors().double()[:, None] / sums.double()

    def slopes(self) -> Tensor:
        """Derivative of a_i L_i by the logarithm of the scale, (N,); needs ``moments``."""
        return (self.moments_N - self.attractions()) * self.anchors()

    def gradient(self, reciprocals_R2: Tensor) -> Tensor:
        """A dL/dz_i of this rank's rows, (N, P).

        Args:
            reciprocals_R2: ``reciprocals`` of all rows of this step, in the order of the columns.
        """
        rows, columns_CP = self.rows, self.rows.columns_CP
        inverse_C = columns_CP.new_zeros(len(columns_CP), dtype=self.work)
        inverse_C[: rows.num_rows] = reciprocals_R2[:, 0]
        inverse_N = inverse_C[rows.start : rows.start + rows.num_own]
        gradient_NP = torch.zeros_like(rows.own_NP)
        for part, columns, exponentials in self._tiles(
            "similarity", self._exponentials, len(columns_CP)
        ):
            factors = inverse_N[part, None] + inverse_C[columns]
            gradient_NP[part].addmm_(
                factors.mul_(exponentials).to(columns_CP.dtype), columns_CP[columns]
            )
        shares_C = columns_CP.new_zeros(len(columns_CP))
        shares_C[: rows.num_rows] = reciprocals_R2[:, 1]
        gradient_NP.addcmul_(
            self.pulls_NP, shares_C[rows.start : rows.start + rows.num_own, None], value=-1
        )
        gradient_NP -= self._pulled(columns_CP, shares_C)[0]
        return gradient_NP * self.scale

    def _pulled(self, columns_CP: Tensor, factors_C: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over an own row's candidates of w_ij f_j z_j, (N, P), and of w_ij f_j, (N,).

        Rows of one key are summed first, so the affinity is computed between different keys only. A
        row's own key is taken apart: there the row itself is left out by subtraction, which is
        exact where it stands alone.
        """
        rows, K = self.rows, len(self.rows.groups_K)
        factors_K1 = factors_C[:K, None]
        scaled_KQ = torch.cat([columns_CP[:K] * factors_K1, factors_K1], dim=1)
        sums_UQ = _grouped_sums(scaled_KQ, rows.groups_K, groups=len(rows.keys_UK))
        own_NQ = sums_UQ[rows.own_groups_N] - scaled_KQ[rows.start : rows.start + rows.num_own]
        within_X = rows.hidden_columns_X < K
        hidden_rows_X = rows.hidden_rows_X[within_X]
        if len(hidden_rows_X):
            hidden_XQ = scaled_KQ[rows.hidden_columns_X[within_X]]
            own_NQ -= _grouped_sums(hidden_XQ, hidden_rows_X, groups=rows.num_own)
            # Where the key has no other post, what subtraction left would outweigh an affinity of
            # e^-40 to the rest.
            ones_K1, ones_X1 = (
                torch.ones_like(at[:, None]) for at in (rows.groups_K, hidden_rows_X)
            )
            alike_N1 = _grouped_sums(ones_K1, rows.groups_K, groups=len(rows.keys_UK))[
                rows.own_groups_N
            ]
            hidden_N1 = _grouped_sums(ones_X1, hidden_rows_X, groups=rows.num_own)
            own_NQ = torch.where(alike_N1 - hidden_N1 > 1, own_NQ, 0.0)
        if rows.affinity is not None:
            others_NQ = torch.zeros_like(own_NQ)
            for part, groups, weights in self._tiles("affinity", self._affinities, len(sums_UQ)):
                others_NQ[part].addmm_(weights, sums_UQ[groups])
            own_NQ = own_NQ * self._self_affinity_N[:, None] + others_NQ
        return own_NQ[:, :-1], own_NQ[:, -1]

    def _tiles(
        self, what: str, make: Callable[[slice, slice], Tensor], width: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """(own rows, columns, tile) over all own rows and ``width`` columns: kept ones, or made now."""
        if what in self._kept:
            yield from self._kept[what]
            return
        kept = []
        for part, columns in _cuts(
            self.rows.num_own, width, self.work.itemsize, self.rows.columns_CP.device.type
        ):
            tile = (part, columns, make(part, columns))
            if self._keeps:
                kept.append(tile)
            yield tile
        if self._keeps:
            self._kept[what] = kept

    def _exponentials(self, part: slice, columns: slice) -> Tensor:
        """exp(s), 0 for the row itself and for other rows of its post."""
        own = self.rows.own_NP[part] * self.scale
        tile = (own @ self.rows.columns_CP[columns].T).to(self.work).exp_()
        offset = self.rows.start + part.start - columns.start
        if -tile.shape[0] < offset < tile.shape[1]:
            tile.diagonal(offset).zero_()
        hidden = self.rows.hidden_rows_X, self.rows.hidden_columns_X
        return _without(hidden, tile, part, columns)

    def _affinities(self, part: slice, groups: slice) -> Tensor:
        """w between own rows and other keys, 0 for the own key; its w is set aside: 1, or 0 where nothing is alike."""
        own_groups = self.rows.own_groups_N[part]
        tile = self.rows.affinity(self.rows.keys_UK[own_groups], self.rows.keys_UK[groups])
        here = ((own_groups >= groups.start) & (own_groups < groups.stop)).nonzero()[:, 0]
        at = (here, own_groups[here] - groups.start)
        self._self_affinity_N[part.start + here] = tile[at]
        tile[at] = 0
        return tile.to(self.rows.columns_CP.dtype)

    def _divisors(self, values_N: Tensor) -> Tensor:
        # 1 where there is no positive: nothing counts there, and 0 would make it NaN.
        return torch.where(self.weights_N > 0, values_N, torch.ones_like(values_N))


class ClosedForm(torch.autograd.Function):
    """A finished ``AnchorSums`` as a node of the graph: its value, and the gradient of the loss over all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        own_NP: Tensor,
        scale: Tensor,
        sums: AnchorSums,
        reciprocals_R2: Tensor,
        factor: Tensor,
    ) -> Tensor:
        """``factor`` times the sum of L_i over this rank's anchors, scalar.

        Args:
            ctx: of autograd.
            own_NP: this rank's rows, of which ``sums`` has the values.
            scale: the same of the scale, scalar.
            sums: of these rows.
            reciprocals_R2: ``AnchorSums.reciprocals`` of the rows of all ranks.
            factor: multiplies value and gradient; so the gradient of this rank's rows is that of
                ``factor`` times the sum over the anchors of ALL ranks, the gradient of the scale
                that of this rank's anchors.
        """
        ctx.sums, ctx.reciprocals_R2, ctx.factor = sums, reciprocals_R2, factor
        return (factor * sums.loss()).to(own_NP.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """No collective: what other ranks know came with the forward pass."""
        sums, factor = ctx.sums, gradient * ctx.factor
        own = sums.gradient(ctx.reciprocals_R2) * factor if ctx.needs_input_grad[0] else None
        if sums.moments_N is None or not ctx.needs_input_grad[1]:
            return own, None, None, None, None
        return own, factor * sums.slopes().sum() / sums.scale, None, None, None


@dataclass(frozen=True, slots=True)
class OtherAnchors:
    """O anchors of other tasks, of all ranks, which have this rank's rows of one task as negatives."""

    rows_OP: Tensor
    """Unit-length rows, without gradient."""
    scales_O: Tensor
    """Inverse temperature of each one's task, float64."""
    factors_O: Tensor
    """Of each its task's factor in the total times a_j/E_j, float64; 0 for a row that is no anchor."""
    hidden_rows_X: Tensor
    """Own row of each (own row, anchor) pair of one post."""
    hidden_columns_X: Tensor
    """Anchor of each such pair."""

    def gradient(self, own_NP: Tensor) -> Tensor:
        """Sum over j of factor_j scale_j exp(scale_j z_i z_j) z_j, (N, P)."""
        rows_OP, gradient_NP = self.rows_OP, torch.zeros_like(own_NP)
        factors_O = self.factors_O * self.scales_O
        # In float64 throughout: at a scale of 100 exp(s) leaves the range of float32.
        size = torch.float64.itemsize
        for part, columns in _cuts(len(own_NP), len(rows_OP), size, own_NP.device.type):
            tile = (own_NP[part] @ rows_OP[columns].T).double().mul_(self.scales_O[columns]).exp_()
            hidden = self.hidden_rows_X, self.hidden_columns_X
            weights = _without(hidden, tile, part, columns).mul_(factors_O[columns])
            gradient_NP[part].addmm_(weights.to(own_NP.dtype), rows_OP[columns])
        return gradient_NP


class Repulsion(torch.autograd.Function):
    """0, with the gradient that the anchors of other tasks give to this rank's rows of one task."""

    @staticmethod
    def forward(ctx: Any, own_NP: Tensor, others: OtherAnchors) -> Tensor:
        """Scalar; ``others`` see the values of ``own_NP``."""
        ctx.save_for_backward(own_NP)
        ctx.others = others
        return own_NP.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """No collective, as in ``ClosedForm``."""
        (own_NP,) = ctx.saved_tensors
        return gradient * ctx.others.gradient(own_NP), None


def hidden_pairs(own_N: Tensor, others_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Every (own row, other row) of the same post: two lists of indices, int64, ordered by own row."""
    order_Q = others_Q.argsort(stable=True)
    sorted_Q = others_Q[order_Q]
    first_N = torch.searchsorted(sorted_Q, own_N)
    counts_N = torch.searchsorted(sorted_Q, own_N, right=True) - first_N
    rows_X = torch.arange(len(own_N), device=own_N.device).repeat_interleave(counts_N)
    nth_X = torch.arange(len(rows_X), device=own_N.device) - (counts_N.cumsum(0) - counts_N)[rows_X]
    return rows_X, order_Q[first_N[rows_X] + nth_X]


def _without(pairs: tuple[Tensor, Tensor], tile: Tensor, part: slice, columns: slice) -> Tensor:
    """The tile of these rows and columns, in place, with 0 at the pairs (rows, columns) in it."""
    rows_X, columns_X = pairs
    if len(rows_X):
        here = (rows_X >= part.start) & (rows_X < part.stop)
        here &= (columns_X >= columns.start) & (columns_X < columns.stop)
        tile[rows_X[here] - part.start, columns_X[here] - columns.start] = 0
    return tile


def _grouped_sums(values_NQ: Tensor, groups_N: Tensor, *, groups: int) -> Tensor:
    # index_put_ with accumulate sorts first on a GPU: unlike index_add_ it sums in the same order
    # on every run.
    return values_NQ.new_zeros(groups, values_NQ.shape[1]).index_put_(
        (groups_N,), values_NQ, accumulate=True
    )


def _cuts(height: int, width: int, itemsize: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Tiles of a matrix, nearly square, as long as there is something to cut."""
    elements = TILE_BYTES.get(device, TILE_BYTES_ELSEWHERE) // itemsize
    side = math.isqrt(elements)
    tall = min(height, max(side, elements // max(width, 1)))
    wide = max(1, elements // max(tall, 1))
    for row in range(0, height, max(tall, 1)):
        for column in range(0, width, wide):
            yield slice(row, min(row + tall, height)), slice(column, min(column + wide, width))
