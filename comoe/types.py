"""Records that travel between the layers, and the contracts of the exchangeable parts.

Shape letters, as suffixes of tensor names: B rows on this rank, G rows of all ranks, L tokens per
row, S real (not padding) tokens of all rows, M model width, F expert width, E experts, k experts
per token, T tasks, Y labels, D tokens of a target, P projected width, W ranks. A row is a post; or
a (post, task) pair when the gate routes by task, and always for a task in decoder mode, whose
prompt is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

from comoe.deferred import Deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")

IGNORED = -100
"""Label id of a position without a label; what torch's cross-entropy skips."""


LEXICON, DOMAINS, TOKENS, TARGET_TOKENS = -4, -3, -2, -1
"""Places in ``Batch.unit_scale_T`` of the mean over words of the lexicon, over posts with a value
that the adversarial loss predicts, over the encoder's real tokens, and over the target tokens of a
decoder."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank, padded to its longest row; for an ONNX file of NumPy arrays, without labels."""

    input_ids_BL: Tensor
    """Token ids, int64."""
    attention_mask_BL: Tensor
    """1 on real tokens, 0 on padding, int64."""
    token_type_ids_BL: Tensor | None
    """Segment ids, int64, where the tokenizer makes them."""
    word_starts_BL: Tensor
    """True on the first piece of each word of the first text, bool."""
    task_ids_B: Tensor
    """Index of the one task this row is for, int64; -1 where a row serves all tasks (``route_by:
    token``)."""
    row_ids_B: Tensor
    """Index of the post in its split, int64; -1 on a filler row, which only gives a rank something
    to run."""
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    """Task -> targets: single_label and label_words (B,) int64, multi_label (B, Y) float,
    regression (B,) float, tags (B, L) int64, text (B,) int64: the number of its tokens,
    masked_words (B,) int64: the number of its hidden tokens. Missing:
    IGNORED or NaN."""
    unit_scale_T: Tensor | None = None
    """W * accumulation steps / units of the task in the whole optimizer step, 0 for an absent task;
    then the same for the labeled posts of each task, for its soft labels (``soft_scales``), and at
    ``LEXICON``, ``DOMAINS``, ``TOKENS`` and ``TARGET_TOKENS``: (3 T + 4,). Set by the trainer, None outside
    training."""

    pixels_I3HW: Tensor | None = None
    """Prepared images, float32, each once; at least one (blank, of row -1) where the run reads
    images, so that every rank runs its tower. None where the run reads none."""
    image_rows_I: Tensor | None = None
    """Rows that have an image, int64, ascending; -1 for the blank one."""
    image_numbers_I: Tensor | None = None
    """Which of the pixels each of these rows has, int64: a post may have a row per task. None where
    each has its own, in this order; else there may be fewer pixels than rows."""
    step: int = -1
    """Optimizer step, from 0; set by the trainer, -1 outside training."""
    progress: float = 0.0
    """Share of the run's optimizer steps that are done, in [0, 1); set by the trainer."""
    confidences: Mapping[str, Tensor] = field(default_factory=dict)
    """Task that weighs its posts by confidence -> number in [0, 1], (B,), float32; 1 where a post
    has none."""
    domains_B: Tensor | None = None
    """What ``loss.adversarial`` predicts of each row, a class from 0, int64; IGNORED where a row
    has no value. None where nothing is predicted."""
    target_ids_BD: Tensor | None = None
    """Token ids of the text that a row's task wants of the decoder, its end token included, int64;
    IGNORED behind it and in rows that want none. At least one column; None where no task is in
    decoder mode."""
    choices: Mapping[str, Tensor] = field(default_factory=dict)
    """Task whose labels are words that the decoder scores -> token ids of each label's words, (Y,
    D), int64, IGNORED behind their end token; the same in every batch."""
    masked_ids_BL: Tensor | None = None
    """Token ids that are hidden from the encoder in rows of tasks in masked mode, int64; IGNORED at
    all other tokens. None where the run has no such task."""
    domain_weights_B: Tensor | None = None
    """Weight of the row in that prediction, float32: 0 without a value, and the rows of a post
    share its weight."""
    texts: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    """Task of free text -> the text that each of the B rows wants, None where it wants none."""
    soft_labels: Mapping[str, Tensor] = field(default_factory=dict)
    """Task with soft labels -> probability of each label (B, Y), of tags (B, L, Y) at the first
    piece of each word, of regression the teacher's number (B, 1), float32; NaN where there is
    none."""
    text_numbers_B: Tensor | None = None
    """Rows with the same number read the same text, int64; the encoder may compute it once as far
    as it does not depend on the task. None where each row has its own."""

    bags_B: Tensor | None = None
    """Rows with the same number are read together for one task: the posts of an author, or a post
    and its neighbors; the first one has the labels, int64. None where each row is alone."""

    lexicon_BLK: Tensor | None = None
    """Standardized numbers of the lexicon's entry that a token is a piece of, and 1 behind them, float32; 0 on
    other tokens. None without ``model.lexicon``."""
    lexicon_starts_BL: Tensor | None = None
    """True on the first piece of each entry, bool; likewise."""

    def leads_B(self) -> Tensor:
        """True on the first row of those that are read together, bool; on all where each is alone."""
        # All true, of NumPy or PyTorch as the batch is.
        leads_B = self.row_ids_B >= -1
        if self.bags_B is not None:
            leads_B[1:] = self.bags_B[1:] != self.bags_B[:-1]
        return leads_B

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                moved[item.name] = value.to(device, non_blocking=True)
            elif isinstance(value, Mapping) and item.name != "texts":
                moved[item.name] = {
                    key: tensor.to(device, non_blocking=True) for key, tensor in value.items()
                }
        return replace(self, **moved)

    def take(self, rows_R: Tensor) -> Batch:
        """The batch of some rows, int64, padding kept; a blank image where none of them has one."""
        kept = {
            item.name: value[rows_R]
            for item in fields(self)
            if item.name.endswith(("_B", "_BL", "_BLK", "_BD"))
            and isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        for name in ("labels", "confidences", "soft_labels"):
            kept[name] = {task: values[rows_R] for task, values in getattr(self, name).items()}
        rows = rows_R.tolist() if self.texts else []
        kept["texts"] = {task: [texts[row] for row in rows] for task, texts in self.texts.items()}
        if self.pixels_I3HW is None or self.image_rows_I is None:
            return replace(self, **kept)
        is_row_IR = self.image_rows_I[:, None] == rows_R
        chosen_I, places_I = is_row_IR.nonzero(as_tuple=True)
        if len(chosen_I) == 0:
            chosen_I, places_I = chosen_I.new_zeros(1), places_I.new_full((1,), -1)
        numbers_I = chosen_I if self.image_numbers_I is None else self.image_numbers_I[chosen_I]
        distinct, numbers_I = numbers_I.unique(return_inverse=True)
        pixels_I3HW = self.pixels_I3HW[distinct]
        return replace(
            self, **kept, pixels_I3HW=pixels_I3HW, image_rows_I=places_I, image_numbers_I=numbers_I
        )


def soft_scales(scale_T: Tensor, num_tasks: int) -> Tensor:
    """The part of ``Batch.unit_scale_T`` that is of soft labels, (T,)."""
    return scale_T[LEXICON - num_tasks : LEXICON]


def labelled_rows(batch: Batch, tasks: Sequence[str]) -> Tensor:
    """Which rows have a label of which task: bool (B, T), on the batch's device.

    A row counts if any entry of its target is there: whole numbers other than ``IGNORED``, other
    numbers than NaN.
    """
    columns = []
    for task in tasks:
        target = batch.labels[task]
        present = ~torch.isnan(target) if target.is_floating_point() else target != IGNORED
        columns.append(present.flatten(1).any(dim=1) if target.ndim > 1 else present)
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, slots=True)
class Routing:
    """What one gate decided for S real tokens of text.

    Image tokens that went through the experts too have no row here, but count as load.
    """

    logits_SE: Tensor
    """Gate logits, float32, differentiable."""
    scores_SE: Tensor
    """Sigmoid (or softmax) of the logits, float32, differentiable."""
    indices_Sk: Tensor
    """Selected experts per token, int64."""
    weights_Sk: Tensor
    """Weight of each selected expert, float32, differentiable; for k > 1 the sum per token
    is the gate's scale (``model.moe.gate_scale``)."""
    counts_E: Tensor
    """Tokens per expert on this rank, int64, image tokens included."""
    energies_S2: Tensor | None = None
    """Squared norms of each token's update by the block, and of the state that the block read,
    float32; None in training."""

    def per_token(self) -> dict[str, Tensor]:
        """The tensors with a row per token, by name."""
        names = ("logits_SE", "scores_SE", "indices_Sk", "weights_Sk", "energies_S2")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)  # no slots: ZeRO-3 reads a module's output with vars()
