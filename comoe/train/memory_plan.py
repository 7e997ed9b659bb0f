"""How much memory one rank needs, as a plan before anything is built: ZeRO, expert parallelism, precision, offload.

With D dense and X expert parameters (of all experts), W ranks, EP ranks per set of experts, and p
bytes per weight (2 in bf16, else 4), one rank holds, in bytes (frozen parameters count as weights
and nothing else):

    weights       p (D + X / EP)    stage 1, 2          p (D + X) / W    stage 3
    gradients     4 (D + X / EP)    stage 1             4 (D + X) / W    stage 2, 3      (summed in float32)
                  2 (D + X / EP)    more at stage 1 in bf16: its optimizer keeps both widths until the step
    master copy   4 (D + X) / W     all stages, in float32 too: ZeRO clones its share
    moments       4 n (D + X) / W   n = 2 for AdamW, 1 for SGD with momentum, else 0
    bucket        p R               R gradient elements on their way to the other ranks
    activations   what the backward pass reads, see ``Work`` and ``DecoderWork``
    vocabulary    (8 + p') A V          A target tokens over a vocabulary of V, p' = 2 in bf16, else 0
    dispatch      4 p S k M         one layer's routes: sent, received, padded for the grouped product, returned

Expert parallelism divides what ZeRO below stage 3 leaves whole; the optimizer's share is (D + X) /
W at every EP, because the W / EP ranks that hold the same experts split their state. Stage 2 in
float32 keeps the whole of every tensor that its share cuts, see ``whole_tensors``; what stage 3
gathers for the moment is one line of its own.

Not counted: allocator slack; what only losses learn (temperatures, a discriminator of some ten
thousand numbers); what weightings that read gradients keep for a moment, per task what a head
keeps, the slope of the last states and 2 M^2 numbers; and in ``step()`` one more float32 copy of
the largest group's share, when the activations are gone.
``tests/multiprocess/test_memory_measured.py`` compares each line with tensors of real runs.

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; the float32 facts were read in DeepSpeed
0.19.8 and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from comoe.config.recipe import Recipe
from comoe.data.tokens.split import TokenizedSplit
from comoe.models.encoders.families import expert_width, family_of, has_decoder
from comoe.models.model import MultiTaskModel
from comoe.models.moe.block import CooperativeBlock
from comoe.models.moe.lora import LoraLinear, adapters_of, widths_of
from comoe.models.vision.tower import expected_tokens
from comoe.tasks.task import decoder_tasks, head_tasks, masked_tasks
from comoe.train.parallel.ds_config import Layout

FULL = 4
"""Bytes of a float32."""

HALF = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass of one rank goes through; its activations are what the backward pass reads."""

    tokens: int = 0
    """Tokens of the micro-batch; 0 leaves activations and dispatch out."""
    layers: int = 0
    """Encoder layers."""
    shared_layers: int = 0
    """Of them, where a row serves one task, those below the first block and the first layer of a
    task's own: a text is read once."""
    shared_tokens: int = 0
    """Tokens of the micro-batch that these layers read."""
    width: int = 0
    """Encoder width M."""
    ffn_width: int | None = None
    """Hidden width of the encoder's feed-forward; None is 4 M."""
    tasks: int = 0
    """Heads that pool."""
    private_parts: int = 0
    """Tasks with a private part."""
    private_width: int = 0
    """Hidden width of one."""
    mixing_heads: int = 0
    """Heads that mix the states of all layers."""
    tied: int = 0
    """Weights of all tasks' own layers that a loss holds together."""
    moe_layers: int = 0
    """Layers with experts."""
    top_k: int = 0
    """Experts per token k."""
    expert_width: int = 0
    """Width F of one expert."""
    adapter_numbers: int = 0
    """Numbers that the LoRA experts of all linear maps keep of one token."""
    recompute: bool = False
    """Activation checkpointing per layer: the inputs of all layers are kept, and one layer
    whole."""

    @property
    def layer_tokens(self) -> int:
        """Sum over the layers of the tokens that each reads."""
        return (self.layers - self.shared_layers) * self.tokens + (
            self.shared_layers * self.shared_tokens
        )

    def activation_bytes(self, number: int) -> int:
        """All layers, blocks, embeddings and heads; ``number`` bytes per activation."""
        if not self.recompute:
            blocks = self.moe_layers * self.block_bytes(number)
            layers = self.layer_tokens * self.layer_token_bytes(number)
            adapters = self.tokens * self.adapter_numbers * number
            return layers + blocks + adapters + self.outer_bytes(number)
        inputs = self.layer_tokens * self.width * number
        return (
            inputs
            + self.layer_bytes(number)
            + self.block_bytes(number) * (self.moe_layers > 0)
            + self.tokens * self.adapter_numbers * number // max(1, self.layers)
            + self.outer_bytes(number)
        )

    def layer_bytes(self, number: int) -> int:
        """One encoder layer that reads all tokens."""
        return self.tokens * self.layer_token_bytes(number)

    def layer_token_bytes(self, number: int) -> int:
        """One token in one encoder layer, without the attention matrix.

        Per token 8 M + 2 F' numbers (input, query, key, value, attended, and around the
        feed-forward of width F') and two one-byte dropout masks of M. A GPU's fused attention keeps
        no matrix; a CPU keeps some under dropout.

        Source: Korthikanti et al. 2022, arXiv:2205.05198: 34 M bytes in 16 bits at F' = 4 M.
        """
        ffn = 4 * self.width if self.ffn_width is None else self.ffn_width
        return (8 * self.width + 2 * ffn) * number + 2 * self.width

    def block_bytes(self, number: int) -> int:
        """One cooperative block.

        Per token its norm's input and output, the gate's float32 input and a one-byte dropout mask;
        per route (one token to one expert) input, output, and four of the expert's width: gate, up,
        the activated gate, the product.
        """
        routes = self.top_k * (2 * self.width + 4 * self.expert_width) * number
        return self.tokens * (self.width * (2 * number + FULL + 1) + routes)

    def outer_bytes(self, number: int) -> int:
        """Outside of the layers: three numbers of the embeddings, in bf16 a float32 copy of the
        last states for each pooling head, for each head that mixes layers the mixture, for all of
        them the states of texts once per row, and for each private part its norm's output, the sum
        that its head reads, a one-byte dropout mask and four numbers of its hidden width. And how
        far tied weights are from their mean."""
        private = (2 * self.width + 4 * self.private_width) * number + self.width
        heads = self.width * (3 * number + (FULL * self.tasks if number < FULL else 0))
        copied = (
            (self.shared_layers + 1) * (self.shared_tokens < self.tokens) * (self.mixing_heads > 0)
        )
        mixed = self.width * number * (self.mixing_heads + copied)
        return self.tokens * (heads + mixed + self.private_parts * private) + FULL * self.tied

    def dispatch_bytes(self, number: int) -> int:
        """One layer's routes on their way: sent, received, padded for the grouped product, and returned."""
        return 4 * number * self.tokens * self.top_k * self.width if self.moe_layers else 0


