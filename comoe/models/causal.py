"""Answers of a decoder-only model: label words and texts scored behind a prompt, texts generated behind it.

A row's prompt is computed once for all labels: their tokens lie side by side behind it in one
sequence, every label at the positions right behind the prompt, and the attention mask shows a token
the prompt and its own label's tokens before it alone. So one pass gives what a pass per label would.
A text to be learned is one more label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.decoder import choices_of, stacked, wide_dtype, with_tokens
from comoe.models.encoder_io import EncoderInputs
from comoe.models.encoders.families import family_of, stacks_of
from comoe.models.generation import Beginning, TextGenerator, check_lengths, together
from comoe.models.moe.block import ContextHolder
from comoe.tasks.task import Task, decoder_tasks
from comoe.types import IGNORED, Batch

STATES_PER_PASS = 1024
"""States whose next token is scored at a time in prediction: logits of the whole vocabulary are large."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The labels, or texts, that are scored behind the B prompts of a batch: N of them, C columns, S tokens."""

    ids_BC: Tensor
    """What the model reads behind the prompts: all but the last token of each label, int64."""
    labels_BC: Tensor
    """Number n of the label that a token belongs to, int64; -1 on padding."""
    depths_BC: Tensor
    """Place of a token in its label, int64."""
    lengths_B: Tensor
    """Tokens of the prompts."""
    rows_N: Tensor
    """Row of each label."""
    states_S: Tensor
    """Position, in the flattened (B * (L + C)), of the state that predicts a token."""
    tokens_S: Tensor
    """The token."""
    owners_S: Tensor
    """Its label n."""
    places: Mapping[str, tuple[Tensor, slice]]
    """Task -> (label y of its labels, 0 for texts; which of the N they are)."""

    def positions(self, columns: int) -> Tensor:
        """Position ids (B, L + C): labels begin behind the prompt."""
        text_BL = torch.arange(columns, device=self.ids_BC.device).expand(len(self.ids_BC), -1)
        return torch.cat([text_BL, self.lengths_B[:, None] + self.depths_BC], dim=1)

    def visible(self, mask_BL: Tensor, window: int | None = None) -> Tensor:
        """Which token (last axis) a token sees, bool (B, L + C, L + C).

        Args:
            mask_BL: 1 on the prompts' real tokens.
            window: a token sees only so many positions back, itself included.
        """
        B, L = mask_BL.shape
        real_BN = torch.cat([mask_BL.bool(), self.labels_BC >= 0], dim=1)
        # Texts have number -1: they see one another, and no label.
        owner_BN = torch.cat([mask_BL.new_full((B, L), -1), self.labels_BC], dim=1)
        at_BN = self.positions(L)
        back_BNN = at_BN[:, :, None] - at_BN[:, None, :]
        is_text_N = torch.arange(real_BN.shape[1], device=mask_BL.device) < L
        same_BNN = (owner_BN[:, :, None] == owner_BN[:, None, :]) & (
            is_text_N[:, None] == is_text_N[None, :]
        )
        to_text_NN = ~is_text_N[:, None] & is_text_N[None, :]
        seen_BNN = (same_BNN | to_text_NN) & (back_BNN >= 0) & real_BN[:, None, :]
        return seen_BNN if window is None else seen_BNN & (back_BNN < window)


