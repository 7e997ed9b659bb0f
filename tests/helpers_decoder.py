"""Small tokenizers of encoder-decoders, tasks that a decoder answers, posts for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from comoe.data.posts import PostSplit, unlabelled_posts
from comoe.tasks.task import Task
from comoe.types import Batch

ASPECT = Task("aspect", "text", (), "token_f1", prompt="aspect of: {text}", max_answer_length=6)
POLARITY = Task(
    "polarity", "label_words", ("bad", "good"), "macro_f1", prompt="polarity of {pair} in: {text} ?",
    label_words=("terrible", "great"),
)  # fmt: skip
MOOD = Task("mood", "single_label", ("calm", "wild"), "macro_f1")
TASKS = (MOOD, ASPECT, POLARITY)


def decoder_tokenizer(
    words: Sequence[str] = (), *, start: bool = False, end: bool = True
) -> PreTrainedTokenizerFast:
    """As T5's ("a </s>"), or BART's with ``start`` ("<s> a </s>"): given words whole, others by ASCII letters."""
    letters = [chr(code) for code in range(33, 127)]
    known = dict.fromkeys(
        ["<pad>", "</s>", "<unk>", "<s>", *letters, *(f"##{letter}" for letter in letters), *words]
    )
    vocab = {token: i for i, token in enumerate(known)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    if end:
        single = f"{'<s> ' if start else ''}$A </s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} $B </s>",
            special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
        )
    named = {"pad_token": "<pad>", "unk_token": "<unk>"} | ({"eos_token": "</s>"} if end else {})
    named |= {"bos_token": "<s>"} if start else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )


def posts_of(
    texts: Sequence[str],
    labels: Mapping[str, Sequence[Any]],
    *,
    pairs: Sequence[str | None] | None = None,
    tasks: Sequence[Task] = TASKS,
    **more: Any,
) -> PostSplit:
    """Posts of one data set; tasks without labels here have none."""
    posts = unlabelled_posts(texts, tasks=[task.name for task in tasks], pairs=pairs)
    return replace(posts, labels={**posts.labels, **labels}, **more)


def batch_of_labels(labels: Mapping[str, Tensor]) -> Batch:
    """A batch of which only the labels mean anything."""
    rows = len(next(iter(labels.values())))
    blank = torch.zeros(rows, 1, dtype=torch.int64)
    return Batch(
        blank, blank, None, blank.bool(), torch.full((rows,), -1), torch.arange(rows), labels=labels
    )
