"""Files that are written whole or not at all, and locks that keep a second process out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from comoe.config.failure import doing, sentence

PART = ".part"
"""Ending of a file that is being written."""
PLAIN_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
"""Flags of ``os.open`` where the system has them: a planted link is not followed, no byte is translated (Windows)."""


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that takes its name, replacing an older one, only when the block ends without an error.

    No reader, crash or second writer ever sees half of it: it is written under a random name in the
    same folder, synchronized to the disk with its folder, and renamed. What a killed writer of the
    same file left there is removed. A link at ``path`` is replaced, never followed. A pipe or
    device cannot be replaced and is written directly.

    Args:
        path: in a folder that exists.
        mode: ``wb``, or ``w`` for UTF-8 text with line ends as they are given.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if written_directly(path) or path.is_dir():
        with doing("writing", path), path.open(mode, **text) as file:
            yield file
        return
    with doing("writing", path):
        yield from _written_aside(path, mode, text)


def written_directly(path: Path) -> bool:
    """Whether a path is a pipe or a device, which cannot be replaced."""
    # /dev/stdout may lead to a plain file; /dev/shm is a folder like others.
    here = path.parent in (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
    return here or (path.exists() and not path.is_file() and not path.is_dir())


def _written_aside(path: Path, mode: str, text: Mapping[str, str]) -> Iterator[IO]:
    stem = f".{path.name[:40]}."
    _remove_stale(path.parent, stem)
    part = path.with_name(f"{stem}{secrets.token_hex(8)}{PART}")
    # Mode 0o666 less the umask, as for any new file.
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN_OPEN, 0o666)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with open(descriptor, mode, **text) as file:
            # Held as long as this process lives: see _remove_stale. Some file systems have none.
            with contextlib.suppress(OSError):
                lock_descriptor(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_replace(part: Path, path: Path) -> None:
    """Give a synchronized file its name, also on the disk."""
    part.replace(path)
    # Windows cannot open a folder, some network file systems cannot synchronize one.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
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
        with contextlib.suppress(OSError):
            with part.open("rb") as file:
                free = lock_descriptor(file.fileno(), blocking=False)
                old = time.time() - os.fstat(file.fileno()).st_mtime > 60
            if free and old:
                part.unlink()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all; see ``atomic_file``."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of torch and NumPy become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def cache_file(path: Path) -> Iterator[IO]:
    """``atomic_file`` for what can be made again: a full disk is a warning, as only the next start is slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        print(f"warning: not cached: {sentence(error)}", file=sys.stderr)


