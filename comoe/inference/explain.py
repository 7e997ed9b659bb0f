"""Why a post was predicted so: attention of the head, integrated gradients of the words, experts of the words.

Attention says where a head looked, experts which parts of the model worked; neither shows a cause.
Integrated gradients split the change from the post without its words to the post among its words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.config.extras import need
from comoe.config.recipe import DataConfig
from comoe.data.collator import Collator
from comoe.data.tokens.split import TokenizedSplit, TokenRow
from comoe.data.tokens.tokenize import readable
from comoe.deferred import Deferred
from comoe.inference.exported import Exported
from comoe.inference.onnx_model import OnnxModel
from comoe.tasks.kinds.regression import unstandardized
from comoe.tasks.task import TOGETHER, Task
from comoe.types import Batch, ModelOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")

if TYPE_CHECKING:
    from comoe.models.model import MultiTaskModel

ATTENTION, GRADIENTS, EXPERTS = "attention", "gradients", "experts"

METHODS: dict[str, tuple[str, ...]] = {
    ATTENTION: ("pooled",),
    GRADIENTS: ("pooled",),
    EXPERTS: ("pooled", "tokens"),
}
"""Name of a method -> modes of the tasks that it explains."""

STEPS = (16, 32, 64, 128, 256)
"""Steps of the integral that are tried, until it converges."""

TOLERANCE = 0.02
"""It has where the words sum to the change up to this share of it, or to this number if that is more."""

ROWS_AT_ONCE = 64
"""Steps of one forward and backward pass."""


def method_of(explain: bool | str) -> str | None:
    """The method that ``explain`` names; True is attention, False none.

    Raises:
        ValueError: no such method, or a package that it needs is not installed.
    """
    if not explain:
        return None
    method = ATTENTION if explain is True else explain
    if method not in METHODS:
        raise unknown_name("explain", method, METHODS)
    if method == GRADIENTS:
        need("explain", what="explaining by gradients")
    return method


def check_backend(method: str | None, model: MultiTaskModel | OnnxModel) -> None:
    """ValueError where a model gives too little for a method: an ONNX file gives attention alone."""
    if method not in (None, ATTENTION) and isinstance(model, OnnxModel):
        raise ValueError(
            f"{method}: an ONNX file explains by attention alone; use --backend torch for it."
        )


def check_explained(method: str, tasks: Sequence[Task], model: MultiTaskModel | OnnxModel) -> None:
    """ValueError where a method can explain none of these tasks of a model."""
    check_backend(method, model)
    modes = METHODS[method]
    if not any(task.mode in modes for task in tasks):
        names, able = ", ".join(task.name for task in tasks), " or ".join(map(MODES.get, modes))
        raise ValueError(f"{method} explains tasks with {able}; {names} has none.")
    joined = [task.name for task in tasks if task.reads in TOGETHER]
    if method != ATTENTION and joined:
        raise ValueError(
            f"{method} explains what one post says, and {', '.join(joined)} reads several posts together; take "
            "attention, which says how much each of them weighs, or leave the task out."
        )
    if method == EXPERTS and not model.moe_layers():
        raise ValueError("this model has no experts; explain it by attention or gradients.")


MODES = {"pooled": "a head on the whole post", "tokens": "a head on each word"}


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explanations of one export's predictions."""

    exported: Exported
    """The model, on ``device``."""
    collator: Collator
    """Makes the batches."""
    device: torch.device
    """Where the model is."""

    def of_output(
        self, method: str | None, task: Task, split: TokenizedSplit, post: int, row: int,
        output: ModelOutput,
    ) -> dict[str, Any]:  # fmt: skip
        """What a forward pass itself tells of one row: ``attention`` or ``experts``; empty for other methods and tasks.

        Args:
            method: key of ``METHODS``, or None.
            task: whose prediction it is.
            split: the posts.
            post: number of the post there.
            row: of the post in the output.
            output: of the model.
        """
        if method in (None, GRADIENTS) or task.mode not in METHODS[method]:
            return {}
        found = {}
        if task.reads in TOGETHER:
            weights_B = output.post_weights[task.name].float().tolist()
            shown = [post.text for post in split.posts.members[post][: self.collator.max_posts]]
            found = {"posts": [[text, weights_B[row + i]] for i, text in enumerate(shown)]}
            if task.reads == "author":
                return found
        ids_L, words = self._words(split, post)
        if method == ATTENTION:
            weights_L = output.attentions[task.name][row]
            if not isinstance(weights_L, np.ndarray):
                weights_L = weights_L.float().cpu().numpy()
            return attention_per_word(weights_L, ids_L, words=words) | found
        layers = [block.layer for block in self.exported.model.moe_layers()]
        return {EXPERTS: experts(output, row, ids_L, words, layers=layers)}

    def add_gradients(
        self,
        split: TokenizedSplit,
        indices: np.ndarray,
        *,
        tasks: Sequence[Task],
        predictions: Sequence[dict[str, Any]],
    ) -> None:
        """Add ``gradients`` to the predictions of these tasks that have a pooled head.

        A list with an object for each predicted label (the likeliest where none is predicted), one
        for a number. ``words`` are [word, share of the change] in the order of the cleaned post,
        positive where the word speaks for the label. They sum to ``to`` - ``from`` + ``delta``:
        log-odds of the label (or the number) for the post, and for the post with every word
        masked; ``steps`` were taken, and ``converged`` is false where the limit came first.

        Args:
            split: the posts.
            indices: posts of one forward pass.
            tasks: that were predicted.
            predictions: per post of the split, with the prediction under each task's name.
        """
        batch = self.collator(split, indices).to(self.device)
        posts_B = batch.row_ids_B.tolist()
        for number, task in enumerate(self.exported.tasks):
            if task not in tasks or task.mode not in METHODS[GRADIENTS]:
                continue
            served_B = task.rules.serves(batch.task_ids_B, number) & batch.leads_B()
            for row in served_B.nonzero()[:, 0].tolist():
                prediction = predictions[posts_B[row]].get(task.name)
                if prediction is not None:
                    ids_L, words = self._words(split, posts_B[row])
                    one = _Row(self.exported.model, batch.take(torch.tensor([row])), task)
                    prediction[GRADIENTS] = one.explained(
                        prediction, ids_L, words, blank=_blank(self.exported.tokenizer)
                    )

    def _words(self, split: TokenizedSplit, post: int) -> tuple[np.ndarray, Any]:
        """Number of the word of each token, -1 for none, and the words by number."""
        (row,) = split.rows(np.array([post]))
        words = split.posts.words[post] or words_of(
            split.posts.texts[post],
            row,
            tokenizer=self.exported.tokenizer,
            config=self.exported.data_config,
        )
        return row.word_ids, words


