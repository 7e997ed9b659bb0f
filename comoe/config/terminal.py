"""What a command prints: never a control character of a post or a label, and never the end of the command."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""C0 without tab and line feed, DEL, C1, marks that turn the direction of text, half surrogate pairs."""


def printable(text: str) -> str:
    """A text whose control characters are escaped, as ``\\x1b``: a terminal shows them and does nothing else."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SafeStream:
    """A text stream in the place of standard output or error.

    What is written is ``printable``; carriage returns at the beginning and end of a write stay,
    which progress bars draw with. Once writing fails (closed pipe, closed terminal, full disk below
    a log file), the rest is dropped: what is printed is no reason to end a run.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As that of a text stream."""
        shown = printable(text.strip("\r"))
        before = len(text) - len(text.lstrip("\r"))
        after = len(text.rstrip("\r")) if shown else len(text)
        shown = text[:before] + shown + text[after:]
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self.stream.write(shown))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As that of a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As that of a text stream."""
        self._try(self.stream.flush)

    def _try(self, work: Any) -> None:
        try:
            work()
        except (OSError, ValueError):  # ValueError: the stream itself is closed
            # What is buffered, and what Python flushes at its end, must fail no more.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Standard output and error as ``SafeStream`` while the block runs; safe ones stay."""
    # A command that was started without them would give their numbers to the next files it opens.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    made = [
        stream if isinstance(stream, SafeStream) else SafeStream(stream or open(os.devnull, "w"))
        for stream in before
    ]
    sys.stdout, sys.stderr = made  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in made:
            stream.flush()
        sys.stdout, sys.stderr = before