class ModelOutput:
    """Everything the model knows about a batch."""

    logits: Mapping[str, Tensor]
    """Task -> float32 logits, (B, Y); regression (B, 1); tags (B, L, Y); masked_words (B, 2), see its
    kind, and nothing where ``Batch.masked_ids_BL`` is None.

    label_words (B, Y): log-probability of each label's words; in training without soft labels only
    of the row's own label, 0 elsewhere. text: log-probability of the row's own text, 0 where it has
    none, (B, 1); outside training behind it that of the generated text, (B, 2)."""
    embeddings: Mapping[str, Tensor]
    """Task -> unit-length projections (B, P), float32; only tasks with a pooled head."""
    attentions: Mapping[str, Tensor]
    """Task -> weight of each token in the pooling (B, L), float32, rows sum to 1; the explanation
    shown to the user."""
    routings: tuple[Routing, ...]
    """One per layer with experts, in layer order."""
    token_rows_S: Tensor
    """Row of each real token of text that the encoder reads, int64, the order of ``Routing``."""
    selected: tuple[Tensor, ...] = ()
    """Per layer with experts the selected experts, int64, one row per routed token, image tokens
    last; none for a filler row. A second pass over the same batch repeats them."""
    views: Mapping[str, Tensor] = field(default_factory=dict)
    """Task -> projections (B, P) as in ``embeddings``, under another draw of dropout; for tasks
    whose posts the contrastive loss has two views of. Only in training."""
    image_text: ImageText | None = None
    """Both sides of the posts with images; None where the run reads none."""
    sharing: Sharing | None = None
    """What the tasks share and what each has for itself; only in training."""
    probe: Probe | None = None
    """The tasks' logits once more; only on request."""
    answer_rows_S: Tensor | None = None
    """Row of each token of the texts that the decoder scored, int64, in the order of
    ``Routing`` in the decoder's layers; None without a decoder."""
    num_answer_layers: int = 0
    """How many of the routings, the last ones, are the decoder's."""
    generated: Mapping[str, Tensor] = field(default_factory=dict)
    """Task of free text -> token ids of the generated texts, (B, D), int64, -1 from the end token
    on; empty in training."""

    post_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Task that reads several posts together -> weight of each row among those of its bag, (B,),
    float32."""

    @property
    def layer_rows(self) -> tuple[Tensor, ...]:
        """Per routing the row of each of its tokens."""
        own = len(self.routings) - self.num_answer_layers
        assert self.answer_rows_S is not None or not self.num_answer_layers
        return (self.token_rows_S,) * own + (self.answer_rows_S,) * self.num_answer_layers


@dataclass(frozen=True)  # no slots: ZeRO-3 reads a module's output with vars()
class Sharing:
    """The last states that all tasks share, and what each task has of its own."""

    shared_BLM: Tensor
    """States of the text tokens before any private part, and before layers that tasks have for
    themselves."""
    mask_BL: Tensor
    """1 on real tokens."""
    private: Mapping[str, Tensor]
    """Task -> update (B, L, M) of its private part; empty without such parts."""
    distance: Tensor | None = None
    """How far the tasks' own layers are apart, scalar; None where no loss asks for it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The tasks' logits from copies of the last states that they share, for the tasks' gradients there."""

    states: Mapping[str, Tensor]
    """Task -> its copy (B, L, M), where its gradient ends."""
    logits: Mapping[str, Tensor]
    """Task -> as in ``ModelOutput``, the same numbers."""


