"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that takes its name, replacing an older one, only when the block ends without an error.

    No reader, crash or second writer ever sees half of it: it is written under a random name in the
    same folder, synchronized to the disk with its folder, and renamed. A link at ``path`` is
    replaced, never followed. A pipe or device cannot be replaced and is written directly.

    Args:
        path: in a folder that exists.
        mode: ``wb``, or ``w`` for UTF-8 text with line ends as they are given.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if Path("/dev") in path.parents or (path.exists() and not path.is_file()):
        with path.open(mode, **text) as file:
            yield file
        return
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    # Mode 0o666 less the umask, as for any new file.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, mode, **text) as file:
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
