"""Who predicts the windows of an input: this process, or several; the order stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.data.posts import Post
from comoe.deferred import Deferred
from comoe.inference.long_posts import LongPosts
from comoe.inference.options import PredictOptions
from comoe.inference.post_stream import PostStream
from comoe.inference.predictor import Predictor
from comoe.inference.windows import Window, predict_posts

if TYPE_CHECKING:
    import torch
else:
    torch = Deferred("torch")

Answers = Iterator[tuple[Window, list[dict[str, Any]]]]
"""Each window with the predictions of the posts that it asks for."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to predict posts."""

    folder: Path
    """Of the export."""
    device: str
    """A torch device; cuda is any of the GPUs."""
    precision: str
    """Of its products."""
    backend: str
    """What runs the model."""
    long: LongPosts
    """What becomes of long posts."""
    threads: int
    """Threads on a CPU."""
    source: str
    """The input, as of ``open_posts``."""
    root: Path
    """Folder that paths of images start from."""
    total: int | None
    """Posts of the input, where that is known."""
    first: int
    """Number of the first one that is not predicted yet, from 0."""
    options: PredictOptions
    """What is predicted."""

    @classmethod
    def of(cls, predictor: Predictor, posts: PostStream, *, first: int) -> Job:
        """The predictions of some posts by other processes with the same model."""
        rows, options, exported = posts.rows, posts.options, predictor.exported
        threads = exported.model.threads if exported.backend == "onnx" else torch.get_num_threads()
        # The place of the model of this process says which kind of device was asked for.
        return cls(
            folder=exported.folder,
            device=str(predictor.device),
            precision=str(predictor.precision).removeprefix("torch."),
            backend=exported.backend,
            long=predictor.long,
            threads=max(1, threads // options.workers),
            source=rows.source,
            root=rows.root,
            total=posts.total,
            first=first,
            options=options,
        )

    def start(self, number: int) -> Predictor:
        """The model of the process with this number."""
        device = self.device
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        predictor = Predictor.from_pretrained(
            self.folder,
            device=device,
            verify=False,
            precision=self.precision,
            backend=self.backend,
            threads=self.threads,
        )
        return replace(predictor, long=self.long)


def predict_here(windows: Iterable[Window], predictor: Predictor, job: Job) -> Answers:
    """In this process."""
    for window in windows:
        yield window, predict_posts(predictor, window.questions(), job.root, job.options)


def predict_in_processes(windows: Iterable[Window], predictor: Predictor, job: Job) -> Answers:
    """In ``workers`` processes of this machine, one per GPU or with a share of the CPU's threads.

    Raises:
        ValueError: one of them has ended.
    """
    count = job.options.workers
    if count == 1:
        yield from predict_here(windows, predictor, job)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(job, numbers))
    waiting: deque[tuple[Window, Future]] = deque()
    try:
        for window in windows:
            waiting.append((window, pool.submit(_answer, window.questions())))
            # Two for each: one that is predicted, one that is ready.
            if len(waiting) >= 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of --workers has ended (killed, out of memory, or it could not load the model); --resume goes "
            "on, with fewer --workers or a smaller --batch-size where memory was short."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_predict: Callable[[list[Post]], list[dict[str, Any]]]
"""Of a process that was started here."""


def _begin(job: Job, numbers: Any) -> None:
    global _predict
    # Ctrl-C is for the process that writes; without it, nobody reads what this one predicts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    predictor = job.start(number)
    _predict = lambda posts: predict_posts(predictor, posts, job.root, job.options)  # noqa: E731


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(posts: list[Post]) -> list[dict[str, Any]]:
    return _predict(posts)
