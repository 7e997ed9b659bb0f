"""Files that augment writes: its output, and the journal that lets a killed run go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from comoe.config.errors import differences
from comoe.config.failure import doing
from comoe.config.files import atomic_file, same_file, write_json
from comoe.data.reading.files import json_line
from comoe.data.reading.sources import ENDINGS, NAMES

Record = dict[str, Any]
Row = Mapping[str, Any]
BEGIN_ANEW = "begin anew with --overwrite"
_BEGIN = b'{"--'
"""Of a journal, whose head has options for keys."""


class Journal:
    """A file with a head, then one line per finished piece of work; a half-written last line counts as not written.

    Args:
        path: the file; it is made where it is missing.
        head: what the work depends on, option -> value.
        anew: forget what was done.

    Raises:
        ValueError: the file is no journal, was begun with another head, is damaged, or another
            process writes to it.
    """

    def __init__(self, path: Path, head: Mapping[str, str], *, anew: bool = False) -> None:
        self.path = path
        self._file = path.open("a+b")
        try:
            if not lock_descriptor(self._file.fileno(), blocking=False):
                raise ValueError(
                    f"{self.path}: another process is writing it; wait, or name another --output."
                )
            self.records = self._read(dict(head), anew=anew)
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Sequence[Record]) -> None:
        """Write one finished piece; when this returns it is on the disk."""
        self._write(list(records))
        self.records.extend(records)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        # After a full disk there is a rest that cannot be written, and does not count.
        with contextlib.suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """The work is done, and its result written."""
        try:
            self.path.unlink()
        except PermissionError:
            # Windows removes no open file.
            self._file.close()
            self.path.unlink()

    def _read(self, head: dict[str, str], *, anew: bool) -> list[Record]:
        self._file.seek(0)
        content = self._file.read()
        if not (content.startswith(_BEGIN) or _BEGIN.startswith(content)):
            raise ValueError(
                f"{self.path} is no file of augment, which needs this name; move it away."
            )
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
        changed = differences(found[0], head) if found else ""
        if changed and len(found) > 1:
            raise ValueError(
                f"{self.path} holds a run that stopped after {sum(map(len, found[1:])):,} posts, "
                f"begun otherwise: {changed}. Give the same again to continue, or {BEGIN_ANEW}."
            )
        if changed or not found:
            # Nothing was done yet: a prompt that the model cannot read is corrected and given
            # again.
            self._file.truncate(0)
            self._write(head)
        return [record for piece in found[1:] for record in piece]

    def _write(self, content: object) -> None:
        with doing("writing", self.path):
            self._file.write(json.dumps(content).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@dataclass(frozen=True, slots=True)
class Note:
    """What augment leaves beside a finished output."""

    head: Mapping[str, str]
    """What the output depends on, option -> value."""
    sha256: Mapping[str, str]
    """File name -> digest of what was written."""
    report: tuple[str, ...]
    """Lines of the report."""


class Output:
    """The posts that are written, and the files beside them.

    Args:
        path: the posts.
    """

    def __init__(self, path: Path) -> None:
        self.posts = path
        self.malformed = path.with_name(f"{path.stem}.malformed.jsonl")
        self.begun = path.with_name(f".{path.name}.part")
        """Work of a run that has not ended."""
        self._note = path.with_name(f".{path.name}.done")

    def check(self, *, spared: Sequence[Path] = ()) -> None:
        """Refuse to replace a file that augment did not write.

        Args:
            spared: files and folders that are read.

        Raises:
            ValueError: a file to write is one that is read, also through a link, or would be found
                in a folder that is read; another file is in the way.
        """
        for path in (self.posts, self.malformed, self.begun, self._note):
            for source in spared:
                if same_file(path, source) or _is_read_from(path, source):
                    raise ValueError(
                        f"--output {self.posts} would write {path}, which is read ({source}); name "
                        "another file, or another folder."
                    )
        note = self._read()
        for path in (self.posts, self.malformed):
            if os.path.lexists(path) and not _wrote(path, note):
                raise ValueError(
                    f"{path} is there already, and is not as augment wrote it, so it is never "
                    "replaced, not even with --overwrite; move it away, or name another --output."
                )

    def finished(self) -> Note | None:
        """What an earlier run left beside the posts that lie there, None where there are none."""
        return self._read() if self.posts.is_file() else None

    def write(
        self,
        posts: Iterable[Row],
        malformed: Sequence[Row],
        *,
        head: Mapping[str, str],
        report: Sequence[str],
    ) -> None:
        """Write all that a run ends with; without malformed texts there is no file of them.

        Until the caller removes its journal a run that is killed in here can be done again.

        Raises:
            ValueError: see ``check``.
        """
        rows = {self.malformed: malformed, self.posts: posts}
        # The files get their names when the block ends, after the note that knows their digests.
        with contextlib.ExitStack() as stack:
            digests = {
                path.name: _write(stack.enter_context(atomic_file(path)), some)
                for path, some in rows.items()
                if path == self.posts or some
            }
            # Once more: the run may have taken days.
            self.check()
            for path in rows:
                path.unlink(missing_ok=True)
            note = {"head": dict(head), "sha256": digests, "report": list(report)}
            write_json(self._note, note)

    def _read(self) -> Note | None:
        try:
            found = json.loads(self._note.read_text(encoding="utf-8"))
            return Note(dict(found["head"]), dict(found["sha256"]), tuple(found["report"]))
        except (OSError, ValueError, KeyError, TypeError):
            # Without a note nothing is known, and so nothing is replaced.
            return None


def line_of(row: Row, *, number: int) -> str:
    """A row as one line of JSON.

    Raises:
        ValueError: a cell that JSON cannot hold.
    """
    try:
        return json_line(_without_nan(row))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"post {number} has a cell that JSON lines cannot hold ({error}); drop its column."
        ) from error


def _without_nan(value: Any) -> Any:
    """NaN, the empty cell of some formats, as null."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(file: IO[bytes], rows: Iterable[Row]) -> str:
    """JSON lines; returns their digest."""
    sha256 = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        line = line_of(row, number=number).encode()
        sha256.update(line)
        file.write(line)
    return sha256.hexdigest()


def _wrote(path: Path, note: Note | None) -> bool:
    if note is None or path.name not in note.sha256 or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == note.sha256[path.name]


def _is_read_from(path: Path, folder: Path) -> bool:
    """Whether a path is, or would be taken for, one of the files of a data set that is a folder."""
    if not folder.is_dir():
        return False
    place = Path(os.path.realpath(path))
    if place.parent == Path(os.path.realpath(folder)) and _is_split(place.name):
        return True
    return any(_is_split(file.name) and same_file(path, file) for file in folder.iterdir())


def _is_split(name: str) -> bool:
    stem, ending = os.path.splitext(name)
    usual = stem.removesuffix("_text").removesuffix("_labels") in {
        word for words in NAMES.values() for word in words
    }
    return (usual and ending.lower() in ENDINGS) or name == "mapping.txt"