@dataclass(frozen=True, slots=True)
class DecoderWork:
    """What one forward pass of one rank goes through in a decoder, for the texts that it learns."""

    own: Work = field(default_factory=Work)
    """Its layers on the tokens of the targets, as if it were an encoder of them."""
    read_tokens: int = 0
    """Tokens of the encoder that its rows look at."""
    vocabulary: int = 0
    """Vocabulary V of the decoder's outputs."""

    def activation_bytes(self, number: int) -> int:
        """All layers with what they look at, the gathered states of their rows, the embeddings."""
        layers = self.own.layers if not self.own.recompute else min(1, self.own.layers)
        gathered = self.read_tokens * self.own.width * number * (self.own.layers > 0)
        return self.own.activation_bytes(number) + layers * self.look_bytes(number) + gathered

    def look_bytes(self, number: int) -> int:
        """One layer's look at the encoder's states: of each token of a target the norm's output,
        query, attended, sum and a one-byte dropout mask; of each token that it looks at a key and a
        value."""
        per_token = 4 * self.own.width * number + self.own.width
        return self.own.tokens * per_token + 2 * self.read_tokens * self.own.width * number

    def vocabulary_bytes(self, number: int) -> int:
        """Log-probabilities of all words and their gradient in float32, and in bf16 the logits before them."""
        return self.own.tokens * self.vocabulary * (2 * FULL + (number if number < FULL else 0))


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One line of the plan, for one rank."""

    name: str
    """What it is."""
    device_bytes: int
    """Bytes on the accelerator (on a CPU: in main memory)."""
    host_bytes: int = 0
    """Bytes in main memory because of the optimizer offload."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one rank."""

    parts: tuple[MemoryPart, ...]
    """Its parts, largest groups as in the module's formulas."""
    setting: str
    """The layout in words."""

    @property
    def device_bytes(self) -> int:
        """Sum on the accelerator."""
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Sum in main memory because of the offload; 0 without one."""
        return sum(part.host_bytes for part in self.parts)

    def lines(self) -> list[str]:
        """The plan as a table for people, in MiB, from 10 GiB on in GiB; the second column is there with an offload."""
        rows = [*self.parts, MemoryPart("total", self.device_bytes, self.host_bytes)]
        head = [f"memory per rank, estimated ({self.setting})"]
        if self.host_bytes:
            head.append(f"  {'':<26}{'device':>14}{'host':>14}")
        return head + [
            f"  {row.name:<26}{_readable(row.device_bytes)}{_readable(row.host_bytes) if self.host_bytes else ''}"
            for row in rows
        ]


def reduction_elements(bucket: int, *, largest: int) -> int:
    """Gradient elements that may be on their way to the other ranks at once.

    Args:
        bucket: ``reduce_bucket_size`` of the DeepSpeed JSON.
        largest: elements of the largest weight: one that is larger than the bucket, such as the
            table of words, goes by itself.
    """
    return max(bucket, largest)


@dataclass(frozen=True, slots=True)
class RunSize:
    """What a plan is made for: parameters, ranks, precision, optimizer.

    Raises:
        ValueError: a stage other than 1, 2, 3, or ranks that ``ep_size`` does
            not divide.
    """

    dense: int
    """D: parameters of everything but experts."""
    experts: int
    """X: parameters of all experts of all layers together."""
    frozen: int = 0
    """Of D those that do not train: weights alone, no gradient, master copy or moment."""
    world_size: int = 1
    """Ranks W."""
    ep_size: int = 1
    """Ranks that share one set of experts."""
    stage: int = 2
    """ZeRO stage."""
    bf16: bool = False
    """Bfloat16 weights and activations with float32 masters; else float32."""
    beside: bool = False
    """Other weights are kept beside those that train, in float32: an average, or Reptile's."""
    optimizer: str = "adamw"
    """Key of ``MOMENTS``."""
    momentum: float = 0.0
    """Of sgd; 0 needs no buffer."""
    offload: bool = False
    """Master copy, moments and, from stage 2 on, gradients live in main memory."""
    bucket_elements: int = 0
    """R: ``reduce_bucket_size`` of the DeepSpeed JSON."""
    gathered_elements: int = 0
    """Weights that stage 3 holds whole at a time, such as two encoder layers; 0 leaves them out."""
    tensor_groups: Sequence[tuple[Sequence[int], int]] = ()
    """Per optimizer group the sizes of its tensors in order and the ranks that share it; makes the
    gradients of stage 2 in float32 exact. Empty takes the even share."""

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"zero_optimization.stage is {self.stage}; it must be 1, 2 or 3.")
        if self.world_size % self.ep_size:
            raise ValueError(
                f"ep_size ({self.ep_size}) must divide the number of ranks ({self.world_size})."
            )

    def gradient_bytes(self) -> int:
        """Of the gradients when the backward pass ends."""
        if self.stage == 1:
            whole = self.dense - self.frozen + math.ceil(self.experts / self.ep_size)
            return (FULL + HALF * self.bf16) * whole
        if self.stage == 2 and not self.bf16 and self.tensor_groups:
            return FULL * sum(whole_tensors(group, ranks=n) for group, n in self.tensor_groups)
        return FULL * self.trained_share

    @property
    def trained_share(self) -> int:
        """Parameters whose master copy and moments one rank holds."""
        return math.ceil((self.dense - self.frozen + self.experts) / self.world_size)

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        precision = "bf16" if self.bf16 else "float32"
        offload = ", optimizer offload" if self.offload else ""
        return f"{ranks}, EP {self.ep_size}, ZeRO {self.stage}, {precision}{offload}"


