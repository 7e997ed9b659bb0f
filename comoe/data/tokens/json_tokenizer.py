"""A tokenizer read from its ``tokenizer.json`` alone, by the library tokenizers: transformers takes a second to import.

An export says whether that file is all that there is to its tokenizer (``description_of``): then both
give the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from comoe.config.files import digest_of
from comoe.data.tokens.vocabulary import WHOLE

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FILES = (
    WHOLE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What transformers reads of a tokenizer whose first file is there."""

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens that have a name."""

CALLED = (
    "__call__",
    "_encode_plus",
    "_switch_to_input_mode",
    "convert_tokens_to_string",
    "num_special_tokens_to_add",
    "set_truncation_and_padding",
    "tokenize",
)
"""What a class of transformers may not do in its own way."""


class Span(NamedTuple):
    """Characters of a text."""

    start: int
    end: int
    """The last one + 1."""


class Encoded:
    """Tokens of a text, or of each of some texts; what is read of a ``BatchEncoding`` of transformers.

    Args:
        encodings: of the library, one per text.
        alone: whether it was one text, and no list of one.
    """

    def __init__(self, encodings: list[Encoding], *, alone: bool) -> None:
        self.encodings = encodings
        self._alone = alone

    def __getitem__(self, key: str) -> Any:
        """``input_ids``: of each text, or of the only one."""
        if key != "input_ids":
            raise KeyError(key)
        ids = [encoding.ids for encoding in self.encodings]
        return ids[0] if self._alone else ids

    def word_to_chars(self, word: int) -> Span:
        """Where a word of the first text stands in it."""
        return Span(*self.encodings[0].word_to_chars(word, 0))


class JsonTokenizer:
    """What comoe uses of a fast tokenizer of transformers; anything else is asked of that tokenizer, read on demand.

    Args:
        tokenizer: of the library; its truncation and padding are changed.
        description: as of ``description_of``.
        whole: reads the tokenizer of transformers.
    """

    is_fast = True
    chat_template = None

    def __init__(
        self, tokenizer: Tokenizer, description: Mapping[str, Any], whole: Callable[[], Any]
    ) -> None:
        self.backend_tokenizer = tokenizer
        self.model_input_names: list[str] = list(description["model_input_names"])
        self.model_max_length: int = description["model_max_length"]
        self.truncation_side: str = description["truncation_side"]
        for name in SPECIAL:
            token = description["special_tokens"].get(name)
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", token and tokenizer.token_to_id(token))
        tokenizer.encode_special_tokens = description["split_special_tokens"]
        tokenizer.no_padding()
        self._read_whole = whole

    def __call__(
        self,
        texts: Any,
        pairs: Sequence[Any] | None = None,
        *,
        truncation: str | bool = False,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        verbose: bool = True,
    ) -> Encoded:
        """Tokens of texts, as a tokenizer of transformers gives them.

        Args:
            texts: a text or a list of them; or a list of lists of words.
            pairs: second texts of a list, all or none; words where the texts are words.
            truncation: ``longest_first`` cuts to ``max_length`` tokens, ``only_second`` the second texts alone; false
                cuts nothing.
            max_length: of a row, special tokens included.
            is_split_into_words: the texts are words.
            add_special_tokens: around the texts.
            verbose: of no use here, as nothing is said of long texts.
        """
        if truncation:
            self.backend_tokenizer.enable_truncation(
                max_length, strategy=truncation, direction=self.truncation_side
            )
        else:
            self.backend_tokenizer.no_truncation()
        alone = isinstance(texts, str)
        rows = [texts] if alone else texts
        made = self.backend_tokenizer.encode_batch(
            rows if pairs is None else list(zip(rows, pairs, strict=True)),
            is_pretokenized=is_split_into_words,
            add_special_tokens=add_special_tokens,
        )
        return Encoded(made, alone=alone)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text as they stand in the vocabulary, without special ones around it."""
        return self(text, add_special_tokens=False).encodings[0].tokens

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens around a text, or around two."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._whole, name)

    @functools.cached_property
    def _whole(self) -> Any:
        return self._read_whole()


def description_of(tokenizer: Any, folder: Path) -> dict[str, Any] | None:
    """What ``JsonTokenizer`` must know beside a folder's ``tokenizer.json``; None where its tokens might differ.

    Args:
        tokenizer: of transformers, as it reads the folder, and as it is used.
        folder: of its files.
    """
    file = folder / WHOLE
    if not (tokenizer.is_fast and file.is_file()) or tokenizer.chat_template:
        return None
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    changed = any(
        getattr(kind, name, None) is not getattr(TokenizersBackend, name, None) for name in CALLED
    )
    alone = Tokenizer.from_file(str(file))
    for one in (alone, here := Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())):
        one.no_truncation()
        one.no_padding()
    if changed or alone.to_str() != here.to_str():
        return None
    special = {name: getattr(tokenizer, f"{name}_token") for name in SPECIAL}
    return {
        "sha256": digests(folder),
        "model_input_names": list(tokenizer.model_input_names),
        "model_max_length": tokenizer.model_max_length,
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
        "special_tokens": {name: str(token) for name, token in special.items() if token},
    }


def read_json_tokenizer(
    folder: Path, description: Any, whole: Callable[[], Any]
) -> JsonTokenizer | None:
    """The tokenizer of an export; None where it is not described, or one of its files has been changed since.

    Args:
        folder: of the export.
        description: that the export has; of a stranger's export it may be anything.
        whole: reads the tokenizer of transformers.
    """
    found = digests(folder)
    if not isinstance(description, Mapping) or description.get("sha256") != found:
        return None
    if WHOLE not in found:
        return None
    from tokenizers import Tokenizer

    made = JsonTokenizer(Tokenizer.from_file(str(folder / WHOLE)), description, whole)
    # It is tried, as some settings fail only then.
    made(["a"], truncation="longest_first", max_length=8)
    return made


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of ``FILES`` that a folder has."""
    return {name: digest_of(folder / name) for name in FILES if (folder / name).is_file()}
