"""Errors as one sentence: what failed, at which file, what to do; and the log that keeps the traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from comoe import __version__

SHOW = "COMOE_TRACEBACK"
"""Environment variable: 1 prints the traceback of an error instead of keeping it in a log."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that mean that a file can take no more."""

NUMBERED = re.compile(r"os error (\d+)")
"""How libraries in Rust end what they say of an error of the system."""

SQLITE = {5: errno.EBUSY, 6: errno.EBUSY, 13: errno.ENOSPC, 22: errno.EFBIG}
"""Primary result code of SQLite -> the system's error that it stands for (https://sqlite.org/rescode.html)."""

READ_ONLY, IO_ERROR, CANNOT_OPEN = 8, 10, 14
"""Codes of SQLite that stand for several errors of the system."""

TORCH_WRITING = ("PytorchStreamWriter", "inline_container", "iostream error", "write failed")
"""Parts of what torch says where a file cannot be written, by the size of what was left to write."""

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of the system or user for the size of a file (ulimit -f)",
    errno.EACCES: "get the right to it, or choose another path",
    errno.EPERM: "get the right to it, or choose another path",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENOENT: "correct the path",
    errno.EEXIST: "choose another path, or move away what is there",
    errno.ENOTDIR: "a file is where a folder should be; correct the path",
    errno.EISDIR: "a folder is where a file should be; correct the path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "links lead in a circle, or a link is not followed here; correct the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of the system",
    errno.EIO: "look at the disk, or mount it again",
    errno.ESTALE: "mount the network folder again",
    errno.ENOMEM: "free some memory",
    errno.EBUSY: "another process uses it; wait until it ends, or end it",
}
"""Number of an error of the system -> what to do about it."""


def sentence(error: BaseException) -> str:
    """An error in one line; one of the system with its file, and with what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    where = next(iter(getattr(error, "__notes__", ())), named)
    remedy = REMEDIES.get(error.errno, "")
    return f"{where}{': ' if where else ''}{error.strerror}{'; ' if remedy else ''}{remedy}."


def is_foreign(error: BaseException) -> bool:
    """Whether a ``ValueError`` comes from another library, whose words may tell a user little."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError) and not module.startswith("comoe.")


@contextlib.contextmanager
def doing(action: str, path: Path) -> Iterator[None]:
    """Give errors of the system in the block, also those that libraries put into words, a note of action and file.

    Args:
        action: in words, such as ``writing``.
        path: file or folder that is worked on.

    Raises:
        OSError: instead of the errors of torch, safetensors, tokenizers and SQLite for it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.add_note(f"{action} {path}")
        raise
    except Exception as error:
        number = _number_behind(error, path)
        if number is None:
            raise
        found = OSError(number, os.strerror(number))
        found.add_note(f"{action} {path}")
        raise found from error


@contextlib.contextmanager
def parsing(what: Path | str, remedy: str) -> Iterator[None]:
    """Inside, what a library says of a damaged or foreign file becomes one sentence.

    Args:
        what: the file, or the option and the file.
        remedy: the end of the sentence.

    Raises:
        ValueError: whatever the library raised; errors of this package stay as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not is_foreign(error):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300].rstrip(".")
        raise ValueError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); {remedy}."
        ) from error


def behind(error: Exception) -> Exception:
    """The error of the system that a library put into words where no block of ``doing`` was, or the error itself."""
    if isinstance(error, (ValueError, OSError)) or (number := _stated_number(error)) is None:
        return error
    system = OSError(number, os.strerror(number))
    system.__cause__ = error
    return system


def _stated_number(error: BaseException) -> int | None:
    """The system's error that a library's words or code stand for."""
    found = NUMBERED.search(str(error))
    return int(found[1]) if found else SQLITE.get(_sqlite_code(error))


def _sqlite_code(error: BaseException | None) -> int:
    """SQLite's code, also behind the error of a library that wraps it; 0 where there is none."""
    while error is not None and not hasattr(error, "sqlite_errorcode"):
        error = error.__cause__
    return 0 if error is None else error.sqlite_errorcode & 0xFF


def _number_behind(error: Exception, path: Path) -> int | None:
    """The system's error that a library put into words; None where it was something else."""
    if (number := _stated_number(error)) is not None:
        return number
    code, text = _sqlite_code(error), str(error)
    if code not in (READ_ONLY, IO_ERROR, CANNOT_OPEN) and not any(
        word in text for word in TORCH_WRITING
    ):
        return None
    # torch and SQLite keep the number to themselves: the disk is asked again.
    folder = next((place for place in (path, *path.parents) if place.is_dir()), Path())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as again:
        return again.errno
    if code in (READ_ONLY, CANNOT_OPEN):
        return errno.EACCES if path.exists() else errno.ENOENT
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            return errno.EFBIG
    return errno.EIO


def keep_traceback(word: str, folder: Callable[[], Path]) -> str:
    """Print the traceback of the error at hand where ``SHOW`` asks for it, else keep it in a file.

    Args:
        word: the command, for the name of the file.
        folder: gives the folder of logs.

    Returns:
        What to tell about it, a sentence; empty if it was printed.
    """
    trace = traceback.format_exc()
    if os.environ.get(SHOW, "0") not in ("", "0"):
        print(trace, end="", file=sys.stderr)
        return ""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    head = f"comoe {__version__}, Python {platform.python_version()}, {platform.platform()}\n{sys.argv}\n"
    try:
        file = folder() / f"{word}-{stamp}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(head + trace, encoding="utf-8", errors="backslashreplace")
    except OSError:
        # A full disk may be the very reason.
        print(trace, end="", file=sys.stderr)
        return ""
    return f"The traceback is in {file}."
