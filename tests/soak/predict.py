"""A corpus through ``comoe predict``: memory, kills at random moments, Parquet to Parquet; not a part of CI.

    python tests/soak/predict.py --model runs/smoke/export --posts 1000000 --kills 5 --output /tmp/corpus

Generated posts, some of them equal and some that cannot be read, are predicted once undisturbed and
once killed (SIGKILL) again and again with ``--resume`` until it is done: the bytes must be the same.
The memory of the largest moment is set beside that of a run of three posts. The figures are printed
as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

WORDS = (
    "again the hotel and friend so awful brilliant today band @user train match soup phone".split()
)
SHARD = 250_000
"""Rows of an input file of the folder."""


def write_posts(folder: Path, count: int, *, seed: int) -> tuple[Path, Path]:
    """The same posts as JSON lines, every thousandth of them broken, and as a folder of Parquet files."""
    draw = random.Random(seed)
    lines, tables = folder / "posts.jsonl", folder / "posts"
    tables.mkdir(parents=True, exist_ok=True)
    with lines.open("w") as file:
        for start in range(0, count, SHARD):
            rows = []
            for number in range(start, min(start + SHARD, count)):
                text = " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))
                rows.append({"id": number, "text": text})
                file.write(
                    '{"id": 1, "text": \n' if number % 1000 == 999 else json.dumps(rows[-1]) + "\n"
                )
            name = f"posts-{start // SHARD:03d}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tables / name)
    return lines, tables


class Run:
    """One start of the command."""

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.peak = 0.0

    def start(self, *, kill: Callable[[], bool] = lambda: False) -> int:
        """Run to the end, or kill it when it is time; returns its exit code."""
        child = subprocess.Popen(
            [sys.executable, "-m", "comoe", "predict", *self.options],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while child.poll() is None:
            self.peak = max(self.peak, _peak(child.pid))
            time.sleep(0.1)
            if kill():
                child.kill()
        return child.returncode


def _peak(process: int) -> float:
    """MB that a process had at most so far."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def predicted(journal: Path) -> int:
    """Posts that an unfinished run has written; -1 where there is none."""
    if not journal.is_file():
        return -1
    try:
        with contextlib.closing(sqlite3.connect(journal, timeout=1)) as db:
            return db.execute("SELECT posts FROM done").fetchone()[0]
    except (sqlite3.Error, TypeError):
        return -1


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True)
    add("--posts", type=int, default=1_000_000)
    add("--kills", type=int, default=5)
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True)
    add("options", nargs="*", help="further options of comoe predict, behind --")
    given = parser.parse_args()
    folder, draw = given.output, random.Random(given.seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines, tables = write_posts(folder, given.posts, seed=given.seed)
    few = folder / "few.jsonl"
    few.write_text("".join(lines.open().readline() for _ in range(3)))

    def run(source: Path, target: str, *more: str) -> Run:
        options = ["--model", given.model, "--input", str(source), "--output", str(folder / target)]
        return Run([*options, *more, *given.options])

    small = run(few, "few-out.jsonl")
    assert small.start() == 0
    whole = run(lines, "whole.jsonl", "--json-summary", str(folder / "summary.json"))
    assert whole.start() == 0
    seconds = json.loads((folder / "summary.json").read_text())["seconds"]
    killed, stops = run(lines, "killed.jsonl", "--resume"), []
    journal = folder / ".killed.jsonl.journal"
    for least in sorted(draw.sample(range(given.posts), given.kills)):
        pause = draw.random()

        def due(least: int = least, pause: float = pause) -> bool:
            found = predicted(journal) >= least
            time.sleep(pause if found else 0)
            return found

        code = killed.start(kill=due)
        if code == 0:
            break
        stops.append(predicted(journal))
    assert code == 0 or killed.start() == 0
    same = (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert same, "the output of the killed run is another one"
    parquet = run(tables, "answers", "--format", "parquet")
    assert parquet.start() == 0
    rows = pyarrow.parquet.read_metadata
    count = sum(rows(path).num_rows for path in (folder / "answers").iterdir())
    assert count == given.posts
    figures = {
        "posts": given.posts, "identical": same, "killed_at": stops,
        "peak_mb": {"three posts": small.peak, "whole": whole.peak, "resumed": killed.peak, "parquet": parquet.peak},
        "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
