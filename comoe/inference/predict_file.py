"""Posts in, predictions out: what ``comoe predict`` does, window by window, however many posts there are."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

import comoe
from comoe.config.errors import unknown_name
from comoe.config.files import atomic_file, is_read_from, lock_beside, locked, written_directly
from comoe.inference.checkpoint_folder import is_part_of
from comoe.inference.engines import Answers, Job, predict_in_processes
from comoe.inference.journal import Journal, journal_of
from comoe.inference.options import DEFAULT, PredictOptions
from comoe.inference.post_stream import PostStream, open_posts
from comoe.inference.predictor import Predictor
from comoe.inference.ray_engine import predict_with_ray
from comoe.inference.summary import Counts, Summary
from comoe.inference.windows import answered, windows_of
from comoe.inference.writers import JsonLines, make_writer, packer

ENGINES: dict[str, Callable[..., Answers]] = {
    "processes": predict_in_processes,
    "ray": predict_with_ray,
}
"""``--engine`` -> who predicts."""


def predict_file(
    predictor: Predictor, source: Path | str, target: Path, options: PredictOptions = DEFAULT
) -> Summary:
    """Predict every post of an input, in order, one row per post; a terminal shows a progress bar.

    Memory does not grow with the number of posts. What is done is kept beside the output until it
    is whole, so that a run that was stopped in any way can be resumed; the output is then, byte for
    byte, that of a run that was not. Predictions whose scores are adapted to another mix of labels
    wait there until all of them are made, those for a pipe in a private folder.

    Args:
        predictor: the model.
        source: .txt (one post per line), .csv, .tsv, .jsonl, each also with .gz or .zst; .parquet,
            or a folder of them; ``hf://name[:split]``; - is standard input.
        target: the predictions; missing folders are made. Replaced whole.
        options: what to predict, and how it is written.

    Returns:
        What was done, with the number of posts without a prediction.

    Raises:
        ValueError: an input, column, task, rate or format that does not exist or does not fit, a target
            that is the source or that another process writes, something else to resume, or no post
            has a prediction.
    """
    source = str(source)
    if options.engine not in ENGINES:
        raise unknown_name("--engine", options.engine, ENGINES)
    writer = make_writer(predictor, options)
    if options.adapts:
        from comoe.inference.predict_adapted import Adapted  # brings in PyTorch

        writer = Adapted(writer, options)
    _refuse_read(target, Path(source), predictor)
    writer.check(target)
    with contextlib.ExitStack() as stack:
        kept = target if stack.enter_context(_only_one(target)) else None
        if options.resume and kept is not None:
            _refuse_finished(target)
        posts = open_posts(source, options, model=predictor, tasks=writer.tasks)
        if kept is None and options.adapts:
            # Read twice, which a pipe is not; nobody else may read it.
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "predictions"
        writer.begin(posts.kept)
        head = _head(predictor, options) | writer.head()
        journal = Journal(kept, head, resume=options.resume)
        try:
            summary = _predict_into(target, writer, posts, journal)
        except BaseException as error:
            journal.close(remove=not journal.posts)
            if isinstance(error, OSError) and journal.keeps and journal.posts:
                kept = f"{journal.posts:,} posts are predicted; --resume goes on behind them"
                print(kept, file=sys.stderr)
            raise
        journal.close(remove=True)
    counts = summary.counts
    if counts.posts and counts.posts == counts.set_aside.total():
        why = f"see {target}; the first: {counts.first_error.rstrip('.')}"
        raise ValueError(f"none of the {counts.posts} posts of {source} could be predicted, {why}.")
    return summary


def _refuse_read(target: Path, source: Path, predictor: Predictor) -> None:
    """ValueError for an output over what is read: posts or model."""
    if is_read_from(target, source):
        raise ValueError(f"--output {target} is the --input itself; name another file.")
    if is_part_of(target, predictor.exported.folder):
        raise ValueError(f"--output {target} is a file of the model; name another file.")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise ValueError(
            f"--output {target} lies in the folder of --input, and would be read with it next time; name another place."
        )


def _refuse_finished(target: Path) -> None:
    """ValueError for an output without a journal: it is whole, and ``--resume`` would predict all of it again."""
    begun = journal_of(target).is_file() or not target.exists()
    if not begun and (any(target.iterdir()) if target.is_dir() else target.stat().st_size):
        raise ValueError(
            f"--resume: {target} is finished, as no unfinished run has left anything beside it; "
            "nothing was predicted. Leave --resume out to predict it anew."
        )


def _predict_into(target: Path, writer: JsonLines, posts: PostStream, journal: Journal) -> Summary:
    _say_where(journal, posts, target)
    predictor, options, resumed = writer.predictor, posts.options, journal.posts
    counts, names = Counts.from_json(journal.counts), [task.name for task in writer.tasks]
    pack = packer(writer, target)
    begin = writer.begin(posts.kept)
    begin = "" if resumed else begin
    windows = windows_of(posts, writer, journal, dedupe=options.dedupe)
    answers = ENGINES[options.engine](windows, predictor, Job.of(predictor, posts, first=resumed))
    # None: no bar where standard error is no terminal.
    bar = tqdm(total=posts.total, initial=resumed, unit="post", disable=None, dynamic_ncols=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(contextlib.closing(answers))
        direct = None if journal.keeps else stack.enter_context(atomic_file(target))
        for window, predictions in answers:
            rows, same = answered(window, predictions, journal)
            for row in rows:
                counts.add(row, names)
            counts.filled += window.filled
            counts.deduplicated += same
            chunk = pack((begin + "".join(map(writer.line, rows))).encode())
            begin = ""
            if direct is not None:
                direct.write(chunk)
            journal.commit(chunk, counts.posts, digest=window.digest, counts=counts.to_json())
            bar.update(len(rows))
        if begin and direct is not None:
            direct.write(pack(begin.encode()))
        elif not counts.posts:
            journal.commit(pack(begin.encode()), 0, digest=b"", counts="{}")
    seconds = time.monotonic() - began
    if journal.finish():
        writer.finish(journal.part, target)
        counts.labels = counts.labels if writer.labels is None else writer.labels
    return Summary(
        counts, posts.rows.file, str(target), _model(predictor), seconds,
        kept=posts.kept, resumed_at=resumed, note=writer.remark(counts),
    )  # fmt: skip


def _say_where(journal: Journal, posts: PostStream, target: Path) -> None:
    of = "" if posts.total is None else f" of {posts.total:,}"
    if journal.discarded:
        message = f"an unfinished run had predicted {journal.discarded:,} posts; begun anew, as --resume was not given"
    elif journal.posts:
        message = f"{journal.posts:,}{of} posts are predicted already; going on behind them"
    elif posts.options.resume:
        message = f"nothing to resume beside {target}; starting at the first post"
    else:
        return
    print(message, file=sys.stderr)


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[bool]:
    """Make the folder of the predictions, and let one process at a time write them; pipes and devices take any."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if written_directly(target):
        yield False
        return
    with locked(lock_beside(target), f"--output {target}"):
        yield True


def _head(predictor: Predictor, options: PredictOptions) -> dict[str, str]:
    """What the bytes of an output depend on besides the posts."""
    library = "onnxruntime" if predictor.exported.backend == "onnx" else "torch"
    return options.head() | {
        "the model": _model(predictor)["sha256"],
        "comoe": comoe.__version__,
        library: import_module(library).__version__,
        "--device": str(predictor.device).partition(":")[0],
        "--precision": str(predictor.precision),
        "--backend": predictor.exported.backend,
        "--long": str(predictor.long),
    }


def _model(predictor: Predictor) -> dict[str, str]:
    manifest = predictor.exported.folder / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
    return {
        "folder": str(predictor.exported.folder),
        "sha256": digest,
        "device": str(predictor.device),
        "backend": predictor.exported.backend,
        "precision": predictor.exported.config.get("onnx", {}).get("precision", "")
        if predictor.exported.backend == "onnx"
        else str(predictor.precision).removeprefix("torch."),
    }
