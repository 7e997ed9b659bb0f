"""How far an output is written: a part file beside it, and a small data base (sqlite) that says how much of it counts.

Both are synchronized to the disk after every window, the part first: whatever ends the process, the
part begins with what the data base says, and the rest is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from comoe.config.errors import differences
from comoe.config.failure import doing
from comoe.config.files import PART, PLAIN_OPEN

KNOWN = 1_000_000
"""Posts back to which ``--dedupe`` remembers predictions; so the table is bounded."""

_TABLES = """
CREATE TABLE IF NOT EXISTS head (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS done (
    one INTEGER PRIMARY KEY, posts INTEGER, bytes INTEGER, digest BLOB, counts TEXT, whole INTEGER);
CREATE TABLE IF NOT EXISTS known (key BLOB PRIMARY KEY, post INTEGER, prediction BLOB);
CREATE INDEX IF NOT EXISTS known_post ON known (post);
"""
_SAVE = "INSERT OR REPLACE INTO done VALUES (0, ?, ?, ?, ?, 0)"


def journal_of(target: Path) -> Path:
    """The data base beside an output."""
    return target.with_name(f".{target.name}.journal")


class Journal:
    """What is done of one output.

    Args:
        target: the output; None keeps no part file, and nothing after the end of the process.
        head: what the output depends on, option -> value.
        resume: go on with what an earlier run has left.

    Raises:
        ValueError: it was begun otherwise, or is damaged.
    """

    def __init__(self, target: Path | None, head: Mapping[str, str], *, resume: bool) -> None:
        self.posts, self.digest, self.counts = 0, b"", "{}"
        self.discarded = 0
        """Posts of an unfinished run that a fresh start gave up."""
        self._file: IO[bytes] | None = None
        self._db: sqlite3.Connection | None = None
        if target is None:
            # A temporary file of sqlite's own, removed with the connection.
            self.path = Path(os.environ.get("SQLITE_TMPDIR") or tempfile.gettempdir())
            with self._using("writing"):
                self._db = sqlite3.connect("")
                self._db.executescript(_TABLES)
            return
        self.part = target.with_name(f".{target.name}{PART}")
        self.path = journal_of(target)
        if not resume:
            self.discarded = self._discard()
        try:
            with doing("writing", target):
                self._open(head, target)
        except BaseException:
            self.close(remove=not resume)
            raise

    def _open(self, head: Mapping[str, str], target: Path) -> None:
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link; remove it.")
        with self._using("writing"):
            self._db = sqlite3.connect(self.path)
            self._db.executescript(_TABLES)
            begun = dict(self._db.execute("SELECT name, value FROM head"))
            done = self._db.execute("SELECT posts, bytes, digest, counts, whole FROM done")
            self.posts, size, self.digest, self.counts, whole = done.fetchone() or (
                0, 0, b"", "{}", 0,
            )  # fmt: skip
        changed = differences(begun, head) if self.posts else ""
        if changed:
            raise ValueError(
                f"--resume: {target} was begun otherwise after which {self.posts:,} posts were "
                f"predicted: {changed}. Give the same again, or start anew, without --resume."
            )
        with self._using("writing"), self._db:
            self._db.execute("DELETE FROM head")
            self._db.executemany("INSERT INTO head VALUES (?, ?)", head.items())
        # Stopped between its last two steps.
        if whole and not self.part.exists():
            return
        flags = os.O_RDWR | os.O_CREAT | PLAIN_OPEN
        self._file = open(os.open(self.part, flags, 0o666), "r+b")
        if os.fstat(self._file.fileno()).st_size < size:
            raise ValueError(
                f"{self.part} is shorter than {self.path} says; start anew, without --resume."
            )
        self._file.truncate(size)
        self._file.seek(size)

    @contextlib.contextmanager
    def _using(self, action: str) -> Iterator[None]:
        """Inside, what sqlite says becomes an error of the system with the file, or names it as damaged."""
        try:
            with doing(action, self.path):
                yield
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); start anew, without --resume."
            ) from error

    def _discard(self) -> int:
        """Remove what an earlier run has left; returns the posts that it had predicted."""
        posts = 0
        if self.path.is_file() and not self.path.is_symlink():
            # Nothing has to be right here: it may be damaged, or have no window yet.
            with contextlib.suppress(sqlite3.Error, TypeError, ValueError):
                with contextlib.closing(sqlite3.connect(self.path)) as db:
                    posts = sum(int(found) for (found,) in db.execute("SELECT posts FROM done"))
        self._remove()
        return posts

    def commit(self, chunk: bytes, posts: int, *, digest: bytes, counts: str) -> None:
        """A window is predicted.

        Args:
            chunk: what it adds to the output.
            posts: all posts so far.
            digest: of these posts.
            counts: what the summary counts, as JSON.
        """
        size = 0
        if self._file is not None:
            with doing("writing", self.part):
                self._file.write(chunk)
                self._file.flush()
                os.fsync(self._file.fileno())
                size = self._file.tell()
        with self._using("writing"), self._db:
            self._db.execute(_SAVE, (posts, size, digest, counts))
        self.posts, self.digest = posts, digest

    @property
    def keeps(self) -> bool:
        """Whether there is a part file, or was one."""
        return hasattr(self, "part")

    def finish(self) -> bool:
        """All posts are predicted; returns whether the part is still to be given its name."""
        with self._using("writing"), self._db:
            self._db.execute("UPDATE done SET whole = 1")
        if self._file is None:
            return False
        self._file.close()
        return True

    def close(self, *, remove: bool = False) -> None:
        """End; ``remove``: nothing is left to do, or nothing was done."""
        if self._file is not None:
            # After a full disk there is a rest that cannot be written, and does not count.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._db is not None:
            self._db.close()
        if remove and self.keeps:
            self._remove()

    def _remove(self) -> None:
        # The part first: a journal without it is one of an output that is whole.
        for path in (self.part, self.path, self.path.with_name(f"{self.path.name}-journal")):
            path.unlink(missing_ok=True)

    def known(self, keys: Sequence[bytes], *, since: int) -> set[bytes]:
        """Which of some posts were predicted before, from the post with the number ``since`` on."""
        marks = ",".join("?" * len(keys))
        asked = f"SELECT key FROM known WHERE post >= ? AND key IN ({marks})"
        with self._using("reading"):
            return {key for (key,) in self._db.execute(asked, (since, *keys))}

    def recall(self, key: bytes) -> dict[str, Any]:
        """The prediction of a post that is known."""
        asked = "SELECT prediction FROM known WHERE key = ?"
        with self._using("reading"):
            for (found,) in self._db.execute(asked, (key,)):
                return json.loads(zlib.decompress(found))
            raise sqlite3.DatabaseError("a prediction is gone")

    def remember(self, predictions: Iterable[tuple[bytes, dict[str, Any]]], *, post: int) -> None:
        """Keep predictions of a window, whose first post has this number, until the next commit saves them."""
        rows = (
            (key, post, zlib.compress(json.dumps(prediction).encode(), 1))
            for key, prediction in predictions
        )
        with self._using("writing"):
            self._db.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", rows)
            # Windows that are asked about at the same time look back further than this one.
            self._db.execute("DELETE FROM known WHERE post < ?", (post - 2 * KNOWN,))
