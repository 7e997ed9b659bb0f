"""``comoe bench predict``: posts per second of comoe against a Hugging Face pipeline of the same encoder, in turns.

The pipeline has one head and no experts; comoe has the experts of the recipe and answers one task,
or all of them. Both start from texts and end with labels and scores. Heads and experts are random:
what they say is of no matter. Then the latency of one post, and the time until a process has
answered three.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from comoe.benchmarks.ranks import ROOT
from comoe.benchmarks.serving import export_untrained, load_it, serving
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Target,
    machine_note,
    median,
    ratio,
    take_turns,
)
from comoe.benchmarks.workload import find_posts
from comoe.config.recipe import Recipe
from comoe.inference.onnx_export import add_onnx
from comoe.inference.predictor import Predictor

POSTS, ROUNDS = 2048, 7
"""Posts of a turn, and turns."""

BATCH = 32
"""Posts of a pass of the pipeline."""

TARGETS = {"float32": 1.5, "bf16": 2.4, "onnx": None, "onnx int8": 3.0}
"""Contestant -> least ratio to the pipeline, for all tasks and for one."""

SINGLE, STARTS = 200, 5
"""Single posts, and processes, that are timed."""


def run(
    json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None
) -> Measurements:
    """Predict by turns, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file, of tasks with heads; None is the default recipe.
        rounds: turns instead of the usual number.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    targets = {
        f"{name}, {tasks}": Target(at_least=least)
        for name, least in TARGETS.items() if least
        for tasks in ("all tasks", "one task")
    }  # fmt: skip
    report = Measurements(
        "predict: posts per second over those of a Hugging Face pipeline", targets
    )
    recipe = find_posts(None if config is None else str(config)).recipe
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
        folders = {kind: Path(name) / kind for kind in ("export", "onnx", "onnx int8")}
        texts = export_untrained(recipe, folders["export"], seed=0)
        posts = _tweets(recipe) or texts
        posts = [posts[i % len(posts)] for i in range(POSTS)]
        for kind in ("onnx", "onnx int8"):
            add_onnx(folders["export"], folders[kind], int8=kind.endswith("int8"))
        report.notes += [
            machine_note("CPU", threads),
            f"{POSTS} tweets, from text to label and scores; the pipeline in passes of {BATCH}; turns: rounds",
        ]
        for kind, folder in folders.items():
            # An ONNX file is added to a copy of the export.
            file = next(filter(Path.is_file, (folder / "model.onnx", folder / "model.safetensors")))
            report.notes.append(f"{kind}: {file.stat().st_size / 1e6:.1f} MB")
        predictors = {
            kind: Predictor.from_pretrained(
                folder,
                backend="torch" if kind == "export" else "onnx",
                device="cpu",
                threads=threads,
            )
            for kind, folder in folders.items()
        }
        bf16 = Predictor.from_pretrained(folders["export"], device="cpu", precision="bfloat16")
        forms = {"float32": predictors["export"], "bf16": bf16, **predictors}
        measure_speed(report, recipe, forms, posts, rounds or ROUNDS)
        measure_latency(report, predictors, folders, posts)
        measure_starts(report, folders)
    report.publish(json_path)
    return report


def measure_speed(
    report: Measurements,
    recipe: Recipe,
    predictors: Mapping[str, Predictor],
    posts: Sequence[str],
    rounds: int,
) -> None:
    """The pipeline and every form of comoe on the same posts, in turns."""
    first = predictors["export"].tasks[0]
    reference = _pipeline(recipe, len(first.labels), list(posts))
    contestants: dict[str, Contestant] = {"pipeline": Contestant(reference)}
    for tasks, names in (("all tasks", None), ("one task", [first.name])):
        for form in TARGETS:
            run = partial(predictors[form], posts, tasks=names)
            contestants[f"{form}, {tasks}"] = Contestant(run)
    times = take_turns(contestants, rounds=rounds, warmup=1)
    for name in contestants:
        report.add_time(name, median(times, name), case=f"{POSTS} posts")
        if name != "pipeline":
            report.add(name, asdict(ratio(times, "pipeline", name)))
            pairs = zip(times["pipeline"], times[name], strict=True)
            found = sorted(above / below for above, below in pairs if above and below)
            report.notes.append(f"{name}: {found[0]:.2f}, {statistics.median(found):.2f}, {found[-1]:.2f} "
                                f"(min, median, max), {POSTS / median(times, name):.0f} posts/s")  # fmt: skip
    report.notes.append(f"pipeline: {POSTS / median(times, 'pipeline'):.0f} posts/s")


def _pipeline(recipe: Recipe, labels: int, posts: list[str]) -> Callable[[], None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name = recipe.model.encoder
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
    answer = pipeline(
        "text-classification", model=model.eval(), tokenizer=AutoTokenizer.from_pretrained(name),
        batch_size=BATCH, device="cpu", truncation=True, max_length=recipe.data.max_length, top_k=None,
    )  # fmt: skip
    return lambda: answer(posts) and None


def measure_latency(
    report: Measurements,
    predictors: Mapping[str, Predictor],
    folders: Mapping[str, Path],
    posts: Sequence[str],
) -> None:
    """One post at a time, all tasks: in this process by turns, then of one client of a server."""
    seconds: dict[str, list[float]] = {kind: [] for kind in predictors}
    for post in posts[:SINGLE]:
        for kind, predictor in predictors.items():
            start = time.perf_counter()
            predictor([post])
            seconds[kind].append(time.perf_counter() - start)
    for kind, found in seconds.items():
        cuts = statistics.quantiles(found, n=100, method="inclusive")
        words = () if kind == "export" else ("--backend", "onnx")
        with serving(folders[kind], *words) as server:
            served = load_it(server, posts, clients=1, posts=1, seconds=5.0)
        report.notes.append(
            f"one post, {'torch float32' if kind == 'export' else kind}: p50 {1000 * cuts[49]:.1f} "
            f"ms, p99 {1000 * cuts[98]:.1f} ms; of a server {served.percentiles()}"
        )


def measure_starts(report: Measurements, folders: Mapping[str, Path]) -> None:
    """Processes of ``comoe predict`` on three posts."""
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
        source, target = Path(name) / "posts.txt", Path(name) / "predictions.jsonl"
        source.write_text("what a lovely day :)\nthe bridge is down\nno idea\n", encoding="utf-8")
        for kind, folder in folders.items():
            command: list[Any] = [sys.executable, "-m", "comoe", "predict", "--model", folder]
            command += ["--input", source, "--output", target]
            command += [] if kind == "export" else ["--backend", "onnx"]
            found = []
            for _ in range(STARTS):
                start = time.perf_counter()
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                subprocess.run(command, check=True, capture_output=True, env=environment)
                found.append(time.perf_counter() - start)
            backend = "torch" if kind == "export" else kind
            report.notes.append(
                f"comoe predict of three posts, {backend}: {min(found):.2f} s "
                f"(median {statistics.median(found):.2f})"
            )


def _tweets(recipe: Recipe) -> list[str]:
    """The tweets among the posts of the starter kit; none without it."""
    path = Path(recipe.data.root or ".") / "tweets" / "train.jsonl"
    if not path.is_file():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["domain"] == "tweets" and row["text"].strip()]
