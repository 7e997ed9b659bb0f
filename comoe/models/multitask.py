"""The whole model in plain PyTorch: encoder with cooperative blocks, one head per task, one shared projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.encoder import build_encoder, build_encoder_from_config
from comoe.models.families import attach_blocks, freeze_encoder, longest_input, reads_segments
from comoe.models.fusion import build_fusion
from comoe.models.gate import ROUTES
from comoe.models.heads import HeadOutput, TaskHead
from comoe.models.image_text import ImageTextHead
from comoe.models.moe import ContextHolder, CooperativeBlock, RoutingContext, of_first, without_tokens
from comoe.models.pictures import EncoderInputs, Pictures, Reading, Texts
from comoe.models.private import PrivatePart, input_weights, scale_inputs
from comoe.models.probe import probe
from comoe.models.recompute import recompute_layers
from comoe.models.vision import Tower, build_tower, build_tower_from_config, expected_tokens
from comoe.protocols import Batch, ImageText, ModelOutput, Sharing
from comoe.schema import ImageTextConfig, ModelConfig
from comoe.tasks.catalog import Task

HEAD_DROPOUT = 0.1
"""Dropout of the heads where ``model.dropout`` is null."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers that DeepSpeed reads from ``model.config``; the names are its own."""

    hidden_size: int
    """Model width M."""
    num_local_experts: int
    """Experts per layer E."""
    num_experts_per_tok: int
    """Experts per token k."""
    model_type: str = "comoe"
    """A name that AutoEP has no preset for."""


