"""Files of predictions adapted to another mix of labels: predicted once, then read again and written as adapted."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from comoe.config.files import is_read_from
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file, rewrite
from comoe.inference.predictor import Predictor
from comoe.inference.prior import apply_rates, choose_adapted, find_rates, read_rates
from comoe.inference.summary import Summary
from comoe.inference.writers import make_writer


def predict_adapted(
    predictor: Predictor, source: Path | str, target: Path, options: PredictOptions
) -> Summary:
    """Predict the posts of a file, with scores adapted to another mix of labels.

    The predictions wait beside the output as lines of JSON until all of them are there, so memory
    does not grow with their number. What the scores were adapted to is said on standard error, and
    under ``prior`` of each prediction.

    Args, returns and raises as ``predict_file``; and ValueError for rates that make no sense.
    """
    tasks = predictor.choose_tasks(options.tasks)
    rates = read_rates(options.assume_rates, tasks)
    assumed = {one.task.name for one in rates}
    left = [task for task in tasks if task.name not in assumed]
    wanted = choose_adapted(left) if options.adapt_prior else []
    writer = make_writer(predictor, options)
    if is_read_from(target, Path(source)):
        raise ValueError(f"--output {target} is the --input itself; name another file.")
    writer.check(target)
    regular = target.is_file() or not target.exists()
    place = target.parent if regular else Path(tempfile.gettempdir())
    waiting = place / f".{target.name}.unadapted.jsonl"
    try:
        plain = replace(options, format="jsonl", raw_csv=False, assume_rates=(), adapt_prior=None)
        done = predict_file(predictor, source, waiting, plain)
        rates += find_rates(_lines(waiting), wanted) if wanted else []
        for one in rates:
            print(one, file=sys.stderr)
        writer.adapted = {one.task.name for one in rates}
        rewrite(writer, target, apply_rates(_lines(waiting), rates), kept=done.kept)
    finally:
        waiting.unlink(missing_ok=True)
    return replace(done, target=str(target))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
