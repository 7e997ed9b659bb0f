"""What a run has done so far, kept beside its output, so that a killed run goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

BEGIN_ANEW = "begin anew with --overwrite"


class Journal:
    """A file with a head, then one line per finished piece of work; a half-written last line counts as not written.

    Args:
        path: the file; it is made where it is missing.
        head: what the work depends on, option -> value. Work begun with another head is not gone on with.
        anew: forget what was done.

    Raises:
        ValueError: the file is none of a journal, was begun with another head, is damaged, or another process writes
            to it.
    """

    def __init__(self, path: Path, head: Mapping[str, str], *, anew: bool = False) -> None:
        self.path = path
        self._file = path.open("a+b")
        try:
            self._lock()
            self.records = self._read(dict(head), anew=anew)
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Sequence[Record]) -> None:
        """Write one finished piece; when this returns it lies on the disk."""
        self._write(list(records))
        self.records.extend(records)

    def close(self) -> None:
        """Leave the file for a later run."""
        self._file.close()

    def remove(self) -> None:
        """The work is done, and its result written."""
        self.path.unlink()
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another process is writing it; wait, or name another --output.") from error

    def _read(self, head: dict[str, str], *, anew: bool) -> list[Record]:
        self._file.seek(0)
        content = self._file.read()
        if not (content.startswith(_BEGIN) or _BEGIN.startswith(content)):
            raise ValueError(f"{self.path} is no file of augment, which needs this name; move it away.")
        if anew:
            self._file.truncate(0)
            content = b""
        lines = content.split(b"\n")
        if lines[-1]:
            # The last write was interrupted.
            self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        try:
            found = [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}); {BEGIN_ANEW}.") from error
        if not found:
            self._write(head)
            return []
        begun = found[0]
        told = differences(begun, head)
        if told and len(found) == 1:
            # Nothing was done yet: a prompt that the model cannot read is corrected and given again.
            self._file.truncate(0)
            self._write(head)
        elif told:
            raise ValueError(
                f"{self.path} holds a run that stopped after {sum(map(len, found[1:])):,} posts, begun otherwise: "
                f"{told}. Give the same again to go on with it, or {BEGIN_ANEW}."
            )
        return [record for piece in found[1:] for record in piece]

    def _write(self, content: object) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def differences(begun: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What two runs do not have in common, as a message says it; empty where they are the same."""
    changed = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
    return "; ".join(f"{name} was {begun.get(name)}, is now {now.get(name)}" for name in changed)


_BEGIN = b'{"--'
"""Of a journal, whose head has options for keys."""