class CausalDecoder:
    """Scores and generates the answers of the tasks in decoder mode. Holds no weights of its own.

    Args:
        encoder: a whole decoder-only model of ``build_encoder``, blocks attached.
        tasks: all tasks of the model.
        holder, embed: as for ``comoe.models.generation.TextGenerator``.
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
        self.vocabulary = family_of(encoder.config.model_type).vocabulary
        self.tasks = list(decoder_tasks(tasks).items())
        self.text_tasks = [(number, task) for number, task in self.tasks if not task.label_words]
        self.generator = TextGenerator(encoder, stacks_of(encoder)[0], holder, embed)
        kinds = dict.fromkeys(getattr(encoder.config, "layer_types", None) or ())
        self.windows: dict[str, int | None] = {}
        if any("sliding" in kind for kind in kinds):
            window = encoder.config.sliding_window
            self.windows = {kind: window if "sliding" in kind else None for kind in kinds}

    @property
    def longest_text(self) -> int:
        """Most tokens of a text that is generated."""
        return max((task.max_answer_length for _, task in self.text_tasks), default=0)

    def answers(self, batch: Batch, *, training: bool) -> Answers:
        """What to score: each row's own label or text; of tasks with soft labels, and outside training, all labels."""
        rows, texts, places, start = [], [], {}, 0
        for number, task in self.tasks:
            if task.label_words and (not training or task.name in batch.soft_labels):
                found = choices_of(batch, number, task)
                rows_R, labels_R, texts_RD = found.rows_N, found.labels_N, found.texts_ND
            else:
                mine_BD = torch.where(
                    (batch.task_ids_B == number)[:, None], batch.target_ids_BD, IGNORED
                )
                rows_R = with_tokens(mine_BD)
                texts_RD, labels_R = mine_BD[rows_R], torch.zeros_like(rows_R)
                if task.label_words:
                    labels_R = batch.labels[task.name][rows_R]
            places[task.name] = (labels_R, slice(start, start + len(rows_R)))
            start += len(rows_R)
            rows.append(rows_R)
            texts.append(texts_RD)
        return _laid_out(batch, torch.cat(rows), stacked(texts), places)

    def behind(self, inputs: EncoderInputs, answers: Answers) -> EncoderInputs:
        """The texts with labels to score behind them."""
        mask_BL, dtype = inputs.mask_BL, self.encoder.get_input_embeddings().weight.dtype

        def shown(window: int | None) -> Tensor:
            seen_BNN = answers.visible(mask_BL, window)
            hidden = torch.zeros(seen_BNN.shape, dtype=dtype, device=seen_BNN.device)
            return hidden.masked_fill(~seen_BNN, torch.finfo(dtype).min)[:, None]

        masks = {kind: shown(window) for kind, window in self.windows.items()}
        arguments = inputs.arguments | {"attention_mask": masks or shown(None)}
        arguments["position_ids"] = answers.positions(mask_BL.shape[1])
        arguments["input_ids"] = torch.cat([inputs.arguments["input_ids"], answers.ids_BC], dim=1)
        columns = arguments["input_ids"].shape[1]
        row_Z, column_Z = (answers.labels_BC >= 0).nonzero(as_tuple=True)
        index_Z = row_Z * columns + mask_BL.shape[1] + column_Z
        return EncoderInputs(arguments, mask_BL, columns, index_Z)

    def logits(self, states_BNM: Tensor, answers: Answers) -> dict[str, Tensor]:
        """Log-probability of the labels' words, (B, Y) per task, and of texts, (B, 1); 0 where none was asked for.

        Args:
            states_BNM: last states of prompts and labels.
            answers: what was asked.
        """
        flat_NM = states_BNM.flatten(0, 1)
        values_S = self._next_tokens(flat_NM, answers.states_S, answers.tokens_S)
        found_N = values_S.new_zeros(len(answers.rows_N)).index_add(0, answers.owners_S, values_S)
        logits = {}
        for _, task in self.tasks:
            labels_R, where = answers.places[task.name]
            # Part of the graph also on a rank without a row of the task.
            columns = max(1, len(task.labels))
            none_BY = values_S.sum() * values_S.new_zeros(len(states_BNM), columns)
            logits[task.name] = none_BY.index_put((answers.rows_N[where], labels_R), found_N[where])
        return logits

    def texts(
        self,
        batch: Batch,
        logits: Mapping[str, Tensor],
        states_of: Callable[[Batch, Answers], Tensor],
        private: Sequence[Callable[[Tensor], Tensor]] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The generated texts of each task, and the logits with their scores, as in ``ModelOutput``.

        Args:
            batch: its rows; every rank must call it where a pass needs other ranks.
            logits: of ``logits``.
            states_of: last states of prompts with what is scored behind them.
            private: what each task adds to the last states before the output layer; None for nothing.
        """
        tasks_B = batch.task_ids_B

        def refine(number: int) -> Callable[[Tensor], Tensor] | None:
            return None if private is None else lambda x_BLM: x_BLM + private[number](x_BLM)

        def begin(rows_R: Tensor) -> Beginning:
            ids_RL, mask_RL = _right_aligned(
                batch.input_ids_BL[rows_R], batch.attention_mask_BL[rows_R]
            )
            return Beginning({"input_ids": ids_RL, "attention_mask": mask_RL}, mask_RL)

        texts = {
            number: self.generator.generate(tasks_B, number, task, begin, refine(number))
            for number, task in self.text_tasks
        }
        texts_BD = together(texts)
        rows_R = with_tokens(texts_BD)
        # A model in shares runs equally often on every rank.
        one = batch.take(rows_R if len(rows_R) else rows_R.new_zeros(1))
        places_R = torch.arange(len(rows_R), device=rows_R.device)
        names = {"all": (torch.zeros_like(rows_R), slice(0, len(rows_R)))}
        answers = _laid_out(one, places_R, texts_BD[rows_R], names)
        flat_NM = states_of(one, answers).flatten(0, 1)
        values_S = self._next_tokens(flat_NM, answers.states_S, answers.tokens_S)
        scores_B = values_S.new_zeros(len(tasks_B)).index_add(0, rows_R[answers.owners_S], values_S)
        generated, joined = {}, dict(logits)
        for number, task in self.text_tasks:
            generated[task.name] = self.generator.ended(texts[number])
            scores_B1 = (scores_B * (tasks_B == number))[:, None]
            joined[task.name] = torch.cat([logits[task.name], scores_B1], dim=1)
        return generated, joined

    def _next_tokens(self, flat_NM: Tensor, states_S: Tensor, tokens_S: Tensor) -> Tensor:
        """Log-probability of each token behind its state, float32; each state's logits are computed once."""
        states_U, place_S = states_S.unique(return_inverse=True)
        if len(states_U) == 0:
            # The output layer runs on every rank.
            row_1V = self.vocabulary(self.encoder, flat_NM[:1])
            return row_1V.new_zeros(0, dtype=wide_dtype(row_1V)) + 0.0 * row_1V.sum()
        # A model in shares runs it equally often on every rank.
        at_once = torch.is_grad_enabled() or any(
            hasattr(weight, "ds_id") for weight in self.encoder.parameters()
        )
        size = len(states_U) if at_once else STATES_PER_PASS
        values_S = flat_NM.new_zeros(len(states_S), dtype=wide_dtype(flat_NM))
        for first in range(0, len(states_U), size):
            logits_UV = self.vocabulary(self.encoder, flat_NM[states_U[first : first + size]])
            logs_UV = F.log_softmax(logits_UV.to(values_S.dtype), dim=1)
            mine = ((place_S >= first) & (place_S < first + size)).nonzero().squeeze(1)
            found = logs_UV[place_S[mine] - first, tokens_S[mine]]
            values_S = values_S.index_put((mine,), found)
        return values_S


def _right_aligned(ids_RL: Tensor, mask_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts with their padding in front, as a search goes on behind them, and the mask of that."""
    lengths_R = mask_RL.sum(dim=1)
    longest = int(lengths_R.max())
    at_RL = torch.arange(longest, device=ids_RL.device) - (longest - lengths_R)[:, None]
    real_RL = at_RL >= 0
    # What stands in front is read by nothing; any token of the row will do.
    return ids_RL.gather(1, at_RL.clamp_min(0)), real_RL.to(mask_RL.dtype)


def _laid_out(
    batch: Batch,
    rows_N: Tensor,
    texts_ND: Tensor,
    places: Mapping[str, tuple[Tensor, slice]],
) -> Answers:
    """Labels side by side behind their rows; labels of a row follow one another in ``rows_N``."""
    B, L = batch.attention_mask_BL.shape
    lengths_B = batch.attention_mask_BL.sum(dim=1)
    read_N = ((texts_ND != IGNORED).sum(dim=1) - 1).clamp_min(0)
    before_N = read_N.cumsum(0) - read_N
    first_B = before_N.new_zeros(B).scatter_reduce(0, rows_N, before_N, "amin", include_self=False)
    start_N = before_N - first_B[rows_N]
    C = int(read_N.new_zeros(B).index_add(0, rows_N, read_N).max())
    depth_D = torch.arange(texts_ND.shape[1], device=rows_N.device)
    label_T, depth_T = (depth_D < read_N[:, None]).nonzero(as_tuple=True)
    at = (rows_N[label_T], start_N[label_T] + depth_T)
    ids_BC, depths_BC = rows_N.new_zeros(2, B, C)
    labels_BC = rows_N.new_full((B, C), -1)
    ids_BC[at], labels_BC[at], depths_BC[at] = texts_ND[label_T, depth_T], label_T, depth_T
    owners_S, depth_S = (texts_ND != IGNORED).nonzero(as_tuple=True)
    row_S = rows_N[owners_S]
    behind_S = torch.where(depth_S == 0, lengths_B[row_S] - 1, L + start_N[owners_S] + depth_S - 1)
    return Answers(
        ids_BC, labels_BC, depths_BC, lengths_B, rows_N, row_S * (L + C) + behind_S,
        texts_ND[owners_S, depth_S], owners_S, places,
    )  # fmt: skip
