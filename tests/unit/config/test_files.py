"""Files that are whole or not there."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from comoe.config.files import atomic_file, write_atomic


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "posts.jsonl"
    write_atomic(path, "old\n")
    with pytest.raises(RuntimeError), atomic_file(path, "w") as file:
        file.write("ne")
        assert path.read_text() == "old\n"
        raise RuntimeError
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["posts.jsonl"]
    with atomic_file(path, "w") as file:
        file.write("a\r\nü\n")
    assert path.read_bytes() == "a\r\nü\n".encode() and os.listdir(tmp_path) == ["posts.jsonl"]


def test_bytes_and_the_longest_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_reads_the_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "link").symlink_to("other")
    write_atomic(tmp_path / "link", "ours")
    assert (tmp_path / "other").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "ours" and not (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_atomic(pipe, "through")
    reader.join(timeout=20)
    assert read == ["through"] and pipe.is_fifo()


@pytest.mark.parametrize(
    ("path", "error"), [("missing/x", FileNotFoundError), ("folder", IsADirectoryError)]
)
def test_what_cannot_be_written_raises_and_leaves_nothing(
    path: str, error: type[OSError], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(error):
        write_atomic(tmp_path / path, "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_only_old_parts_of_killed_writers_of_the_same_file_are_removed(tmp_path: Path) -> None:
    path, old = tmp_path / "x.csv", time.time() - 61
    with atomic_file(path, "w") as file:
        alive = os.listdir(tmp_path)[0]
        names = [f".x.csv.{letter * 16}.part" for letter in "ab"] + [f".y.csv.{'a' * 16}.part"]
        for name in names:
            (tmp_path / name).touch()
        for name in (alive, names[0], names[2]):
            os.utime(tmp_path / name, (old, old))
        write_atomic(path, "second")
        assert sorted(os.listdir(tmp_path)) == sorted([alive, *names[1:], "x.csv"])
        file.write("first")
    assert path.read_text() == "first"
