"""Readers of labeled posts: finds a data set's splits and reads them, whatever the format, as plain rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from comoe.config.errors import unknown_name
from comoe.config.extras import need
from comoe.data.reading.files import (
    RawSplit,
    read_csv,
    read_jsonl,
    read_mapping,
    read_text,
    read_tsv,
    read_tweeteval,
)
from comoe.data.reading.label_studio import read_label_studio

NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
"""Split -> usual names of its file."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one data set is."""

    key: str
    """Key path in the recipe, for messages: ``tasks.mood``."""
    path: str
    """Folder or file, resolved; or a hub name."""
    format: str
    """Key of ``READERS``."""
    subset: str | None = None
    """Configuration of a hub data set."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Split -> file (or hub split) where it has not a usual name."""


def open_source(
    key: str,
    *,
    root: str | None,
    path: str,
    format: str,
    subset: str | None,
    splits: Mapping[str, str],
) -> Source:
    """Find a data set and its format.

    Args:
        key: key path in the recipe, for messages.
        root: folder that a relative path starts from, None for the current one.
        path: folder, file or hub name.
        format: key of ``READERS``, or auto.
        subset: configuration of a hub data set.
        splits: split -> file or hub split.

    Raises:
        ValueError: nothing there, or no format fits.
    """
    if format != "auto" and format not in READERS:
        raise unknown_name(f"{key}.format", format, ("auto", *READERS))
    if format == "hub":
        return Source(key=key, path=path, format=format, subset=subset, splits=splits)
    place = Path(root or ".").expanduser() / Path(path).expanduser()
    if not place.exists():
        if root is not None and not Path(root).expanduser().is_dir():
            raise ValueError(
                f"data.root ({root}): there is no such folder; {key}.path ({path}) starts from it."
            )
        raise ValueError(
            f"{key}.path ({path}): there is no file or folder {place}. Correct the path or data.root; "
            f"for a data set of the Hugging Face hub set {key}.format=hub."
        )
    return Source(
        key=key,
        path=str(place),
        format=_guess(key, place, splits) if format == "auto" else format,
        subset=subset,
        splits=splits,
    )


def read_split(source: Source, split: str) -> RawSplit | None:
    """One split of a data set, None where it has none.

    Raises:
        ValueError: a file named in the recipe is missing, or a file cannot be read at all.
    """
    return READERS[source.format](source, split)


def read_input(option: str, path: str, *, format: str = "auto", split: str = "train") -> RawSplit:
    """What an option of a command names: a file is read whole, of a folder or hub data set one split.

    Raises:
        ValueError: nothing there, no format fits, no such split; or it cannot be read at all.
    """
    source = open_source(option, root=None, path=path, format=format, subset=None, splits={})
    if split not in NAMES:
        raise unknown_name("--split", split, NAMES)
    # A path that is a file is its data set's training split to the reader.
    raw = read_split(source, "train" if Path(source.path).is_file() else split)
    if raw is None:
        raise ValueError(f"{option} {path}: it has no {split} split; choose another --split.")
    return raw


def _guess(key: str, place: Path, splits: Mapping[str, str]) -> str:
    """The format of a path: by its folder's text files, or by the ending of its training file."""
    named = splits.get("train")
    if place.is_file():
        files = [place]
    elif named is not None:
        files = [place / named]
    elif any((place / f"{name}_text.txt").is_file() for name in NAMES["train"]):
        return "tweeteval"
    else:
        files = _candidates(place, "train", ENDINGS)
    for file in files:
        if file.is_file() and file.suffix.lower() in ENDINGS:
            return ENDINGS[file.suffix.lower()]
    looked = [
        name
        for stem in NAMES["train"]
        for name in (f"{stem}_text.txt", *(stem + ending for ending in ENDINGS))
    ]
    nothing = _nothing(key, place, "train", looked if named is None else [named])
    raise ValueError(f"{nothing} Or set {key}.format ({', '.join(READERS)}).")


def unread_files(source: Source) -> list[str]:
    """One sentence for each split that also lies there in another format than the one that is read."""
    place = Path(source.path)
    if not place.is_dir():
        return []
    found = []
    for split in NAMES:
        if split in source.splits:
            continue
        there = [file for file in _candidates(place, split, ENDINGS) if file.is_file()]
        there += [
            place / f"{name}_text.txt"
            for name in NAMES[split]
            if (place / f"{name}_text.txt").is_file()
        ]
        formats = {
            file: "tweeteval" if file.stem.endswith("_text") else ENDINGS[file.suffix]
            for file in there
        }
        others = [file.name for file, format in formats.items() if format != source.format]
        if others:
            found.append(
                f"{place}: {', '.join(others)} not read, as the data set is read as {source.format}; "
                f"{source.key}.format or {source.key}.splits.{split} would choose, or move what is not meant away"
            )
    return found


def _candidates(folder: Path, split: str, endings: Sequence[str] | Mapping[str, str]) -> list[Path]:
    return [folder / f"{name}{ending}" for name in NAMES[split] for ending in endings]


def _nothing(key: str, place: Path, split: str, looked: Sequence[str]) -> str:
    """The message for a file that is not there."""
    there = sorted(item.name for item in place.iterdir())[:20] if place.is_dir() else [place.name]
    return (
        f"{key}.path: no {split} file in {place}; looked for {', '.join(looked)}; "
        f"there is {', '.join(there) or 'nothing'}. Name it in {key}.splits.{split}."
    )


