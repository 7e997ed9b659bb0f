"""Every image of a file of posts looked at once, before training: by all ranks together, remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from comoe.config.files import cache_file
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
from comoe.data.images.pixels import limits_of
from comoe.data.posts import Post
from comoe.data.reading.rows import settle
from comoe.data.report import BadRow, DataReport
from comoe.distributed import all_gather_objects, is_main, rank, world_size

IMAGE_REASON = "image: "
"""How ``BadRow.reason`` of a bad image begins."""


THREADS = min(4, os.cpu_count() or 1)
"""Images decoded at the same time: Pillow works outside of the interpreter's lock, and each takes
its memory."""


ADVICE = {
    "missing": "If the paths start elsewhere, set data.image_root.",
    "outside": "Or set data.image_root to the folder that holds them all.",
}
"""Reason of ``BadImage`` -> what to do about it in a recipe."""


CheckResult = tuple[str, str, bool]
"""Reason and rule of ``BadImage``, both empty for a good image; whether it has more frames than
one."""


@dataclass(frozen=True, slots=True)
class CheckedImages:
    """The images of some posts."""

    sources: list[Source | None]
    """One per post: bytes, a path, None where there is no image or a bad one."""
    bad: dict[int, BadRow]
    """Number of the post -> what is wrong with its image."""
    animated: int
    """Images of which only the first frame is read."""


@dataclass(frozen=True, slots=True)
class HowToCheck:
    """What holds for every file with images."""

    limits: ImageLimits
    """Of file and image."""
    cache_dir: Path | None = None
    """Where results are kept; None keeps none."""
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
    """Find and decode the image of every post; every rank must call it with the same cells, and all get the same.

    Each rank decodes a share. An image that was looked at before and has not changed since is not
    decoded again.

    Args:
        cells: what the image column holds, one per post.
        file: that names the images, for messages.
        lines: line of each cell there.
        column: name of the column.
        root: folder that paths start from and must not leave; None takes any path.
        how: limits, cache, and what is printed.
    """
    results: dict[Source, CheckResult] = {}
    sources: list[Source | None] = []
    bad: dict[int, BadRow] = {}
    inside = None if root is None else root.resolve()

    def refuse(post: int, reason: str, rule: str) -> None:
        shown = cells[post]
        if isinstance(shown, Mapping):
            shown = shown.get("path") or shown.get("bytes")
        if isinstance(shown, (bytes, bytearray, memoryview)):
            shown = bytes(shown[:16])  # the bytes of an image are too long for a report
        rule_shown = f"column {column}: the image {rule} {how.advice.get(reason, '')}".rstrip()
        bad[post] = BadRow(file, lines[post], shown, rule_shown, f"{IMAGE_REASON}{reason}")

    for post, cell in enumerate(cells):
        try:
            sources.append(locate_image(cell, root=inside))
        except BadImage as error:
            sources.append(None)
            refuse(post, error.reason, error.rule)
    different = list(dict.fromkeys(source for source in sources if source is not None))
    if different:
        # Other columns and folders name other images: sharing a file they would forget each
        # other's.
        cache = _cache_file(how.cache_dir, os.path.abspath(file), column, str(inside), how.limits)
        results = _check_different(different, how.limits, cache=cache, progress=how.progress)
    for post, source in enumerate(sources):
        reason, rule, _ = (
            results.get(source, ("", "", False)) if source is not None else ("", "", False)
        )
        if reason:
            sources[post] = None
            refuse(post, reason, rule)
    return CheckedImages(
        sources, bad, sum(source is not None and results[source][2] for source in sources)
    )


class ImageReader:
    """The images of a recipe's posts, by its limits, with bad ones noted in a report.

    Args:
        config: ``data`` of the recipe.
        report: gets rows set aside, rows kept without their image, and notes.
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
                f"data.image_root ({root}): there is no such folder; the paths of images start from it. Correct it, "
                "or leave it out where they start from the folder of the file that names them."
            )
        self.config = config
        self.report = report
        self._how = HowToCheck(limits_of(config), cache_dir, progress, advice)

    def read(self, posts: Sequence[Post], *, column: str, folder: str | None = None) -> list[Post]:
        """The posts of a file that stay under ``data.on_bad_image``, with their images located.

        Args:
            posts: of one file.
            column: with the image.
            folder: where paths start without ``data.image_root``; None: where the file is.

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
            root=Path(root or folder or Path(file).parent).expanduser(),
            how=self._how,
        )
        if found.animated:
            self.report.notes.append(
                f"{file}: of {found.animated:,} animated images the first frame is read"
            )
        bad = [found.bad[row] for row in sorted(found.bad)]
        self._warn(bad, good=sum(source is not None for source in found.sources), file=file)
        keeps = KEEPS_POST[self.config.on_bad_image]
        if keeps:
            self.report.without_image.extend(bad)
        located = (
            replace(post, image=source, error=None if keeps else found.bad.get(row))
            for row, (post, source) in enumerate(zip(posts, found.sources, strict=True))
        )
        return settle(located, file=file, skip=True, option="", report=self.report)

    def _warn(self, bad: Sequence[BadRow], *, good: int, file: str) -> None:
        """Where most images are bad, something is wrong with all of them: a folder, a download."""
        if len(bad) > good:
            (reason, count), *_ = Counter(
                row.reason.removeprefix(IMAGE_REASON) for row in bad
            ).most_common(1)
            first = next(row for row in bad if row.reason == f"{IMAGE_REASON}{reason}")
            self.report.warnings.append(
                f"{file}: {len(bad):,} of {len(bad) + good:,} images are bad, most often "
                f"({count:,}) because of: {reason}. The first: {first}"
            )


def _check_different(
    sources: Sequence[Source], limits: ImageLimits, *, cache: Path | None, progress: bool
) -> dict[Source, CheckResult]:
    known = _load(cache)
    mine = range(rank(), len(sources), world_size())
    keys = {number: _key(sources[number]) for number in mine}
    found = {number: known[key] for number, key in keys.items() if key in known}
    new = [number for number in mine if number not in found]

    def check(source: Source) -> CheckResult:
        try:
            read_image(source, limits)
        except BadImage as error:
            return error.reason, error.rule, False
        return "", "", is_animated(source)

    show = progress and is_main() and len(new) > 0
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(new), desc="images", unit="", disable=not show) as bar,
    ):
        for number, result in zip(
            new, pool.map(check, (sources[number] for number in new)), strict=True
        ):
            found[number] = result
            bar.update()
    shares = all_gather_objects(
        [(number, keys[number], result) for number, result in found.items()]
    )
    everything = [entry for share in shares for entry in share]
    if is_main() and cache is not None:
        # What could not be read now may be readable tomorrow, with the same size and time.
        lasting = {
            key: result for _, key, result in everything if key and result[0] != "unreadable"
        }
        if lasting != known:
            with cache_file(cache) as file:
                file.write(json.dumps(lasting).encode())
    return {sources[number]: result for number, _, result in everything}


def _key(source: Source) -> str:
    """What a result is remembered by: path, size and time of change, or the bytes; empty where there is no file."""
    if isinstance(source, bytes):
        rule_shown = source
    else:
        try:
            found = os.stat(source)
        except (OSError, ValueError):
            return ""
        rule_shown = f"{source}\n{found.st_size}\n{found.st_mtime_ns}".encode(
            errors="surrogateescape"
        )
    return hashlib.blake2b(rule_shown, digest_size=16).hexdigest()


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


def _load(path: Path | None) -> dict[str, CheckResult]:
    """A cache file; nothing where there is none, or a damaged one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return {
            key: (str(reason), str(rule), bool(animated))
            for key, (reason, rule, animated) in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


KEEPS_POST: dict[str, bool] = {"skip": False, "text": True}
"""``data.on_bad_image`` -> whether the post of a bad image stays, without it."""
