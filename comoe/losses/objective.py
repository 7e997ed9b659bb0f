"""Model, task losses, auxiliary terms and their weighting as one module with four modes of a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comoe.config.recipe import DistillConfig, LossConfig, MoeConfig
from comoe.distributed import sum_over_ranks, world_size
from comoe.losses.adversarial import AdversarialLoss, count_domains
from comoe.losses.contrastive.gradcache import Cached, Passes, cache_gradients, replayed
from comoe.losses.contrastive.loss import ContrastiveLoss, has_views
from comoe.losses.distillation import SoftLoss
from comoe.losses.image_text import ITCLoss, ITMLoss
from comoe.losses.lexicon import LexiconLoss, count_words
from comoe.losses.orthogonal import OrthogonalLoss, SoftSharingLoss
from comoe.losses.routing import BalanceLoss, TaskSeparationLoss, ZLoss
from comoe.losses.weighting.gradient_surgery import gram_over_ranks, shared_gradients
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task, decoder_tasks
from comoe.types import (
    IGNORED,
    Batch,
    Loss,
    ModelOutput,
    StepOutput,
    labelled_rows,
    soft_scales,
)


@dataclass(frozen=True, slots=True)
class Term:
    """One auxiliary term of the objective."""

    weight: float
    """Factor in the total."""
    loss: Loss
    over_embeddings: bool = False
    """True for the contrastive term: GradCache takes it over the whole optimizer step."""
    takes_share: bool = False
    """True where the weight is a share of 1 that the tasks' losses lose."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a term is built from."""

    loss: LossConfig
    moe: MoeConfig
    model: MultiTaskModel
    seed: int
    """``train.seed``."""
    num_domains: int
    """Values of ``Batch.domains_B``; 0 where nothing is predicted."""


def _contrastive(parts: Parts) -> Term | None:
    config, projection = parts.loss.contrastive, parts.model.projection
    tasks = [task for task in parts.model.tasks if task.contrastive]
    if not (config.weight or config.first_steps) or not tasks:
        return None
    assert projection is not None, "a task of the contrastive loss has a head that pools"
    loss = ContrastiveLoss(tasks, config, width=projection.out_features)
    return Term(config.weight, loss, over_embeddings=True)


def _balance(parts: Parts) -> Term | None:
    weight, moe = parts.loss.balance_weight, parts.moe
    if not weight or not moe.num_experts:
        return None
    assert moe.top_k < moe.num_experts, "nothing to balance: every expert runs for every token"
    return Term(weight, BalanceLoss())


def _z(parts: Parts) -> Term | None:
    if not parts.loss.z_weight or not parts.moe.num_experts:
        return None
    return Term(parts.loss.z_weight, ZLoss.of(parts.moe, parts.model.config.hidden_size))


def _task_separation(parts: Parts) -> Term | None:
    weight, names = parts.loss.task_separation_weight, [task.name for task in parts.model.tasks]
    # One expert, or one task: there is nothing to separate.
    if not weight or parts.moe.num_experts < 2 or len(names) < 2:
        return None
    return Term(weight, TaskSeparationLoss(names))


def _itc(parts: Parts) -> Term | None:
    config, head = parts.loss.image_text, parts.model.image_text
    if head is None or not head.contrasts:
        return None
    return Term(config.itc_weight, ITCLoss(config), takes_share=True)


def _itm(parts: Parts) -> Term | None:
    config, head = parts.loss.image_text, parts.model.image_text
    if head is None or head.match is None:
        return None
    return Term(config.itm_weight, ITMLoss(config, seed=parts.seed), takes_share=True)


def _orthogonal(parts: Parts) -> Term | None:
    weight = parts.loss.orthogonal_weight
    if not weight or parts.model.private is None:
        return None
    return Term(weight, OrthogonalLoss([task.name for task in parts.model.tasks]))


def _soft_sharing(parts: Parts) -> Term | None:
    weight, model = parts.loss.soft_sharing_weight, parts.model
    # One task: there is nothing to tie.
    if not weight or not model.own_layers or len(model.tasks) < 2:
        return None
    model.holder.measures_distance = True
    return Term(weight, SoftSharingLoss())


def _adversarial(parts: Parts) -> Term | None:
    config, domains = parts.loss.adversarial, parts.num_domains
    if not config.weight:
        return None
    assert domains > 1, "loss.adversarial needs the number of values that find_domains found"
    width = parts.model.config.hidden_size
    return Term(config.weight, AdversarialLoss(config, model_width=width, num_domains=domains))


