"""Small data sets, recipes and tokenizers for the tests of ``comoe.data``."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from comoe.config.recipe import Recipe, TaskConfig
from comoe.data.corpus import Corpus, load_corpus

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file of this process grows over so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wordpiece_tokenizer(
    words: Sequence[str] = (), *, model_max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: the given words whole, all others letter by letter, [UNK] for what is not ASCII."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A RoBERTa-like tokenizer: bytes, the blank before a word within the word's token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *alphabet, "Ġa", "Ġb"])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ġ", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 3), ("<s>", 2), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
    )


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a row that is a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


def labelled_rows(
    count: int, *, labels: Sequence[str] = ("bad", "good"), start: int = 0
) -> list[dict[str, str]]:
    """Posts that are all different, labels in turn."""
    return [
        {"text": f"post number {start + i}", "label": labels[i % len(labels)]} for i in range(count)
    ]


def recipe_of(root: Path, **tasks: TaskConfig) -> Recipe:
    """A recipe with the given tasks and a data root."""
    recipe = Recipe(tasks=tasks)
    recipe.data.root = str(root)
    return recipe


def corpus_of(root: Path, rows: Iterable[Any], **task: Any) -> Corpus:
    """The corpus of a task ``t`` on a data set ``posts`` whose training and validation posts are these rows."""
    rows = list(rows)
    for name in ("train", "validation"):
        write_jsonl(root / "posts" / f"{name}.jsonl", rows)
    return load_corpus(recipe_of(root, t=TaskConfig(path="posts", **task)))