def plan_memory(
    size: RunSize,
    work: Work | None = None,
    *,
    tower: Work | None = None,
    decoder: DecoderWork | None = None,
) -> MemoryPlan:
    """Estimate the memory of one rank by the formulas of this module.

    Args:
        size: of model and layout.
        work: what a forward pass goes through; None leaves activations and dispatch out.
        tower: what a vision tower that trains goes through; a frozen one keeps nothing for a
            backward pass.
        decoder: what a decoder goes through; None without one.
    """
    number = HALF if size.bf16 else FULL
    whole = size.dense + math.ceil(size.experts / size.ep_size)
    share = math.ceil((size.dense + size.experts) / size.world_size)
    trained, offload = size.trained_share, size.offload
    held = share if size.stage == 3 else whole
    beside = FULL * max(0, held - size.frozen) * size.beside
    moments = FULL * MOMENTS[size.optimizer](size.momentum) * trained
    gathered = number * size.gathered_elements if size.stage == 3 else 0
    parts = (
        MemoryPart("weights", number * held),
        *([MemoryPart("weights beside those that train (float32)", beside)] if beside else []),
        _part("gradients", size.gradient_bytes(), on_host=offload and size.stage > 1),
        _part("master copy (float32)", FULL * trained, on_host=offload),
        _part(f"moments of {size.optimizer}", moments, on_host=offload),
        MemoryPart("reduction bucket", number * size.bucket_elements),
        MemoryPart("gathered weights", gathered),
        *_passing(work or Work(), tower or Work(), decoder, number),
    )
    return MemoryPlan(parts, str(size))