def attention_per_word(
    weights_L: np.ndarray, word_ids_L: np.ndarray, *, words: Sequence[str] | Mapping[int, str]
) -> dict[str, Any]:
    """Weights of the pieces summed per word, as shares of what fell on words; ``words[i]`` is the text of word i."""
    inside = word_ids_L >= 0
    weights_L = weights_L[: len(inside)].astype(np.float64)
    sums = np.bincount(word_ids_L[inside], weights=weights_L[inside])
    merged = [
        [words[word], float(sums[word] / sums.sum())]
        for word in np.unique(word_ids_L[inside]).tolist()
    ]
    return {"attention": merged, "attention_elsewhere": float(weights_L[~inside].sum())}


def words_of(text: str, row: TokenRow, *, tokenizer: Any, config: DataConfig) -> dict[int, str]:
    """Number of a word -> its letters in the cleaned text, which pieces do not hold ([UNK], lower case)."""
    numbers = set(row.word_ids[row.word_ids >= 0].tolist())
    if not tokenizer.is_fast:
        return {
            number: tokenizer.decode(row.input_ids[row.word_ids == number].tolist())
            for number in numbers
        }
    cleaned, _ = readable(text, config.normalize, config.max_length)
    encoded = tokenizer(cleaned, truncation=False, verbose=False)
    spans = {number: encoded.word_to_chars(number) for number in numbers}
    return {number: cleaned[span.start : span.end].strip() for number, span in spans.items()}