def check_target(path: Path) -> None:
    """Notice before long work that a file could not be written at its end: its folder is made, and written to.

    Raises:
        OSError: with the file; it is a folder, or may not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not written_directly(path):
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{PART}")
        with doing("writing", path):
            part.touch(exist_ok=False)
            part.unlink()


def write_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Write ``plain(value)`` as JSON, whole or not at all; ``default`` as of ``json.dumps``."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False, default=default)
    write_atomic(path, f"{text}\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged.") from error


_BLANKS = r"\x00-\x08\x0b\x0c\x0e-\x20\x85\xa0\u1680\u2000-\u200f\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"

_FORMULA = re.compile(
    rf"(^[{_BLANKS}\t\r\n]*|[;\t\r\n][{_BLANKS}]*)(?!(?<=;)-\))([=+\-@\uff1d\uff0b\uff0d\uff20])"
)
"""What a spreadsheet takes for a formula: at the start of a cell, or behind what some take for the
end of one. The emoticon ;-) is none."""

_DEFUSED = re.compile(_FORMULA.pattern.replace("([=", "'([=").replace("(?!(?<=;)-", "(?!(?<=;)'?-"))

_SIGNED = re.compile(r"[+-](?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def csv_line(cells: Iterable[Any], *, raw: bool = False) -> str:
    """One line of a CSV file, with its line feed.

    A text that a spreadsheet would run as a formula gets an apostrophe before its first sign, as
    the spreadsheets themselves write text (OWASP, CSV Injection); a number with a sign stays. NUL,
    which ends a file for many readers, becomes U+FFFD.

    Args:
        cells: text, numbers; None is an empty cell.
        raw: leave text as it is.
    """
    return ",".join(_csv_cell(cell, raw) for cell in cells) + "\n"


def _csv_cell(cell: Any, raw: bool) -> str:
    text = "" if cell is None else str(cell)
    if isinstance(cell, str) and not raw:
        text = text.replace("\0", "\ufffd")
        if not _SIGNED.fullmatch(text):
            text = _FORMULA.sub(r"\1'\2", text)
    # Python's csv leaves a bare carriage return unquoted, at which most readers begin a new row.
    quoted = any(sign in text for sign in ',"\r\n') or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if quoted else text


DEFUSED = "defused"
"""Column of a CSV file that names the cells of its row, joined by ;, which got an apostrophe: ``csv_rows`` takes it off
again."""


def defused_columns(row: Mapping[str, Any]) -> str:
    """What a row has in the column ``DEFUSED``: the columns whose text ``csv_line`` changes."""
    texts = {name: cell for name, cell in row.items() if isinstance(cell, str)}
    return ";".join(
        name
        for name, cell in texts.items()
        if not _SIGNED.fullmatch(cell) and _FORMULA.search(cell)
    )


def read_csv_text(text: str) -> str:
    """The text that ``csv_line`` wrote as this cell, without the apostrophes."""
    return _DEFUSED.sub(r"\1\2", text)


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Let one process at a time run the block, by a lock file that is there as long as it runs.

    The system gives the lock back when its process ends, in whatever way: that of a dead process is
    taken over. Where the file system has no locks nobody is kept out.

    Args:
        path: the lock file; see ``lock_beside``.
        what: is worked on, for the message.
        wait: say by it who has the lock, and wait; None raises.

    Raises:
        ValueError: another process has the lock, with its host, number and since when.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | PLAIN_OPEN, 0o666)
        file = open(descriptor, "r+b", buffering=0)
        try:
            _lock(file, what, wait)
            # A holder removes the file: a lock on a removed one keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    held = True
    try:
        with file:
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            file.seek(0)  # a holder's name was read
            file.truncate()
            file.write(f" process {os.getpid()} on {platform.node()} since {since}".encode())
            try:
                yield
            finally:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)
                    held = False
    finally:
        if held:
            # Windows removes no open file; what another process waits with stays, and it removes it.
            with contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)


def _lock(file: IO[bytes], what: str, wait: Callable[[str], object] | None) -> None:
    # Where the file system has no locks nobody is kept out.
    with contextlib.suppress(OSError):
        if lock_descriptor(file.fileno(), blocking=False):
            return
        # Windows lets nobody else read the first byte, which is the locked one.
        file.seek(1)
        busy = f"{what} is in use by {file.read().decode() or 'another process'}"
        if wait is None:
            raise ValueError(f"{busy}; wait until it ends, or end it.")
        wait(f"{busy}; waiting for it")
        lock_descriptor(file.fileno())


def lock_beside(path: Path) -> Path:
    """The lock file of a file or folder that is written, in the folder of it."""
    name = (
        path.name
        if len(os.fsencode(path.name)) < 200
        else hashlib.sha256(path.name.encode()).hexdigest()
    )
    return path.with_name(f".{name}.lock")


def is_read_from(path: Path, source: Path) -> bool:
    """Whether writing a path would replace what is read: the file itself, or one in the folder; - is standard input."""
    if source == Path("-"):
        # A shell opens the file of "< posts.csv" under no name.
        return path.is_file() and os.path.samestat(path.stat(), os.fstat(0))
    inside = source.is_dir() and path.exists() and source.resolve() in path.resolve().parents
    return inside or same_file(path, source)


def same_file(path: Path, other: Path) -> bool:
    """One file under two names, links and hard links included."""
    both = path.exists() and other.exists()
    return os.path.realpath(path) == os.path.realpath(other) or (
        both and os.path.samefile(path, other)
    )