def _passing(
    passed: Work, seen: Work, decoder: DecoderWork | None, number: int
) -> list[MemoryPart]:
    """What a forward pass leaves for the backward pass, and needs for a moment."""
    written = decoder or DecoderWork()
    activations = passed.activation_bytes(number) + seen.layers * seen.layer_bytes(number)
    parts = [MemoryPart("activations (rough)", activations + written.activation_bytes(number))]
    if decoder is not None:
        parts.append(MemoryPart("logits of the vocabulary", decoder.vocabulary_bytes(number)))
    # One layer at a time.
    moved = max(passed.dispatch_bytes(number), written.own.dispatch_bytes(number))
    return [*parts, MemoryPart("dispatch buffers", moved)]


def whole_tensors(sizes: Sequence[int], *, ranks: int) -> int:
    """Elements of the tensors that one rank's even share of a flat group cuts or holds; the most over ranks.

    Args:
        sizes: elements of the group's tensors, in order.
        ranks: ranks that share the group.
    """
    share = math.ceil(sum(sizes) / ranks)
    most = 0
    for rank in range(ranks):
        start, held = 0, 0
        for size in sizes:
            if start < (rank + 1) * share and start + size > rank * share:
                held += size
            start += size
        most = max(most, held)
    return most


def _part(name: str, size: int, *, on_host: bool) -> MemoryPart:
    return MemoryPart(name, 0, size) if on_host else MemoryPart(name, size)