def _lexicon(parts: Parts) -> Term | None:
    weight, model = parts.loss.lexicon_weight, parts.model
    if not weight:
        return None
    assert model.word_numbers, "the recipe's rules refuse it"
    return Term(weight, LexiconLoss(model.config.hidden_size, model.word_numbers))


LOSSES: dict[str, Callable[[Parts], Term | None]] = {
    "contrastive": _contrastive,
    "balance": _balance,
    "z": _z,
    "task_separation": _task_separation,
    "itc": _itc,
    "itm": _itm,
    "orthogonal": _orthogonal,
    "soft_sharing": _soft_sharing,
    "adversarial": _adversarial,
    "lexicon": _lexicon,
}
"""Auxiliary term -> parts -> term, None where it is switched off. That of a plugin is made where
``loss.added`` gives it a weight."""
BUILT_IN = tuple(LOSSES)
"""Those that the recipe has options for."""


Mode = Literal["train", "evaluate", "embed", "task_gradients"]


class Objective(nn.Module):
    """What the engine wraps: model, losses and weighting.

    Every number of a ``StepOutput`` is this rank's share, scaled so that the mean over ranks and
    micro-steps is the global value: that mean is what ZeRO and gradient accumulation take of the
    gradients.

    Args:
        model: the model.
        tasks: the same tasks in the same order.
        loss: ``loss`` of the recipe; a term whose weight is 0 is neither computed nor communicated.
        moe: ``model.moe`` of the recipe.
        seed: ``train.seed``; decides which texts the matching loss draws.
        num_domains: values that ``loss.adversarial`` predicts; 0 without it.
        distill: ``distill`` of the recipe, read where batches have soft labels.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        loss: LossConfig,
        moe: MoeConfig,
        *,
        seed: int = 0,
        num_domains: int = 0,
        distill: DistillConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.soft_loss = SoftLoss(distill or DistillConfig())
        # DeepSpeed reads it from the module that it wraps.
        self.config = model.config
        self.tasks = tuple(tasks)
        self.names = [task.name for task in tasks]
        self.r_drop_weight = loss.r_drop_weight
        self.first_steps = range(loss.contrastive.first_steps)
        model.holder.seed = seed
        self.weighting = WEIGHTINGS[loss.weighting](self.tasks, loss)
        decoded = bool(decoder_tasks(tasks))
        assert not (decoded and self.weighting.reads_gradients), "the recipe's rules refuse it"
        parts = Parts(loss, moe, model, seed, num_domains)
        wanted = {*BUILT_IN, *(name for name, weight in loss.added.items() if weight)}
        built = {name: build(parts) for name, build in LOSSES.items() if name in wanted}
        self.terms = {name: term for name, term in built.items() if term is not None}
        # Temperatures and a discriminator to learn, queues to save.
        self.losses = nn.ModuleDict(
            {n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)}
        )
        # Terms that are given a share of 1 leave the rest of it to the tasks.
        self.task_share = 1.0 - sum(term.weight for term in self.terms.values() if term.takes_share)
        over_embeddings = (term.loss for term in self.terms.values() if term.over_embeddings)
        # Under this name, too, a module: checkpoints have its queues and temperatures twice.
        self._contrast = next(over_embeddings, None)
        self.viewed = [
            task.name
            for task in self.tasks
            if self._contrast is not None and task.contrastive and has_views(task, loss.contrastive)
        ]

    def weights_at(self, step: int) -> dict[str, float]:
        """Term -> its weight in an optimizer step; of terms that do not run then nothing.

        In the first steps of ``loss.contrastive.first_steps`` the contrastive term has 1, all
        others and the tasks 0: they run all the same, so that every parameter has a gradient on
        every rank.
        """
        if step in self.first_steps:
            return {name: float(term.over_embeddings) for name, term in self.terms.items()}
        return {name: term.weight for name, term in self.terms.items() if term.weight}

    def compares(self, step: int) -> bool:
        """Whether the contrastive term, which ``contrast`` can take over a whole step, runs in a step."""
        return any(self.terms[name].over_embeddings for name in self.weights_at(step))

    def begin_step(self) -> None:
        """Tell the terms that a new optimizer step begins; call it before the first micro-step."""
        for term in self.terms.values():
            term.loss.begin_step()

    def end_step(self, outputs: Sequence[StepOutput], batches: Sequence[Batch]) -> None:
        """Tell the weighting, on all ranks, about an optimizer step that has changed the weights.

        Args:
            outputs: of this rank's micro-steps.
            batches: of any device.
        """
        if not self.weighting.remembers or batches[0].step in self.first_steps:
            return
        losses_T = torch.stack(
            [
                torch.stack([output.terms[f"task/{name}"] for name in self.names])
                for output in outputs
            ]
        ).double()
        losses_T = sum_over_ranks(losses_T.mean(dim=0)) / world_size()
        present_T = self._present(batches[0]).to(losses_T.device)
        self.weighting.end_step(losses_T, present_T, gram_TT=outputs[0].gram_TT)

    def forward(
        self, batch: Batch, mode: Mode = "train", **options: Any
    ) -> StepOutput | ModelOutput | Passes | Tensor:
        """One micro-batch through the method of ``_MODES`` that ``mode`` names, with its options.

        DeepSpeed's engine, and so the hooks of ZeRO-3, know ``forward`` alone.
        """
        return _MODES[mode](self, batch, **options)

    def train_step(
        self, batch: Batch, *, cached: Cached | None = None, gram_TT: Tensor | None = None
    ) -> StepOutput:
        """The loss of one micro-batch, its terms, and what the model predicts.

        Args:
            batch: with ``unit_scale_T`` and the labels of every task.
            cached: what ``contrast`` made of this micro-batch; its routing is repeated.
            gram_TT: inner products of the tasks' gradients over all micro-batches and ranks; None
                takes this micro-batch for the whole step.
        """
        repeats = cached is not None or gram_TT is not None
        probed = self.weighting.reads_gradients and gram_TT is None
        output = self._passes(batch, cached.selected if cached else ((), ()), probed=probed)[0]
        if probed:
            gram_TT = gram_over_ranks(self._shared_gradients(output, batch))
            output = replace(output, probe=None)
        terms: dict[str, Tensor] = {}
        losses_T = self.task_losses(output, batch, terms)
        alone, weights = batch.step in self.first_steps, self.weights_at(batch.step)
        again = self._again(batch, repeats=repeats) if self.r_drop_weight and not alone else None
        if again is not None:
            losses_T = (losses_T + self.task_losses(again, batch)) / 2
        T = len(self.tasks)
        # Up to one factor: their shares are what counts.
        posts_T = torch.nan_to_num(1 / batch.unit_scale_T[T : 2 * T], posinf=0.0)
        total, weights_T = self.weighting(
            losses_T, self._present(batch), posts_T=posts_T, gram_TT=gram_TT, step=batch.step
        )
        share = 0.0 if alone else self.task_share
        total, weights_T = share * total, share * weights_T
        if again is not None:
            divergences_T = self._divergences(output, again, batch)
            total = total + self.r_drop_weight * (weights_T * divergences_T).sum()
            # The same reason as below.
            total = total + 0.0 * sum(z_BP.sum() for z_BP in again.embeddings.values())
            terms["r_drop"] = divergences_T.detach().sum()
        for kind, values_T in (("task", losses_T), ("weight", weights_T)):
            for name, value in zip(self.names, values_T.detach(), strict=True):
                terms[f"{kind}/{name}"] = value
        # The first passes ran no term, and the next micro-batch must find the random numbers where
        # they left them.
        with torch.random.fork_rng([total.device] if total.is_cuda else [], enabled=repeats):
            for name, term in self.terms.items():
                if name not in weights:
                    # A temperature that is learned no more has a gradient all the same.
                    total = total + 0.0 * term.loss.scales().sum().to(total)
                    continue
                if cached is not None and term.over_embeddings:
                    value, logged = replayed(cached, output, term.loss.scales()), cached.terms
                else:
                    value, logged = term.loss(output, batch)
                total = total + weights[name] * value
                terms |= logged
        # The projection must get a gradient on every rank also where no term reads it, or ZeRO's
        # buckets differ; and every forward pass must be run backward on every rank: its experts may
        # be on another.
        for embeddings_BP in [*output.embeddings.values(), *output.views.values()]:
            total = total + 0.0 * embeddings_BP.sum()
        return StepOutput(total, terms, output, gram_TT)

    def evaluate(self, batch: Batch) -> ModelOutput:
        """What the model predicts: no loss, no label, no collective of ours."""
        return self.model(batch)

    def embed(self, batch: Batch) -> Passes:
        """The first pass of GradCache: embeddings and routing without all that is not to be kept
        for a whole optimizer step."""
        return tuple(
            ModelOutput(
                {},
                output.embeddings,
                {},
                (),
                output.token_rows_S[:0],
                views=output.views,
                selected=output.selected,
            )
            for output in self._passes(batch)
        )

    def task_gradients(self, batch: Batch) -> Tensor:
        """This rank's share of the tasks' gradients by the last shared layer, (T, M, M)."""
        return self._shared_gradients(self._passes(batch, probed=True)[0], batch)

    def contrast(self, batches: Sequence[Batch], passes: Sequence[Passes]) -> list[Cached]:
        """The contrastive term over all micro-batches of a step, on all ranks, for their second passes."""
        assert self._contrast is not None, "loss.contrastive.chunk_size needs a contrastive term"
        return cache_gradients(self._contrast, self._contrast.scales(), batches, passes)

    def task_losses(
        self, output: ModelOutput, batch: Batch, parts: dict[str, Tensor] | None = None
    ) -> Tensor:
        """This micro-batch's share of each task's mean loss, (T,), float32; 0 with a gradient for an absent task.

        ``parts`` gets ``gold/<name>`` and ``soft/<name>`` of tasks with soft labels, unweighted.
        """
        assert batch.unit_scale_T is not None, "training needs batch.unit_scale_T (see unit_scale)"
        losses = []
        T = len(self.tasks)
        scales = batch.unit_scale_T[:T].float(), soft_scales(batch.unit_scale_T, T).float()
        for task, gold_scale, soft_scale in zip(self.tasks, *scales, strict=True):
            confidences = batch.confidences.get(task.name) if task.weighs("output") else None
            logits, targets = output.logits[task.name], batch.labels[task.name]
            loss = task.rules.loss(logits, targets, task, confidences) * gold_scale
            if task.name in batch.soft_labels:
                gold, soft = loss, self.soft_loss(logits, batch, task) * soft_scale
                loss = soft + self.soft_loss.gold_weight(batch) * gold
                if parts is not None:
                    parts |= {f"gold/{task.name}": gold.detach()}
                    parts |= {f"soft/{task.name}": soft.detach()}
            losses.append(loss)
        return torch.stack(losses)

    def _again(self, batch: Batch, *, repeats: bool) -> ModelOutput:
        """The second pass of R-Drop, under other dropout and, of a gate that draws, other experts."""
        # As for the terms below: the first passes of GradCache did not run it.
        devices = [batch.input_ids_BL.device] if batch.input_ids_BL.is_cuda else []
        self.model.holder.view = 1
        try:
            with torch.random.fork_rng(devices, enabled=repeats):
                return self.model(batch, compare=False)
        finally:
            self.model.holder.view = 0

    def _divergences(self, one: ModelOutput, other: ModelOutput, batch: Batch) -> Tensor:
        """This micro-batch's share of each task's mean (KL(p || q) + KL(q || p)) / 2, (T,), float32.

        The mean is over the posts that the task learns from (of tags, of the mean over a post's
        words); of a decoder's tasks and of masked words it is 0.

        Source: R-Drop, arXiv:2106.14448.
        """
        found = []
        for number, task in enumerate(self.tasks, start=len(self.tasks)):
            if task.own_rows or not task.rules.scored:
                found.append(batch.unit_scale_T.new_zeros(()).float())
                continue
            targets, soft = batch.labels[task.name], batch.soft_labels.get(task.name)
            words = task.mode == "tokens"
            learned = targets != IGNORED if words else task.rules.labelled(targets)
            if soft is not None:
                learned = learned | task.rules.soft_present(soft)
            values = task.rules.disagreements(one.logits[task.name], other.logits[task.name])
            values = torch.where(learned, values, 0.0 * values).reshape(len(values), -1)
            counts_B = learned.reshape(len(values), -1).sum(dim=1).clamp_min(1)
            scale = batch.unit_scale_T[number].float()
            found.append(0.5 * scale * (values.sum(dim=1) / counts_B).sum())
        return torch.stack(found)

    def _present(self, batch: Batch) -> Tensor:
        """Tasks that some post of the optimizer step has: bool (T,)."""
        assert batch.unit_scale_T is not None, "training needs batch.unit_scale_T (see unit_scale)"
        T = len(self.tasks)
        return (batch.unit_scale_T[:T] > 0) | (soft_scales(batch.unit_scale_T, T) > 0)

    def _shared_gradients(self, output: ModelOutput, batch: Batch) -> Tensor:
        with torch.enable_grad():
            losses_T = self.task_losses(replace(output, logits=output.probe.logits), batch)
        return shared_gradients(losses_T, output.probe, self.names)

    def _passes(
        self, batch: Batch, selected: Sequence[Sequence[Tensor]] = ((), ()), *, probed: bool = False
    ) -> Passes:
        """The model's output, with the second views of the tasks that want them; and their own forward pass."""
        output = self.model(batch, selected[0], probed=probed)
        if not self.viewed or not self.compares(batch.step):
            return (output,)
        rows_B = labelled_rows(batch, self.viewed).any(dim=1)
        if batch.bags_B is not None:
            # What is read together is viewed together.
            rows_B = torch.isin(batch.bags_B, batch.bags_B[rows_B])
        rows_R = rows_B.nonzero().squeeze(1)
        # Every rank runs this pass too: one without such rows runs its first one, times zero.
        scale = float(len(rows_R) > 0)
        rows_R = rows_R if scale else rows_R.new_zeros(1)
        again = batch.take(rows_R)
        if not scale:
            again = replace(again, row_ids_B=again.row_ids_B.new_full((1,), -1))
        viewed = self.model(again, selected[1], compare=False, decode=False)
        views = {
            name: torch.zeros_like(output.embeddings[name]).index_copy(
                0, rows_R, scale * viewed.embeddings[name]
            )
            for name in self.viewed
        }
        return replace(output, views=views), viewed


