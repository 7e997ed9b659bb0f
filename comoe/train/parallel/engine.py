"""One optimizer step over several micro-batches, and forwards without gradient: what the trainer sees of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comoe.config.recipe import Recipe
from comoe.distributed import sum_over_ranks
from comoe.losses.contrastive.gradcache import Cached, targets_of
from comoe.losses.weighting.gradient_surgery import gram_over_ranks
from comoe.models.moe.gate import BALANCES, balanced_together
from comoe.train.parallel.average import OuterWeights, WeightAverage, WeightsBeside
from comoe.train.parallel.setup import gather_full_state
from comoe.types import Batch, ModelOutput, StepOutput


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    loss: Tensor
    """This rank's mean over micro-steps, scalar; the mean over ranks is the global loss."""
    terms: Mapping[str, Tensor]
    """The same for each term."""
    outputs: Sequence[StepOutput]
    """One per micro-step, detached from the graph by backward."""
    grad_norm: float | None
    """Global norm before clipping; None where DeepSpeed does not compute it."""
    skipped: bool
    """True when a loss or gradient was not finite on any rank: no weight was changed."""


class Engine:
    """Wraps the DeepSpeed engine; owns learning rates and the balance bias."""

    def __init__(self, deepspeed_engine: Any, recipe: Recipe) -> None:
        self.deepspeed = deepspeed_engine
        self.recipe = recipe
        self.device = deepspeed_engine.device
        groups = deepspeed_engine.optimizer.param_groups
        # Stage 3 overwrites these with the first group's when it loads, and a checkpoint of an
        # earlier version has another implementation of Adam; see ``restore_groups``.
        self._group_settings = [
            {key: group[key] for key in ("lr", "weight_decay", "name", "fused", "foreach")}
            for group in groups
        ]
        self._roles = [group["role"] for group in groups]
        self._rate_factor = 1.0
        decay = recipe.train.average_weights
        self.average = WeightAverage(deepspeed_engine, decay) if decay else None
        self.outer = OuterWeights(deepspeed_engine) if recipe.train.reptile_steps else None

    @property
    def objective(self) -> Any:
        """The wrapped module; its experts are this rank's share."""
        return self.deepspeed.module

    @property
    def beside(self) -> WeightsBeside | None:
        """What evaluations and exports have in the place of the weights that train: the average, Reptile's, or none."""
        return self.average or self.outer

    def averaged(self) -> AbstractContextManager[None]:
        """The context to evaluate in: the model has the weights ``beside``, where there are any."""
        return nullcontext() if self.beside is None else self.beside.in_place()

    def full_state(self) -> dict[str, Tensor]:
        """``gather_full_state`` of the weights to evaluate and to export."""
        if self.beside is None:
            return gather_full_state(self.deepspeed)
        return self.beside.full_state()

    def set_rate_factor(self, factor: float) -> dict[str, float]:
        """Set every group's rate to its peak times ``factor``; returns role -> its highest rate."""
        self._rate_factor = factor
        rates = {}
        for group, peak, role in zip(
            self.deepspeed.optimizer.param_groups, self._group_settings, self._roles, strict=True
        ):
            group["lr"] = peak["lr"] * factor
            rates[role] = max(rates.get(role, 0.0), group["lr"])
        return rates

    def restore_groups(self) -> None:
        """Undo what loading a checkpoint does to the parameter groups and, at stage 3, to Adam's step counts."""
        inner = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        for group, settings in zip(inner.param_groups, self._group_settings, strict=True):
            group.update(settings)
        for state in inner.state.values():
            if isinstance(state.get("step"), Tensor):
                # One tensor shared by all sub-groups would advance once per sub-group.
                state["step"] = state["step"].clone()

    def train_step(
        self, batches: Sequence[Batch], *, max_grad_norm: float | None = None
    ) -> StepReport:
        """Forward and backward over the micro-batches, then one optimizer step. Every rank, equally many batches.

        Args:
            batches: this rank's micro-batches.
            max_grad_norm: what the gradient's global norm is scaled down to, the same on every rank;
                0 for none. None leaves the last one, at first ``gradient_clipping`` of the JSON.
        """
        self.deepspeed.train()
        if max_grad_norm is not None:
            # All ZeRO optimizers read it in each step. Checkpoints hold it, so a resume with
            # another limit would go on with the old one.
            self.deepspeed.optimizer.clip_grad = max_grad_norm
        self.objective.begin_step()
        outputs: list[StepOutput] = []
        skipped_before = self.deepspeed.skipped_steps
        # ZeRO 1 in bf16 adds the gradients of each backward pass to float32 sums, and would clear
        # them by a hook on what the model returns; on a record it finds no place for one, and a
        # step's first gradients would count once for each of its micro-steps.
        clear = getattr(self.deepspeed.optimizer, "clear_lp_grads", lambda: None)
        gram_TT = self._gram(batches)
        for batch, cached in zip(batches, self._first_pass(batches), strict=True):
            output: StepOutput = self.deepspeed(
                batch.to(self.device), cached=cached, gram_TT=gram_TT
            )
            # A loss that is not finite must not change a weight, wherever the graph swallows it:
            # the poisoned gradient reaches DeepSpeed's own check, which skips the step on all ranks
            # and clears what was summed.
            clear()
            poison = torch.where(torch.isfinite(output.loss.detach()), 1.0, torch.nan)
            self.deepspeed.backward(output.loss * poison)
            self.deepspeed.step()
            # Texts, images and states wait for nothing any more, and the step may have many
            # micro-batches.
            outputs.append(
                replace(output, output=replace(output.output, image_text=None, sharing=None))
            )
        skipped = self.deepspeed.skipped_steps > skipped_before
        if not skipped:
            self._update_balance([output.output for output in outputs])
            self.objective.end_step(outputs, batches)
            if self.average is not None:
                self.average.update(batches[0].step)
        norm = self.deepspeed.get_global_grad_norm()
        return StepReport(
            loss=_mean([output.loss for output in outputs]),
            terms={
                name: _mean([output.terms[name] for output in outputs]) for name in outputs[0].terms
            },
            outputs=outputs,
            grad_norm=None if norm is None else float(norm),
            skipped=skipped,
        )

    def _first_pass(self, batches: Sequence[Batch]) -> Sequence[Cached | None]:
        """GradCache: the contrastive gradients of the whole step; None for each micro-batch where it is off."""
        chunked = self.recipe.loss.contrastive.chunk_size is not None
        if not chunked or not self.objective.compares(batches[0].step):
            return [None] * len(batches)
        # The second pass draws the same dropout: nothing else may draw between its micro-batches.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            passes = [self.deepspeed(batch.to(self.device), mode="embed") for batch in batches]
        return self.objective.contrast(
            [targets_of(batch).to(self.device) for batch in batches], passes
        )

    def _gram(self, batches: Sequence[Batch]) -> Tensor | None:
        """Inner products of the tasks' gradients over the whole step, by a pass of its own over all micro-batches.

        None where the weighting does not read them, or the only micro-batch finds them itself.
        """
        if not self.objective.weighting.reads_gradients or len(batches) == 1:
            return None
        # The same dropout is drawn again when the weights are trained, as for GradCache.
        devices = [self.device] if self.device.type == "cuda" else []
        total = torch.zeros(())
        with torch.random.fork_rng(devices), torch.no_grad():
            for batch in batches:
                found_TMM = self.deepspeed(batch.to(self.device), mode="task_gradients")
                total = total.to(found_TMM) + found_TMM / len(batches)
        return gram_over_ranks(total)

    @torch.no_grad()
    def forward(self, batch: Batch) -> ModelOutput:
        """The model's output in evaluation mode. Every rank must call it equally often: a forward is an all-to-all."""
        self.deepspeed.eval()
        return self.deepspeed(batch.to(self.device), mode="evaluate")

    def _update_balance(self, outputs: Sequence[ModelOutput]) -> None:
        layers = self.objective.model.moe_layers()
        if not layers:
            return
        # Loads of the whole optimizer step: all micro-steps, all ranks, real tokens only.
        steps_ALE = torch.stack(
            [torch.stack([routing.counts_E for routing in output.routings]) for output in outputs]
        )
        loads_LE = sum_over_ranks(steps_ALE.sum(0).double())
        moe = self.recipe.model.moe
        factor = self._rate_factor if moe.balance_schedule == "follow_rate" else 1.0
        groups = balanced_together(moe, len(self.objective.model.tasks))
        for layer, load_E in zip(layers, loads_LE, strict=True):
            bias_E = layer.balance_bias_E
            for group in groups:
                BALANCES[moe.balance](bias_E[group], load_E[group], moe.balance_rate * factor)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.detach().float() for value in values]).mean()
