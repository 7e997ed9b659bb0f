"""Posts in, posts with auxiliary columns out: what ``launch/augment.py`` does."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comoe.augmenting.generator import Generator
from comoe.augmenting.journal import BEGIN_ANEW, Journal
from comoe.augmenting.posts import Post, PostChoice, Posts, read_posts
from comoe.augmenting.prompts import Prompts, load_prompts
from comoe.augmenting.rounds import Outcome, Reading, Refiner, Settings

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
    """Where the malformed answers are."""
    resumed: int
    """Posts that an earlier run had done."""

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        readings = [outcome.reading for outcome in self.outcomes if outcome.reading is not None]
        labelled = [outcome for outcome in self.outcomes if outcome.converged is not None]
        by_round = Counter(outcome.rounds for outcome in labelled if outcome.converged)
        malformed = [item for outcome in self.outcomes for item in outcome.malformed]
        lines = list(self.posts.notes)
        lines.append(f"{len(self.outcomes):,} posts in {self.output}, {len(readings):,} of them answered")
        lines += [f"  {self.resumed:,} of them by the run that this one went on with"] if self.resumed else []
        lines += [f"  {len(self.posts.bad):,} bad rows left out, such as {row}" for row in self.posts.bad[:1]]
        if labelled:
            lines.append(f"converged: {by_round.total():,} of {len(labelled):,} posts with a gold label")
            lines += [f"  in round {number}: {count:,}" for number, count in sorted(by_round.items())]
            lines.append(f"  not converged: {len(labelled) - by_round.total():,}")
        shortened = sum(outcome.shortened for outcome in self.outcomes)
        lines += [f"shortened, too long for the model: {shortened:,} posts"] if shortened else []
        lines.append(f"malformed answers kept out: {len(malformed):,}" + (f", see {self.aside}" if malformed else ""))
        counts = Counter(f"{item.part}, {item.reason}" for item in malformed)
        lines += [f"  {what}: {count:,}" for what, count in counts.most_common()]
        lines += [f"mean confidence of the {part}: {_mean(readings, part):.3f}" for part in PARTS if readings]
        return lines


def run_command(options: Namespace, *, progress: bool) -> Report:
    """``augment`` with the options of ``launch/augment.py``; raises what ``augment`` does."""
    # Here, not above: a mistake in the prompts or the posts is told before the libraries of models are imported.
    prompts = load_prompts(options.prompts)

    def load() -> Generator:
        from comoe.augmenting.loading import load_generator

        return load_generator(
            options.model, device=options.device, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, trust_remote_code=options.trust_remote_code, progress=progress,
        )  # fmt: skip

    choice = PostChoice(
        options.input, options.format, options.split, options.text_column, options.pair_column, options.label_column,
        options.limit, options.skip_bad,
    )  # fmt: skip
    settings = Settings(options.rounds, options.batch_size, options.temperature, options.seed)
    return augment(
        choice, options.output, prompts=prompts, load=load, settings=settings, overwrite=options.overwrite,
        progress=progress,
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
) -> Report:
    """Write the posts with their auxiliary columns. A run that was killed goes on when it is started again.

    Args:
        choice: the posts.
        output: JSON lines; missing folders are made. Written aside and renamed when all posts are done.
        prompts: what is asked.
        load: gives the model; called once the posts are found to be good.
        settings: how answers are refined.
        overwrite: replace an output that is there, and forget a run that stopped.
        progress: show a progress bar.

    Raises:
        ValueError: posts that cannot be read; an output that is there; a run that stopped and was begun otherwise.
    """
    _check(choice, settings)
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {output}: the output is JSON lines; give it the ending .jsonl.")
    posts = read_posts(choice, labels=prompts.labels, added=COLUMNS)
    begun = output.with_name(f".{output.name}.part")
    if output.exists() and not begun.exists() and not overwrite:
        raise ValueError(f"--output {output} is there already; name another file, or {BEGIN_ANEW}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    generator = load()
    if overwrite:
        begun.unlink(missing_ok=True)
    journal = Journal(begun, _head(posts, prompts, generator, settings))
    resumed = len(journal.records)
    try:
        _work(posts.posts, journal, Refiner(generator, prompts, settings), settings=settings, progress=progress)
    except BaseException:
        journal.close()
        raise
    outcomes = sorted((Outcome.from_dict(record) for record in journal.records), key=lambda outcome: outcome.index)
    report = Report(posts, tuple(outcomes), output, output.with_name(f"{output.stem}.malformed.jsonl"), resumed)
    pairs = list(zip(posts.posts, outcomes, strict=True))
    _write(report.aside, (row for post, outcome in pairs for row in _kept_out(post, outcome)))
    _write(output, (columns_of(post, outcome) for post, outcome in pairs))
    journal.remove()
    return report


def _check(choice: PostChoice, settings: Settings) -> None:
    least = {
        "--rounds": (settings.rounds, 1), "--batch-size": (settings.batch_size, 1), "--limit": (choice.limit, 1),
        "--temperature": (settings.temperature, 0),
    }  # fmt: skip
    for option, (value, at_least) in least.items():
        if value is not None and not at_least <= value < math.inf:
            raise ValueError(f"{option} is {value}; it must be {at_least} or more.")


def _work(posts: Sequence[Post], journal: Journal, refine: Refiner, *, settings: Settings, progress: bool) -> None:
    """Answer what is left, piece by piece; the pieces are the same however often the run stops."""
    # Longest first: what does not fit into memory fails at once.
    order = sorted(posts, key=lambda post: (-len(post.text), post.index))
    size = settings.batch_size * BATCHES
    done = {record["index"] for record in journal.records}
    with tqdm(total=len(posts), initial=len(done), unit="post", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(order), size):
            piece = [post for post in order[start : start + size] if post.index not in done]
            if not piece:
                continue
            outcomes = refine(piece, watch=lambda number, left: bar.set_postfix(round=number, posts=left))
            journal.add([outcome.to_dict() for outcome in outcomes])
            bar.update(len(piece))


def columns_of(post: Post, outcome: Outcome) -> dict[str, Any]:
    """One line of the output: the columns of the post, then ``COLUMNS``."""
    reading = outcome.reading
    values = [None if reading is None else getattr(reading, name) for name in PARTS]
    confidences = [None if reading is None else getattr(reading, f"{name}_confidence") for name in PARTS]
    added = dict(zip(COLUMNS, [*values, *confidences, outcome.rounds, outcome.converged], strict=True))
    return {**post.row, **added}


def _kept_out(post: Post, outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {"line": post.line, "round": item.round, "part": item.part, "reason": item.reason, "answer": item.text}
        for item in outcome.malformed
    ]


def _head(posts: Posts, prompts: Prompts, generator: Generator, settings: Settings) -> dict[str, str]:
    """What the answers depend on: option -> value."""
    return {
        "--input": f"{posts.file} ({posts.digest[:12]})", "--prompts": prompts.digest[:12],
        "--rounds": str(settings.rounds),
        "--batch-size": str(settings.batch_size), "--temperature": str(settings.temperature),
        "--seed": str(settings.seed), **generator.identity,
    }  # fmt: skip


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, written aside and renamed."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows, start=1):
            try:
                text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                rule = f"post {number} has a cell that JSON lines cannot hold ({error}); drop its column."
                raise ValueError(rule) from error
            # U+2028 and its kin end a line for some readers, and half a surrogate pair is no character: as escapes
            # they do no harm.
            file.write("".join(_ESCAPED.get(sign, sign) if sign < "\ud800" else _safe(sign) for sign in text) + "\n")
    aside.replace(path)


def _plain(value: Any) -> Any:
    """NaN, the empty cell of some formats, as null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _safe(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if sign <= "\udfff" else sign


_ESCAPED = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


def _mean(readings: Sequence[Reading], part: str) -> float:
    return sum(getattr(reading, f"{part}_confidence") for reading in readings) / len(readings)


PARTS = ("aspect", "opinion", "polarity")
"""What is read out of a post."""

COLUMNS = (
    *(f"aux_{part}" for part in PARTS), *(f"aux_{part}_confidence" for part in PARTS), "aux_rounds", "aux_converged",
)  # fmt: skip
"""Columns of the output beside those of the posts."""
