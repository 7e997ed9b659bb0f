"""One forward pass of a model: posts to tokens, tokens to what the model gives each post for each task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.data.collator import Collator
from comoe.data.posts import Post
from comoe.data.reading.rows import with_neighbors
from comoe.data.tokens.split import TokenizedSplit
from comoe.deferred import Deferred
from comoe.inference.columns import Posts, whole_cell
from comoe.inference.exported import Exported
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.kinds.tagging import tag_spans
from comoe.tasks.task import Task
from comoe.types import Batch, ModelOutput

if TYPE_CHECKING:
    import torch
else:
    torch = Deferred("torch")

UNCOMPUTABLE = (TypeError, AttributeError, LookupError, ArithmeticError, NotImplementedError)
"""What a model raises that was built from a configuration with values of another type or size."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A model on a device."""

    exported: Exported
    """The model and what belongs to it."""
    collator: Collator
    """Makes the batches."""
    device: torch.device | str
    """Where the model is; the word cpu for an ONNX file."""
    precision: torch.dtype | str
    """Of its products; a word for an ONNX file."""

    @property
    def _arrays(self) -> bool:
        """Whether nothing needs PyTorch: neither the model nor the kinds, which plugins may have changed."""
        return self.exported.backend == "onnx" and not self.exported.config.get("plugins")

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Around a forward pass of an export: values of a configuration may load and not compute.

        Products have the precision, the weights stay as they are.
        """
        try:
            if self.exported.backend == "onnx":
                yield
                return
            precision = None if self.precision in ("float32", torch.float32) else self.precision
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, dtype=precision, enabled=precision is not None),
            ):
                yield
        except UNCOMPUTABLE as error:
            raise ValueError(
                f"{self.exported.folder}: the model that config.json describes does not compute "
                f"({type(error).__name__}: {error}); export it again, and report it if that does not help."
            ) from error

    def encode(self, posts: Posts, words: list, tasks: Sequence[Task]) -> TokenizedSplit:
        """The usable posts as tokens; ``words`` instead of their own words."""
        config, usable = self.exported.data_config, posts.usable
        # A prompt reads the words that were given, as it did in training.
        read = [
            posts.texts[i] if posts.words[i] is None else " ".join(posts.words[i]) for i in usable
        ]
        columns = (read, [posts.pairs[i] for i in usable], [words[i] for i in usable])
        # As training does.
        texts, pairs, words = ([whole_cell(cell) for cell in cells] for cells in columns)
        # What is read together, as training puts it together.
        texts = [
            tuple(Post(one, author="") for one in text) if isinstance(text, (list, tuple)) else text
            for text in texts
        ]
        if any(task.reads == "neighbors" for task in tasks):
            near = list(zip(texts, words, pairs, strict=True))
            texts = [
                with_neighbors(text, some, pair) if pair else text for text, some, pair in near
            ]
            pairs = [None] * len(pairs)
        images = [posts.images[i] for i in usable]
        split = self.collator.encode_texts(
            texts, pairs, words, images=images, config=config, asked=tasks
        )
        # Where a row serves one task, the collator makes rows for labeled ones only.
        split.labelled[
            :, [number for number, task in enumerate(self.exported.tasks) if task in tasks]
        ] = True
        return split

    def outputs(
        self, split: TokenizedSplit, indices: np.ndarray, tasks: Sequence[Task]
    ) -> tuple[ModelOutput, list[tuple[Task, list[tuple[int, int, PostOutput]]]]]:
        """One forward pass, and of each task (post, row of the batch, what the model gives it)."""
        batch = self._batch(split, indices)
        with self._computing():
            output = self.exported.model(self._moved(batch))
        found = []
        posts_B = batch.row_ids_B.tolist()
        for number, task in enumerate(self.exported.tasks):
            if task not in tasks:
                continue
            served_B = task.rules.serves(np.asarray(batch.task_ids_B), number)
            rows = np.flatnonzero(served_B & np.asarray(batch.leads_B())).tolist()
            outputs = task.rules.outputs(
                output, batch, rows, task=task, detokenize=self.collator.detokenize
            )
            found.append(
                (task, [(posts_B[row], row, of) for row, of in zip(rows, outputs, strict=True)])
            )
        return output, found

    def embed(self, split: TokenizedSplit, indices: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Posts of one forward pass and their vectors, float32, (B, M)."""
        if any(some and some[0].author is not None for some in split.posts.members):
            raise ValueError("an embedding is of one post; give texts, no lists of them.")
        batch = self._batch(split, indices)
        with self._computing():
            vectors_BM = self.exported.model.embed(self._moved(batch))
        if not isinstance(vectors_BM, np.ndarray):
            vectors_BM = vectors_BM.float().cpu().numpy()
        leads_B = batch.leads_B()
        return batch.row_ids_B[leads_B].tolist(), vectors_BM[np.asarray(leads_B)]

    def _batch(self, split: TokenizedSplit, indices: np.ndarray) -> Batch:
        return self.collator(split, indices, **({"arrays": True} if self._arrays else {}))

    def _moved(self, batch: Batch) -> Batch:
        return batch if self._arrays else batch.to(self.device)

    def remarks(self, split: TokenizedSplit, posts_B: list[int], predictions: list[dict]) -> None:
        """Say of posts that were cut, or that lost their image."""
        lost = {} if self.collator.pixels is None else self.collator.pixels.take_lost()
        cut = split.cut
        for post in posts_B:
            if cut[post]:
                predictions[post]["truncated"] = True
            if split.posts.images[post] in lost:
                predictions[post]["image_error"] = f"the image {lost[split.posts.images[post]]}"


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of a model's products on a device.

    On a CPU ``auto`` is float32, also where it multiplies bfloat16: scores are then those that were
    evaluated, and the same on every machine to their last digits.

    Args:
        name: float32, bfloat16, float16; or auto: bfloat16 on GPUs that have it, float16 on older
            ones, float32 elsewhere.
        device: where the model is.

    Raises:
        ValueError: another name, or float16 without a GPU.
    """
    from comoe.distributed import gpu_lacks_bf16

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        reduced = "float16" if gpu_lacks_bf16() else "bfloat16"
        name = reduced if device.type == "cuda" else "float32"
    if name not in known:
        raise unknown_name("--precision", name, ("auto", *known))
    if name == "float16" and device.type != "cuda":
        raise ValueError(
            f"--precision float16 is for GPUs, and the model is on {device.type}; take bfloat16 or float32."
        )
    return known[name]


def with_spans(prediction: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The prediction of a task with tags, with its words and its spans."""
    return {"words": words, **prediction, "spans": tag_spans(prediction["tags"], words)}


def put_prediction(row: dict[str, Any], task: Task, prediction: dict[str, Any]) -> None:
    """A prediction, or that it is none."""
    if _is_finite(prediction):
        row[task.name] = prediction
    else:
        row.setdefault("error", f"the scores of {task.name} are not finite: the model has diverged")


def _is_finite(value: Any) -> bool:
    """Whether every number in a prediction is one that JSON can hold."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