def _readable(size: int) -> str:
    if size >= 10 * 2**30:
        return f"{size / 2**30:>10,.1f} GiB"
    return f"{size / 2**20:>10,.1f} MiB"


MOMENTS: dict[str, Callable[[float], int]] = {
    "adamw": lambda momentum: 2,
    "sgd": lambda momentum: int(momentum > 0),
}
"""Optimizer -> float32 numbers it keeps per parameter, given its momentum."""

ROUGH = (
    "reduction bucket",
    "gathered weights",
    "activations (rough)",
    "logits of the vocabulary",
    "dispatch buffers",
)
"""Parts of a plan that are bounds or estimates; the others are there in any case."""

UNBOUNDED = 1_000_000_000
"""What DeepSpeed takes where the JSON says nothing of ``stage3_max_live_parameters`` and its
like."""

DEFAULT_BUCKET = 500_000_000
"""What DeepSpeed takes where the JSON says nothing of ``reduce_bucket_size``."""


def count_parameters(model: MultiTaskModel, *, top_k: int) -> dict[str, int]:
    """Parameters of the whole model, a vision tower's too: in all, in experts, dense, frozen, and active per token."""
    total = _elements(model.parameters())
    adapters, blocks = adapters_of(model), model.moe_layers()
    mixtures = [block.mixture for block in blocks if isinstance(block, CooperativeBlock)]
    experts = sum(_elements(mixture.experts.parameters()) for mixture in mixtures)
    experts += _elements(weight for one in adapters for weight in (one.lora_A, one.lora_B))
    frozen = _elements(parameter for parameter in model.parameters() if not parameter.requires_grad)
    # All LoRA experts of a token run; the weights of those that are not selected are 0.
    share = 1.0 if adapters else top_k / max(1, model.config.num_local_experts)
    # A token goes through the copy of one task.
    own = sum(_elements(layer.parameters()) for layer in model.own_layers)
    others = own - own // len(model.tasks)
    return {
        "total": total,
        "experts": experts,
        "dense": total - experts,
        "frozen": frozen,
        "active": int(total - experts * (1 - share)) - others,
    }


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    # Under ZeRO-3 a weight that is split already says by itself how large it is in all.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def plan_run(
    recipe: Recipe,
    layout: Layout,
    model: MultiTaskModel,
    train: TokenizedSplit,
    settings: Mapping[str, Any],
) -> MemoryPlan:
    """The memory of one rank of this run.

    Args:
        recipe: with the encoder resolved.
        layout: of the run.
        model: built, on no device in particular.
        train: its mean length decides the tokens of a forward pass.
        settings: complete DeepSpeed configuration.
    """
    parameters = count_parameters(model, top_k=recipe.model.moe.top_k)
    zero = settings["zero_optimization"]
    size = RunSize(
        parameters["dense"],
        parameters["experts"],
        frozen=parameters["frozen"],
        world_size=layout.world_size,
        ep_size=layout.ep_size,
        stage=layout.stage,
        bf16=layout.bf16,
        beside=recipe.train.average_weights > 0 or recipe.train.reptile_steps > 0,
        optimizer=recipe.train.optimizer,
        momentum=recipe.train.momentum,
        offload=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
        bucket_elements=reduction_elements(
            int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            largest=max(
                _elements([weight]) for weight in model.parameters() if weight.requires_grad
            ),
        ),
        gathered_elements=min(
            kept_whole(zero), parameters["dense"] + parameters["experts"] // layout.ep_size
        ),
    )
    # The second pass of R-Drop, and that of second views, wait for the backward pass too.
    contrastive = recipe.loss.contrastive
    viewed = contrastive.views == 2 and (contrastive.weight or contrastive.first_steps)
    passes = 1 + bool(recipe.loss.r_drop_weight) + bool(viewed and model.projection is not None)
    posts = layout.micro_batch_size * passes
    work, decoder = _text_work(recipe, model, train, posts=posts)
    return plan_memory(size, work, tower=_tower_work(model, posts), decoder=decoder)


