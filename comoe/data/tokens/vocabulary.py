"""Tokenizers: loading one, and what is wrong with one that would make every word unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comoe.config.hub_access import cached_where_unreachable

WHOLE = "tokenizer.json"
"""The file that holds a whole tokenizer."""

SAMPLED = 64
"""Words of a vocabulary that are tokenized to see whether they are known."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an encoder.

    Args:
        name: folder with the tokenizer's files, or a hub name.
        trust_remote_code: let the encoder's repository run its own Python code.

    Raises:
        ValueError: no tokenizer there, one without a padding token, or one that knows no words.
    """
    from transformers import AutoTokenizer  # takes a second, which not every prediction waits for

    try:
        with cached_where_unreachable(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        prepare_causal(tokenizer)
        problem = tokenizer_problem(tokenizer, name)
    except Exception as error:  # a damaged setting fails anywhere in the library
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"model.encoder ({name}): no tokenizer could be loaded. Give a folder that holds tokenizer.json or the "
            f"vocabulary beside config.json, or a hub name with a network at hand. ({type(error).__name__}: {reason})"
        ) from error
    if problem:
        raise ValueError(
            f"model.encoder ({name}): {problem}; copy all files of the encoder's own tokenizer there."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"model.encoder ({name}): its tokenizer has no padding token; choose BERT, RoBERTa or DistilBERT."
        )
    return tokenizer


def is_causal(tokenizer: Any) -> bool:
    """Whether it is the tokenizer of a decoder-only model: it has an end token, but puts none
    behind a text, and no token that stands for a text or between two."""
    if tokenizer.eos_token_id is None or {tokenizer.cls_token_id, tokenizer.sep_token_id} != {None}:
        return False
    return tokenizer.eos_token_id not in tokenizer("a", verbose=False)["input_ids"]


def prepare_causal(tokenizer: Any) -> None:
    """Let the tokenizer of a decoder-only model pad behind the text, and take special tokens in
    posts as the text that they are, in place; others stay as they are."""
    if not is_causal(tokenizer):
        return
    tokenizer.padding_side = "right"
    tokenizer.split_special_tokens = True
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def tokenizer_problem(tokenizer: Any, source: str | Path) -> str:
    """Why a tokenizer cannot have come from its own files; empty where it can.

    The library makes one of special tokens alone where a folder holds no vocabulary, and says
    nothing: every word would be the unknown token.

    Args:
        tokenizer: as it was loaded.
        source: folder or hub name that it was loaded from.
    """
    folder = Path(source).expanduser()
    needed = {
        file for key, file in tokenizer.vocab_files_names.items() if key != "tokenizer_file"
    } or {WHOLE} & set(tokenizer.vocab_files_names.values())
    missing = sorted(file for file in needed if not (folder / file).is_file())
    # Some folders hold a tokenizer.json per version of the library.
    whole = any(file.name != "tokenizer_config.json" for file in folder.glob("tokenizer*.json"))
    if folder.is_dir() and missing and not whole:
        return (
            f"its tokenizer has no vocabulary: neither {WHOLE} nor {' and '.join(missing)} is there"
        )
    special = set(tokenizer.all_special_tokens)
    words = [word for word in sorted(tokenizer.get_vocab()) if word not in special]
    if not words:
        # Some tokenizers of characters have no vocabulary.
        return "its tokenizer knows no words" if _is_unknown(tokenizer, "a") else ""
    sample = [word for word in words if sum(map(str.isalpha, word)) > 1] or words
    sample = sample[:: max(1, len(sample) // SAMPLED)]
    texts = [tokenizer.convert_tokens_to_string([word]).removeprefix("##") for word in sample]
    lost = sum(_is_unknown(tokenizer, text) for text in texts)
    if 2 * lost > len(sample):
        return f"its tokenizer does not know {lost} of {len(sample)} words of its own vocabulary, such as {sample[0]!r}"
    return ""


def _is_unknown(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return set(ids) <= {tokenizer.unk_token_id}


def embedding_problem(tokenizer: Any, hf_config: Any) -> str:
    """Why an embedding table cannot hold the ids of a tokenizer; empty where it can.

    Args:
        tokenizer: of the model.
        hf_config: the encoder's Hugging Face configuration.
    """
    rows = getattr(hf_config, "vocab_size", None)
    word, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if rows is None or last < rows:
        return ""
    return (
        f"the tokenizer has id {last} ({word!r}), but the encoder's embedding has {rows} rows: the "
        "tokenizer is that of another model"
    )
