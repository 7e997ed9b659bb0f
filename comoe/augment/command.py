"""Posts in, posts with auxiliary columns out, with progress: what ``launch/augment.py`` does."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from comoe.augment.generator import Generator
from comoe.augment.output import BEGIN_ANEW, Journal, Note, Output, differences, line_of
from comoe.augment.posts import Post, PostChoice, Posts, read_posts
from comoe.augment.prompts import Prompts, load_prompts
from comoe.augment.refine import Outcome, Reading, Refiner, Settings

LINES = 10
"""Lines of a whole run, in a log."""


SILENCE = 60.0
"""Seconds without a line after which the begin of a round is told too."""


class Progress:
    """A context in which posts are counted.

    Args:
        total: posts.
        done: of them, by an earlier run.
        bar: draw a bar instead of printing lines.
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int,
        bar: bool,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._done = total, done, done
        self._say = (lambda line: None) if bar else say
        self._clock = clock
        self._began = self._said = clock()
        self._bar = tqdm(
            total=total, initial=done, unit="post", disable=not bar, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def watch(self, number: int, posts: int) -> None:
        """A round begins.

        Args:
            number: of the round, from 1.
            posts: that take part.
        """
        self._bar.set_postfix(round=number, posts=posts)
        if self._clock() - self._said >= SILENCE:
            self._tell(f"; round {number} of {posts:,} more")

    def advance(self, posts: int) -> None:
        """So many posts more are done."""
        before, self._done = self._done, self._done + posts
        self._bar.update(posts)
        if before * LINES // self._total != self._done * LINES // self._total:
            self._tell("")

    def _tell(self, more: str) -> None:
        now, new = self._clock(), self._done - self._first
        self._said = now
        seconds = (now - self._began) / new * (self._total - self._done) if new else 0.0
        left = f", about {duration(seconds)} left" if seconds else ""
        self._say(
            f"augment: {self._done:,} of {self._total:,} posts ({self._done / self._total:.0%}){left}{more}"
        )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    size, unit = next(item for item in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= item[0])
    return f"{seconds / (size or 1):.{int(unit == 'h')}f} {unit}"


BATCHES = 4
"""Batches of posts that go through all their rounds together, and are then safe on the disk."""


ENDINGS = (".jsonl", ".ndjson", ".json")
"""Endings of the output, which a recipe then reads without being told a format."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did."""

    posts: Posts
    """What it read."""
    outcomes: tuple[Outcome, ...]
    """One per post, in the order of the file."""
    output: Path
    """Where the posts are."""
    aside: Path
    """Where the malformed answers are, if there are any."""
    resumed: int
    """Posts that an earlier run had done."""
    earlier: tuple[str, ...] = ()
    """Lines of the run that had finished already, where there was nothing left to do."""

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        if self.earlier:
            return [
                f"done already by the same command: {self.output} is as it was. It said:",
                *self.earlier,
            ]
        readings = [outcome.reading for outcome in self.outcomes if outcome.reading is not None]
        labelled = [outcome for outcome in self.outcomes if outcome.converged is not None]
        by_round = Counter(outcome.rounds for outcome in labelled if outcome.converged)
        malformed = [item for outcome in self.outcomes for item in outcome.malformed]
        lines = list(self.posts.notes)
        lines.append(
            f"{len(self.outcomes):,} posts in {self.output}, {len(readings):,} of them answered"
        )
        lines += (
            [f"  {self.resumed:,} of them by the run that this one went on with"]
            if self.resumed
            else []
        )
        lines += [
            f"  {len(self.posts.bad):,} bad rows left out, such as {row}"
            for row in self.posts.bad[:1]
        ]
        if labelled:
            lines.append(
                f"converged: {by_round.total():,} of {len(labelled):,} posts with a gold label"
            )
            lines += [
                f"  in round {number}: {count:,}" for number, count in sorted(by_round.items())
            ]
            lines.append(f"  not converged: {len(labelled) - by_round.total():,}")
        shortened = sum(outcome.shortened for outcome in self.outcomes)
        lines += [f"shortened, too long for the model: {shortened:,} posts"] if shortened else []
        lines.append(
            f"malformed answers kept out: {len(malformed):,}"
            + (f", see {self.aside}" if malformed else "")
        )
        counts = Counter(f"{item.part}, {item.reason}" for item in malformed)
        lines += [f"  {what}: {count:,}" for what, count in counts.most_common()]
        lines += [
            f"mean confidence of the {part}: {_mean(readings, part):.3f}"
            for part in PARTS
            if readings
        ]
        return lines


def run_command(options: Namespace, *, progress: bool) -> Report:
    """``augment`` with the options of ``launch/augment.py``; raises what ``augment`` does."""
    # Here, not above: a mistake in the prompts or the posts is told before the libraries of models
    # are imported.
    prompts = load_prompts(options.prompts)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def load() -> Generator:
        say(f"augment: loading {options.model}")
        from comoe.augment.hugging_face import load_generator

        return load_generator(
            options.model, device=options.device, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, trust_remote_code=options.trust_remote_code,
        )  # fmt: skip

    choice = PostChoice(
        options.input, options.format, options.split, options.text_column, options.pair_column, options.label_column,
        options.limit, options.skip_bad,
    )  # fmt: skip
    settings = Settings(options.rounds, options.batch_size, options.temperature, options.seed)
    return augment(
        choice, options.output, prompts=prompts, load=load, settings=settings, overwrite=options.overwrite,
        progress=progress, say=say, spared=(options.prompts,),
    )  # fmt: skip


def augment(
    choice: PostChoice,
    output: Path,
    *,
    prompts: Prompts,
    load: Callable[[], Generator],
    settings: Settings,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    spared: Sequence[Path] = (),
) -> Report:
    """Write the posts with their auxiliary columns. A run that was killed goes on when it is
    started again, and one that has finished changes nothing.

    Args:
        choice: the posts.
        output: JSON lines; missing folders are made. Written aside and renamed when all posts are
            done.
        prompts: what is asked.
        load: gives the model; called once the posts are found to be good.
        settings: how answers are refined.
        overwrite: replace an output of augment's that is there, and forget a run that stopped.
        progress: show a progress bar; else lines are said now and then.
        say: prints a line.
        spared: files that are read, beside the posts.

    Raises:
        ValueError: posts that cannot be read; an output that is there and was made otherwise, or
            not by augment, or is a file that is read; a run that stopped and was begun otherwise.
    """
    _check(choice, settings)
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {output}: the output is JSON lines; give it the ending .jsonl.")
    files = Output(output)
    files.check(spared=[*_places(choice), *spared])
    posts = read_posts(choice, labels=prompts.labels, added=COLUMNS)
    for post in posts.posts:
        # Now, not when all the work is done.
        line_of(post.row, number=post.index + 1)
    earlier = None if overwrite or files.begun.exists() else files.finished()
    head = _head(posts, prompts, settings)
    if earlier is not None:
        _compare(earlier, {**earlier.head, **head}, output)
    generator = load()
    head |= generator.identity
    if earlier is not None:
        _compare(earlier, head, output)
        return Report(posts, (), output, files.malformed, len(posts.posts), earlier.report)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(files.begun, head, anew=overwrite)
    resumed = len(journal.records)
    try:
        with Progress(len(posts.posts), done=resumed, bar=progress, say=say) as shown:
            _work(
                posts.posts,
                journal,
                Refiner(generator, prompts, settings),
                settings=settings,
                shown=shown,
            )
        report = _write(files, posts, journal, head=head, resumed=resumed)
    except BaseException:
        journal.close()
        raise
    journal.remove()
    return report


def _write(
    files: Output, posts: Posts, journal: Journal, *, head: Mapping[str, str], resumed: int
) -> Report:
    """The files of a run that has answered every post."""
    outcomes = sorted(
        (Outcome.from_dict(record) for record in journal.records), key=lambda outcome: outcome.index
    )
    report = Report(posts, tuple(outcomes), files.posts, files.malformed, resumed)
    pairs = list(zip(posts.posts, outcomes, strict=True))
    kept_out = [row for post, outcome in pairs for row in _kept_out(post, outcome)]
    files.write(
        (columns_of(post, outcome) for post, outcome in pairs),
        kept_out,
        head=head,
        report=report.lines(),
    )
    return report


def _places(choice: PostChoice) -> list[Path]:
    """Where the posts are read, as far as that is on this machine."""
    place = Path(choice.path).expanduser()
    return [place] if place.exists() else []


def _compare(earlier: Note, head: Mapping[str, str], output: Path) -> None:
    if told := differences(earlier.head, head):
        raise ValueError(
            f"--output {output} is there already, made otherwise: {told}. Name another file, or {BEGIN_ANEW}."
        )


def _check(choice: PostChoice, settings: Settings) -> None:
    least = {
        "--rounds": (settings.rounds, 1), "--batch-size": (settings.batch_size, 1), "--limit": (choice.limit, 1),
        "--temperature": (settings.temperature, 0),
    }  # fmt: skip
    for option, (value, at_least) in least.items():
        if value is not None and not at_least <= value < math.inf:
            raise ValueError(f"{option} is {value}; it must be {at_least} or more.")


def _work(
    posts: Sequence[Post], journal: Journal, refine: Refiner, *, settings: Settings, shown: Progress
) -> None:
    """Answer what is left, piece by piece; the pieces are the same however often the run stops."""
    # Longest first: what does not fit into memory fails at once.
    order = sorted(posts, key=lambda post: (-len(post.text), post.index))
    size = settings.batch_size * BATCHES
    done = {record["index"] for record in journal.records}
    for start in range(0, len(order), size):
        piece = [post for post in order[start : start + size] if post.index not in done]
        if piece:
            journal.add([outcome.to_dict() for outcome in refine(piece, watch=shown.watch)])
            shown.advance(len(piece))


def columns_of(post: Post, outcome: Outcome) -> dict[str, Any]:
    """One line of the output: the columns of the post, then ``COLUMNS``."""
    reading = outcome.reading
    values = [None if reading is None else getattr(reading, name) for name in PARTS]
    confidences = [
        None if reading is None else getattr(reading, f"{name}_confidence") for name in PARTS
    ]
    added = dict(
        zip(COLUMNS, [*values, *confidences, outcome.rounds, outcome.converged], strict=True)
    )
    return {**post.row, **added}


def _kept_out(post: Post, outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "line": post.line,
            "round": item.round,
            "part": item.part,
            "reason": item.reason,
            "answer": item.text,
        }
        for item in outcome.malformed
    ]


def _head(posts: Posts, prompts: Prompts, settings: Settings) -> dict[str, str]:
    """What the answers depend on beside the model: option -> value."""
    return {
        "--input": f"{posts.file} ({posts.digest[:12]})", "--prompts": prompts.digest[:12],
        "--rounds": str(settings.rounds),
        "--batch-size": str(settings.batch_size), "--temperature": str(settings.temperature),
        "--seed": str(settings.seed),
    }  # fmt: skip


def _mean(readings: Sequence[Reading], part: str) -> float:
    return sum(getattr(reading, f"{part}_confidence") for reading in readings) / len(readings)


PARTS = ("aspect", "opinion", "polarity")
"""What is read out of a post."""


COLUMNS = (
    *(f"aux_{part}" for part in PARTS), *(f"aux_{part}_confidence" for part in PARTS), "aux_rounds", "aux_converged",
)  # fmt: skip
"""Columns of the output beside those of the posts."""
