"""Predictions of an export, in one process, without DeepSpeed.

A post takes the path of training: cleaned and tokenized by the same ``Collator``, through the
same model, and decoded by its task's kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from tqdm import tqdm

from comoe.config.errors import unknown_name
from comoe.config.files import same_file
from comoe.config.plugins import consent
from comoe.data.collator import Collator
from comoe.data.reading.inputs import USUAL
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import choose_device
from comoe.inference.columns import Posts, locate_images, read_columns, whole_cell
from comoe.inference.explain import GRADIENTS, Explainer, check_explained, method_of
from comoe.inference.exported import Exported, load_exported
from comoe.inference.hub import copy_export, find_export
from comoe.inference.passes import forward_passes, task_passes
from comoe.tasks.kinds.tagging import tag_spans
from comoe.tasks.task import Task


@dataclass(frozen=True)
class Predictor(ModelHubMixin):
    """Texts in, one plain dict per text out, in the same order.

    ``predictor(["what a lovely day"])`` gives ``[{"text": "what a lovely day", "<task>": {...},
    ...}]``. What stands under a task depends on its kind: ``label`` and ``scores`` of every label;
    ``labels`` and ``scores``; ``value``; or ``words``, ``tags``, ``scores`` and ``spans``; or
    ``answer``, a text, and its ``probability``. A post that was cut to the model's length has
    ``truncated`` as well, one that was predicted without its bad image ``image_error``.
    """

    exported: Exported
    """The model and what belongs to it."""
    collator: Collator
    """Makes the batches."""
    device: torch.device
    """Where the model is."""

    def __new__(cls, *values: Any, **named: Any) -> Predictor:
        """Without the mixin's copy of all values, which would be one of the model."""
        return object.__new__(cls)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        verify: bool = True,
        plugins: Sequence[str] = (),
        **hub: Any,
    ) -> Predictor:
        """Load an export.

        Args:
            folder: written by a run (``export/``) or by ``comoe export``; or ``organization/name``
                on the Hugging Face hub.
            device: a torch device; auto is the first GPU, or the CPU where there is none.
            verify: compare the digests of its files with those that were written.
            plugins: those that may be imported if the export names them: their code runs.
            hub: revision (branch, tag or commit), token, cache_dir, force_download,
                local_files_only, as of ``comoe.inference.hub.find_export``.

        Raises:
            ValueError: no export there or on the hub, or one that cannot be read; no such device.

        Example:
            >>> predictor = comoe.Predictor.from_pretrained("runs/smoke/export")
            >>> predictor(["what a lovely day"])[0]["mood"]["label"]
            'positive'
        """
        consent(plugins)
        exported = load_exported(find_export(folder, **hub), verify=verify)
        place = choose_device(device)
        exported.model.to(place)
        return cls(exported, exported.collator(), place)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Copy the export to a folder; options of ``huggingface_hub.ModelHubMixin`` (``push_to_hub``, ``repo_id``).

        Raises:
            ValueError: the folder is the one that it was read from, or its files were changed.
        """
        if same_file(Path(save_directory), self.exported.folder):
            raise ValueError(f"{save_directory} is the folder that the model was read from.")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        copy_export(self.exported.folder, save_directory)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the model predicts."""
        return tuple(task for task in self.exported.tasks if task.rules.scored)

    @property
    def image_column(self) -> str | None:
        """Column of the training posts that named the images; None where the model reads none."""
        return (
            None
            if self.collator.pixels is None
            else self.exported.config.get("image_column") or USUAL
        )

    @property
    def as_words(self) -> frozenset[str]:
        """Tasks that read posts as words, as in training."""
        per_token = (task.name for task in self.exported.tasks if task.mode == "tokens")
        return frozenset([*per_token, *self.exported.config.get("as_words", ())])

    def choose_tasks(self, names: Sequence[str] | None) -> list[Task]:
        """The tasks of these names, in this order, each once; all with None. ValueError for a name that no task has."""
        known = {task.name: task for task in self.tasks}
        for name in names or ():
            if name not in known:
                raise unknown_name("task of this model", name, known)
        return list(self.tasks) if names is None else [known[name] for name in dict.fromkeys(names)]

    def __call__(
        self,
        texts: Sequence[str],
        *,
        pairs: Sequence[str | None] | None = None,
        words: Sequence[Sequence[str] | None] | None = None,
        images: Sequence[Any] | None = None,
        image_root: Path | None = None,
        tasks: Sequence[str] | None = None,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        explain: bool | str = False,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """Predict every text; one that cannot be has ``error`` instead of predictions, and no text is lost.

        Args:
            texts: raw posts.
            pairs: second texts (stance target, aspect; a list of words or a number too) or None.
            words: posts as words, for tags, instead of their texts; else texts are split.
            images: paths, bytes of files, or Pillow images, None where there is none. A post with a
                bad one is predicted by its text alone and has ``image_error``.
            image_root: folder that paths of images start from and must not leave; None: any path.
            tasks: names of the tasks; None is all.
            batch_size: posts per forward pass.
            batch_tokens: most tokens of a forward pass, padding counted, if it has several posts.
            explain: attention, gradients or experts, as of ``explain``; True is attention. Tasks that
                the method cannot explain are predicted without it.
            progress: show a progress bar.

        Raises:
            ValueError: no such task; columns of different number, or that are no lists; images for
                a model of texts.
        """
        chosen, method = self.choose_tasks(tasks), method_of(explain)
        posts = self._read(texts, pairs, words, images, image_root, chosen)
        predictions, passes = posts.predictions, []
        if posts.usable:
            passes = task_passes(posts, chosen, as_words=self.as_words)
        total = len(posts.usable) * len(passes)
        with tqdm(total=total, unit="post", disable=not progress, dynamic_ncols=True) as bar:
            for column, some in passes:
                split = self._encode(posts, column, some)
                mine = [predictions[i] for i in posts.usable]
                rows = self.collator.rows_per_post(some)
                for indices in forward_passes(split.lengths, batch_size, batch_tokens, rows=rows):
                    options = {"tasks": some, "predictions": mine}
                    self._predict(split, indices, **options, explain=method)
                    if method == GRADIENTS:
                        self._explainer.add_gradients(split, indices, **options)
                    bar.update(len(indices))
        return predictions

    def explain(
        self, texts: Sequence[str], *, method: str = "attention", **options: Any
    ) -> list[dict[str, Any]]:
        """Predictions with what explains them, under the name of the method in each task's prediction.

        - ``attention`` (tasks with a head on the whole post): [word, weight] in the order of the
          cleaned post, weights summing to 1; and ``attention_elsewhere``, the share on special
          tokens and on the second text. Where the head looked, which is no proof of a cause.
        - ``gradients`` (the same tasks): integrated gradients of the predicted label, signed; see
          ``comoe.inference.explain.Explainer.add_gradients``. Some 50 to 500 times as slow.
        - ``experts`` (also tasks with a head on each word): the experts that each word used.

        Args:
            texts: raw posts.
            method: attention, gradients or experts.
            options: as of a prediction.

        Raises:
            ValueError: as of a prediction; or the method can explain none of the tasks.
        """
        tasks = self.choose_tasks(options.get("tasks"))
        check_explained(method_of(method), tasks, self.exported.model)
        return self(texts, **options, explain=method)

    @property
    def _explainer(self) -> Explainer:
        return Explainer(self.exported, self.collator, self.device)

    def embed(
        self,
        texts: Sequence[str],
        *,
        pairs: Sequence[str | None] | None = None,
        words: Sequence[Sequence[str] | None] | None = None,
        images: Sequence[Any] | None = None,
        image_root: Path | None = None,
        task: str | None = None,
        batch_size: int = 64,
        batch_tokens: int | None = None,
    ) -> list[dict[str, Any]]:
        """One vector per text: the mean of the encoder's last states over its tokens, scaled to length 1.

        The product of two vectors is the cosine of their angle: near 1 for posts that the model
        takes to be alike.

        Args:
            texts, pairs, words, images, image_root, batch_size, batch_tokens: as of a prediction.
            task: reads the posts, which counts where the model routes by task or has prompts; None
                is the first task.

        Returns:
            Per text ``embedding``, a float32 array as wide as the encoder, or ``error``; and
            ``truncated`` and ``image_error`` as predictions have them.

        Raises:
            ValueError: as of a prediction.
        """
        chosen = self.choose_tasks(None if task is None else [task])[:1]
        posts = self._read(texts, pairs, words, images, image_root, chosen)
        for prediction in posts.predictions:
            prediction.pop("text")
        if posts.usable:
            ((column, some),) = task_passes(posts, chosen, as_words=self.as_words)
            split = self._encode(posts, column, some)
            mine = [posts.predictions[i] for i in posts.usable]
            rows = self.collator.rows_per_post(some)
            for indices in forward_passes(split.lengths, batch_size, batch_tokens, rows=rows):
                self._embed(split, indices, mine)
        return posts.predictions

    def _read(
        self, texts: Any, pairs: Any, words: Any, images: Any, root: Path | None, tasks: list[Task]
    ) -> Posts:
        posts = read_columns(texts, pairs, words, images, tasks=tasks)
        locate_images(posts, root, reads_images=self.collator.pixels is not None)
        return posts

    def _encode(self, posts: Posts, words: list, tasks: Sequence[Task]) -> TokenizedSplit:
        """The usable posts as tokens; ``words`` instead of their own words."""
        config, usable = self.exported.data_config, posts.usable
        # A prompt reads the words that were given, as it did in training.
        read = [
            posts.texts[i] if posts.words[i] is None else " ".join(posts.words[i]) for i in usable
        ]
        columns = (read, [posts.pairs[i] for i in usable], [words[i] for i in usable])
        # As training does.
        texts, pairs, words = ([whole_cell(cell) for cell in cells] for cells in columns)
        images = [posts.images[i] for i in usable]
        split = self.collator.encode_texts(
            texts, pairs, words, images=images, config=config, asked=tasks
        )
        # Where a row serves one task, the collator makes rows for labeled ones only.
        split.labelled[
            :, [number for number, task in enumerate(self.exported.tasks) if task in tasks]
        ] = True
        return split

    @torch.inference_mode()
    def _embed(self, split: TokenizedSplit, indices: np.ndarray, predictions: list[dict]) -> None:
        batch = self.collator(split, indices)
        vectors_BM = self.exported.model.embed(batch.to(self.device)).cpu().numpy()
        posts_B = batch.row_ids_B.tolist()
        for post, vector_M in zip(posts_B, vectors_BM, strict=True):
            if np.isfinite(vector_M).all():
                predictions[post]["embedding"] = vector_M
            else:
                predictions[post]["error"] = "its states are not finite: the model has diverged"
        self._remarks(split, posts_B, predictions)

    @torch.inference_mode()
    def _predict(
        self,
        split: TokenizedSplit,
        indices: np.ndarray,
        *,
        tasks: Sequence[Task],
        predictions: list[dict],
        explain: str | None,
    ) -> None:
        batch = self.collator(split, indices)
        output = self.exported.model(batch.to(self.device))
        posts_B = batch.row_ids_B.tolist()
        tokens = dict(zip(posts_B, split.rows(batch.row_ids_B.numpy()), strict=True))
        for number, task in enumerate(self.exported.tasks):
            if task not in tasks:
                continue
            rows = task.rules.serves(batch.task_ids_B, number).nonzero()[:, 0].tolist()
            outputs = task.rules.outputs(
                output, batch, rows, task=task, detokenize=self.collator.detokenize
            )
            for row, prediction in zip(rows, task.rules.decode(outputs, task), strict=True):
                post = posts_B[row]
                if task.mode == "tokens":
                    kept = [
                        split.posts.words[post][word]
                        for word in tokens[post].word_ids[tokens[post].word_starts]
                    ]
                    prediction = {
                        "words": kept,
                        **prediction,
                        "spans": tag_spans(prediction["tags"], kept),
                    }
                prediction |= self._explainer.of_output(explain, task, split, post, row, output)
                if not _is_finite(prediction):
                    problem = f"the scores of {task.name} are not finite: the model has diverged"
                    predictions[post].setdefault("error", problem)
                    continue
                predictions[post][task.name] = prediction
        self._remarks(split, posts_B, predictions)

    def _remarks(self, split: TokenizedSplit, posts_B: list[int], predictions: list[dict]) -> None:
        """Say of posts that were cut, or that lost their image."""
        lost = {} if self.collator.pixels is None else self.collator.pixels.take_lost()
        cut = split.cut
        for post in posts_B:
            if cut[post]:
                predictions[post]["truncated"] = True
            if split.posts.images[post] in lost:
                predictions[post]["image_error"] = f"the image {lost[split.posts.images[post]]}"


def _is_finite(value: Any) -> bool:
    """Whether every number in a prediction is one that JSON can hold."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
