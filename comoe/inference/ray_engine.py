"""Windows of an input predicted by Ray Data: actors with a model each, on this machine or on those of a cluster.

An actor is told the number of a window and reads it itself: posts do not travel, so all machines
must see the input and the export under the same path.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.extras import need
from comoe.data.posts import Post
from comoe.inference import windows as windowing
from comoe.inference.engines import Answers, Job
from comoe.inference.post_stream import open_posts
from comoe.inference.predictor import Predictor
from comoe.inference.windows import Window, predict_posts
from comoe.inference.writers import make_writer


class WindowPredictor:
    """The class that ``ray.data.Dataset.map_batches`` is given: numbers of windows in, predictions out.

    Args:
        job: the input, the model, and what is predicted.
        size: posts of a window.
    """

    def __init__(self, job: Job, size: int) -> None:
        self._job, self._size = job, size
        # Ray shows each actor its own GPU only.
        self._predictor = job.start(0)
        self._writer = make_writer(self._predictor, job.options)
        self._next, self._posts = 0, iter(())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Predictions of some windows, each as JSON."""
        found = [json.dumps(self._predict(int(number))) for number in batch["window"]]
        return {"window": batch["window"], "predictions": np.array(found, dtype=object)}

    def _predict(self, number: int) -> list[dict[str, Any]]:
        posts = [self._writer.prepare(post) for post in self._read(number)]
        return predict_posts(self._predictor, posts, self._job.root, self._job.options)

    def _read(self, number: int) -> list[Post]:
        if number < self._next or not self._next:
            stream = open_posts(self._job.source, self._job.options, model=self._predictor)
            self._next, self._posts = 0, iter(stream)
        skipped = (number - self._next) * self._size
        self._next = number + 1
        return list(islice(self._posts, skipped, skipped + self._size))


def predict_with_ray(windows: Iterable[Window], predictor: Predictor, job: Job) -> Answers:
    """By ``workers`` actors, one per GPU or CPU, of the cluster of RAY_ADDRESS, or of this machine.

    Raises:
        ValueError: ray is not installed; the input cannot be read by every actor; too few CPUs or
            GPUs; or an actor has failed.
    """
    need("ray", what="--engine ray")
    if job.options.dedupe:
        raise ValueError("--engine ray has no table of posts; leave --dedupe out.")
    if job.total is None or not Path(job.source).exists():
        raise ValueError("--engine ray wants a file or a folder that all of its machines see.")
    import ray

    own = not ray.is_initialized()
    if own:
        # Ray starts its processes at a low priority, at which a busy machine never gets to them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        yield from zip(windows, _rows(predictor, job), strict=True)
    except ray.exceptions.RayError as error:
        raise ValueError(f"--engine ray has stopped ({error}); --resume goes on.") from error
    finally:
        if own:
            ray.shutdown()


def _rows(predictor: Predictor, job: Job) -> Iterator[list[dict[str, Any]]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    count, unit = job.options.workers, "GPU" if job.device.startswith("cuda") else "CPU"
    there = int(ray.cluster_resources().get(unit, 0))
    if there < count:
        # Ray would wait for more.
        raise ValueError(f"--workers {count}: ray has {there} {unit}s; ask for no more than that.")
    size = windowing.WINDOW
    numbers = range(job.first // size, -(-job.total // size))
    if not numbers:
        return
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    place = replace(
        job,
        folder=job.folder.resolve(),
        source=os.path.abspath(job.source),
        root=job.root.resolve(),
    )
    data = ray.data.from_items(
        [{"window": number} for number in numbers], override_num_blocks=len(numbers)
    ).map_batches(
        WindowPredictor,
        fn_constructor_kwargs={"job": place, "size": size},
        batch_size=1,
        compute=ActorPoolStrategy(size=count),
        **({"num_gpus": 1} if unit == "GPU" else {"num_cpus": 1}),
    )
    for row in data.iter_rows():
        yield json.loads(row["predictions"])
