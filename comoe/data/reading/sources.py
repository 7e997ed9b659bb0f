"""Readers of labeled posts: finds a data set's splits and reads them, whatever the format, as plain rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from comoe.config.errors import unknown_name
from comoe.data.reading.files import (
    COMPRESSED,
    Met,
    RawSplit,
    Rows,
    csv_rows,
    jsonl_rows,
    read_whole,
    text_rows,
    tsv_rows,
)
from comoe.data.reading.image_posts import LAYOUTS
from comoe.data.reading.label_studio import read_label_studio
from comoe.data.reading.tables import class_names, load_hub, named_rows, read_parquet
from comoe.data.reading.tweeteval import read_mapping, read_tweeteval
from comoe.tasks.kinds.base import Kind

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
    text: str | None = None
    """Column with the post, where the reader is to know."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """Column of labels -> kind of the task that has them."""


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
        option = "--format" if key.startswith("-") else f"{key}.format"
        raise unknown_name(option, format, ("auto", *READERS))
    if format == "hub":
        return Source(key=key, path=path, format=format, subset=subset, splits=splits)
    place = Path(root or ".").expanduser() / Path(path).expanduser()
    if not place.exists():
        if root is not None and not Path(root).expanduser().is_dir():
            raise ValueError(
                f"data.root ({root}): there is no such folder; {key}.path ({path}) starts from it."
            )
        if key.startswith("-"):
            raise ValueError(
                f"{key} {path}: there is no such file or folder; correct the path, or give "
                "--format hub for a data set of the Hugging Face hub."
            )
        raise ValueError(
            f"{key}.path ({path}): there is no file or folder {place}. Correct the path or "
            f"data.root; for a data set of the Hugging Face hub set {key}.format=hub."
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


def read_input(
    option: str,
    path: str,
    *,
    format: str = "auto",
    split: str = "train",
    text: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> RawSplit:
    """What an option of a command names: a file whole, of a folder or hub data set one split.

    ``text`` and ``kinds`` are those of ``Source``.

    Raises:
        ValueError: nothing there, no format fits, no such split; or it cannot be read at all.
    """
    source = open_source(option, root=None, path=path, format=format, subset=None, splits={})
    source = replace(source, text=text, kinds=kinds or {})
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
        if file.is_file() and (format := format_of(file)):
            return format
    looked = [
        name
        for stem in NAMES["train"]
        for name in (f"{stem}_text.txt", *(stem + ending for ending in ENDINGS))
    ]
    nothing = _nothing(key, place, "train", looked if named is None else [named])
    raise ValueError(f"{nothing} Or set {key}.format ({', '.join(READERS)}).")


def format_of(path: Path) -> str | None:
    """The format that the ending of a file says, also in front of .gz or .zst; None where none is known."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in COMPRESSED:
        format = ENDINGS.get(endings[0])
        return format if format in TEXT_ROWS else None
    return ENDINGS.get(path.suffix.lower())


def unread_files(source: Source) -> list[str]:
    """One sentence for each split that lies there in a second format, which is not read."""
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


def _read_label_studio(source: Source, split: str) -> RawSplit | None:
    path = _locate(source, split, (".json",))
    option = f"{source.key}.text" if source.key.startswith("tasks.") else "--text-column"
    if path is None:
        return None
    return read_label_studio(path, text=source.text, kinds=source.kinds, option=option)


def _read_hub(source: Source, split: str) -> RawSplit | None:
    """A data set of the Hugging Face hub. Its own Python code is never run."""
    where = source.path + (f", subset {source.subset}" if source.subset else "")
    names = (source.splits[split],) if split in source.splits else NAMES[split]
    loaded = load_hub(f"{source.key}.path", source.path, source.subset)
    name = next((name for name in names if name in loaded), None)
    if name is not None:
        found = loaded[name]
        known = class_names(found.column_names, found.features.to_dict())
        file = f"{source.path} ({name})"
        return named_rows(found.to_list(), found.column_names, known, file=file)
    if split == "train" or split in source.splits:
        raise ValueError(
            f"{source.key}.path ({where}): no split {' or '.join(names)}; there is "
            f"{', '.join(loaded)}. Name one in {source.key}.splits.{split}."
        )
    return None


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


TEXT_ROWS: dict[str, Callable[[Iterable[bytes], str, Met], Rows]] = {
    "jsonl": jsonl_rows,
    "csv": csv_rows,
    "tsv": tsv_rows,
    "txt": text_rows,
}
"""Format of text files -> reader of their rows, one after another."""


def _text_reader(format: str) -> Callable[[Source, str], RawSplit | None]:
    endings = tuple(ending for ending, meant in ENDINGS.items() if meant == format)
    return _file_reader(endings, partial(read_whole, read=TEXT_ROWS[format]))


def _layout_reader(
    read: Callable[[str, Path, str, str | None], RawSplit | None],
) -> Callable[[Source, str], RawSplit | None]:
    """Reader of a public set's folder."""

    def reader(source: Source, split: str) -> RawSplit | None:
        folder, option = Path(source.path), f"{source.key}.path"
        if not folder.is_dir():
            raise ValueError(
                f"{option} ({folder}) is not a folder; format {source.format} wants the set's."
            )
        return read(option, folder, split, source.splits.get(split))

    return reader


READERS: dict[str, Callable[[Source, str], RawSplit | None]] = {
    "tweeteval": _read_tweeteval,
    "jsonl": _text_reader("jsonl"),
    "csv": _text_reader("csv"),
    "tsv": _text_reader("tsv"),
    "parquet": _file_reader((".parquet",), read_parquet),
    "txt": _text_reader("txt"),
    "label_studio": _read_label_studio,
    "hub": _read_hub,
    **{format: _layout_reader(read) for format, read in LAYOUTS.items()},
}
"""Format -> reader of one split, None where the data set lacks it."""
