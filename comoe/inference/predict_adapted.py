"""Files of predictions adapted to another mix of labels: they wait until all are made, then they are written."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from comoe.config.files import atomic_file, written_directly
from comoe.data.posts import Post
from comoe.inference.options import PredictOptions
from comoe.inference.prior import apply_rates, choose_adapted, find_rates, read_rates
from comoe.inference.summary import Counts, labels_of
from comoe.inference.windows import WINDOW
from comoe.inference.writers import JsonLines, packer


class Adapted(JsonLines):
    """Lines of JSON until all posts are predicted; at the end the output itself, by another writer.

    Memory does not grow with the number of posts. What the scores were adapted to is said on
    standard error, and under ``prior`` of each prediction.

    Args:
        writer: of the output.
        options: with the rates.

    Raises:
        ValueError: rates that make no sense, or nothing to adapt.
    """

    packed = False

    def __init__(self, writer: JsonLines, options: PredictOptions) -> None:
        super().__init__(writer.predictor, writer.tasks)
        tasks = writer.predictor.choose_tasks(options.tasks)
        self.writer, self.rates = writer, read_rates(options.assume_rates, tasks)
        assumed = {one.task.name for one in self.rates}
        left = [task for task in tasks if task.name not in assumed]
        self.wanted = choose_adapted(left) if options.adapt_prior else []
        writer.adapted = assumed | {task.name for task in self.wanted}

    def prepare(self, post: Post) -> Post:
        return self.writer.prepare(post)

    def check(self, target: Path) -> None:
        self.writer.check(target)

    def begin(self, kept: Sequence[str]) -> str:
        self.kept = tuple(kept)
        return ""

    def remark(self, counts: Counts) -> str:
        return self.writer.remark(counts)

    def finish(self, part: Path, target: Path) -> None:
        """Write the output; the predictions that wait stay, for a run that is resumed."""
        found = find_rates(_lines(part), self.wanted) if self.wanted else []
        rates = [*self.rates, *found]
        for one in rates:
            print(one, file=sys.stderr)
        rows = self._counted(apply_rates(_lines(part), rates))
        if written_directly(target):
            with atomic_file(target) as file:
                self._write(file, rows, target)
            return
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", dir=target.parent) as own:
            aside = Path(own) / "adapted"
            with atomic_file(aside) as file:
                self._write(file, rows, target)
            self.writer.finish(aside, target)

    def _write(self, file: IO[bytes], rows: Iterator[dict[str, Any]], target: Path) -> None:
        pack, begin = packer(self.writer, target), self.writer.begin(self.kept)
        while (chunk := list(islice(rows, WINDOW))) or begin:
            file.write(pack((begin + "".join(map(self.writer.line, chunk))).encode()))
            begin = ""

    def _counted(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        self.labels = {}
        for row in rows:
            for task in self.tasks:
                if task.name in row:
                    self.labels.setdefault(task.name, Counter()).update(labels_of(row[task.name]))
            yield row


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)
