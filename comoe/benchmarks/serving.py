"""``comoe bench serve``: posts per second of eight clients over HTTP against batch prediction, in turns.

The exports have the recipe's encoder and random heads: what they predict is of no matter. The
clients share the machine with the server. Then the queue is overrun, the export replaced under
load, and the server told to end while it works.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

from comoe.benchmarks.ranks import ROOT
from comoe.benchmarks.timing import Measurements, Target, machine_note, spread_of
from comoe.benchmarks.workload import RECIPE, SMOKE, find_posts
from comoe.config.recipe import Recipe
from comoe.data.corpus import load_corpus
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.inference.export import Backbone, export_model
from comoe.inference.predictor import Predictor
from comoe.models.build import build_model

CLIENTS, POSTS = 8, 16
"""Clients, and posts of a request."""

LOADED, ROUNDS = 60.0, 3
"""Length of a turn under load beside batch prediction, in seconds, and turns."""

SECONDS = 10.0
"""Length of the other turns."""

REFUSED, BROKEN = 0, -1
"""A connection that was not taken, and one that ended without an answer: a lost request."""

BATCH = 1024
"""Posts of a turn of batch prediction, in passes of 64."""


@dataclass(slots=True)
class Load:
    """What clients saw."""

    posts: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds of each answered request."""
    statuses: Counter[int] = field(default_factory=Counter)
    """By HTTP status, or ``REFUSED`` and ``BROKEN``."""
    revisions: set[str] = field(default_factory=set)

    @property
    def rate(self) -> float:
        """Posts per second."""
        return self.posts / self.seconds

    def percentiles(self) -> str:
        """Median and 99th percentile of the latencies."""
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        return f"p50 {1000 * cuts[49]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms"


class Server:
    """A process of ``comoe serve``."""

    def __init__(self, export: Path, log: Path, *words: str) -> None:
        command = [sys.executable, "-m", "comoe", "serve", str(export), "--port", "0", *words]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stderr=file)
        while not (found := re.search(r" at http://([\d.]+):(\d+)", self.log())):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log()}")
            time.sleep(0.05)
        self.address = (found[1], int(found[2]))

    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text(encoding="utf-8")

    def memory(self) -> int:
        """Bytes that it holds."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextlib.contextmanager
def serving(export: Path, *words: str) -> Iterator[Server]:
    """A server while the block runs."""
    with tempfile.NamedTemporaryFile(prefix="comoe-serve-", suffix=".log") as log:
        server = Server(export, Path(log.name), *words)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def load_it(
    server: Server, texts: Sequence[str], *, clients: int, posts: int, seconds: float
) -> Load:
    """Clients that ask again as soon as they are answered, each over one connection."""
    total, lock, start = Load(), threading.Lock(), time.perf_counter()

    def work(number: int) -> None:
        mine, place = Load(), number * posts
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        while time.perf_counter() - start < seconds:
            asked = [texts[(place + i) % len(texts)] for i in range(posts)]
            place += clients * posts
            begun = time.perf_counter()
            try:
                body = json.dumps({"posts": asked})
                connection.request(
                    "POST", "/v1/predict", body, {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                content, status = response.read(), response.status
            except ConnectionRefusedError:
                mine.statuses[REFUSED] += 1
                break
            except (OSError, http.client.HTTPException):
                mine.statuses[BROKEN] += 1
                break
            mine.statuses[status] += 1
            if status == http.client.OK:
                mine.latencies.append(time.perf_counter() - begun)
                mine.revisions.add(json.loads(content)["revision"])
                mine.posts += posts
            else:
                time.sleep(0.05)
        connection.close()
        with lock:
            total.posts += mine.posts
            total.latencies += mine.latencies
            total.statuses += mine.statuses
            total.revisions |= mine.revisions

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total.seconds = time.perf_counter() - start
    return total


def export_untrained(recipe: Recipe, folder: Path, *, seed: int) -> list[str]:
    """Export the recipe's model as it begins; the texts of its training posts."""
    corpus = load_corpus(recipe)
    torch.manual_seed(seed)
    model = build_model(recipe.model, corpus.tasks)
    export_model(
        folder,
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=corpus.tasks,
        backbone=Backbone(model.encoder.config.to_dict(), load_tokenizer(recipe.model.encoder)),
    )
    return [text for text in corpus.splits["train"].texts if text.strip()]