_MODES: dict[Mode, Callable[..., Any]] = {
    "train": Objective.train_step,
    "evaluate": Objective.evaluate,
    "embed": Objective.embed,
    "task_gradients": Objective.task_gradients,
}


def count_units(batch: Batch, tasks: Sequence[Task]) -> Tensor:
    """What each task's mean is divided by, the posts that it learns from, what the mean over its
    soft labels is divided by, then the means at ``LEXICON``, ``DOMAINS``, ``TOKENS`` and
    ``TARGET_TOKENS``, in one micro-batch: (3 T + 4,), float64.

    Sum it over the micro-steps of a rank, then over ranks, then pass it to ``unit_scale``. The
    tokens of a filler row do not count. A post counts whole, whatever its confidence.
    """
    units = [task.rules.normalizer(batch.labels[task.name], task).double() for task in tasks]
    soft_units = [
        task.rules.soft_units(batch.soft_labels[task.name])
        if task.name in batch.soft_labels
        else torch.zeros_like(units[0])
        for task in tasks
    ]
    real_B = batch.row_ids_B >= 0
    tokens = batch.attention_mask_BL[real_B].sum(dtype=torch.float64)
    targets = torch.zeros_like(tokens)
    if batch.target_ids_BD is not None:
        targets = _target_tokens(batch, tasks)[real_B].sum(dtype=torch.float64)
    posts = []
    for task in tasks:
        # Rows with a label of the task, gold or soft.
        learned_B = task.rules.labelled(batch.labels[task.name])
        if (soft := batch.soft_labels.get(task.name)) is not None:
            learned_B = learned_B | task.rules.soft_present(soft).reshape(len(soft), -1).any(dim=1)
        count = learned_B.sum(dtype=torch.float64)
        posts.append(count if task.rules.scored else torch.zeros_like(tokens))
    more = (count_words(batch), count_domains(batch), tokens, targets)
    return torch.stack([*units, *posts, *soft_units, *more])


def _target_tokens(batch: Batch, tasks: Sequence[Task]) -> Tensor:
    """Tokens that the decoder scores for each row, (B,): its own text's, with soft labels all labels'."""
    tokens_B = (batch.target_ids_BD != IGNORED).sum(dim=1)
    for number, task in decoder_tasks(tasks).items():
        if task.name in batch.soft_labels:
            words = (batch.choices[task.name] != IGNORED).sum()
            tokens_B = torch.where(batch.task_ids_B == number, words, tokens_B)
    return tokens_B


def unit_scale(units_T: Tensor, *, world_size: int, accumulation: int) -> Tensor:
    """``Batch.unit_scale_T``: W * accumulation / units of the whole optimizer step, float32; 0 for an absent task."""
    scale_T = world_size * accumulation / units_T.double()
    return torch.where(units_T > 0, scale_T, torch.zeros_like(scale_T)).float()