@dataclass(frozen=True)  # no slots: ZeRO-3 reads a module's output with vars()
class ImageText:
    """The two sides of the posts with images, as the image-text losses and retrieval read them."""

    rows_I: Tensor
    """Row of each image, int64; -1 is a blank one that no loss counts."""
    text_embeddings_IP: Tensor | None
    """Unit-length projections of the texts alone, float32; None where one stream reads both sides,
    and where the contrast is off."""
    image_embeddings_IP: Tensor | None
    """The same of the images."""
    match_logits_I2: Tensor | None
    """Logits of [another post's text, its own text] for each image with its own text, float32;
    None where matching is off."""
    texts: tuple[Tensor, ...]
    """What ``match`` wants of the text of each image's row, each (I, L, ...), longer with zeros
    at the end; texts of other ranks may stand in."""
    match: Callable[[tuple[Tensor, ...], Tensor], Tensor]
    """(texts of J pairs, index of the image of each (J,)) -> logits (J, 2). To be called on every
    rank or on none: it may run the whole encoder."""


@dataclass(frozen=True)  # no slots: ZeRO-3 reads a module's output with vars()
class StepOutput:
    """One micro-step of the objective. The mean over ranks and micro-steps of each number here is its global value."""

    loss: Tensor
    """Scalar to call backward on."""
    terms: Mapping[str, Tensor]
    """Detached scalars: ``task/<name>``, ``weight/<name>``, ``gold/<name>``, ``soft/<name>``,
    ``contrastive``, ``contrastive/<name>``, ``positives_per_anchor/<name>``,
    ``temperature/<name>``, ``itc``, ``itc_temperature``, ``itm``, ``itm_accuracy``, ``balance``,
    ``z``, ``task_separation``, ``orthogonal``, ``soft_sharing``, ``r_drop``, ``adversarial``,
    ``adversarial_accuracy``, ``adversarial_commonest``, ``adversarial_even``,
    ``adversarial_lambda``, ``lexicon``."""
    output: ModelOutput
    """The model's output, for training metrics and statistics."""
    gram_TT: Tensor | None = None
    """Inner products of the tasks' gradients over the whole optimizer step, float64, the same on
    all ranks; None where the weighting does not read them."""


class Loss(Protocol):
    """An auxiliary term: (model output, batch) -> this rank's share, scalar, and what to log."""

    def begin_step(self) -> None:
        """A new optimizer step begins: forget what was carried between micro-steps."""
        ...

    def __call__(
        self, output: ModelOutput, batch: Batch
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...
