"""The files that augment writes, and how it knows them again: no other file is ever replaced."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.data.sources import ENDINGS, NAMES

Row = Mapping[str, Any]


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
        """Refuse to write where a file is that augment did not write.

        Args:
            spared: files and folders that are read.

        Raises:
            ValueError: a file to write is one that is read, also through a link, or would be found in a folder that is
                read; a file of somebody else is in the way.
        """
        written = [self.posts, self.malformed, self.begun, self._note, *map(_aside, (self.posts, self.malformed))]
        for path in written:
            for source in spared:
                if _same(path, source) or _is_read_from(path, source):
                    raise ValueError(
                        f"--output {self.posts} would write {path}, which is read ({source}); name another file, or "
                        "another folder."
                    )
        note = self._read()
        for path in (self.posts, self.malformed):
            if os.path.lexists(path) and not _is_known(path, note):
                raise ValueError(
                    f"{path} is there already, and is not as augment wrote it, so it is never replaced, not even with "
                    "--overwrite; move it away, or name another --output."
                )

    def finished(self) -> Note | None:
        """What an earlier run left beside the posts that lie there, None where there are none."""
        return self._read() if self.posts.is_file() else None

    def write(
        self, posts: Iterable[Row], malformed: Sequence[Row], *, head: Mapping[str, str], report: Sequence[str]
    ) -> None:
        """Write all that a run ends with; without malformed answers there is no file of them.

        Until the caller removes its journal a run that is killed in here can be done again.

        Raises:
            ValueError: see ``check``.
        """
        rows = {self.malformed: malformed, self.posts: posts}
        new = {path: _write(_aside(path), some) for path, some in rows.items() if path == self.posts or some}
        # Once more: the run may have taken days.
        self.check()
        for path in rows:
            path.unlink(missing_ok=True)
        note = {"head": dict(head), "sha256": {path.name: digest for path, digest in new.items()}}
        self._note.unlink(missing_ok=True)
        self._note.write_text(json.dumps({**note, "report": list(report)}) + "\n", encoding="utf-8")
        for path in new:
            _aside(path).replace(path)

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
        text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"post {number} has a cell that JSON lines cannot hold ({error}); drop its column.") from error
    # U+2028 and its kin end a line for some readers, and half a surrogate pair is no character: as escapes they do no
    # harm.
    return "".join(_ESCAPED.get(sign, sign) if sign < "\ud800" else _safe(sign) for sign in text) + "\n"


def _write(path: Path, rows: Iterable[Row]) -> str:
    """JSON lines; returns their digest."""
    sha256 = hashlib.sha256()
    # Anew: never through a link.
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        for number, row in enumerate(rows, start=1):
            line = line_of(row, number=number).encode()
            sha256.update(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _is_known(path: Path, note: Note | None) -> bool:
    if note is None or path.name not in note.sha256 or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == note.sha256[path.name]


def _same(path: Path, other: Path) -> bool:
    """One file under two names, links and hard links included."""
    both = path.exists() and other.exists()
    return os.path.realpath(path) == os.path.realpath(other) or (both and os.path.samefile(path, other))


def _is_read_from(path: Path, folder: Path) -> bool:
    """Whether a path is, or would be taken for, one of the files of a data set that is a folder."""
    if not folder.is_dir():
        return False
    place = Path(os.path.realpath(path))
    if place.parent == Path(os.path.realpath(folder)) and _is_split(place.name):
        return True
    return any(_is_split(file.name) and _same(path, file) for file in folder.iterdir())


def _is_split(name: str) -> bool:
    stem, ending = os.path.splitext(name)
    usual = stem.removesuffix("_text").removesuffix("_labels") in {word for words in NAMES.values() for word in words}
    return (usual and ending.lower() in ENDINGS) or name == "mapping.txt"


def _plain(value: Any) -> Any:
    """NaN, the empty cell of some formats, as null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _safe(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if sign <= "\udfff" else sign


_ESCAPED = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}
