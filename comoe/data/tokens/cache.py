"""Tokens on disk: found again where the same was tokenized alike before."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from comoe.config.files import cache_file
from comoe.data.text.normalize import VERSION

FORMAT = 1
"""Changes when the arrays of a cache file mean something else."""

Stored = TypeVar("Stored")


def cached(
    record: type[Stored],
    make: Callable[[], Stored],
    settings: Sequence[Any],
    read: Iterable[Any],
    *,
    count: int,
    cache_dir: Path,
) -> Stored:
    """What ``make`` gives, read from ``cache_dir`` where the same was made before.

    The file is named by a hash of everything that the tokens depend on, and holds arrays only:
    loading it runs no code.

    Args:
        record: what is made: a dataclass of arrays, one of them ``offsets``, (count + 1,).
        make: makes it.
        settings: plain values that it depends on.
        read: plain values, one per text, that it depends on.
        count: texts.
        cache_dir: folder of the cache.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, *settings]).encode())
    for value in read:
        digest.update(json.dumps(value).encode())
    path = Path(cache_dir) / f"{digest.hexdigest()[:32]}.npz"
    if (tokens := _load(record, path, count=count)) is not None:
        return tokens
    tokens = make()
    # Ranks may write the same file at the same time.
    with cache_file(path) as file:
        arrays = {field.name: getattr(tokens, field.name) for field in fields(record)}
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return tokens


def _load(record: type[Stored], path: Path, *, count: int) -> Stored | None:
    """A cache file, None where there is none or it was cut short."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens = record(**stored)
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, TypeError, ValueError):
        return None
    return tokens if len(tokens.offsets) == count + 1 else None


def fingerprint(tokenizer: Any) -> str:
    """Hash of the tokenizer's vocabulary and rules, whatever it was called with before."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Every call stores its settings there.
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    else:
        rules = {
            key: str(value)
            for key, value in (*tokenizer.get_vocab().items(), *tokenizer.init_kwargs.items())
        }
    names = [type(tokenizer).__name__, tokenizer.unk_token]
    return hashlib.sha256(json.dumps([names, rules], sort_keys=True).encode()).hexdigest()
