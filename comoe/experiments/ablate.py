"""Ablation of experts: held-out quality of a trained model without one expert of one layer.

A removed expert is never selected: its tokens go to the next best expert, and the weights are
normalized over the remaining ones. The drop in quality is therefore what the other experts cannot
compensate for, not the effect of zeros in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comoe.config.files import read_json
from comoe.evaluation.evaluate import mean_metric
from comoe.evaluation.experts_off import CONDITIONS, IN_TURN, OFF
from comoe.experiments.finished_run import load_trained
from comoe.inference.score import score_split
from comoe.models.moe.block import GatedBlock
from comoe.models.moe.gate import TopKGate, restricted, select_experts
from comoe.types import Routing

REMOVED_LOGIT = -1e30
"""Finite, so that a softmax over a single removed expert is not NaN."""


@dataclass(frozen=True, slots=True)
class GateWithout:
    """The trained gate, as if one expert did not exist."""

    gate: TopKGate
    expert: int

    def __call__(
        self,
        logits_SE: Tensor,
        balance_bias_E: Tensor,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> Routing:
        """Route S tokens to the other experts; where all that a token sees run, the removed one has weight 0."""
        gate = self.gate
        removed_E = torch.arange(logits_SE.shape[1], device=logits_SE.device) == self.expert
        # Masked before the softmax, which then gives its share to the others; then its own score.
        logits_left_SE = logits_SE.masked_fill(removed_E, REMOVED_LOGIT)
        scores_SE = gate.score(logits_left_SE / gate.temperature).masked_fill(removed_E, 0.0)
        bias_E = balance_bias_E.masked_fill(removed_E, -torch.inf)
        return select_experts(
            logits_SE,
            *restricted(scores_SE, bias_E, own_SE),
            gate.top_k,
            gate.cooperation_threshold,
            selected_Sk,
            scale=gate.scale,
        )

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """The trained gate's."""
        return self.gate.z_penalty(logits_SE)


@dataclass(frozen=True, slots=True)
class Removal:
    """Quality with all experts, and without each one."""

    layers: tuple[int, ...]
    """Layers with experts: the encoder's, then the decoder's."""
    posts: int
    whole: Mapping[str, float]
    """With all experts: ``mean`` (of the main metrics, larger is better) and ``loss`` (mean over
    tasks)."""
    drop_LE: np.ndarray
    """Drop of the mean metric without expert e of layer l; positive: the expert is needed."""
    loss_rise_LE: np.ndarray
    """Rise of the mean loss, which resolves smaller effects than a metric of predicted labels."""
    limit: int | None
    """Maximum of posts per data set."""
    conditions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Key of ``CONDITIONS`` -> ``drop`` of the mean metric and ``loss_rise``, of all layers at
    once; empty in files of earlier versions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        arrays = {"drop": self.drop_LE, "loss_rise": self.loss_rise_LE}
        return {
            "layers": list(self.layers), "posts": self.posts, "whole": dict(self.whole),
            **{name: np.round(array_LE, 6).tolist() for name, array_LE in arrays.items()}, "limit": self.limit,
            "conditions": {name: dict(values) for name, values in self.conditions.items()},
        }  # fmt: skip


def measure_removal(
    run_folder: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    device: str = "auto",
    progress: bool = True,
    verify: bool = True,
) -> Removal:
    """Score the export of a finished run on its own posts, with all experts and without each one.

    Args:
        run_folder: holds ``config.yaml`` and ``export/``.
        split: validation or test.
        limit: maximum of posts per data set; None uses all posts of the recipe.
        device: a torch device; auto is the first GPU, or the CPU.
        progress: show a progress bar.
        verify: compare the digests of the export's files.

    Raises:
        ValueError: no finished run there, no experts in it, or no labeled post in the split.
    """
    predictor, tokens = load_trained(
        run_folder, split=split, limit=limit, device=device, verify=verify
    )
    blocks = predictor.exported.model.moe_layers()
    if not blocks:
        raise ValueError(f"{run_folder} was trained without experts: there is nothing to remove.")
    experts, tasks = predictor.exported.model_config.moe.num_experts, predictor.tasks
    passes = 1 + len(CONDITIONS) + len(blocks) * experts
    with tqdm(total=passes, unit="pass", disable=not progress, dynamic_ncols=True) as bar:

        def score() -> tuple[float, float]:
            """Mean metric and mean loss of the model as it is now."""
            metrics = score_split(predictor, tokens).metrics
            bar.update(1)
            losses = [metrics[task.name]["loss"] for task in tasks if task.name in metrics]
            return mean_metric(metrics, tasks), float(np.mean(losses))

        whole = score()
        conditions = {}
        for name, condition in CONDITIONS.items():
            with condition(predictor.exported.model):
                mean, loss = score()
            conditions[name] = {"drop": whole[0] - mean, "loss_rise": loss - whole[1]}
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
        conditions=conditions,
    )


@contextmanager
def removed(block: GatedBlock, expert: int) -> Iterator[None]:
    """Within the context the block routes as if it had no such expert."""
    route = block.pending
    before = route.gate
    route.gate = GateWithout(before, expert)
    try:
        yield
    finally:
        route.gate = before


def removal_lines(removal: Removal) -> list[str]:
    """The printed table: drop of the mean metric, and rise of the loss in brackets, per layer and expert."""
    whole = removal.whole
    lines = [
        f"{removal.posts} posts; with all experts: mean metric {whole['mean']:.4f}, loss {whole['loss']:.4f}",
        "drop of the mean metric without one expert (rise of the loss); below 0 the expert does harm.",
        "A few changed predictions are noise: the loss is more sensitive; more seeds are decisive.",
    ]
    for name, label in ((OFF, "all experts off"), (IN_TURN, "experts in turn instead of routed")):
        if name in removal.conditions:
            values = removal.conditions[name]
            lines.append(f"{label}: {values['drop']:+.4f} ({values['loss_rise']:+.4f})")
    layers = zip(removal.layers, removal.drop_LE, removal.loss_rise_LE, strict=True)
    for layer, drops, rises in layers:
        pairs = enumerate(zip(drops, rises, strict=True))
        cells = [f"{expert:3d}: {drop:+.4f} ({rise:+.4f})" for expert, (drop, rise) in pairs]
        lines += [
            f"layer {layer:2d}  " + "  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)
        ]
    return lines


def read_removal(file: Path) -> Removal:
    """Read what ``Removal.to_dict`` gives."""
    read = read_json(file)
    drop_LE, loss_rise_LE = np.array(read["drop"]), np.array(read["loss_rise"])
    return Removal(
        tuple(read["layers"]), read["posts"], read["whole"], drop_LE, loss_rise_LE, read["limit"],
        read.get("conditions", {}),
    )  # fmt: skip
