"""Tokenized posts to padded batches; the same class in training, evaluation and prediction."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.config.recipe import DataConfig
from comoe.data.columns import Domains, confidences_of, domain_columns
from comoe.data.posts import flattened, hidden, unlabelled_posts
from comoe.data.tokens.masking import Masker, check_mask_token
from comoe.data.tokens.prompts import Wording, check_end_token, detokenize, label_tokens
from comoe.data.tokens.split import (
    TokenizedSplit,
    TokenRow,
    assemble_split,
    no_tokens,
    soft_of,
    target_of,
)
from comoe.data.tokens.tokenize import tokenize
from comoe.deferred import Deferred
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import TOGETHER, Task, decoder_tasks, head_tasks, masked_tasks
from comoe.types import IGNORED, Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from comoe.data.images.pixels import PixelReader
else:
    torch = Deferred("torch")


class Collator:
    """Pads posts to a batch and lays out rows and labels as the model and the decoder want them.

    There is one row per post for all tasks with a head, and one per (post, task in decoder mode), with
    the task's prompt, or (post, task in masked mode), with hidden words. With ``row_per_task``
    (``model.moe.route_by: task`` and ``both``, or ``model.own_layers``) there is one row per (post,
    labeled task), a soft label being one too. The labels of tasks that a row does not serve are
    missing in it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tasks: all tasks.
        row_per_task: see above.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
        pixels: reads the posts' images; None leaves them alone.
        domains: what the adversarial loss predicts of posts; None predicts nothing.
        max_posts: ``data.max_posts``.
        lexicon: of the model.

    Raises:
        ValueError: label words that the tokenizer does not know or cannot
            tell apart.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        row_per_task: bool = False,
        pad_to_multiple_of: int = 1,
        pixels: PixelReader | None = None,
        domains: Domains | None = None,
        max_posts: int = DataConfig().max_posts,
        lexicon: Lexicon | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.pixels = pixels
        self.domains = domains
        self.max_posts = max_posts
        self.lexicon = lexicon
        self._row_per_task = row_per_task
        self._multiple = pad_to_multiple_of
        self._segments = "token_type_ids" in tokenizer.model_input_names
        self._decoded = decoder_tasks(self.tasks)
        self._masked = masked_tasks(self.tasks)
        self._heads = [*head_tasks(self.tasks)]
        for task in self._decoded.values():
            check_end_token(tokenizer, task)
        for task in self._masked.values():
            check_mask_token(tokenizer, task)
        self._words = {
            task.name: label_tokens(tokenizer, task) for task in self.tasks if task.label_words
        }
        filler = unlabelled_posts(["a"], tasks=())
        tokens = tokenize(filler, tokenizer, max_length=8, normalize=None)
        self._filler = TokenRow(tokens.input_ids, tokens.token_types, tokens.word_ids)

    def __call__(
        self,
        split: TokenizedSplit,
        indices: np.ndarray,
        *,
        all_tasks: bool = False,
        arrays: bool = False,
        draw: Sequence[int] | None = None,
    ) -> Batch:
        """One batch on the CPU.

        What is read together (an author, a post and its neighbors) has a row each; the first has the labels.

        Args:
            split: tokenized posts.
            indices: posts, int, may be empty: the batch is then one short filler row without
                labels, of row id -1.
            all_tasks: prediction: a row that serves one task is made for every task, labeled or
                not; a task in decoder mode has rows for posts with its label and for posts without
                any label. Else there would be nothing to score, and generating takes long.
            arrays: of NumPy instead of PyTorch, and only what an ONNX file reads: no labels.
            draw: training: seeds which posts of an author are read, if not all, and which words are
                hidden; None reads the first, and hides the same words each time.
        """
        asked = [
            (int(post), task)
            for post in indices
            for task in self._served(split, int(post), all_tasks=all_tasks)
        ] or [(-1, 0 if self._row_per_task else -1)]
        together = [self._rows(split, post, task, draw) for post, task in asked]
        rows = [row for some in together for row in some]
        pairs = [pair for pair, some in zip(asked, together, strict=True) for _ in some]
        places = [place for some in together for place in range(len(some))]
        inputs = self._inputs(pairs, places, rows)
        if split.bounds is not None:
            inputs["bags_B"] = np.cumsum(np.array(places) == 0) - 1
        if arrays:
            return Batch(**inputs)
        posts = [post for post, _ in pairs]
        images = [split.posts.images[post] if post >= 0 else None for post in posts]
        pixels, image_rows, image_numbers = (
            (None,) * 3 if self.pixels is None else self.pixels.collate(images)
        )
        # Rows of a post; drawn twice it counts twice.
        counts, drawn = Counter(posts), Counter(map(int, indices))
        shares = [counts[post] // drawn.get(post, 1) for post in posts]
        given = {name: value for name, value in inputs.items() if value is not None}
        return Batch(
            **(inputs | {name: torch.from_numpy(value) for name, value in given.items()}),
            pixels_I3HW=pixels,
            image_rows_I=image_rows,
            image_numbers_I=image_numbers,
            **self._targets(split, pairs, places, rows, length=inputs["input_ids_BL"].shape[1]),
            confidences=confidences_of(split.posts, posts, self.tasks),
            target_ids_BD=_ragged([self._target_ids(split, post, task) for post, task in pairs])
            if self._decoded
            else None,
            choices={name: _ragged(words) for name, words in self._words.items()},
            **domain_columns(self.domains, split.posts, posts, shares),
        )

    def _inputs(
        self, pairs: Sequence[tuple[int, int]], places: Sequence[int], rows: Sequence[TokenRow]
    ) -> dict[str, np.ndarray | None]:
        """What the model reads of each row: the (post, task) that it is for, its place among those that are read
        together, and its tokens."""
        length = -(-max(len(row.input_ids) for row in rows) // self._multiple) * self._multiple
        pad = functools.partial(_padded, length=length)
        hidden = [() if row.masked_ids is None else row.masked_ids for row in rows]
        of_lexicon = {}
        if self.lexicon is not None:
            entries_BL = pad([() if row.entries is None else row.entries for row in rows])
            of_lexicon = {
                "lexicon_BLK": self.lexicon.features[abs(entries_BL)],
                "lexicon_starts_BL": entries_BL > 0,
            }
        return {
            **of_lexicon,
            "input_ids_BL": pad([row.input_ids for row in rows], fill=self.tokenizer.pad_token_id),
            "attention_mask_BL": pad([np.ones(len(row.input_ids)) for row in rows]),
            "token_type_ids_BL": pad([row.token_types for row in rows]) if self._segments else None,
            "word_starts_BL": pad([row.word_starts for row in rows]).astype(bool),
            "task_ids_B": np.array([task for _, task in pairs], dtype=np.int64),
            "text_numbers_B": self._text_numbers(pairs, places) if self._row_per_task else None,
            "masked_ids_BL": pad(hidden, fill=IGNORED) if self._masked else None,
            "row_ids_B": np.array([post for post, _ in pairs], dtype=np.int64),
        }

    def rows_per_post(self, tasks: Sequence[Task]) -> int:
        """Most rows of a batch that a post has where it is asked for these tasks."""
        heads = len(head_tasks(tasks))
        return max(1, len(tasks) - heads + (heads if self._row_per_task else min(heads, 1)))

    def detokenize(self, ids_BD: Tensor) -> list[str]:
        """Generated token ids (``ModelOutput.generated``) as texts: the model has no tokenizer."""
        return detokenize(ids_BD, self.tokenizer)

    def encode_texts(
        self,
        texts: Sequence[str],
        pairs: Sequence[str | None] | None = None,
        words: Sequence[Sequence[str] | None] | None = None,
        *,
        images: Sequence[bytes | str | None] | None = None,
        config: DataConfig | None = None,
        asked: Sequence[Task] | None = None,
    ) -> TokenizedSplit:
        """Raw texts as a split without labels, by the same path as training posts.

        Args:
            texts: posts; tuples of ``Post`` for what is read together.
            pairs: second texts, None where there is none; tuples of texts for a context.
            words: posts as words, for tags; a text is only used where its words are None.
            images: images as ``comoe.data.images.decode.locate_image`` gives them, None where
                there is none.
            config: longest post, cleaning and what is hidden; None takes the texts as they are, up
                to 128 tokens.
            asked: tasks to make prompts for; None is all.

        Raises:
            ValueError: columns of different number, or a prompt that is too long by itself.
        """
        names = [task.name for task in self.tasks]
        posts = unlabelled_posts(texts, tasks=names, pairs=pairs, words=words, images=images)
        hide = "none" if config is None else config.hide
        seen = hidden(posts, hide)
        max_length, normalize = (
            (128, None) if config is None else (config.max_length, config.normalize)
        )
        heading = self.tasks if asked is None else asked
        if all(task.mode == "decoder" for task in heading):
            tokens = no_tokens(len(posts))
        else:
            flat = hidden(flattened(posts), hide)
            cut = {"max_length": max_length, "normalize": normalize}
            tokens = tokenize(flat, self.tokenizer, **cut, lexicon=self.lexicon)
        wording = Wording(self.tokenizer, max_length=max_length, normalize=normalize)
        return assemble_split(posts, seen, tokens, tasks=self.tasks, wording=wording, asked=asked)

    def _targets(
        self,
        split: TokenizedSplit,
        pairs: Sequence[tuple[int, int]],
        places: Sequence[int],
        rows: Sequence[TokenRow],
        *,
        length: int,
    ) -> dict[str, Any]:
        """``labels``, ``soft_labels`` and ``texts`` of a batch with these rows, as of ``_inputs``; the first of those
        that are read together has them."""
        labels, soft, texts = {}, {}, {}
        for number, task in enumerate(self.tasks):
            # The post of each row that the task is for, -1 for other rows.
            of_task = [
                post if place == 0 and task.rules.serves(only, number) else -1
                for (post, only), place in zip(pairs, places, strict=True)
            ]
            targets = [
                None if post < 0 else target_of(split, task, post, row)
                for post, row in zip(of_task, rows, strict=True)
            ]
            labels[task.name] = task.rules.collate(targets, labels=task.labels, length=length)
            if task.name in split.soft:
                given = [
                    None if post < 0 else soft_of(split, task, post, row)
                    for post, row in zip(of_task, rows, strict=True)
                ]
                soft[task.name] = task.rules.collate_soft(given, labels=task.labels, length=length)
            if task.mode == "decoder" and not task.label_words:
                column = split.posts.labels[task.name]
                texts[task.name] = [None if post < 0 else column[post] for post in of_task]
        return {"labels": labels, "soft_labels": soft, "texts": texts}

    def _rows(
        self, split: TokenizedSplit, post: int, task: int, draw: Sequence[int] | None
    ) -> list[TokenRow]:
        """The rows of a post that are read together for a task, or for all."""
        if post < 0:
            return [self._filler]
        if task in self._decoded:
            return [split.prompt(post, self.tasks[task].name)]
        if task >= 0 and self.tasks[task].reads not in TOGETHER:
            rows = split.rows(np.array([post]))
            if task not in self._masked:
                return rows
            given = {"draw": None if draw is None else (*draw, post, task)}
            given["probability"] = self.tasks[task].probability
            return [self._masker.hide(row, **given) for row in rows]
        return split.all_rows(post, most=self.max_posts, draw=draw)

    def _served(self, split: TokenizedSplit, post: int, *, all_tasks: bool) -> list[int]:
        """Tasks of a post's rows; -1 is all that have heads."""
        labelled = split.labelled[post].copy()
        bare = not labelled.any()
        for number, task in enumerate(self.tasks):
            soft = split.soft.get(task.name)
            labelled[number] |= soft is not None and soft.has(post)
        decoded = [
            task
            for task in self._decoded
            if labelled[task] or (all_tasks and bare)
            if (lists := split.prompts.get(self.tasks[task].name)) is not None
            and lists.lengths[post]
        ]
        decoded += [task for task in self._masked if labelled[task]]
        if self._row_per_task:
            return sorted(
                [*decoded, *(task for task in self._heads if all_tasks or labelled[task])]
            )
        return [-1] * bool(self._heads and (bare or labelled[self._heads].any())) + sorted(decoded)

    @functools.cached_property
    def _masker(self) -> Masker:
        return Masker(self.tokenizer)

    def _text_numbers(self, pairs: Sequence[tuple[int, int]], places: Sequence[int]) -> np.ndarray:
        """Rows of a post have its text, those of tasks in decoder or masked mode one of their own."""
        texts = [
            (post, -1 if task in self._heads else task, place)
            for (post, task), place in zip(pairs, places, strict=True)
        ]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return np.array([numbers[text] for text in texts], dtype=np.int64)

    def _target_ids(
        self, split: TokenizedSplit, post: int, number: int
    ) -> Sequence[int] | np.ndarray:
        """Target tokens of the decoder in one row; none where the row has no target."""
        task = self.tasks[number]
        if (
            post < 0
            or number not in self._decoded
            or (value := split.posts.labels[task.name][post]) is None
        ):
            return ()
        return self._words[task.name][value] if task.label_words else split.targets[task.name][post]


def _padded(
    rows: Sequence[Sequence[int] | np.ndarray], *, length: int, fill: int = 0
) -> np.ndarray:
    """Rows of any length as one int64 array (B, L)."""
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """Token ids of any number as one int64 tensor (B, D), IGNORED behind them; D is at least 1."""
    return torch.from_numpy(_padded(rows, length=max(1, *map(len, rows)), fill=IGNORED))