def _locate(source: Source, split: str, endings: Sequence[str]) -> Path | None:
    """The file of a split. A path that is a file is the training split."""
    place = Path(source.path)
    folder = place if place.is_dir() else place.parent
    if split in source.splits:
        file = folder / source.splits[split]
        if not file.is_file():
            raise ValueError(f"{_nothing(source.key, folder, split, [source.splits[split]])}")
        return file
    if place.is_file():
        return place if split == "train" else None
    found = [file for file in _candidates(folder, split, endings) if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"{source.key}.path: several {split} files in {folder} ({names}); name one in {source.key}.splits.{split}."
        )
    if not found and split == "train":
        looked = [file.name for file in _candidates(folder, split, endings)]
        raise ValueError(_nothing(source.key, folder, split, looked))
    return found[0] if found else None


def _read_parquet(path: Path) -> RawSplit:
    """Parquet, by column names."""
    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    # OverflowError and others: dates that Python has not; OSError: what cannot be unpacked.
    except (pyarrow.ArrowException, OSError, ArithmeticError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({error}); write it anew, or correct the format."
        ) from error
    try:
        # Where the library datasets keeps what it knows about the columns.
        kept = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(kept.get("info", {}).get("features", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        features = {}
    return _named_rows(rows, table.column_names, features, file=str(path))


def _file_reader(
    endings: Sequence[str], read: Callable[[Path], RawSplit]
) -> Callable[[Source, str], RawSplit | None]:
    """Reader of a format that has one file per split."""

    def reader(source: Source, split: str) -> RawSplit | None:
        path = _locate(source, split, endings)
        return None if path is None else read(path)

    return reader


def _read_tweeteval(source: Source, split: str) -> RawSplit | None:
    """A folder of TweetEval: ``<split>_text.txt``, ``<split>_labels.txt``, and ``mapping.txt`` with id, tab, name."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise ValueError(
            f"{source.key}.path ({folder}) is not a folder; format tweeteval wants the folder with train_text.txt."
        )
    names = (source.splits[split],) if split in source.splits else NAMES[split]
    stem = next((name for name in names if (folder / f"{name}_text.txt").is_file()), None)
    if stem is None:
        if split == "train" or split in source.splits:
            raise ValueError(
                _nothing(source.key, folder, split, [f"{name}_text.txt" for name in names])
            )
        return None
    text_file, label_file = folder / f"{stem}_text.txt", folder / f"{stem}_labels.txt"
    if not label_file.is_file() and split != "test":
        raise ValueError(
            f"{source.key}.path: {text_file} has no labels; {label_file.name} is missing beside it."
        )
    return read_tweeteval(
        text_file,
        label_file if label_file.is_file() else None,
        read_mapping(folder / "mapping.txt"),
    )


def _read_hub(source: Source, split: str) -> RawSplit | None:
    """A data set of the Hugging Face hub. Its own Python code is never run."""
    need("train", "datasets", what=f"{source.key}.path ({source.path}): a data set of the hub")
    import datasets

    where = source.path + (f", subset {source.subset}" if source.subset else "")
    names = (source.splits[split],) if split in source.splits else NAMES[split]
    try:
        loaded = datasets.load_dataset(source.path, source.subset)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"{source.key}.path ({where}): the data set could not be loaded from the Hugging Face hub. Without a "
            "network, save it as JSON lines and give the folder. Otherwise check the name, "
            f"{source.key}.subset, and your right to read it. ({type(error).__name__}: {reason})"
        ) from error
    name = next((name for name in names if name in loaded), None)
    if name is not None:
        found = loaded[name]
        features = found.features.to_dict()
        file = f"{source.path} ({name})"
        return _named_rows(found.to_list(), found.column_names, features, file=file)
    if split == "train" or split in source.splits:
        raise ValueError(
            f"{source.key}.path ({where}): no split {' or '.join(names)}; there is {', '.join(loaded)}. "
            f"Name one in {source.key}.splits.{split}."
        )
    return None


def _named_rows(
    rows: list[dict[str, Any]], columns: Sequence[str], features: Mapping[str, Any], *, file: str
) -> RawSplit:
    """Rows; ids of a column that knows their names become names, its negative ids missing labels.

    Args:
        rows: column -> value.
        columns: their names.
        features: column -> its type, as the library datasets writes it.
        file: for messages.
    """
    known = {column: names for column in columns if (names := _class_names(features.get(column)))}

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(item, names) for item in value]
        if value is not None and value >= len(names):
            raise ValueError(f"{file}: {value} is no label id; there are {len(names)} label names.")
        return None if value is None or value < 0 else names[value]

    for column, names in known.items():
        for row in rows:
            row[column] = named(row[column], names)
    return RawSplit(
        file=file,
        rows=rows,
        lines=list(range(1, len(rows) + 1)),
        columns=tuple(columns),
        label_names=known,
    )


def _class_names(feature: Any) -> tuple[str, ...]:
    """The label names of a column, or of the items of its lists; empty where it has none."""
    if not isinstance(feature, dict):
        return ()
    if feature.get("_type") in ("List", "LargeList", "Sequence"):
        return _class_names(feature["feature"])
    return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else ()


ENDINGS: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
"""Ending of a file -> key of ``READERS``."""


READERS: dict[str, Callable[[Source, str], RawSplit | None]] = {
    "tweeteval": _read_tweeteval,
    "jsonl": _file_reader((".jsonl", ".ndjson", ".json"), read_jsonl),
    "csv": _file_reader((".csv",), read_csv),
    "tsv": _file_reader((".tsv", ".tab"), read_tsv),
    "parquet": _file_reader((".parquet",), _read_parquet),
    "txt": _file_reader((".txt",), read_text),
    "label_studio": _file_reader((".json",), read_label_studio),
    "hub": _read_hub,
}
"""Format -> reader of one split, None where the data set lacks it."""
