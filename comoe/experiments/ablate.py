"""What each expert is worth: the held-out quality of a trained model with one expert of one layer taken away.

An expert that was taken away is not picked; its tokens go to the next best one and the weights are
normalised over those that are left. So the loss of quality is what the other experts cannot make
good, not what a hole of zeros does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comoe.data.tokens.split import TokenizedSplit
from comoe.evaluation.evaluate import Evaluation, mean_metric
from comoe.experiments.finished_run import load_trained
from comoe.inference.predictor import Predictor
from comoe.inference.score import score_split
from comoe.models.moe.block import CooperativeBlock
from comoe.models.moe.gate import TopKGate, select_experts
from comoe.types import Routing

NOWHERE = -1e30
"""Logit of an expert that is not there; finite, so that a softmax over it alone is a number."""


@dataclass(frozen=True, slots=True)
class GateWithout:
    """A gate that does as if one expert did not exist."""

    gate: TopKGate
    """The trained one's rule."""
    expert: int
    """Who is missing."""

    def __call__(
        self, logits_SE: Tensor, balance_bias_E: Tensor, selected_Sk: Tensor | None = None
    ) -> Routing:
        """Route S tokens over the others; where all experts run, the missing one runs with the weight 0."""
        gate = self.gate
        gone_E = torch.arange(logits_SE.shape[1], device=logits_SE.device) == self.expert
        # Out of the scores of the others too, which under softmax share what it had; then out of
        # its own.
        left_SE = logits_SE.float().masked_fill(gone_E, NOWHERE)
        scores_SE = gate.score(left_SE / gate.temperature).masked_fill(gone_E, 0.0)
        bias_E = balance_bias_E.masked_fill(gone_E, -torch.inf)
        return select_experts(
            logits_SE, scores_SE, bias_E, gate.top_k, gate.cooperation_threshold, selected_Sk
        )

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """The trained gate's."""
        return self.gate.z_penalty(logits_SE)


@dataclass(frozen=True, slots=True)
class Removal:
    """Quality with all experts, and without each one."""

    layers: tuple[int, ...]
    """Layers with experts, a decoder's behind the encoder's."""
    posts: int
    """Posts scored."""
    whole: Mapping[str, float]
    """With all experts: ``mean`` (of the main metrics, larger is better) and ``loss`` (mean over
    tasks)."""
    drop_LE: np.ndarray
    """Fall of the mean metric without expert e of layer l; positive: the expert is needed."""
    loss_rise_LE: np.ndarray
    """Rise of the mean loss, which tells small effects apart that a metric of decided labels
    cannot."""
    limit: int | None
    """At most so many posts per data set were taken."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "layers": list(self.layers), "posts": self.posts, "whole": dict(self.whole),
            "drop": np.round(self.drop_LE, 6).tolist(), "loss_rise": np.round(self.loss_rise_LE, 6).tolist(),
            "limit": self.limit,
        }  # fmt: skip


def measure_removal(
    run_folder: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Removal:
    """Score the export of a finished run on its own posts, with all experts and without each one.

    Args:
        run_folder: as training left it: ``config.yaml`` and ``export/``.
        split: validation or test.
        limit: at most this many posts per data set; None is all that the recipe has.
        device: a torch device; auto is the first GPU, or the CPU.
        progress: show a progress bar.

    Raises:
        ValueError: no finished run there, no experts in it, no labelled post in the split, or a
            limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit of posts per data set is {limit}; it must be at least 1.")
    predictor, tokens = load_trained(run_folder, split=split, limit=limit, device=device)
    blocks = predictor.exported.model.moe_layers()
    if not blocks:
        raise ValueError(
            f"{run_folder} was trained without experts (model.moe.num_experts is 0): nothing to remove."
        )
    experts = predictor.exported.model_config.moe.num_experts
    with tqdm(
        total=1 + len(blocks) * experts, unit="pass", disable=not progress, dynamic_ncols=True
    ) as bar:
        score = _scorer(predictor, tokens, bar.update)
        whole = score()
        without = np.empty((len(blocks), experts, 2))
        for layer, block in enumerate(blocks):
            for expert in range(experts):
                with removed(block, expert):
                    without[layer, expert] = score()
    return Removal(
        layers=tuple(block.layer for block in blocks),
        posts=len(tokens),
        whole={"mean": whole[0], "loss": whole[1]},
        drop_LE=whole[0] - without[..., 0],
        loss_rise_LE=without[..., 1] - whole[1],
        limit=limit,
    )


@contextmanager
def removed(block: CooperativeBlock, expert: int) -> Iterator[None]:
    """Inside, the block routes as if it had no such expert."""
    router = block.mixture.router
    before = router.gate
    router.gate = GateWithout(before, expert)
    try:
        yield
    finally:
        router.gate = before


def removal_lines(removal: Removal) -> list[str]:
    """The table for people: fall of the mean metric, and rise of the loss in brackets, per layer and expert."""
    whole = removal.whole
    lines = [
        f"{removal.posts} posts; with all experts: mean metric {whole['mean']:.4f}, loss {whole['loss']:.4f}"
    ]
    lines.append(
        "without one expert, the mean metric falls by (and the loss rises by); below 0 it did harm."
    )
    lines.append(
        "A few posts decided otherwise are noise: the loss tells more, and other seeds tell most."
    )
    for layer, drops, rises in zip(
        removal.layers, removal.drop_LE, removal.loss_rise_LE, strict=True
    ):
        pairs = enumerate(zip(drops, rises, strict=True))
        cells = [f"{expert:3d}: {drop:+.4f} ({rise:+.4f})" for expert, (drop, rise) in pairs]
        lines += [
            f"layer {layer:2d}  " + "  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)
        ]
    return lines


def _scorer(
    predictor: Predictor, tokens: TokenizedSplit, done: Callable[[int], object]
) -> Callable[[], tuple[float, float]]:
    """Scores the model as it is now: (mean metric, mean loss)."""
    tasks = predictor.tasks

    def score() -> tuple[float, float]:
        evaluation = score_split(predictor, tokens)
        done(1)
        return mean_metric(evaluation.metrics, tasks), _mean_loss(
            evaluation, [task.name for task in tasks]
        )

    return score


def _mean_loss(evaluation: Evaluation, names: Sequence[str]) -> float:
    return float(
        np.mean([evaluation.metrics[name]["loss"] for name in names if name in evaluation.metrics])
    )


def read_removal(file: Path) -> Removal:
    """What ``Removal.to_dict`` was written as."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return Removal(
        tuple(found["layers"]),
        found["posts"],
        found["whole"],
        np.array(found["drop"]),
        np.array(found["loss_rise"]),
        found["limit"],
    )
