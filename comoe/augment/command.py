"""Posts in, posts with auxiliary columns out, with progress: what ``comoe augment`` does."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from comoe.augment.generator import Generator
from comoe.augment.output import BEGIN_ANEW, Journal, Note, Output, line_of
from comoe.augment.posts import InputPosts, read_input_posts
from comoe.augment.prompts import Prompts, load_prompts
from comoe.augment.refine import PARTS, Outcome, Refiner, Settings
from comoe.config.errors import differences
from comoe.config.ready_made import prompts_path
from comoe.data.posts import Post
from comoe.data.reading.inputs import DataChoice

BATCHES = 4
"""Batches of posts that go through all their rounds together, and are then safe on the disk."""
LOG_SECONDS = 60.0
"""Minimum between two lines of a log."""
LOG_LINE = "{desc}: {n_fmt} of {total_fmt} posts, {elapsed} gone, {remaining} left{postfix}\n"
ENDINGS = (".jsonl", ".ndjson", ".json")
"""Endings of the output, which a recipe then reads without a format."""
COLUMNS = (
    *(f"aux_{part}" for part in PARTS), *(f"aux_{part}_confidence" for part in PARTS), "aux_rounds", "aux_converged",
)  # fmt: skip
"""Columns of the output beside those of the posts."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did."""

    posts: InputPosts
    """What it read."""
    outcomes: tuple[Outcome, ...]
    """One per post, in the order of the file."""
    files: Output
    """Where the posts are, and the malformed texts, if there are any."""
    resumed: int
    """Posts that an earlier run had done."""
    earlier: tuple[str, ...] = ()
    """Lines of the run that had finished already, where there was nothing left to do."""

    def lines(self) -> list[str]:
        """The report for the terminal."""
        output, outcomes = self.files.posts, self.outcomes
        if self.earlier:
            done = f"done already by the same command: {output} is unchanged. Its report:"
            return [done, *self.earlier]
        readings = [outcome.reading for outcome in outcomes if outcome.reading is not None]
        lines = [
            *self.posts.notes,
            f"{len(outcomes):,} posts in {output}, {len(readings):,} of them with well-formed texts",
        ]
        if self.resumed:
            lines.append(f"  {self.resumed:,} of them by the run that this one continued")
        if bad := self.posts.bad:
            lines.append(f"  {len(bad):,} bad rows left out, such as {bad[0]}")
        with_gold = [outcome for outcome in outcomes if outcome.converged is not None]
        if with_gold:
            by_round = Counter(outcome.rounds for outcome in with_gold if outcome.converged)
            lines += [
                f"converged: {by_round.total():,} of {len(with_gold):,} posts with a gold label",
                *(f"  in round {number}: {n:,}" for number, n in sorted(by_round.items())),
                f"  not converged: {len(with_gold) - by_round.total():,}",
            ]
        if shortened := sum(outcome.shortened for outcome in outcomes):
            lines.append(f"shortened, too long for the model: {shortened:,} posts")
        malformed = [item for outcome in outcomes for item in outcome.malformed]
        where = f", see {self.files.malformed}" if malformed else ""
        lines.append(f"malformed texts left out: {len(malformed):,}{where}")
        counts = Counter(f"{item.part}, {item.reason}" for item in malformed)
        lines += [f"  {what}: {count:,}" for what, count in counts.most_common()]
        for part in PARTS if readings else ():
            mean = fmean(getattr(reading, f"{part}_confidence") for reading in readings)
            lines.append(f"mean confidence of the {part}: {mean:.3f}")
        return lines


def run_command(options: Namespace, *, progress: bool) -> Report:
    """``augment`` with the options of ``comoe augment``; raises what ``augment`` does."""

    def load() -> Generator:
        print(f"augment: loading {options.model}", file=sys.stderr, flush=True)
        # Here, not above: a mistake in the prompts or the posts is reported before the libraries of
        # models are imported.
        from comoe.augment.hugging_face import load_generator

        names = ("device", "max_new_tokens", "temperature", "trust_remote_code")
        return load_generator(options.model, **{name: getattr(options, name) for name in names})

    choice = DataChoice(
        options.input,
        format=options.format,
        split=options.split,
        text=options.text_column,
        pair=options.pair_column,
        label=options.label_column,
        limit=options.limit,
        skip_bad=options.skip_bad,
    )
    return augment(
        choice,
        options.output,
        prompts=load_prompts(options.prompts or prompts_path()),
        load=load,
        settings=Settings(options.rounds, options.batch_size, options.temperature, options.seed),
        overwrite=options.overwrite,
        progress=progress,
    )


