"""What a decoder gives: log-probabilities of texts and of label words, and generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.encoders.build import as_encoder_output
from comoe.models.encoders.families import family_of, stacks_of
from comoe.models.generation import Beginning, TextGenerator, check_lengths, together
from comoe.models.moe.block import ContextHolder, RoutingContext, without_tokens
from comoe.tasks.task import Task, decoder_tasks
from comoe.types import IGNORED, Batch, Routing

LABELS_PER_PASS = 8
"""Labels of each row that one pass scores: more at a time take more memory. The same on every rank,
whatever its rows, because every rank runs every pass."""


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """What the decoder gives for a micro-batch."""

    logits: Mapping[str, Tensor]
    """Task -> as in ``ModelOutput.logits``."""
    routings: tuple[Routing, ...]
    """Per decoder layer with experts: of the texts that were scored, not of those that are
    generated."""
    rows_S: Tensor
    """Row of each token of these texts."""
    selected: tuple[Tensor, ...]
    """Selected experts per such layer."""
    generated: Mapping[str, Tensor] = field(default_factory=dict)
    """Task -> as in ``ModelOutput.generated``."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """One pass over N texts."""

    log_probabilities_N: Tensor
    routings: tuple[Routing, ...]
    rows_S: Tensor
    selected: tuple[Tensor, ...]


class TaskDecoder:
    """The decoder of an encoder-decoder, for the tasks in decoder mode. Holds no weights of its own.

    Every rank runs every pass, whatever its rows: a rank without a row of the kind runs row 0 with
    one token, and nothing of that counts. A model that is whole in its process waits for no other,
    and generates only what is asked for. Each pass has a context of its own, and nothing outlives a
    call.

    Args:
        encoder: a whole model of ``build_encoder``, blocks attached.
        tasks: all tasks of the model.
        holder: where its blocks find the context.
        embed: tasks (N,) -> their embeddings, where the gate reads tasks; else None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Sequence[Task],
        holder: ContextHolder,
        embed: Callable[[Tensor], Tensor] | None,
    ) -> None:
        check_lengths(encoder, tasks)
        self.encoder = encoder
        self.stack = stacks_of(encoder)[1]
        self.vocabulary = family_of(encoder.config.model_type).vocabulary
        self.holder = holder
        self.generator = TextGenerator(encoder, self.stack, holder, embed)
        decoded = decoder_tasks(tasks).items()
        self.label_tasks = [(number, task) for number, task in decoded if task.label_words]
        self.text_tasks = [(number, task) for number, task in decoded if not task.label_words]
        most = max((len(task.labels) for _, task in self.label_tasks), default=0)
        self.num_groups = math.ceil(most / LABELS_PER_PASS)
        settings = encoder.generation_config
        self.start, self.padding = settings.decoder_start_token_id, settings.pad_token_id

    def teacher_force(
        self, states_BLM: Tensor, batch: Batch, selected: Mapping[int, Tensor]
    ) -> DecoderOutput:
        """Log-probability of the text that each row wants, in one pass; of a task with soft labels,
        of every label's words.

        Args:
            states_BLM: the encoder's last states, as the decoder is to read them.
            batch: its rows.
            selected: decoder layer -> experts that an earlier pass over the same batch selected.
        """
        tasks_B = batch.task_ids_B
        soft = [pair for pair in self.label_tasks if pair[1].name in batch.soft_labels]
        alone = [pair for pair in self.label_tasks if pair not in soft]
        wanted_BD = self._of(tasks_B, batch.target_ids_BD, [*alone, *self.text_tasks])
        rows_R = with_tokens(wanted_BD)
        choices = [choices_of(batch, number, task) for number, task in soft]
        rows_N = torch.cat([rows_R, *(choice.rows_N for choice in choices)])
        texts_ND = stacked([wanted_BD[rows_R], *(choice.texts_ND for choice in choices)])
        scored = self._score(
            states_BLM, batch.attention_mask_BL, tasks_B, rows_N, texts_ND, selected
        )
        values_N = scored.log_probabilities_N
        own_B = _spread(values_N[: max(1, len(rows_R))], rows_R, len(tasks_B))
        logits = {}
        for number, task in alone:
            gold_B = batch.labels[task.name].clamp_min(0)
            mine_BY = F.one_hot(gold_B, len(task.labels)) * (tasks_B == number)[:, None]
            logits[task.name] = own_B[:, None] * mine_BY
        found = values_N[len(rows_R) : len(rows_N)].split(
            [len(choice.rows_N) for choice in choices]
        )
        for (_, task), choice, values in zip(soft, choices, found, strict=True):
            nothing_BY = values_N.sum() * values_N.new_zeros(len(tasks_B), len(task.labels))
            places = (choice.rows_N, choice.labels_N)
            logits[task.name] = nothing_BY.index_put(places, values)
        for number, task in self.text_tasks:
            logits[task.name] = (own_B * (tasks_B == number))[:, None]
        return DecoderOutput(logits, scored.routings, scored.rows_S, scored.selected)

    def predict(self, states_BLM: Tensor, batch: Batch) -> DecoderOutput:
        """Labels scored, own texts scored, texts generated and scored; see ``teacher_force``."""
        mask_BL, tasks_B = batch.attention_mask_BL, batch.task_ids_B
        logits: dict[str, Tensor] = {}
        passes = []
        if self.text_tasks:
            wanted_BD = self._of(tasks_B, batch.target_ids_BD, self.text_tasks)
            rows_R = with_tokens(wanted_BD)
            passes.append(self._score(states_BLM, mask_BL, tasks_B, rows_R, wanted_BD[rows_R]))
            own_B = _spread(passes[0].log_probabilities_N, rows_R, len(tasks_B))
        for _, task in self.label_tasks:
            logits[task.name] = states_BLM.new_zeros(
                (len(tasks_B), len(task.labels)), dtype=wide_dtype(states_BLM)
            )
        for group in range(self.num_groups):
            passes.append(self._score_labels(states_BLM, batch, group, logits))

        def begin(rows_R: Tensor) -> Beginning:
            states = as_encoder_output(states_BLM[rows_R])
            arguments = {"encoder_outputs": states, "attention_mask": mask_BL[rows_R]}
            return Beginning(arguments, mask_BL.new_ones(len(rows_R), 1))

        texts = {
            number: self.generator.generate(tasks_B, number, task, begin)
            for number, task in self.text_tasks
        }
        if self.text_tasks:
            texts_BD = together(texts)
            rows_R = with_tokens(texts_BD)
            again = self._score(states_BLM, mask_BL, tasks_B, rows_R, texts_BD[rows_R])
            generated_B = _spread(again.log_probabilities_N, rows_R, len(tasks_B))
        for number, task in self.text_tasks:
            mine_B = tasks_B == number
            logits[task.name] = torch.stack([own_B * mine_B, generated_B * mine_B], dim=1)
        generated = {
            task.name: self.generator.ended(texts[number]) for number, task in self.text_tasks
        }
        routings = tuple(map(_joined, zip(*(one.routings for one in passes), strict=True)))
        rows_S = torch.cat([one.rows_S for one in passes])
        return DecoderOutput(logits, routings, rows_S, (), generated)

    def _of(
        self, tasks_B: Tensor, target_ids_BD: Tensor, tasks: Sequence[tuple[int, Task]]
    ) -> Tensor:
        """The texts of the rows of some tasks; IGNORED elsewhere."""
        numbers = torch.tensor([number for number, _ in tasks], device=tasks_B.device)
        return torch.where(torch.isin(tasks_B, numbers)[:, None], target_ids_BD, IGNORED)

    def _score_labels(
        self, states_BLM: Tensor, batch: Batch, group: int, logits: dict[str, Tensor]
    ) -> _Scored:
        """Score one group of labels of every row that wants one; fills ``logits`` in."""
        choices = [choices_of(batch, *pair, group=group) for pair in self.label_tasks]
        rows_N = torch.cat([choice.rows_N for choice in choices])
        texts_ND = stacked([choice.texts_ND for choice in choices])
        scored = self._score(
            states_BLM, batch.attention_mask_BL, batch.task_ids_B, rows_N, texts_ND
        )
        found = scored.log_probabilities_N[: len(rows_N)].split(
            [len(choice.rows_N) for choice in choices]
        )
        for (_, task), choice, values in zip(self.label_tasks, choices, found, strict=True):
            places = (choice.rows_N, choice.labels_N)
            logits[task.name] = logits[task.name].index_put(places, values)
        return scored

    def _score(
        self,
        states_BLM: Tensor,
        mask_BL: Tensor,
        tasks_B: Tensor,
        rows_N: Tensor,
        texts_ND: Tensor,
        selected: Mapping[int, Tensor] | None = None,
    ) -> _Scored:
        """Log-probability of each text under its row; a row may come several times."""
        none = len(rows_N) == 0
        if none:
            rows_N = rows_N.new_zeros(1)
            texts_ND = texts_ND.new_full((1, 1), self.generator.ends[0])
        texts_ND = texts_ND[:, : max(1, int((texts_ND != IGNORED).sum(dim=1).max()))]
        real_ND = texts_ND != IGNORED
        places_S, columns_S = real_ND.nonzero(as_tuple=True)
        index_S = places_S * texts_ND.shape[1] + columns_S
        before_ND = F.pad(texts_ND[:, :-1], (1, 0), value=self.start)
        context = RoutingContext(
            index_S, places_S, *self.generator.of_tasks(tasks_B[rows_N]), selected=selected or {}
        )
        self.holder.context = context
        try:
            hidden_NDM = self.stack(
                input_ids=torch.where(before_ND == IGNORED, self.padding, before_ND),
                encoder_hidden_states=states_BLM[rows_N],
                encoder_attention_mask=mask_BL[rows_N],
                # Whatever the model's own configuration says: a cache would be filled twice under
                # recomputation.
                use_cache=False,
            ).last_hidden_state
        finally:
            self.holder.context = None
        # Of real tokens alone, and nothing keeps the logits of the vocabulary but this expression.
        logits_SV = self.vocabulary(self.encoder, hidden_NDM.flatten(0, 1).index_select(0, index_S))
        lost_S = F.cross_entropy(
            logits_SV.to(wide_dtype(logits_SV)), texts_ND[real_ND], reduction="none"
        )
        found_N = lost_S.new_zeros(len(rows_N)).index_add(0, places_S, -lost_S)
        routings = tuple(routing for _, routing in sorted(context.routings.items()))
        chosen = tuple(routing.indices_Sk for routing in routings)
        rows_S = rows_N[places_S]
        if none:
            found_N, routings, rows_S = (
                0.0 * found_N,
                tuple(map(without_tokens, routings)),
                rows_S[:0],
            )
        return _Scored(found_N, routings, rows_S, chosen)


