"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PART = ".part"
"""Ending of a file that is being written."""


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that takes its name, replacing an older one, only when the block ends without an error.

    No reader, crash or second writer ever sees half of it: it is written under a random name in the
    same folder, synchronized to the disk with its folder, and renamed. What a killed writer of the
    same file left there is removed. A link at ``path`` is replaced, never followed. A pipe or device
    cannot be replaced and is written directly.

    Args:
        path: in a folder that exists.
        mode: ``wb``, or ``w`` for UTF-8 text with line ends as they are given.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if Path("/dev") in path.parents or (path.exists() and not path.is_file()):
        with path.open(mode, **text) as file:
            yield file
        return
    stem = f".{path.name[:40]}."
    _remove_stale(path.parent, stem)
    part = path.with_name(f"{stem}{secrets.token_hex(8)}{PART}")
    # Mode 0o666 less the umask, as for any new file.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, mode, **text) as file:
            # Held as long as this process lives: see _remove_stale. Some file systems have none.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Some network file systems cannot synchronize a folder.
        with contextlib.suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


def _remove_stale(folder: Path, stem: str) -> None:
    """Remove what killed writers of the same file left: parts that nobody has locked or written to for a minute."""
    name = re.compile(rf"{re.escape(stem)}[0-9a-f]{{16}}{re.escape(PART)}")
    for part in folder.iterdir():
        if not (name.fullmatch(part.name) and part.is_file()):
            continue
        # What cannot be locked is left alone.
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > 60:
                part.unlink()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all; see ``atomic_file``."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def same_file(path: Path, other: Path) -> bool:
    """One file under two names, links and hard links included."""
    both = path.exists() and other.exists()
    return os.path.realpath(path) == os.path.realpath(other) or (
        both and os.path.samefile(path, other)
    )
