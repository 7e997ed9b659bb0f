"""What the gates did since the last look: counts of real tokens per layer, task and expert, and the measures on them.

Shares say where routes went; the measures say whether experts are used, specialize and work
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comoe.types import ModelOutput

HISTOGRAM_BINS = 20
"""Equal bins of the scores between 0 and 1."""


COOPERATING_SCORE = 0.5
"""A selected expert above this score counts as working on the token (cooperation degree)."""


@dataclass(frozen=True, slots=True)
class RoutingSummary:
    """Measures of one window, on the CPU. NaN where no token was seen. Entropy and information are in nats."""

    tasks: tuple[str, ...]
    """Names along T."""
    layers: tuple[int, ...]
    """Layer numbers along the layer axis, the decoder's behind the encoder's."""
    share_LE: np.ndarray
    """Share of a layer's routes that each expert got; rows sum to 1."""
    share_LTE: np.ndarray
    """The same among the tokens of one task."""
    weight_LE: np.ndarray
    """Share of a layer's gate weight that each expert got; rows sum to 1. It shows a monopoly
    where ``share_LE`` cannot: at k = E every expert gets the same number of routes."""
    weight_LTE: np.ndarray
    """The same among the tokens of one task."""
    by_layer: Mapping[str, np.ndarray]
    """Measure -> (layers,): those of ``share_measures``, cooperation, task_information = I(task;
    expert) of the routes, and of the gate weights weight_monopoly, weight_effective_experts and
    weight_task_information; update_ratio (rms norm of the block's update over that of the state
    that it read), gate_entropy (mean entropy of a token's normalized scores over ln E, 1 when the
    gate prefers no expert) and weight_spread (standard deviation of the selected weights over their
    mean)."""
    by_task: Mapping[str, np.ndarray]
    """Measure -> (layers, T): the same without the two informations."""
    histogram_LH: np.ndarray
    """Number of scores in each of the equal bins between 0 and 1."""
    tokens: int
    """Real tokens that a layer saw."""
    first_decoder_layer: int | None = None
    """Number of the first layer that is the decoder's; None without a decoder."""

    @property
    def layer_names(self) -> list[str]:
        """The layers as in titles: ``3``, ``0 of the decoder``."""
        first = math.inf if self.first_decoder_layer is None else self.first_decoder_layer
        return [
            str(layer) if layer < first else f"{layer - first} of the decoder"
            for layer in self.layers
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain nested lists and numbers for one line of ``metrics.jsonl``; what is not finite becomes None."""
        return {
            "layers": list(self.layers),
            "tokens": self.tokens,
            **{name: _plain(values) for name, values in self.by_layer.items()},
            "share": _plain(self.share_LE),
            "weight_share": _plain(self.weight_LE),
            "tasks": {
                task: {name: _plain(values[:, index]) for name, values in self.by_task.items()}
                | {
                    "share": _plain(self.share_LTE[:, index]),
                    "weight_share": _plain(self.weight_LTE[:, index]),
                }
                for index, task in enumerate(self.tasks)
            },
        }


class RoutingStats:
    """Sums over steps, per layer and per task, of what the gates did with real tokens.

    A token counts once for each task that its row has a label for, and once in the layer's own
    totals; the tokens of a row without any label (a filler row) are left out. ``update`` never
    waits for the device. Sums are float64, so that adding the ranks' tensors is exact for counts.

    Args:
        tasks: names of the tasks, in the model's order.
        num_layers: layers with experts.
        num_experts: experts per layer.
        layers: numbers of those layers, for titles; counted from 0 if not given.
        first_decoder_layer: number of the first layer that is a decoder's.
        device: where the sums live.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        num_layers: int,
        num_experts: int,
        layers: Sequence[int] | None = None,
        first_decoder_layer: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tasks = tuple(tasks)
        self.layers = tuple(layers) if layers is not None else tuple(range(num_layers))
        assert len(self.layers) == num_layers, (self.layers, num_layers)
        self.first_decoder_layer = first_decoder_layer
        # A model without experts has no layers either: an empty table.
        self.num_experts = max(num_experts, 1)
        # Row T of the task axis holds every labeled token once: with several labels per post the
        # tasks' rows overlap. Last axis: selections and sum of weights per expert; entropy of
        # scores, squared weights, squared norms of update and state; selected experts
        # above 0.5, tokens.
        shape = (num_layers, len(self.tasks) + 1, 2 * self.num_experts + 6)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._histogram_LH = torch.zeros(
            (num_layers, HISTOGRAM_BINS), dtype=torch.float64, device=device
        )

    @torch.no_grad()
    def update(self, output: ModelOutput, labelled_BT: Tensor) -> None:
        """Add one micro-step.

        Args:
            output: the model's output with one routing per layer and, of each layer, the rows of
                its tokens.
            labelled_BT: bool, True where the row has a label of the task (with ``route_by: task``
                one per row).
        """
        if not self.layers:
            return
        counted_BT = torch.cat([labelled_BT, labelled_BT.any(dim=1, keepdim=True)], dim=1)
        counted_BT = counted_BT.to(self._sums.device, torch.float64)
        for layer, (routing, rows_S) in enumerate(
            zip(output.routings, output.layer_rows, strict=True)
        ):
            counted_ST = counted_BT[rows_S]
            scores_SE = routing.scores_SE.to(torch.float64)
            selected_SE = torch.zeros_like(scores_SE).scatter_(1, routing.indices_Sk, 1.0)
            weights_SE = torch.zeros_like(scores_SE).scatter_(
                1, routing.indices_Sk, routing.weights_Sk.double()
            )
            strong_S1 = (selected_SE * (scores_SE > COOPERATING_SCORE)).sum(dim=1, keepdim=True)
            shares_SE = scores_SE / scores_SE.sum(dim=1, keepdim=True).clamp_min(1e-300)
            parts = [
                *(selected_SE, weights_SE),
                torch.special.entr(shares_SE).sum(dim=1, keepdim=True),
                weights_SE.square().sum(dim=1, keepdim=True),
                routing.energies_S2.double(),
                *(strong_S1, torch.ones_like(strong_S1)),
            ]
            facts = torch.cat(parts, dim=1)
            self._sums[layer] += counted_ST.T @ facts
            # index_add_ instead of bincount: on a GPU bincount waits for the device to learn its
            # own length.
            bins_SE = (scores_SE * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
            counted_SE = counted_ST[:, -1:].expand_as(scores_SE)
            self._histogram_LH[layer].index_add_(0, bins_SE.flatten(), counted_SE.flatten())

    def reset(self) -> None:
        """Start a new window."""
        self._sums.zero_()
        self._histogram_LH.zero_()

    def as_tensor(self) -> Tensor:
        """All sums as one flat float64 tensor (a copy), to be added over ranks."""
        return torch.cat([self._sums.flatten(), self._histogram_LH.flatten()])

    def load(self, sums: Tensor) -> None:
        """Take over sums made by ``as_tensor``, for example after an all-reduce."""
        split = self._sums.numel()
        self._sums.copy_(sums[:split].view_as(self._sums))
        self._histogram_LH.copy_(sums[split:].view_as(self._histogram_LH))

    def summary(self) -> RoutingSummary:
        """The measures of this window; copies the sums to the CPU."""
        sums = self._sums.cpu().numpy()
        experts = self.num_experts
        counts, weights = sums[..., :experts], sums[..., experts : 2 * experts]
        entropies, squares, updates, states, strong, tokens = np.moveaxis(
            sums[..., 2 * experts :], -1, 0
        )
        share = _ratio(counts, counts.sum(axis=-1, keepdims=True))
        weight_share = _ratio(weights, weights.sum(axis=-1, keepdims=True))
        by_weight = share_measures(weight_share)
        measures = share_measures(share) | {"cooperation": _ratio(strong, tokens)}
        measures |= {
            f"weight_{name}": by_weight[name] for name in ("monopoly", "effective_experts")
        }
        selections = counts.sum(axis=-1)
        mean_weight = _ratio(weights.sum(axis=-1), selections)
        mean_square = _ratio(squares, selections)
        spread = np.sqrt(np.maximum(mean_square - mean_weight**2, 0.0))
        measures |= {
            "update_ratio": np.sqrt(_ratio(updates, states)),
            "gate_entropy": _ratio(entropies, tokens * math.log(max(experts, 2))),
            "weight_spread": _ratio(spread, mean_weight),
        }
        by_layer = {name: values[:, -1] for name, values in measures.items()}
        by_layer["task_information"] = mutual_information(counts[:, :-1])
        by_layer["weight_task_information"] = mutual_information(weights[:, :-1])
        return RoutingSummary(
            tasks=self.tasks,
            layers=self.layers,
            share_LE=share[:, -1],
            share_LTE=share[:, :-1],
            weight_LE=weight_share[:, -1],
            weight_LTE=weight_share[:, :-1],
            by_layer=by_layer,
            by_task={name: values[:, :-1] for name, values in measures.items()},
            histogram_LH=self._histogram_LH.cpu().numpy(),
            tokens=int(tokens[0, -1]) if self.layers else 0,
            first_decoder_layer=self.first_decoder_layer,
        )


def share_measures(share: np.ndarray) -> dict[str, np.ndarray]:
    """How evenly routes spread over experts.

    Args:
        share: shares along the last axis (E), which sum to 1; NaN where nothing was routed.

    Returns:
        Measure -> array without the last axis: max_violation = max / mean - 1 (0 when even, at most
            E - 1), entropy in
        nats (at most ln E), effective_experts = exp(entropy) (1 to E), dead_share (share of experts
            without any route),
        monopoly (largest share).

    Source: MaxVio is from Wang et al. 2024, arXiv:2408.15664.
    """
    monopoly = share.max(axis=-1)
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(
        axis=-1
    )
    entropy = np.where(np.isnan(monopoly), np.nan, np.abs(entropy))
    return {
        "max_violation": monopoly * share.shape[-1] - 1.0,
        "entropy": entropy,
        "effective_experts": np.exp(entropy),
        "dead_share": np.where(np.isnan(monopoly), np.nan, (share == 0).mean(axis=-1)),
        "monopoly": monopoly,
    }


def mutual_information(counts_LTE: np.ndarray) -> np.ndarray:
    """I(task; expert) of the routes of each layer: how much the expert reveals about the task; 0
    when every task uses the experts alike, at most min(ln T, ln E).

    Args:
        counts_LTE: routes (or gate weight) per layer, task and expert.

    Returns:
        (layers,) in nats, float64; NaN for a layer without routes.
    """
    joint = _ratio(counts_LTE, counts_LTE.sum(axis=(-2, -1), keepdims=True))
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    used = joint > 0
    terms = np.where(
        used, joint * np.log(np.where(used, joint, 1.0) / np.where(used, independent, 1.0)), 0.0
    )
    total = np.maximum(terms.sum(axis=(-2, -1)), 0.0)
    return np.where(np.isnan(joint).any(axis=(-2, -1)), np.nan, total)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _plain(values: np.ndarray) -> object:
    """Nested lists, rounded to six digits: a log line is read by people too."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [round(float(value), 6) if math.isfinite(value) else None for value in values]