def run(
    json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None
) -> Measurements:
    """Serve, load, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the smoke recipe and then the default recipe.
        rounds: turns instead of the usual number.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    files = [config] if config else [SMOKE, RECIPE]
    report = Measurements(
        "serve: posts per second of a server over those of batch prediction",
        {f"{file.stem}_over_batch": Target(at_least=0.7) for file in files},
    )
    report.notes += [
        machine_note("CPU", torch.get_num_threads()),
        f"{CLIENTS} clients of {POSTS} posts a request beside the server on the same cores, turns "
        f"of {LOADED:g} s; batch: {BATCH} posts in passes of 64; all tasks",
    ]
    for file in files:
        with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
            recipe = find_posts(str(file)).recipe
            texts = export_untrained(recipe, Path(name) / "served", seed=0)
            export_untrained(recipe, Path(name) / "next", seed=1)
            measure_speed(report, file.stem, Path(name) / "served", texts, rounds or ROUNDS)
            measure_faults(report, file.stem, Path(name), texts)
    report.publish(json_path)
    return report


def measure_speed(
    report: Measurements, name: str, export: Path, texts: Sequence[str], rounds: int
) -> None:
    """Batch prediction and a loaded server in turns; latencies and memory of the server."""
    batch = [texts[i % len(texts)] for i in range(BATCH)]
    predictor = Predictor.from_pretrained(export, device="cpu")
    predictor(batch[:128])
    rates, memory, all_of = [], [], Load()
    with serving(export) as server:
        load_it(server, texts, clients=CLIENTS, posts=POSTS, seconds=SECONDS / 5)
        for _ in range(rounds):
            start = time.perf_counter()
            predictor(batch)
            alone = BATCH / (time.perf_counter() - start)
            load = load_it(server, texts, clients=CLIENTS, posts=POSTS, seconds=LOADED)
            rates.append((load.rate, alone))
            memory.append(server.memory())
            all_of.latencies += load.latencies
            all_of.statuses += load.statuses
        one = load_it(server, texts, clients=1, posts=1, seconds=SECONDS / 2)
    report.add(f"{name}_over_batch", asdict(spread_of([ours / alone for ours, alone in rates])))
    report.add(
        "memory", asdict(spread_of([memory[-1] / memory[0]])), case=f"{name}, last turn over first"
    )
    ours, alone = (statistics.median(column) for column in zip(*rates, strict=True))
    answers = ", ".join(
        f"{count} times {status}" for status, count in sorted(all_of.statuses.items())
    )
    report.notes += [
        f"{name}: {ours:.0f} posts/s served, {alone:.0f} in batches; answers: {answers}; "
        f"{all_of.percentiles()}; one client with one post: {one.percentiles()}; "
        f"{memory[-1] / 2**20:.0f} MiB",
    ]


def measure_faults(report: Measurements, name: str, folder: Path, texts: Sequence[str]) -> None:
    """Overrun the queue, replace the export under load, and end the server while it works."""
    export = folder / "served"
    with serving(export, "--queue", str(2 * POSTS), "--max-posts", str(POSTS)) as server:
        over = load_it(server, texts, clients=4 * CLIENTS, posts=POSTS, seconds=SECONDS / 2)
        timer = threading.Timer(1.0, _replace, (export, folder / "next", server))
        timer.start()
        new = load_it(server, texts, clients=2, posts=POSTS, seconds=SECONDS)
        timer.join()
        stop = threading.Timer(1.0, server.process.send_signal, (signal.SIGTERM,))
        stop.start()
        last = load_it(server, texts, clients=2, posts=POSTS, seconds=SECONDS)
        code = server.process.wait(60)
    report.notes += [
        f"{name}: 32 clients on a queue of {2 * POSTS} posts: {dict(over.statuses)}; replaced under load: "
        f"{dict(new.statuses)} of {len(new.revisions)} revisions; SIGTERM under load: {dict(last.statuses)}, "
        f"exit code {code}; {REFUSED} is a connection refused, {BROKEN} a lost request",
    ]


def _replace(export: Path, new: Path, server: Server) -> None:
    export.rename(export.with_name("replaced"))
    new.rename(export)
    server.process.send_signal(signal.SIGHUP)
