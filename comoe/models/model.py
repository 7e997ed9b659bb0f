"""The whole model in plain PyTorch: its parts, and one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import ImageTextConfig, ModelConfig
from comoe.models.causal import Answers, CausalDecoder
from comoe.models.decoder import DecoderOutput, TaskDecoder
from comoe.models.encoder_io import EncoderInputs, Encoding, TaskRows, Texts
from comoe.models.encoders.attach import adapt_encoder
from comoe.models.encoders.families import (
    family_of,
    layers_by_stack,
    layers_of,
    longest_input,
    reads_segments,
    stacks_of,
)
from comoe.models.encoders.input_scaling import input_weights, note_inputs, scale_inputs
from comoe.models.heads import (
    HeadOutput,
    MaskedWordHead,
    PrivatePart,
    TaskHead,
    attention_of,
    probe,
    projection_of,
    run_heads,
)
from comoe.models.moe.block import (
    AutoEPConfig,
    ContextHolder,
    GatedBlock,
    RoutingContext,
    of_first,
    without_tokens,
)
from comoe.models.moe.gate import GATES, draw
from comoe.models.vision.fusion import Images, build_fusion
from comoe.models.vision.image_text_head import build_image_text_head, image_text_output
from comoe.models.vision.tower import Tower, expected_tokens
from comoe.tasks.task import Task, decoder_tasks, head_tasks, masked_tasks
from comoe.types import IGNORED, Batch, ModelOutput, Probe, Sharing

HEAD_DROPOUT = 0.1
"""Dropout of the heads where ``model.dropout`` is null."""


class MultiTaskModel(nn.Module):
    """Posts in, every task's prediction out; knows no loss.

    Args:
        encoder: a model of ``build_encoder``, the whole of an encoder-decoder where some task is
            in decoder mode; blocks are attached to it here.
        tasks: in the order of the task ids.
        config: ``model``.
        tower: reads images; None where the model reads none, or where its encoder does.
        image_text: ``loss.image_text``, to be trained for it too; None where it only predicts, as
            in an export.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Sequence[Task],
        config: ModelConfig,
        *,
        tower: Tower | None = None,
        image_text: ImageTextConfig | None = None,
    ) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.config = AutoEPConfig(width, config.moe.num_experts, config.moe.top_k)
        self.tasks = tuple(tasks)
        self.holder = ContextHolder()
        self.encoder = encoder
        self.has_segments = reads_segments(encoder.config)
        adapted = adapt_encoder(encoder, config, self.holder, len(tasks))
        self.own_layers, self._blocks = map(tuple, adapted)
        self.draws = bool(self._blocks) and GATES[config.moe.gate].draws
        reads_task = any(block.task_projection is not None for block in self._blocks)
        self.task_embedding = (
            nn.Embedding(len(tasks), config.moe.task_embedding_width) if reads_task else None
        )
        dropout = HEAD_DROPOUT if config.dropout is None else config.dropout
        # A list, not a dict by name: a task may be called "type" or "expert", which torch and
        # DeepSpeed keep for themselves.
        self._headed, self._masked = tuple(head_tasks(self.tasks)), masked_tasks(self.tasks)
        layers = layers_by_stack(encoder)[0]
        more = {"dropout": dropout, "pooling": config.pooling, "num_layers": len(layers)}
        heads = (TaskHead(self.tasks[number], width, **more) for number in self._headed)
        self.heads = nn.ModuleList(heads)
        has_decoder = bool(decoder_tasks(self.tasks))
        widths = (width, config.projection_width)
        self.projection = projection_of(self.heads, *widths, decodes=has_decoder)
        self.is_causal = family_of(encoder.config.model_type).causal
        embed = None if self.task_embedding is None else self.task_embedding.__call__
        parts = (encoder, tasks, self.holder, embed)
        self.decoder = TaskDecoder(*parts) if has_decoder and not self.is_causal else None
        self.causal_decoder = CausalDecoder(*parts) if has_decoder and self.is_causal else None
        self.tower = tower
        self.fusion = build_fusion(encoder, tower, config.vision, dropout=dropout)
        self.route_image_tokens = config.vision.route_image_tokens
        self.image_text = build_image_text_head(image_text, self.fusion, *widths)
        # Last, so that all else begins as it does without them.
        own = config.private_width
        private = [PrivatePart(width, own, dropout=dropout) for _ in tasks] if own else []
        self.private = nn.ModuleList(private) if private else None
        self.task_attention = attention_of(self.heads, width, config.task_attention_width)
        self.masked_heads = nn.ModuleList(
            MaskedWordHead(encoder.get_input_embeddings(), width) for _ in self._masked
        )
        self.lexicon, self.word_numbers = None, 0  # ``add_lexicon`` sets them
        if any(task.weighs("input") for task in self.tasks):
            scale_inputs(encoder, self.holder)
        # Behind what scales them.
        self.mixes_layers = any(head.mixture is not None for head in self.heads)
        noted = layers if self.mixes_layers else self.own_layers
        note_inputs(noted, lambda states: self.holder.context.inputs.append(states))

    def forward(
        self,
        batch: Batch,
        selected: Sequence[Tensor] = (),
        *,
        compare: bool = True,
        decode: bool = True,
        probed: bool = False,
    ) -> ModelOutput:
        """Logits of each task: of those with a head on every row, of others on their own rows.

        Args:
            selected: ``ModelOutput.selected`` of an earlier pass over the same batch; this one routes
                every token as that one did.
            compare, decode, probed: give ``image_text``, run the decoder (where there is one), give
                ``probe``.
        """
        texts, mask_BL = self._texts(batch), batch.attention_mask_BL
        images = self.embed_images(batch)
        scored = decode and self.causal_decoder is not None
        answers = self.causal_decoder.answers(batch, training=self.training) if scored else None
        encoding = self.encode(texts, images, selected, answers)
        shared_BLM, routings, picked = encoding.fused_BLM, encoding.routings, encoding.selected
        token_rows_S, more = encoding.token_rows_S, {}
        if probed:
            more["probe"] = self._probe(encoding, batch)
        of_heads = self.head_outputs(shared_BLM, mask_BL, encoding.lower, batch.bags_B)
        logits, embeddings, attentions, more["post_weights"], private = of_heads
        found, update = self._find_words(shared_BLM, batch)
        logits, private, decoded = logits | found, private | update, None
        if self.decoder is not None and decode:
            decoded, update = self._decoded(batch, shared_BLM, selected)
            private |= update
            logits |= decoded.logits
            routings, picked = routings + decoded.routings, picked + decoded.selected
        if answers is not None:
            states_BNM, updates = self._with_private(batch, encoding.whole_BNM)
            private |= {name: update[:, : mask_BL.shape[1]] for name, update in updates.items()}
            logits |= self.causal_decoder.logits(states_BNM, answers)
        more["generated"] = {} if decoded is None else decoded.generated
        if answers is not None and self.causal_decoder.text_tasks and not self.training:
            given = (batch, logits, self._states_of, self.private)
            more["generated"], logits = self.causal_decoder.texts(*given)
        answer_rows_S, num_answer_layers = None, 0
        if decoded is not None:
            answer_rows_S, num_answer_layers = decoded.rows_S, len(decoded.routings)
        # A filler row stands alone. Its tokens had to run, but no loss and no statistic counts them.
        if len(batch.row_ids_B) == 1 and int(batch.row_ids_B) < 0:
            routings, picked = tuple(map(without_tokens, routings)), ()
            token_rows_S = token_rows_S[:0]
            answer_rows_S = None if decoded is None else answer_rows_S[:0]
        if compare and self.image_text is not None:
            sides = (self.image_text, self.fusion, self.encode, texts, images, encoding)
            more["image_text"] = image_text_output(*sides)
        if self.training:
            more["sharing"] = Sharing(encoding.shared_BLM, mask_BL, private, encoding.distance)
        more |= {"answer_rows_S": answer_rows_S, "num_answer_layers": num_answer_layers}
        logits = self._predicted(logits, batch)
        return ModelOutput(logits, embeddings, attentions, routings, token_rows_S, picked, **more)

    def embed(self, batch: Batch) -> Tensor:
        """The mean of the encoder's last states over the tokens of each row, of length 1: float32, (B, M)."""
        texts = self._texts(batch)
        states_BLM = self.encode(texts, self.embed_images(batch)).fused_BLM.float()
        return F.normalize((states_BLM * texts.mask_BL[:, :, None]).sum(dim=1), dim=1)

    def _texts(self, batch: Batch) -> Texts:
        # A confidence says how much to learn from a post, not what to predict.
        weights_B = input_weights(batch, self.tasks) if self.training else None
        rows = (batch.input_ids_BL, batch.attention_mask_BL, batch.token_type_ids_BL)
        draws_B = None
        if self.draws and self.training:
            # The same on any layout: of seed, step, post and pass alone.
            draws_B = batch.row_ids_B
            for salt in (self.holder.seed, max(batch.step, 0), self.holder.view):
                draws_B = draw(draws_B, salt)
        more = (batch.text_numbers_B, draws_B, batch.lexicon_BLK)
        return Texts(*rows, batch.task_ids_B, weights_B, *more)

    def head_outputs(
        self,
        states_BLM: Tensor,
        mask_BL: Tensor,
        lower: Sequence[Tensor] = (),
        bags_B: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], ...]:
        """Logits, embeddings, attentions, weights of posts and private updates of tasks with heads; ``lower``: what
        each layer reads."""
        logits, embeddings, attentions, weights = {}, {}, {}, {}
        outputs, private = self._run_heads(states_BLM, mask_BL, lower, bags_B)
        for number, output in zip(self._headed, outputs, strict=True):
            name = self.tasks[number].name
            logits[name] = output.logits
            if output.pooled_BM is not None:
                embeddings[name] = F.normalize(self.projection(output.pooled_BM).float(), dim=1)
            if output.attention_BL is not None:
                attentions[name] = output.attention_BL
            weights |= {} if output.weights_B is None else {name: output.weights_B}
        return logits, embeddings, attentions, weights, private

    def _run_heads(
        self,
        states_BLM: Tensor,
        mask_BL: Tensor,
        lower: Sequence[Tensor],
        bags_B: Tensor | None,
        only: int | None = None,
    ) -> tuple[list[HeadOutput], dict[str, Tensor]]:
        """Outputs of all heads, or of one, and, by their tasks' names, what private parts add to the states."""
        private: dict[str, Tensor] = {}

        def read(place: int) -> Tensor:
            update = self._private(self._headed[place], states_BLM)
            private.update(update)
            return sum(update.values(), self.heads[place].mixed((*lower, states_BLM)))

        return run_heads(self.heads, read, mask_BL, bags_B, self.task_attention, only), private

    def _find_words(
        self, states_BLM: Tensor, batch: Batch, only: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of tasks in masked mode, or of one, on their own rows, and what private parts add to the states."""
        logits, private = {}, {}
        for (number, task), head in zip(self._masked.items(), self.masked_heads, strict=True):
            if batch.masked_ids_BL is not None and only in (None, number):
                private |= (update := self._private(number, states_BLM))
                ids_BL = batch.masked_ids_BL.where((batch.task_ids_B == number)[:, None], IGNORED)
                read_BLM, words = (
                    sum(update.values(), states_BLM),
                    self.encoder.get_input_embeddings(),
                )
                logits[task.name] = head(read_BLM, ids_BL, words)
        return logits, private

    def _probe(self, encoding: Encoding, batch: Batch) -> Probe:
        assert not self.own_layers, "the recipe's rules refuse it"
        rest = (batch.attention_mask_BL, [x.detach() for x in encoding.lower], batch.bags_B)

        def predict(number: int, states_BLM: Tensor) -> Tensor:
            if number in self._masked:
                return self._find_words(states_BLM, batch, number)[0][self.tasks[number].name]
            return self._run_heads(states_BLM, *rest, self._headed.index(number))[0][0].logits

        order = (*self._headed, *self._masked)  # as dropout is drawn
        return probe(encoding.fused_BLM, {i: self.tasks[i] for i in order}, predict)

    def _private(self, number: int, shared_BLM: Tensor) -> dict[str, Tensor]:
        if self.private is None:
            return {}
        return {self.tasks[number].name: self.private[number](shared_BLM)}

    def _decoded(
        self, batch: Batch, shared_BLM: Tensor, selected: Sequence[Tensor]
    ) -> tuple[DecoderOutput, dict[str, Tensor]]:
        """What the decoder gives, and what the private parts of its tasks add to their rows."""
        states_BLM, updates = self._with_private(batch, shared_BLM)
        if not self.training:
            return self.decoder.predict(states_BLM, batch), updates
        return self.decoder.teacher_force(states_BLM, batch, self._by_layer(selected)), updates

    def _predicted(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """In the order of the tasks; outside training, of label words that are normalized, by token."""
        found = {task.name: logits[task.name] for task in self.tasks if task.name in logits}
        for task in self.tasks:
            if task.length_normalized and task.name in found and not self.training:
                found[task.name] = found[task.name] / (batch.choices[task.name] != IGNORED).sum(1)
        return found

    def _with_private(self, batch: Batch, shared_BLM: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """States with what the private parts of the tasks in decoder mode add to their rows, and these updates."""
        updates: dict[str, Tensor] = {}
        states_BLM = shared_BLM
        for number, task in decoder_tasks(self.tasks).items():
            if self.private is not None:
                updates |= self._private(number, shared_BLM)
                own_B11 = (batch.task_ids_B == number).to(shared_BLM.dtype)[:, None, None]
                states_BLM = states_BLM + updates[task.name] * own_B11
        return states_BLM, updates

    def _states_of(self, batch: Batch, answers: Answers) -> Tensor:
        """Last states of prompts with what is scored behind them, as the output layer reads them."""
        encoding = self.encode(self._texts(batch), None, answers=answers)
        return self._with_private(batch, encoding.whole_BNM)[0]

    def _by_layer(self, selected: Sequence[Tensor]) -> dict[int, Tensor]:
        return dict(zip((block.layer for block in self._blocks), selected, strict=False))

    def embed_images(self, batch: Batch) -> Images | None:
        """The images as the fusion wants them, one per row; the tower runs once per batch, on each image once."""
        if self.fusion is None:
            return None
        assert batch.pixels_I3HW is not None, (
            "the model reads images: every batch has one, if only a blank one"
        )
        tokens = batch.pixels_I3HW if self.tower is None else self.tower(batch.pixels_I3HW)
        if batch.image_numbers_I is not None:
            tokens = tokens[batch.image_numbers_I]
        return Images(self.fusion.project(tokens), batch.image_rows_I)

    def encode(
        self,
        texts: Texts,
        images: Images | None,
        selected: Sequence[Tensor] = (),
        answers: Answers | None = None,
    ) -> Encoding:
        """One pass of encoder and fusion; without images the texts alone, or with labels to score behind them."""
        mask_BL = texts.mask_BL
        # An encoder that reads the images too takes a row per task, as its images come.
        whole = answers is not None or (images is not None and self.fusion.in_encoder)
        read, fan_out = (texts, None) if whole else texts.distinct()
        arguments = {"input_ids": read.ids_BL, "attention_mask": read.mask_BL}
        if self.has_segments:
            arguments["token_type_ids"] = read.segments_BL
        inputs = EncoderInputs(arguments, mask_BL, columns=mask_BL.shape[1])
        if self.is_causal:
            # A cache would be filled twice where a layer is computed again for its backward pass.
            arguments["use_cache"] = False
        if images is not None:
            inputs = self.fusion.before(inputs, images)
        if answers is not None:
            inputs = self.causal_decoder.behind(inputs, answers)
        # A device-to-host wait: the number of real tokens decides shapes.
        rows_S, columns_S = mask_BL.nonzero(as_tuple=True)
        index_S, token_rows_S = rows_S * inputs.columns + columns_S, rows_S
        more_Z = inputs.image_index_Z if self.route_image_tokens or answers is not None else None
        if more_Z is not None:
            index_S = torch.cat([index_S, more_Z])
            token_rows_S = torch.cat([rows_S, more_Z // inputs.columns])
        context = RoutingContext(
            index_S, token_rows_S, input_weights_B=texts.weights_B, fan_out=fan_out
        )
        context.draws_B, context.lexicon_BLK = texts.draws_B, read.lexicon_BLK
        context.selected = self._by_layer(selected)
        # A filler row has no task; its output is never used, so any will do.
        tasks_B = texts.tasks_B.clamp_min(0)
        if self.own_layers:
            context.task_rows = TaskRows.of(tasks_B, len(self.tasks))
        if self.task_embedding is not None:
            context.task_ids_B = tasks_B
            context.task_embeddings_BD = self.task_embedding(context.task_ids_B)
        states_BNM = self.run_encoder(inputs.arguments, context)
        if fan_out is not None:
            states_BNM = fan_out.to_rows(states_BNM)  # no layer of this encoder has a block
        states_BLM = states_BNM[:, : mask_BL.shape[1]]
        below = context.inputs if fan_out is None else map(fan_out.to_rows, context.inputs)
        lower = tuple(states_BNM[:, : mask_BL.shape[1]] for states_BNM in below)
        fused_BLM = states_BLM
        if images is not None:
            fused_BLM = self.fusion.after(states_BLM, mask_BL, images)
        routings = tuple(routing for _, routing in sorted(context.routings.items()))
        picked = tuple(routing.indices_Sk for routing in routings)
        of_text = tuple(of_first(routing, len(rows_S)) for routing in routings)
        shared_BLM = lower[-len(self.own_layers)] if self.own_layers else fused_BLM
        found = (states_BLM, fused_BLM, of_text, rows_S, picked, states_BNM, shared_BLM)
        distance = sum(context.distances) if context.distances else None
        return Encoding(*found, lower if self.mixes_layers else (), distance)

    def run_encoder(self, arguments: Mapping[str, Any], context: RoutingContext) -> Tensor:
        """The encoder's last states (B, N, M); ``context`` collects the routings."""
        self.holder.context = context
        try:
            return stacks_of(self.encoder)[0](**arguments).last_hidden_state
        finally:
            self.holder.context = None

    @property
    def reads_tasks(self) -> bool:
        """Whether a row's states depend on its task."""
        return self.task_embedding is not None or bool(self.own_layers)

    @property
    def image_tokens(self) -> int:
        """Image tokens of an image that the text encoder reads, as far as known before it runs."""
        if self.fusion is None or not self.fusion.in_encoder:
            return 0
        return expected_tokens((self.encoder if self.tower is None else self.tower.inner).config)

    @property
    def longest_text(self) -> int:
        """Most tokens of a post that the encoder can number, beside an image and a text behind it."""
        behind = 0 if self.tower is None else self.image_tokens
        behind += 0 if self.causal_decoder is None else self.causal_decoder.longest_text
        return longest_input(self.encoder.config) - behind

    @property
    def first_decoder_layer(self) -> int | None:
        """Number of the decoder's first layer, as blocks count them; None without a decoder."""
        if self.decoder is None:
            return None
        return len(layers_of(self.encoder)) - len(layers_of(self.decoder.stack))

    def moe_layers(self) -> list[GatedBlock]:
        """What has a gate, in layer order: the cooperative blocks, or the gates of LoRA experts."""
        return list(self._blocks)
