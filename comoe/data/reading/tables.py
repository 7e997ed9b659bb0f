"""Tables of typed columns: Parquet files and data sets of the Hugging Face hub, whose label ids have names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from comoe.config.extras import need
from comoe.config.hub_access import cached_where_unreachable
from comoe.data.reading.files import RawSplit, Row


def read_parquet(path: Path) -> RawSplit:
    """Parquet, by column names."""
    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    # OverflowError and others: dates that Python has not; OSError: what cannot be unpacked.
    except (pyarrow.ArrowException, OSError, ArithmeticError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({error}); write it anew, or correct the format."
        ) from error
    known = class_names(table.column_names, parquet_features(table.schema))
    return named_rows(rows, table.column_names, known, file=str(path))


def parquet_features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What the library datasets keeps about the columns in a Parquet file, column -> its type; empty without."""
    try:
        kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(kept.get("info", {}).get("features", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def load_hub(key: str, path: str, subset: str | None = None, **options: Any) -> Any:
    """All splits of a data set of the hub, name -> split.

    Args:
        key: option or key of the recipe, for messages.
        path: its name.
        subset: its configuration.
        options: of ``datasets.load_dataset``.

    Raises:
        ValueError: the library is missing, or nothing could be loaded.
    """
    need("train", "datasets", what=f"{key} ({path}): a data set of the hub")
    import datasets

    where = path + (f", subset {subset}" if subset else "")
    try:
        with cached_where_unreachable(path):
            return datasets.load_dataset(path, subset, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"{key} ({where}): the data set could not be loaded from the Hugging Face hub. Without "
            "a network, save it as JSON lines and give the folder. Otherwise check the name, "
            f"the subset, and your right to read it. ({type(error).__name__}: {reason})"
        ) from error


def class_names(columns: Sequence[str], features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Column -> names of its labels in the order of their ids, of the columns that know them.

    Args:
        columns: their names.
        features: column -> its type, as the library datasets writes it.
    """
    return {column: names for column in columns if (names := _class_names(features.get(column)))}


def name_labels(row: Row, known: Mapping[str, Sequence[str]], *, file: str) -> Row:
    """A row with names instead of ids of labels, in place; a negative id is a missing label.

    Raises:
        ValueError: an id without a name; ``file`` is named.
    """

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(item, names) for item in value]
        if value is not None and value >= len(names):
            raise ValueError(f"{file}: {value} is no label id; there are {len(names)} label names.")
        return None if value is None or value < 0 else names[value]

    for column, names in known.items():
        row[column] = named(row[column], names)
    return row


def named_rows(
    rows: list[Row],
    columns: Sequence[str],
    known: Mapping[str, tuple[str, ...]],
    *,
    file: str,
) -> RawSplit:
    """Rows of a table as a split.

    Args:
        rows: column -> value.
        columns: their names.
        known: of ``class_names``.
        file: for messages.
    """
    return RawSplit(
        file=file,
        rows=[name_labels(row, known, file=file) for row in rows],
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