def _text_work(
    recipe: Recipe, model: MultiTaskModel, train: TokenizedSplit, *, posts: int
) -> tuple[Work, DecoderWork | None]:
    """What the encoder, and a decoder, go through for a number of posts."""
    encoder, blocks = model.encoder.config, model.moe_layers()
    by_task, distilled = recipe.model.row_per_task, bool(recipe.distill.teachers)
    most = recipe.data.max_posts
    rows = _row_tokens(model, train, by_task=by_task, distilled=distilled, most=most)
    num_layers, ffn_widths = stack_shapes(encoder)
    adapters, width = adapters_of(model.encoder), model.config.hidden_size
    common = {
        "width": width,
        "top_k": recipe.model.moe.top_k,
        "recompute": recipe.train.activation_checkpointing,
        "expert_width": 0 if adapters or not blocks else expert_width(recipe.model.moe, width),
    }
    of_encoder = sum(block.layer < num_layers[0] for block in blocks)
    below = 0
    if rows.texts < rows.encoder:
        below = num_layers[0] - len(model.own_layers)
        below = min(below, blocks[0].layer) if of_encoder else below
    work = Work(
        tokens=int(posts * (rows.encoder + rows.images * model.image_tokens)),
        layers=num_layers[0],
        shared_layers=below,
        shared_tokens=int(posts * rows.texts),
        ffn_width=ffn_widths[0],
        tasks=sum(head.pooling is not None for head in model.heads),
        private_parts=len(model.tasks) if recipe.model.private_width else 0,
        private_width=recipe.model.private_width,
        mixing_heads=sum(head.mixture is not None for head in model.heads),
        tied=sum(_elements(layer.parameters()) for layer in model.own_layers)
        * model.holder.measures_distance,
        moe_layers=0 if adapters else of_encoder,
        adapter_numbers=sum(map(kept_of_token, adapters)),
        **common,
    )
    if model.causal_decoder is not None:
        # The answers lie behind the prompts; each of their tokens is predicted over the vocabulary.
        answers = int(posts * rows.answers)
        scored = DecoderWork(Work(tokens=answers), vocabulary=encoder.vocab_size)
        return replace(work, tokens=work.tokens + answers), scored
    if not has_decoder(model.encoder):
        hidden = sum(
            float((train.labelled[:, number] * train.head_lengths).mean()) * task.probability
            for number, task in masked_tasks(model.tasks).items()
        )
        scored = DecoderWork(Work(tokens=int(posts * hidden)), vocabulary=encoder.vocab_size)
        return work, scored if hidden else None
    own = Work(
        tokens=int(posts * rows.answers),
        layers=num_layers[1],
        ffn_width=ffn_widths[1],
        moe_layers=0 if adapters else len(blocks) - of_encoder,
        **common,
    )
    prompts = int(posts * rows.prompts)
    return work, DecoderWork(own, read_tokens=prompts, vocabulary=encoder.vocab_size)


def kept_of_token(adapter: LoraLinear) -> int:
    """Numbers that the experts of a linear map keep of a token: what A reads, under dropout a copy
    of its own, and what B reads, before and after the gate."""
    columns = adapter.num_experts * adapter.rank
    return 2 * columns + (widths_of(adapter.inner)[0] if adapter.dropout.p else 0)


class RowTokens(NamedTuple):
    """Tokens per post, on average over a split."""

    encoder: float
    """That the encoder reads, in all of its rows."""
    prompts: float
    """Of them in rows that a decoder predicts."""
    answers: float
    """That a decoder learns."""
    images: float
    """Rows per post, each with its image."""
    texts: float
    """That the encoder's layers below the first block, or a task's own, read, each text once."""


