"""Predictions of an export, in one process, without DeepSpeed.

A post takes the path of training: cleaned and tokenized by the same ``Collator``, through the
same model, and decoded by its task's kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from comoe.config.errors import unknown_name
from comoe.config.plugins import consent
from comoe.data.collator import Collator
from comoe.data.reading.inputs import USUAL
from comoe.data.tokens.split import TokenizedSplit
from comoe.inference.columns import Posts, columns_of, locate_images, read_columns
from comoe.inference.explain import ATTENTION, GRADIENTS, Explainer, check_explained, method_of
from comoe.inference.exported import Exported, load_exported
from comoe.inference.forward import Forward, choose_precision, put_prediction, with_spans
from comoe.inference.hub import OnHub, find_export
from comoe.inference.long_posts import LongPosts, predict_in_windows, refuse_long
from comoe.inference.passes import WINDOW, check_windows, forward_passes, refuse_mixed, task_passes
from comoe.inference.turns import Turns, in_turn
from comoe.tasks.task import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Predictor(OnHub):
    """Texts in, one plain dict per text out, in the same order.

    ``predictor(["what a lovely day"])`` gives ``[{"text": "what a lovely day", "<task>": {...},
    ...}]``. What stands under a task depends on its kind: ``label`` and ``scores`` of every label;
    ``labels`` and ``scores``; ``value``; or ``words``, ``tags``, ``scores`` and ``spans``; or
    ``answer``, a text, and its ``probability``. A post that was cut to the model's length has
    ``truncated`` as well, one that was predicted without its bad image ``image_error``. Threads may
    share a predictor, which computes for one at a time; it can be pickled.
    """

    exported: Exported
    """The model and what belongs to it."""
    collator: Collator
    """Makes the batches."""
    device: torch.device | str
    """Where the model is; the word cpu for an ONNX file."""
    precision: torch.dtype | str = "float32"
    """Of its products (autocast); the weights stay float32. A word for an ONNX file."""
    long: LongPosts = LongPosts()
    """What becomes of posts with more tokens than the model reads; see ``with_long``."""
    turns: Turns = field(default_factory=Turns, repr=False, compare=False)
    """Taken while it computes: a tokenizer holds how it cuts."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        verify: bool = True,
        precision: str = "float32",
        backend: str = "torch",
        threads: int | None = None,
        plugins: Sequence[str] = (),
        **hub: Any,
    ) -> Predictor:
        """Load an export.

        Args:
            folder: written by a run (``export/``) or by ``comoe export``; or ``organization/name``
                on the Hugging Face hub.
            device: a torch device; auto is the first GPU, or the CPU where there is none.
            verify: compare the digests of its files with those that were written.
            precision: float32, bfloat16, float16 (GPUs), or auto: bfloat16 on GPUs that have it,
                float16 on older ones, float32 on others.
            backend: torch, or onnx, which runs the ONNX file of ``comoe export --format onnx`` on the
                CPU.
            threads: of each operation, a setting of the process; None is what PyTorch takes.
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
        if backend != "torch" and (
            device not in ("auto", "cpu") or precision not in ("auto", "float32")
        ):
            raise ValueError(
                f"--backend {backend} runs on the CPU, in the precision that its file was exported "
                "in; leave out --device and --precision."
            )
        place, products = "cpu", "float32"
        if backend == "torch":
            from comoe.distributed import choose_device  # brings in PyTorch

            place = choose_device(device)
            products = choose_precision(precision, place)
        found = find_export(folder, **hub)
        exported = load_exported(found, verify=verify, backend=backend, threads=threads, plain=True)
        if not any(task.rules.predicts for task in exported.tasks):
            raise ValueError(
                f"{found} predicts nothing: its tasks learn from plain posts alone; train tasks with "
                f"labels from there, with model.start_from={found}."
            )
        if backend == "torch":
            exported.model.to(place)
        return cls(exported, exported.collator(), place, products)

    def with_long(self, mode: str, **options: Any) -> Predictor:
        """The same model, and what becomes of posts with more tokens than it reads.

        Args:
            mode: ``cut``, ``windows`` or ``error``.
            options: scores and overlap, as of ``comoe.inference.long_posts.LongPosts``.

        Raises:
            ValueError: an unknown word, or a number out of range.
        """
        long = LongPosts(mode, **options)
        long.check_overlap(self.exported.data_config.max_length)
        return replace(self, long=long)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the model predicts."""
        return tuple(task for task in self.exported.tasks if task.rules.predicts)

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
        """The tasks of these names, in this order, each once; None: all (of posts, else of authors)."""
        known = {task.name: task for task in self.tasks}
        for name in names or ():
            if name not in known:
                raise unknown_name("task of this model", name, known)
        if names is None:
            return [task for task in self.tasks if task.reads != "author"] or list(self.tasks)
        return refuse_mixed([known[name] for name in dict.fromkeys(names)])

    @in_turn
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
            texts: raw posts; for tasks of authors lists of posts, one for each author.
            pairs: second texts (stance target, aspect; a list of words, or the thread of a context).
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
                a model of texts; gradients or experts where none of the tasks, or not the model, has any.
        """
        chosen, method = self.choose_tasks(tasks), method_of(explain)
        if method not in (None, ATTENTION):  # which is shown where there is some
            check_explained(method, chosen, self.exported.model)
        posts = self._read(texts, pairs, words, images, image_root, chosen)
        if self.long.mode == "windows":
            check_windows(chosen, explained=bool(method))
        if posts.usable and self.long.mode == "error":
            refuse_long(self._forward, posts, chosen, as_words=self.as_words)
        predictions, passes = posts.predictions, []
        if posts.usable:
            passes = task_passes(posts, chosen, as_words=self.as_words)
        total = len(posts.usable) * len(passes)
        with tqdm(total=total, unit="post", disable=not progress, dynamic_ncols=True) as bar:
            for reading in passes:
                self._pass(posts, reading, (batch_size, batch_tokens), explain=method, bar=bar)
        return predictions

    predict = __call__

    def stream(
        self, posts: Iterable[Any], *, window: int = WINDOW, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Predictions of posts that are read as they are asked for, in their order, in the memory of a window.

        Args:
            posts: texts, or mappings with ``text``, ``pair``, ``words`` and ``image``.
            window: posts that are read before the first of them is predicted.
            options: as of a prediction, but columns.

        Raises:
            ValueError: as of a prediction, or a post with another key, when predictions are asked for.

        Example:
            >>> predictor = comoe.Predictor.from_pretrained("runs/smoke/export")
            >>> for found in predictor.stream(text for text in ["what a lovely day"] * 2):
            ...     print(found["mood"]["label"])
            positive
            positive
        """
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1.")
        rest = iter(posts)
        while some := list(islice(rest, window)):
            yield from self(**columns_of(some), **options)

    def _pass(
        self,
        posts: Posts,
        reading: tuple[Sequence[Any], Sequence[Task]],
        limits: tuple[int, int | None],
        *,
        explain: str | None,
        bar: tqdm,
    ) -> None:
        """The usable posts, read in one way for some tasks; see ``task_passes``."""
        column, tasks = reading
        split = self._forward.encode(posts, column, tasks)
        options = {"tasks": tasks, "predictions": [posts.predictions[i] for i in posts.usable]}
        long = split.cut & (self.long.mode == "windows")
        whole = np.flatnonzero(~long)
        rows = self.collator.rows_per_post(tasks)
        for numbers in forward_passes(split.lengths[whole], *limits, rows=rows):
            indices = whole[numbers]
            self._predict(split, indices, **options, explain=explain)
            if explain == GRADIENTS:
                self._explainer.add_gradients(split, indices, **options)
            bar.update(len(indices))
        if long.any():
            room = min((split.room[t.name] for t in tasks if t.name in split.room), default=None)
            numbers = [posts.usable[i] for i in np.flatnonzero(long)]
            predict_in_windows(self._forward, self.long, posts, reading, numbers, (*limits, room))
            bar.update(len(numbers))

    def explain(
        self, texts: Sequence[str], *, method: str = "attention", **options: Any
    ) -> list[dict[str, Any]]:
        """Predictions with what explains them, under the name of the method in each task's prediction.

        - ``attention`` (tasks with a head on the whole post): [word, weight] in the order of the
          cleaned post, weights summing to 1; and ``attention_elsewhere``, the share on special
          tokens and on the second text. Where the head looked, which is no proof of a cause.
        - ``gradients`` (the same tasks): integrated gradients of the predicted label, signed; see
          ``comoe.inference.explain.Explainer.add_gradients``. 50 to 500 forward passes per
          task and predicted label.
        - ``experts`` (also tasks with a head on each word): the experts that each word used.

        Args:
            texts: raw posts.
            method: attention, gradients or experts.
            options: as of a prediction.

        Raises:
            ValueError: as of a prediction; or the method can explain none of the tasks.

        Example:
            >>> predictor = comoe.Predictor.from_pretrained("runs/smoke/export")
            >>> (found,) = predictor.explain(["what a lovely day"], tasks=["mood"])
            >>> [word for word, weight in found["mood"]["attention"]]
            ['what', 'a', 'lovely', 'day']
        """
        tasks = self.choose_tasks(options.get("tasks"))
        check_explained(method_of(method), tasks, self.exported.model)
        return self(texts, **options, explain=method)

    @property
    def _forward(self) -> Forward:
        return Forward(self.exported, self.collator, self.device, self.precision)

    @property
    def _explainer(self) -> Explainer:
        return Explainer(self.exported, self.collator, self.device)

    @in_turn
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
            task: reads the posts, which counts where the model routes by task, has ``own_layers``
                or prompts, or reads posts as words for some tasks; None is the first task.

        Returns:
            Per text ``embedding``, a float32 array as wide as the encoder, or ``error``; and
            ``truncated`` and ``image_error`` as predictions have them.

        Raises:
            ValueError: as of a prediction.

        Example:
            >>> predictor = comoe.Predictor.from_pretrained("runs/smoke/export")
            >>> one, two = (row["embedding"] for row in predictor.embed(["a good day", "a good day"]))
            >>> print(f"{one @ two:.3f}")
            1.000
        """
        chosen = self.choose_tasks(None if task is None else [task])[:1]
        posts = self._read(texts, pairs, words, images, image_root, chosen)
        for prediction in posts.predictions:
            prediction.pop("text")
        if posts.usable:
            ((column, some),) = task_passes(posts, chosen, as_words=self.as_words)
            split = self._forward.encode(posts, column, some)
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

    def _embed(self, split: TokenizedSplit, indices: np.ndarray, predictions: list[dict]) -> None:
        posts_B, vectors_BM = self._forward.embed(split, indices)
        for post, vector_M in zip(posts_B, vectors_BM, strict=True):
            if np.isfinite(vector_M).all():
                predictions[post]["embedding"] = vector_M
            else:
                predictions[post]["error"] = "its states are not finite: the model has diverged"
        self._forward.remarks(split, posts_B, predictions)

    def _predict(
        self,
        split: TokenizedSplit,
        indices: np.ndarray,
        *,
        tasks: Sequence[Task],
        predictions: list[dict],
        explain: str | None,
    ) -> None:
        output, found = self._forward.outputs(split, indices, tasks)
        for task, rows in found:
            decoded = task.rules.decode([of_row for _, _, of_row in rows], task)
            for (post, row, _), prediction in zip(rows, decoded, strict=True):
                if task.mode == "tokens":
                    (tokens,) = split.rows([post])
                    read = tokens.word_ids[tokens.word_starts]
                    prediction = with_spans(prediction, [split.posts.words[post][w] for w in read])
                prediction |= self._explainer.of_output(explain, task, split, post, row, output)
                put_prediction(predictions[post], task, prediction)
        self._forward.remarks(split, indices.tolist(), predictions)