def augment(
    choice: DataChoice,
    output: Path,
    *,
    prompts: Prompts,
    load: Callable[[], Generator],
    settings: Settings,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Write the posts with their auxiliary columns. A killed run is continued, a finished one changes nothing.

    Args:
        choice: the posts.
        output: JSON lines, written aside and renamed when all posts are done.
        prompts: templates and examples.
        load: gives the model; called once the posts are found to be good.
        settings: how generated texts are refined.
        overwrite: replace an earlier output of augment, and forget a run that stopped.
        progress: draw a progress bar; else a line now and then, as a log wants it.

    Raises:
        ValueError: posts that cannot be read; an output that is there and was made otherwise, or
            not by augment, or is a file that is read; a run that stopped and was begun otherwise.
    """
    _check(choice, output, settings)
    files = Output(output)
    place = Path(choice.path).expanduser()
    files.check(spared=[*([place] if place.exists() else ()), prompts.path])
    posts = read_input_posts(choice, labels=prompts.labels, added=COLUMNS)
    for number, row in enumerate(posts.rows, start=1):
        line_of(row, number=number)  # now, not when all the work is done
    earlier = None if overwrite or files.begun.exists() else files.finished()
    # What the texts depend on beside the model.
    head = {"--input": f"{posts.file} ({posts.digest[:12]})", "--prompts": prompts.digest[:12]}
    names = ("rounds", "batch_size", "temperature", "seed")
    head |= {f"--{name.replace('_', '-')}": str(getattr(settings, name)) for name in names}
    if earlier is not None:
        _compare(earlier, {**earlier.head, **head}, output)
    generator = load()
    head |= generator.identity
    if earlier is not None:
        _compare(earlier, head, output)
        return Report(posts, (), files, len(posts.posts), earlier.report)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(files.begun, head, anew=overwrite) as journal:
        resumed = len(journal.records)
        refine = Refiner(generator, prompts, settings)
        _work(posts.posts, journal, refine, batch_size=settings.batch_size, progress=progress)
        outcomes = sorted(map(Outcome.from_dict, journal.records), key=attrgetter("index"))
        report = Report(posts, tuple(outcomes), files, resumed)
        files.write(
            ({**row, **_columns_of(one)} for row, one in zip(posts.rows, outcomes, strict=True)),
            _malformed_rows(posts.posts, outcomes),
            head=head,
            report=report.lines(),
        )
        journal.remove()
    return report


def _compare(earlier: Note, head: Mapping[str, str], output: Path) -> None:
    if changed := differences(earlier.head, head):
        raise ValueError(
            f"--output {output} is there already, made otherwise: {changed}. Name another file, or {BEGIN_ANEW}."
        )


def _check(choice: DataChoice, output: Path, settings: Settings) -> None:
    least = {
        "--rounds": (settings.rounds, 1), "--batch-size": (settings.batch_size, 1), "--limit": (choice.limit, 1),
        "--temperature": (settings.temperature, 0),
    }  # fmt: skip
    for option, (value, at_least) in least.items():
        if value is not None and not at_least <= value < math.inf:
            raise ValueError(f"{option} is {value}; it must be {at_least} or more.")
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {output}: the output is JSON lines; give it the ending .jsonl.")


def _work(
    posts: Sequence[Post], journal: Journal, refine: Refiner, *, batch_size: int, progress: bool
) -> None:
    """Process what is left, piece by piece; the pieces are the same however often the run stops."""
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(posts)), key=lambda index: (-len(posts[index].text), index))
    size = batch_size * BATCHES
    done = {record["index"] for record in journal.records}
    with tqdm(
        total=len(posts),
        initial=len(done),
        desc="augment",
        unit="post",
        mininterval=0.1 if progress else LOG_SECONDS,
        bar_format=None if progress else LOG_LINE,
        dynamic_ncols=progress,
    ) as bar:
        for start in range(0, len(order), size):
            piece = [index for index in order[start : start + size] if index not in done]
            if piece:
                outcomes = refine(
                    {index: posts[index] for index in piece},
                    watch=lambda number, left: bar.set_postfix(
                        round=number, posts=left, refresh=progress
                    ),
                )
                journal.add([asdict(outcome) for outcome in outcomes])
                bar.update(len(piece))


def _malformed_rows(posts: Sequence[Post], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"line": post.line, "round": item.round, "part": item.part, "reason": item.reason, "answer": item.text}
        for post, outcome in zip(posts, outcomes, strict=True)
        for item in outcome.malformed
    ]  # fmt: skip


def _columns_of(outcome: Outcome) -> dict[str, Any]:
    names = (*PARTS, *(f"{part}_confidence" for part in PARTS))
    values = [None if outcome.reading is None else getattr(outcome.reading, n) for n in names]
    return dict(zip(COLUMNS, [*values, outcome.rounds, outcome.converged], strict=True))
