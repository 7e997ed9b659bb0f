"""Every picture of a file of posts looked at once, before training: by all ranks together, remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from comoe.config.files import write_atomic
from comoe.config.recipe import DataConfig
from comoe.data.images.decode import (
    VERSION,
    BadImage,
    ImageLimits,
    Source,
    is_animated,
    locate_image,
    read_image,
)
from comoe.data.posts import Post
from comoe.data.reading.rows import settle
from comoe.data.report import BadRow, DataReport
from comoe.distributed import all_gather_objects, is_main, rank, world_size

PICTURE = "picture: "
"""How ``BadRow.reason`` of a bad picture begins."""


THREADS = min(4, os.cpu_count() or 1)
"""Pictures decoded at the same time: Pillow works outside of the interpreter's lock, and each takes
its memory."""


ADVICE = {
    "missing": "If the paths start elsewhere, set data.image_root.",
    "outside": "Or set data.image_root to the folder that holds them all.",
}
"""Reason of ``BadImage`` -> what to do about it in a recipe."""


Verdict = tuple[str, str, bool]
"""Reason and rule of ``BadImage``, both empty for a good picture; whether it has more frames than
one."""


@dataclass(frozen=True, slots=True)
class CheckedImages:
    """The pictures of some posts."""

    sources: list[Source | None]
    """One per post: bytes, a path, None where there is no picture or a bad one."""
    bad: dict[int, BadRow]
    """Number of the post -> what is wrong with its picture."""
    animated: int
    """Pictures of which only the first frame is read."""


@dataclass(frozen=True, slots=True)
class HowToCheck:
    """What holds for every file with pictures."""

    limits: ImageLimits
    """Of file and picture."""
    cache_dir: Path | None = None
    """Where verdicts are kept; None keeps none."""
    progress: bool = False
    """Show a bar on rank 0."""
    advice: Mapping[str, str] = field(default_factory=lambda: ADVICE)
    """Reason -> what to do besides, at the end of the rule."""


def check_images(
    cells: Sequence[Any],
    *,
    file: str,
    lines: Sequence[int],
    column: str,
    root: Path | None,
    how: HowToCheck,
) -> CheckedImages:
    """Find and decode the picture of every post; every rank must call it with the same cells, and all get the same.

    Each rank decodes a share. A picture that was looked at before and has not changed since is not
    decoded again.

    Args:
        cells: what the picture column holds, one per post.
        file: that names the pictures, for messages.
        lines: line of each cell there.
        column: name of the column.
        root: folder that paths start from and must not leave; None takes any path.
        how: limits, cache, and what is said.
    """
    verdicts: dict[Source, Verdict] = {}
    sources: list[Source | None] = []
    bad: dict[int, BadRow] = {}
    inside = None if root is None else root.resolve()

    def refuse(post: int, reason: str, rule: str) -> None:
        shown = _shown(cells[post])
        told = f"column {column}: the picture {rule} {how.advice.get(reason, '')}".rstrip()
        bad[post] = BadRow(file, lines[post], shown, told, f"{PICTURE}{reason}")

    for post, cell in enumerate(cells):
        try:
            sources.append(locate_image(cell, root=inside))
        except BadImage as error:
            sources.append(None)
            refuse(post, error.reason, error.rule)
    different = list(dict.fromkeys(source for source in sources if source is not None))
    if different:
        # Other columns and folders name other pictures: sharing a file they would forget each
        # other's.
        cache = _cache_file(how.cache_dir, os.path.abspath(file), column, str(inside), how.limits)
        verdicts = _judged(different, how.limits, cache=cache, progress=how.progress)
    for post, source in enumerate(sources):
        reason, rule, _ = (
            verdicts.get(source, ("", "", False)) if source is not None else ("", "", False)
        )
        if reason:
            sources[post] = None
            refuse(post, reason, rule)
    return CheckedImages(
        sources, bad, sum(source is not None and verdicts[source][2] for source in sources)
    )


class ImageReader:
    """The pictures of a recipe's posts, by its limits, with bad ones noted in a report.

    Args:
        config: ``data`` of the recipe.
        report: gets rows set aside, rows kept without their picture, and notes.
        cache_dir: as in ``check_images``.
        progress: as in ``check_images``.
        advice: as in ``check_images``.

    Raises:
        ValueError: ``data.image_root`` is no folder.
    """

    def __init__(
        self,
        config: DataConfig,
        report: DataReport,
        *,
        cache_dir: Path | None = None,
        progress: bool = False,
        advice: Mapping[str, str] = ADVICE,
    ) -> None:
        root = config.image_root
        if root is not None and not Path(root).expanduser().is_dir():
            raise ValueError(
                f"data.image_root ({root}): there is no such folder; the paths of pictures start from it. Correct it, "
                "or leave it out where they start from the folder of the file that names them."
            )
        self.config = config
        self.report = report
        self._how = HowToCheck(limits_of(config), cache_dir, progress, advice)

    def read(self, posts: Sequence[Post], *, column: str) -> list[Post]:
        """The posts of a file that stay under ``data.on_bad_image``, with their images located.

        Raises:
            ValueError: no post stays.
        """
        if not posts:
            return []
        root, file = self.config.image_root, posts[0].file
        found = check_images(
            [post.image for post in posts],
            file=file,
            lines=[post.line for post in posts],
            column=column,
            root=Path(file).parent if root is None else Path(root).expanduser(),
            how=self._how,
        )
        if found.animated:
            self.report.notes.append(
                f"{file}: of {found.animated:,} animated pictures the first frame is read"
            )
        bad = [found.bad[row] for row in sorted(found.bad)]
        self._warn(bad, good=sum(source is not None for source in found.sources), file=file)
        keeps = KEEPS_POST[self.config.on_bad_image]
        if keeps:
            self.report.without_picture.extend(bad)
        located = (
            replace(post, image=source, error=None if keeps else found.bad.get(row))
            for row, (post, source) in enumerate(zip(posts, found.sources, strict=True))
        )
        return settle(located, file=file, skip=True, option="", report=self.report)

    def _warn(self, bad: Sequence[BadRow], *, good: int, file: str) -> None:
        """Where most pictures are bad, something is wrong with all of them: a folder, a download."""
        if len(bad) > good:
            (reason, count), *_ = Counter(
                row.reason.removeprefix(PICTURE) for row in bad
            ).most_common(1)
            first = next(row for row in bad if row.reason == f"{PICTURE}{reason}")
            self.report.warnings.append(
                f"{file}: {len(bad):,} of {len(bad) + good:,} pictures are bad, most often ({count:,}) because of: "
                f"{reason}. The first: {first}"
            )


def limits_of(config: DataConfig) -> ImageLimits:
    """The limits that a recipe sets."""
    return ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)


def _judged(
    sources: Sequence[Source], limits: ImageLimits, *, cache: Path | None, progress: bool
) -> dict[Source, Verdict]:
    known = _load(cache)
    mine = range(rank(), len(sources), world_size())
    keys = {number: _key(sources[number]) for number in mine}
    found = {number: known[key] for number, key in keys.items() if key in known}
    new = [number for number in mine if number not in found]
    judge = partial(_judge, limits=limits)
    show = progress and is_main() and len(new) > 0
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(new), desc="pictures", unit="", disable=not show) as bar,
    ):
        for number, verdict in zip(
            new, pool.map(judge, (sources[number] for number in new)), strict=True
        ):
            found[number] = verdict
            bar.update()
    shares = all_gather_objects(
        [(number, keys[number], verdict) for number, verdict in found.items()]
    )
    everything = [entry for share in shares for entry in share]
    if is_main() and cache is not None:
        # What could not be read now may be readable tomorrow, with the same size and time.
        lasting = {
            key: verdict for _, key, verdict in everything if key and verdict[0] != "unreadable"
        }
        if lasting != known:
            # Without a cache only the next start is slower.
            with suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(cache, json.dumps(lasting))
    return {sources[number]: verdict for number, _, verdict in everything}


def _judge(source: Source, limits: ImageLimits) -> Verdict:
    try:
        read_image(source, limits)
    except BadImage as error:
        return error.reason, error.rule, False
    return "", "", is_animated(source)


def _key(source: Source) -> str:
    """What a verdict is remembered by: path, size and time of change, or the bytes; empty where there is no file."""
    if isinstance(source, bytes):
        told = source
    else:
        try:
            found = os.stat(source)
        except (OSError, ValueError):
            return ""
        told = f"{source}\n{found.st_size}\n{found.st_mtime_ns}".encode(errors="surrogateescape")
    return hashlib.blake2b(told, digest_size=16).hexdigest()


def _cache_file(
    folder: Path | None, file: str, column: str, root: str, limits: ImageLimits
) -> Path | None:
    if folder is None:
        return None
    settings = [VERSION, PIL.__version__, file, column, root, limits.max_bytes, limits.max_pixels]
    return (
        folder
        / f"{hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()}.json"
    )


def _load(path: Path | None) -> dict[str, Verdict]:
    """A cache file; nothing where there is none, or a damaged one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return {
            key: (str(reason), str(rule), bool(animated))
            for key, (reason, rule, animated) in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _shown(cell: Any) -> Any:
    """A cell as a report may keep it: the bytes of a picture are long."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") or cell.get("bytes")
    return bytes(cell[:16]) if isinstance(cell, (bytes, bytearray, memoryview)) else cell


KEEPS_POST: dict[str, bool] = {"skip": False, "text": True}
"""``data.on_bad_image`` -> whether the post of a bad picture stays, without it."""