class Choices(NamedTuple):
    """Labels that the decoder is to score."""

    rows_N: Tensor
    """Row of each."""
    labels_N: Tensor
    """Its label."""
    texts_ND: Tensor
    """The label's words."""


def choices_of(batch: Batch, number: int, task: Task, *, group: int | None = None) -> Choices:
    """The labels of a task, or one group of ``LABELS_PER_PASS``, for each of its rows."""
    words_YD = batch.choices[task.name]
    rows_R = (batch.task_ids_B == number).nonzero().squeeze(1)
    labels_Y = torch.arange(len(words_YD), device=rows_R.device)
    if group is not None:
        labels_Y = labels_Y[group * LABELS_PER_PASS : (group + 1) * LABELS_PER_PASS]
    labels_N = labels_Y.repeat(len(rows_R))
    return Choices(rows_R.repeat_interleave(len(labels_Y)), labels_N, words_YD[labels_N])


def stacked(texts: Sequence[Tensor]) -> Tensor:
    """Texts one under the other, IGNORED behind shorter ones."""
    width = max(part.shape[1] for part in texts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=IGNORED) for part in texts])


def with_tokens(texts_BD: Tensor) -> Tensor:
    """Rows that have a text."""
    return (texts_BD != IGNORED).any(dim=1).nonzero().squeeze(1)


def _spread(values_N: Tensor, rows_R: Tensor, number: int) -> Tensor:
    """The values at their rows, 0 elsewhere; also where there is no row, with a gradient of 0."""
    if len(rows_R) == 0:
        return values_N.expand(number) * 0.0
    return values_N.new_zeros(number).index_copy(0, rows_R, values_N)


def _joined(routings: Sequence[Routing]) -> Routing:
    """The routings of one layer over several passes."""
    rows = [routing.per_token() for routing in routings]
    parts = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    return replace(
        routings[0], **parts, counts_E=torch.stack([one.counts_E for one in routings]).sum(dim=0)
    )


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Float32, or the tensor's own float64."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