def experts(
    output: ModelOutput,
    row: int,
    word_ids_L: np.ndarray,
    words: Mapping[int, str] | Sequence[str],
    *,
    layers: Sequence[int],
) -> dict[str, Any]:
    """``layers``, and per word [word, per layer [[expert, gate], ...]], the strongest first.

    The gate is the mean over the pieces of the word, 0 for a piece that went elsewhere.

    Args:
        output: of the model.
        row: of the post there.
        word_ids_L: word of each token, -1 for none.
        words: text of each word.
        layers: numbers of the layers with experts, the encoder's first.
    """
    own_S = output.token_rows_S == row
    used: dict[int, list[Any]] = {int(word): [] for word in np.unique(word_ids_L[word_ids_L >= 0])}
    routings = output.routings[: len(output.routings) - output.num_answer_layers]
    for routing in routings:
        chosen_Lk = routing.indices_Sk[own_S].cpu().numpy()
        gates_Lk = routing.weights_Sk[own_S].float().cpu().numpy()
        for word, found in used.items():
            pieces = word_ids_L == word
            sums = np.bincount(chosen_Lk[pieces].ravel(), weights=gates_Lk[pieces].ravel())
            mean = sums / pieces.sum()
            order = sorted(set(chosen_Lk[pieces].ravel().tolist()), key=lambda e: -mean[e])
            found.append([[expert, float(mean[expert])] for expert in order])
    return {
        "layers": list(layers[: len(routings)]),
        "words": [[words[word], found] for word, found in used.items()],
    }


def _per_word(values_L: np.ndarray, word_ids_L: np.ndarray) -> dict[int, float]:
    """Sum over the pieces of each word."""
    inside = word_ids_L >= 0
    sums = np.bincount(word_ids_L[inside], weights=values_L[inside].astype(np.float64))
    return {word: float(sums[word]) for word in np.unique(word_ids_L[inside]).tolist()}


