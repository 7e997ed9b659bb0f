"""The files that a run's numbers are kept in, ``metrics.jsonl`` and ``results.json``, and the table that ends a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comoe.config.files import plain, write_atomic, write_json

METRICS_FILE = "metrics.jsonl"
"""One JSON object per line: a training line, an evaluation, an event, or a resume."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that was cut short by a crash is left out; no file is no records."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def truncate_metrics(path: Path, *, after_step: int) -> None:
    """Drop what a run logged after the step that it goes on from, then add ``{"split": "resume", "step": after_step}``.

    Lines without a step stay; a line cut short by a crash goes. The file is replaced whole.
    """
    kept = [record for record in read_metrics(path) if record.get("step", after_step) <= after_step]
    kept.append({"split": "resume", "step": after_step})
    write_atomic(
        path, "".join(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in kept)
    )


def write_results(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, whole or not at all; numbers that are not finite become null."""
    write_json(run_dir / "results.json", results)