class MultiTaskModel(nn.Module):
    """Posts in, every task's answer out; knows no loss.

    Args:
        encoder: a model of ``build_encoder``; blocks are attached to it here.
        tasks: in the order of the task ids.
        config: ``model``.
        tower: reads pictures; None where the model reads none, or where its encoder does.
        image_text: ``loss.image_text``, to be trained for it too; None where it only answers, as in an export.
        recompute: keep only each layer's input for the backward pass (activation checkpointing).
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Sequence[Task],
        config: ModelConfig,
        *,
        tower: Tower | None = None,
        image_text: ImageTextConfig | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.config = ModelShape(width, config.moe.num_experts, config.moe.top_k)
        self.tasks = tuple(tasks)
        self.holder = ContextHolder()
        self.encoder = encoder
        self.has_segments = reads_segments(encoder.config)
        # Before the blocks: they train in every layer.
        freeze_encoder(encoder, config.train_layers)
        self._blocks = tuple(attach_blocks(encoder, config.moe, self.holder))
        if recompute:
            recompute_layers(encoder, self.holder)
        reads_task = bool(self._blocks) and ROUTES[config.moe.route_by].task
        self.task_embedding = nn.Embedding(len(tasks), config.moe.task_embedding_width) if reads_task else None
        dropout = HEAD_DROPOUT if config.dropout is None else config.dropout
        # A list, not a dict by name: a task may be called "type" or "expert", which torch and DeepSpeed keep for
        # themselves.
        self.heads = nn.ModuleList(TaskHead(task, width, dropout=dropout) for task in self.tasks)
        self.projection = nn.Linear(width, config.projection_width, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)
        self.tower = tower
        self.fusion = build_fusion(encoder, tower, config.vision, dropout=dropout)
        self.route_image_tokens = config.vision.route_image_tokens
        self.image_text = None
        if self.fusion is not None and image_text is not None:
            head = ImageTextHead(
                width,
                self.fusion.image_width,
                config.projection_width,
                contrast=image_text.itc_weight > 0,
                match=image_text.itm_weight > 0,
            )
            self.image_text = head if head.compares or head.match is not None else None
        # Last, so that all else begins as it does without them.
        width_of_parts = config.private_width
        parts = [PrivatePart(width, width_of_parts, dropout=dropout) for _ in self.tasks if width_of_parts]
        self.private = nn.ModuleList(parts) if parts else None
        if any(task.weighs("input") for task in self.tasks):
            scale_inputs(encoder, self.holder)

    def forward(
        self, batch: Batch, picks: Sequence[Tensor] = (), *, compare: bool = True, probed: bool = False
    ) -> ModelOutput:
        """Answer every task on every row.

        Args:
            batch: the rows.
            picks: ``ModelOutput.picks`` of an earlier pass over the same batch; this one routes every token as that one
                did.
            compare, probed: give ``ModelOutput.image_text``, where the model is trained for it; give ``probe``.
        """
        ids_BL, mask_BL = batch.input_ids_BL, batch.attention_mask_BL
        # A confidence says how much to learn from a post, not how to answer it.
        weights_B = input_weights(batch, self.tasks) if self.training else None
        texts = Texts(ids_BL, mask_BL, batch.token_type_ids_BL, batch.task_ids_B, weights_B)
        pictures = self.look(batch)
        reading = self.read(texts, pictures, picks)
        routings, picked, token_rows_S = reading.routings, reading.picks, reading.token_rows_S
        second = probe(reading.fused_BLM, self.tasks, partial(self._answer, mask_BL=mask_BL)) if probed else None
        logits, embeddings, attentions, private = {}, {}, {}, {}
        for number, task in enumerate(self.tasks):
            answer, update = self._answer(number, reading.fused_BLM, mask_BL=mask_BL)
            private |= update
            logits[task.name] = answer.logits
            if answer.pooled_BM is not None:
                embeddings[task.name] = F.normalize(self.projection(answer.pooled_BM).float(), dim=1)
            if answer.attention_BL is not None:
                attentions[task.name] = answer.attention_BL
        # A filler row stands alone. Its tokens had to run, but no loss and no statistic may count them.
        if len(batch.row_ids_B) == 1 and int(batch.row_ids_B) < 0:
            routings, picked, token_rows_S = tuple(map(without_tokens, routings)), (), token_rows_S[:0]
        both = self.compare(texts, pictures, reading) if compare and self.image_text is not None else None
        sharing = Sharing(reading.fused_BLM, mask_BL, private) if self.training else None
        more = {"image_text": both, "sharing": sharing, "probe": second}
        return ModelOutput(logits, embeddings, attentions, routings, token_rows_S, picks=picked, **more)

    def _answer(self, number: int, shared_BLM: Tensor, *, mask_BL: Tensor) -> tuple[HeadOutput, dict[str, Tensor]]:
        """One task's answer from the shared states, and, by its name, what its private part adds to them."""
        update = {} if self.private is None else {self.tasks[number].name: self.private[number](shared_BLM)}
        return self.heads[number](sum(update.values(), shared_BLM), mask_BL), update

    def look(self, batch: Batch) -> Pictures | None:
        """The pictures as the fusion wants them, one per row; the tower runs once per batch, on each picture once."""
        if self.fusion is None:
            return None
        assert batch.pixels_I3HW is not None, "the model reads pictures: every batch has one, if only a blank one"
        tokens = batch.pixels_I3HW if self.tower is None else self.tower(batch.pixels_I3HW)
        if batch.image_numbers_I is not None:
            tokens = tokens[batch.image_numbers_I]
        return Pictures(self.fusion.project(tokens), batch.image_rows_I)

    def read(self, texts: Texts, pictures: Pictures | None, picks: Sequence[Tensor] = ()) -> Reading:
        """One pass of encoder and fusion; without pictures the texts alone."""
        mask_BL, arguments = texts.mask_BL, {"input_ids": texts.ids_BL, "attention_mask": texts.mask_BL}
        if self.has_segments:
            arguments["token_type_ids"] = texts.segments_BL
        inputs = EncoderInputs(arguments, mask_BL, columns=mask_BL.shape[1])
        if pictures is not None:
            inputs = self.fusion.before(inputs, pictures)
        # One device-to-host wait per forward: the number of real tokens decides shapes.
        rows_S, columns_S = mask_BL.nonzero(as_tuple=True)
        index_S, token_rows_S = rows_S * inputs.columns + columns_S, rows_S
        if self.route_image_tokens and inputs.image_index_Z is not None:
            index_S = torch.cat([index_S, inputs.image_index_Z])
            token_rows_S = torch.cat([rows_S, inputs.image_index_Z // inputs.columns])
        context = RoutingContext(index_S, token_rows_S, input_weights_B=texts.weights_B)
        context.picks = dict(zip((block.layer for block in self._blocks), picks, strict=False))
        if self.task_embedding is not None:
            # A filler row has no task; its answer is never used, so any embedding will do.
            context.task_embeddings_BD = self.task_embedding(texts.tasks_B.clamp_min(0))
        states_BLM = self.encode(inputs.arguments, context)[:, : mask_BL.shape[1]]
        fused_BLM = states_BLM if pictures is None else self.fusion.after(states_BLM, mask_BL, pictures)
        routings = tuple(routing for _, routing in sorted(context.routings.items()))
        picked = tuple(routing.indices_Sk for routing in routings)
        of_text = tuple(of_first(routing, len(rows_S)) for routing in routings)
        return Reading(states_BLM, fused_BLM, of_text, rows_S, picked)

    def encode(self, arguments: Mapping[str, Any], context: RoutingContext) -> Tensor:
        """The encoder's last states (B, N, M); ``context`` collects the routings."""
        self.holder.context = context
        try:
            return self.encoder(**arguments).last_hidden_state
        finally:
            self.holder.context = None

    def compare(self, texts: Texts, pictures: Pictures, reading: Reading) -> ImageText:
        """Both sides of the posts with pictures. Loads of the passes that are run for it are not counted."""
        rows_I, in_encoder = pictures.places_I, self.fusion.in_encoder
        own = texts.take(rows_I)
        text_IP = image_IP = logits_I2 = None
        if self.image_text.compares:
            # Where the encoder reads the picture too, the text alone takes a pass of its own.
            alone_ILM = self.read(own, None).states_BLM if in_encoder else reading.states_BLM[rows_I]
            text_IP, image_IP = self.image_text.embed(alone_ILM, own.mask_BL, pictures.tokens)
        if self.image_text.match is not None:
            logits_I2 = self.image_text.judge(reading.fused_BLM[rows_I], own.mask_BL)
        if in_encoder:
            segments = () if own.segments_BL is None else (own.segments_BL,)
            given: tuple[Tensor, ...] = (own.mask_BL, own.ids_BL, *segments)
        else:
            given = (own.mask_BL, reading.states_BLM[rows_I])

        def match(others: tuple[Tensor, ...], numbers_J: Tensor) -> Tensor:
            mask_JL, *what = others
            chosen = pictures.take(numbers_J)
            if in_encoder:
                ids_JL, *segments = what
                # Weighed as the picture's own text is: else the weight would tell which text is the own one.
                weights_J = None if own.weights_B is None else own.weights_B[numbers_J]
                paired = Texts(ids_JL, mask_JL, segments[0] if segments else None, own.tasks_B[numbers_J], weights_J)
                fused_JLM = self.read(paired, chosen).fused_BLM
            else:
                fused_JLM = self.fusion.after(what[0], mask_JL, chosen)
            return self.image_text.judge(fused_JLM, mask_JL)

        return ImageText(pictures.rows_I, text_IP, image_IP, logits_I2, given, match)

    @property
    def image_tokens(self) -> int:
        """Image tokens of a picture that the text encoder reads, as far as known before it runs."""
        if self.fusion is None or not self.fusion.in_encoder:
            return 0
        return expected_tokens((self.encoder if self.tower is None else self.tower.inner).config)

    @property
    def longest_text(self) -> int:
        """Most tokens of a post that the encoder can number, beside its picture where it reads that."""
        return longest_input(self.encoder.config) - (0 if self.tower is None else self.image_tokens)

    def moe_layers(self) -> list[CooperativeBlock]:
        """The cooperative blocks in layer order."""
        return list(self._blocks)


def parameter_group(name: str) -> str:
    """Which learning rate a parameter follows: "encoder", "experts" or "heads", from its path.

    Blocks, the task embedding and private parts are "experts": all that is new beside or behind the pre-trained layers.
    """
    parts = name.split(".")
    child = next((part for part in parts if part in PARAMETER_GROUPS), None)
    assert child, f"{name} lies in none of the modules {', '.join(PARAMETER_GROUPS)} of MultiTaskModel"
    # The blocks live inside the encoder they are attached to.
    return "experts" if child == "encoder" and "block" in parts else PARAMETER_GROUPS[child]


def build_model(
    config: ModelConfig,
    tasks: Sequence[Task],
    *,
    encoder_config: dict[str, Any] | None = None,
    tower_config: dict[str, Any] | None = None,
    image_text: ImageTextConfig | None = None,
    recompute: bool = False,
) -> MultiTaskModel:
    """Build the model; deterministic in torch's seed, so every rank that seeds alike gets the same weights.

    Args:
        config: ``model``; ``config.encoder`` must be a folder or hub name here.
        tasks: the tasks in the order of their ids.
        encoder_config: ``encoder.config.to_dict()`` of an export: no pre-trained weights are read then.
        tower_config: ``tower.inner.config.to_dict()`` likewise, where the export reads pictures.
        image_text: ``loss.image_text``, see ``MultiTaskModel``.
        recompute: activation checkpointing, see ``MultiTaskModel``.
    """
    if encoder_config is None:
        encoder = build_encoder(config)
    else:
        encoder = build_encoder_from_config(encoder_config, dropout=config.dropout)
    tower = None
    if tower_config is not None:
        tower = build_tower_from_config(tower_config, train=config.vision.train_tower)
    elif config.vision.tower is not None:
        # Reading draws numbers in vain, how many depends on the layout; what is new must begin alike on all.
        with torch.random.fork_rng([]):
            tower = build_tower(config.vision, trust_remote_code=config.trust_remote_code)
    return MultiTaskModel(encoder, tasks, config, tower=tower, image_text=image_text, recompute=recompute)


PARAMETER_GROUPS: dict[str, str] = {
    "encoder": "encoder",
    "task_embedding": "experts",
    "heads": "heads",
    "projection": "heads",
    "tower": "encoder",
    "fusion": "heads",
    "image_text": "heads",
    "private": "experts",
}
"""Child of ``MultiTaskModel`` -> group of its parameters."""
