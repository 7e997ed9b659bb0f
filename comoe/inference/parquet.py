"""Predictions as Parquet: what stands in a line of JSON becomes a row with typed columns."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from comoe.config.failure import parsing
from comoe.config.files import PART, atomic_file, sync_replace

ENDING = ".parquet"
"""An output with this ending is one file, any other a folder of shards."""
SHARD = 100_000
"""Rows of a file in a folder."""
BATCH = 10_000
"""Rows that are converted at a time, and of a row group."""

_SHARD_NAME = re.compile(r"part-[0-9]{5}\.parquet")
_TEXTS = pyarrow.list_(pyarrow.string())
_SPAN = {
    "type": pyarrow.string(),
    "start": pyarrow.int64(),
    "end": pyarrow.int64(),
    "text": pyarrow.string(),
}
_TYPES = {
    "label": pyarrow.string(),
    "labels": _TEXTS,
    "value": pyarrow.float64(),
    "answer": pyarrow.string(),
    "probability": pyarrow.float64(),
    "words": _TEXTS,
    "tags": _TEXTS,
    "spans": pyarrow.list_(pyarrow.struct(list(_SPAN.items()))),
    "scores": pyarrow.list_(pyarrow.float64()),
}
"""Field of a prediction -> its type; scores with names are a struct, and what is not here is JSON."""
_REMARKS = {"error": pyarrow.string(), "image_error": pyarrow.string(), "truncated": pyarrow.bool_(),
            "windows": pyarrow.int64()}  # fmt: skip


def check_parquet(target: Path) -> None:
    """Refuse a folder that holds anything but shards, which would be lost.

    Raises:
        ValueError: it does; or a file is where the folder would be.
    """
    if target.suffix == ENDING and target.is_dir():
        raise ValueError(f"--output {target} is a folder; remove it, or name a file.")
    if target.suffix == ENDING or not target.exists():
        return
    if not target.is_dir():
        raise ValueError(
            f"--output {target} is a file; Parquet goes into one that ends in {ENDING}, or into a folder."
        )
    others = [item.name for item in target.iterdir() if not _SHARD_NAME.fullmatch(item.name)]
    if others:
        raise ValueError(
            f"--output {target}: the folder has other files ({min(others)}), and is replaced whole; name a new one."
        )
    for shard in target.iterdir():
        with parsing(shard, "name another --output"):
            columns = pyarrow.parquet.read_schema(shard).names
        if not {"text", "error"} <= set(columns):
            raise ValueError(
                f"--output {target}: {shard.name} holds no predictions ({', '.join(columns[:5])}); name a new folder."
            )


def write_parquet(part: Path, target: Path, *, kept: Sequence[str], tasks: Sequence[str]) -> None:
    """Turn lines of predictions into a Parquet file or a folder of them, replacing an older one, and remove them.

    Args:
        part: the lines.
        target: the file, or the folder.
        kept: columns of the input in each line: numbers where all cells are whole numbers.
        tasks: names of the tasks.
    """
    schema = _schema(part, kept, tasks)
    rows = _rows(part, schema)
    if target.suffix == ENDING:
        _write(target, rows, schema)
        part.unlink()
        return
    new = target.with_name(f".{target.name}.{secrets.token_hex(8)}{PART}")
    new.mkdir()
    try:
        for number in itertools.count():
            if not _write(new / f"part-{number:05d}{ENDING}", islice(rows, SHARD), schema) == SHARD:
                break
        if target.exists():
            # Shards of an earlier run; see check_parquet.
            shutil.rmtree(target)
        sync_replace(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    part.unlink()


def _write(target: Path, rows: Iterator[dict[str, Any]], schema: pyarrow.Schema) -> int:
    """Write rows; returns their number."""
    count = 0
    with atomic_file(target) as file:
        with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            while batch := list(islice(rows, BATCH)):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                count += len(batch)
    return count


def _rows(part: Path, schema: pyarrow.Schema) -> Iterator[dict[str, Any]]:
    """The lines as rows of a schema."""
    with part.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(line)
            for name, cell in row.items():
                type_ = schema.field(name).type
                if pyarrow.types.is_struct(type_):
                    for field in type_:
                        if field.type == pyarrow.string() and not _is_text(cell.get(field.name)):
                            cell[field.name] = json.dumps(cell[field.name], ensure_ascii=False)
                elif type_ == pyarrow.string() and not _is_text(cell):
                    row[name] = str(cell)
            yield row


def _is_text(cell: Any) -> bool:
    return cell is None or isinstance(cell, str)


def _schema(part: Path, kept: Sequence[str], tasks: Sequence[str]) -> pyarrow.Schema:
    """The columns of all lines: those kept, the text, one of each task, and what was remarked."""
    whole = dict.fromkeys(kept, True)
    fields: dict[str, dict[str, pyarrow.DataType]] = {}
    with part.open(encoding="utf-8", newline="\n") as lines:
        for row in map(json.loads, lines):
            for name in kept:
                # Empty, or a number that 64 bits hold.
                cell = row.get(name)
                whole[name] &= cell is None or (type(cell) is int and -(1 << 63) <= cell < 1 << 63)
            for task in tasks:
                known = fields.setdefault(task, {})
                for name, value in row.get(task, {}).items():
                    if name not in known:
                        known[name] = (
                            pyarrow.struct([(label, pyarrow.float64()) for label in value])
                            if isinstance(value, Mapping)
                            else _TYPES.get(name, pyarrow.string())
                        )
    columns = {name: pyarrow.int64() if all_ else pyarrow.string() for name, all_ in whole.items()}
    columns |= {"text": pyarrow.string()}
    columns |= {
        task: pyarrow.struct(list(found.items())) for task, found in fields.items() if found
    }
    return pyarrow.schema(list((columns | _REMARKS).items()))