def _blank(tokenizer: Any) -> int:
    """The token that stands for a word that is not told."""
    known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    return next(number for number in known if number is not None)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a batch and one task, along the path from its masked words to its words."""

    model: MultiTaskModel
    batch: Batch
    """Of this row alone, with its padding."""
    task: Task

    def explained(
        self, prediction: Mapping[str, Any], word_ids_L: np.ndarray, words: Any, *, blank: int
    ) -> list[dict[str, Any]]:
        """An object for each label as ``Explainer.add_gradients`` says."""
        ids_1L = self.batch.input_ids_BL[:, : len(word_ids_L)]
        is_word_L = torch.from_numpy(word_ids_L >= 0).to(ids_1L.device)
        masked_1L = torch.where(is_word_L, blank, ids_1L)
        with torch.no_grad():
            # The experts that the post itself uses, along the whole path: a change of experts would
            # be a jump that no gradient sees. Their gates change with the words.
            selected = self._run(ids_1L).selected
        found = []
        for name, target in self._targets(prediction):

            def score(ids_NL: Tensor, target: int = target) -> Tensor:
                return self._score(self._run(ids_NL, selected), target)

            label = {} if name is None else {"label": name}
            values_L, path = self._integrated(score, ids_1L, masked_1L)
            sums = _per_word(values_L, word_ids_L)
            shown = [[words[word], value] for word, value in sums.items()]
            found.append({**label, "words": shown, **path})
        return found

    def _targets(self, prediction: Mapping[str, Any]) -> list[tuple[str | None, int]]:
        labels = self.task.labels
        if not labels:
            return [(None, 0)]
        if "label" in prediction:
            chosen = [prediction["label"]]
        else:
            scores = prediction["scores"]
            chosen = prediction["labels"] or [max(scores, key=scores.__getitem__)]
        return [(label, labels.index(label)) for label in chosen]

    def _run(self, ids_NL: Tensor, selected: Sequence[Tensor] = ()) -> ModelOutput:
        """The model on rows that differ from this one by their words alone."""
        (N, L), own = ids_NL.shape, self.batch
        segments_BL, more = own.token_type_ids_BL, {}
        rows_N = torch.arange(N, device=ids_NL.device)
        if own.pixels_I3HW is not None:
            there = own.image_rows_I is not None and int(own.image_rows_I[0]) >= 0
            rows_I = rows_N if there else own.image_rows_I
            more = {"pixels_I3HW": own.pixels_I3HW, "image_rows_I": rows_I}
            more["image_numbers_I"] = torch.zeros_like(rows_I)
        if own.lexicon_BLK is not None:
            # What a masked word's numbers say is part of the word.
            told_NL1 = (ids_NL == own.input_ids_BL[:, :L])[:, :, None]
            more["lexicon_BLK"] = own.lexicon_BLK[:, :L] * told_NL1
        batch = Batch(
            input_ids_BL=ids_NL,
            attention_mask_BL=torch.ones_like(ids_NL),
            token_type_ids_BL=None if segments_BL is None else segments_BL[:, :L].expand(N, L),
            word_starts_BL=torch.zeros_like(ids_NL, dtype=torch.bool),
            task_ids_B=own.task_ids_B.expand(N),
            row_ids_B=rows_N,
            **more,
        )
        # Those of the text tokens of all rows, then those of their image tokens.
        chosen = [
            torch.cat([experts_Sk[:L].repeat(N, 1), experts_Sk[L:].repeat(N, 1)])
            for experts_Sk in selected
        ]
        return self.model(batch, chosen, compare=False, decode=False)

    def _score(self, output: ModelOutput, target: int) -> Tensor:
        """Log-odds of the label as the task is calibrated, or the number in the unit of the labels; (N,)."""
        logits_NY = output.logits[self.task.name].float() / (self.task.temperature or 1.0)
        if not self.task.labels:
            return unstandardized(logits_NY[:, 0], self.task)
        if not self.task.rules.exclusive:
            return logits_NY[:, target]
        others = [label for label in range(logits_NY.shape[1]) if label != target]
        return logits_NY[:, target] - logits_NY[:, others].logsumexp(dim=1)

    def _integrated(
        self, score: Callable[[Tensor], Tensor], ids_1L: Tensor, masked_1L: Tensor
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Share of each token in the change of the score, float64, (L,), and how it was computed.

        Source: Sundararajan et al. 2017, arXiv:1703.01365, by captum on the output of the word
        embeddings; Gauss-Legendre steps, doubled until the shares sum to the change.
        """
        from captum.attr import LayerIntegratedGradients

        from comoe.models.encoders.families import stacks_of

        layer = stacks_of(self.model.encoder)[0].get_input_embeddings()
        method = LayerIntegratedGradients(score, layer)
        with torch.no_grad():
            start, end = (float(score(ids)) for ids in (masked_1L, ids_1L))
        for steps in STEPS:
            found_1LM = method.attribute(
                ids_1L, masked_1L, n_steps=steps, internal_batch_size=ROWS_AT_ONCE
            )
            values_L = found_1LM[0].detach().double().sum(dim=-1).cpu().numpy()
            delta = float(values_L.sum()) - (end - start)
            converged = abs(delta) <= TOLERANCE * max(1.0, abs(end - start))
            if converged:
                break
        path = {"from": start, "to": end, "delta": delta, "steps": steps}
        return values_L, path if converged else path | {"converged": False}