def _row_tokens(
    model: MultiTaskModel, train: TokenizedSplit, *, by_task: bool, distilled: bool, most: int
) -> RowTokens:
    decoded, masked = decoder_tasks(model.tasks), [*masked_tasks(model.tasks)]
    if not decoded and not by_task and not masked:
        read = float((train.lengths * train.texts_read(most)).mean())
        return RowTokens(read, 0.0, 0.0, 1.0, texts=read)
    # Teachers know most tasks, and say something of every post.
    labelled = train.labelled[:, [*head_tasks(model.tasks)]] | distilled
    hidden = train.labelled[:, masked].sum(axis=1)
    own = (labelled.sum(axis=1) if by_task else labelled.any(axis=1)) + hidden
    lengths = train.head_lengths * train.texts_read(most)
    read = float((own * lengths).mean())
    # As in the model: rows that differ below the blocks share nothing.
    once = by_task and not model.image_tokens and not any(t.weighs("input") for t in model.tasks)
    texts = float(((labelled.any(axis=1) + hidden) * lengths).mean()) if once else read
    prompts = answers = asked = 0.0
    for number, task in decoded.items():
        mine = train.labelled[:, number] | (distilled and bool(task.label_words))
        asked += float(mine.mean())
        prompts += float((mine * train.prompts[task.name].lengths).mean())
        if task.label_words:
            scored = len(task.labels) if distilled else 1
            answers += float(mine.mean()) * tokens_of_words(task.label_words) * scored
        else:
            answers += float((mine * train.targets[task.name].lengths).mean())
    images = float(own.mean()) + asked
    return RowTokens(read + prompts, prompts, answers, images, texts=texts + prompts)


def tokens_of_words(label_words: Sequence[str]) -> int:
    """Tokens of the longest label: about two a word, and an end token; the collator knows them exactly."""
    return 2 * max((len(words.split()) for words in label_words), default=1) + 1


def stack_shapes(hf_config: Any) -> tuple[list[int], list[int]]:
    """Layers, and hidden width of the feed-forward, of the encoder and, of an encoder-decoder, of
    the decoder. A gated one keeps four numbers of its width where others keep two, so it counts as
    one of twice the width."""
    family = family_of(hf_config.model_type)
    gated = 2 if family.gated or getattr(hf_config, "is_gated_act", False) else 1
    layers = [getattr(hf_config, field) for field in family.num_layers]
    # GPT-2 says nothing of the usual width.
    widths = [
        gated * (getattr(hf_config, field) or 4 * hf_config.hidden_size)
        for field in family.feed_forward
    ]
    return layers, widths if len(widths) == len(layers) else widths * len(layers)


def _tower_work(model: MultiTaskModel, images: int) -> Work | None:
    """What a vision tower of transformer layers that trains goes through; None for others."""
    if model.tower is None or not model.tower.trained:
        return None
    config = model.tower.inner.config
    layers, tokens = getattr(config, "num_hidden_layers", 0), expected_tokens(config)
    ffn_width = getattr(config, "intermediate_size", None)
    return Work(tokens=images * tokens, layers=layers, width=model.tower.width, ffn_width=ffn_width)


def kept_whole(zero: Mapping[str, Any]) -> int:
    """Weights that stage 3 may hold whole from the forward to the backward pass, in elements.

    A weight stays gathered while its next use is no farther than ``stage3_max_reuse_distance``
    elements of other weights away, in the forward and then the backward pass: so half of that
    distance counts. It stays too where fetching ahead, up to ``stage3_max_live_parameters``, has
    come to its next use. So the larger of the two holds.

    Args:
        zero: ``zero_optimization`` of the DeepSpeed JSON.

    Source: ``partitioned_param_coordinator`` of DeepSpeed 0.19.8;
    tests/multiprocess/test_construction_memory.py measures it.
    """
    reach = int(zero.get("stage3_max_reuse_distance", UNBOUNDED)) // 2
    return max(reach, int(zero.get("stage3_max_live_parameters", UNBOUNDED)))
