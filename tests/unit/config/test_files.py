"""Files that are whole or not there."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from comoe.augment.output import Journal
from comoe.config.files import (
    atomic_file,
    check_target,
    csv_line,
    is_read_from,
    lock_beside,
    locked,
    read_csv_text,
    write_atomic,
    written_directly,
)


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


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_file_system_in_memory_is_no_device() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "kept.txt"
        path.write_text("before")
        with pytest.raises(RuntimeError), atomic_file(path, "w") as file:
            file.write("half")
            raise RuntimeError
        assert path.read_text() == "before"


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


def test_memory_below_dev_is_a_folder_like_others_and_a_device_is_not() -> None:
    assert written_directly(Path("/dev/stdout")) and written_directly(Path("/dev/fd/1"))
    check_target(Path("/dev/stdout"))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = Path(place) / "x"
        assert not written_directly(path)
        with atomic_file(path, "w") as file:
            file.write("x")
            assert not path.exists()
        assert path.read_text() == "x"


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


HOLDER = """
import pathlib, time
from comoe.augment.output import Journal
from comoe.config.files import locked
with locked(pathlib.Path({!r}), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_a_second_one_out_and_names_the_first(tmp_path: Path) -> None:
    path, told = tmp_path / ".x.lock", []
    host = os.uname().nodename
    with locked(path, "the run"):
        busy = rf"the run is in use by process {os.getpid()} on {host} since \d{{4}}-\d\d-\d\d .*; wait"
        with pytest.raises(ValueError, match=busy), locked(path, "the run"):
            pass
        waiting = threading.Thread(target=lambda: _hold(path, told))
        waiting.start()
        while len(told) < 1:
            time.sleep(0.01)
    waiting.join(timeout=20)
    assert re.match(r"it is in use by process .*; waiting for it", told[0]) and told[1:] == ["held"]
    assert os.listdir(tmp_path) == []


def _hold(path: Path, told: list[str]) -> None:
    with locked(path, "it", wait=told.append):
        told.append("held")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    code = [sys.executable, "-c", HOLDER.format(str(path))]
    with subprocess.Popen(code, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"), locked(path, "x"):
            pass
        process.kill()
    assert path.exists()
    with locked(path, "x"):
        assert str(os.getpid()) in path.read_text() and str(process.pid) not in path.read_text()


@pytest.fixture
def as_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file that this process has open is removed or replaced, no folder is opened, and Unix's names are gone."""
    opened, unlink, replace = os.open, Path.unlink, Path.replace

    def refuse_open(path: Path) -> None:
        held = (
            os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
        )
        if str(path.resolve()) in held:
            raise PermissionError(f"{path} is open")

    def open_no_folder(path: Path, *words: int, **named: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(f"{path} is a folder")
        return opened(path, *words, **named)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(
        Path, "unlink", lambda path, **how: (refuse_open(path), unlink(path, **how))
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: (refuse_open(path), replace(path, to)))
    monkeypatch.delattr(os, "uname")


@pytest.mark.usefixtures("as_on_windows")
def test_files_and_locks_where_no_open_file_can_be_removed(tmp_path: Path) -> None:
    lock, path, part = tmp_path / ".x.lock", tmp_path / "x", tmp_path / f".x.{'a' * 16}.part"
    part.touch()
    os.utime(part, (0, 0))
    with locked(lock, "x"):
        with pytest.raises(ValueError, match=f"x is in use by process {os.getpid()} on"):
            with locked(lock, "x"):
                pass
        # Windows lets nobody else read the byte that is locked, the first one.
        assert lock.read_bytes()[:1] == b" "
        write_atomic(path, "a\r\n")
    with Journal(tmp_path / "journal", {"--input": "x"}) as journal:
        journal.remove()
    assert path.read_bytes() == b"a\r\n" and os.listdir(tmp_path) == ["x"]


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("theirs")
    (tmp_path / ".x.lock").symlink_to("other")
    with pytest.raises(OSError), locked(tmp_path / ".x.lock", "x"):
        pass
    assert (tmp_path / "other").read_text() == "theirs"


@pytest.mark.parametrize("name", ["x", "é" * 127])
def test_a_lock_beside_a_file_has_a_name_that_fits(name: str, tmp_path: Path) -> None:
    with locked(lock_beside(tmp_path / name), name):
        write_atomic(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_what_is_read_is_told_under_every_name(tmp_path: Path) -> None:
    (folder := tmp_path / "posts").mkdir()
    (data := folder / "test.jsonl").write_text("")
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "folder").symlink_to(folder)
    os.link(data, tmp_path / "hard")
    for path in (data, tmp_path / "link", tmp_path / "hard", folder / ".." / "posts/test.jsonl"):
        assert is_read_from(path, data)
    assert is_read_from(tmp_path / "folder/test.jsonl", folder) and is_read_from(data, folder)
    assert not is_read_from(folder / "new.json", folder)
    assert not is_read_from(tmp_path / "other", data)
    before = os.dup(0)
    try:
        with data.open() as file:  # as a shell does for "< test.jsonl"
            os.dup2(file.fileno(), 0)
        assert is_read_from(tmp_path / "hard", Path("-"))
        assert not is_read_from(Path("/dev/null"), Path("-"))
        assert not is_read_from(tmp_path / "other", Path("-"))
    finally:
        os.dup2(before, 0)
        os.close(before)


CELLS = {
    "equals": ("=1+1", "'=1+1"),
    "plus": ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
    "minus": ("-2+3", "'-2+3"),
    "at": ("@SUM(A1)", "'@SUM(A1)"),
    "behind a blank": (" =1", " '=1"),
    "behind a tab": ("\t=1", "\t'=1"),
    "behind a carriage return": ("\r=1", "\r'=1"),
    "behind an invisible sign": ("\ufeff\u200b=1", "\ufeff\u200b'=1"),
    "full-width": ("＝1", "'＝1"),
    "on a second line": ("a\n=1", "a\n'=1"),
    "behind a semicolon": ("a; =1;-2", "a; '=1;'-2"),
    "an emoticon": ("well ;-) yes", "well ;-) yes"),
    "a number": ("-1.5e3", "-1.5e3"),
    "inside a sentence": ("1 = 1, a@b and -1", "1 = 1, a@b and -1"),
    "a quote": ('say "=1"', 'say "=1"'),
    "a bare carriage return": ("a\rb", "a\rb"),
    "NUL": ("a\0b", "a\ufffdb"),
}
"""What a cell holds -> the cell, what a reader of the file finds."""


@pytest.mark.parametrize("what", CELLS)
def test_no_cell_is_a_formula_and_every_reader_finds_the_same_rows(what: str) -> None:
    cell, defused = CELLS[what]
    for raw, wanted in ((False, defused), (True, cell)):
        text = csv_line([cell, -1.5, None], raw=raw) + csv_line(["next"], raw=raw)
        if what != "NUL" or not raw:
            assert list(csv.reader(io.StringIO(text, newline=""))) == [
                [wanted, "-1.5", ""],
                ["next"],
            ]
    if what != "NUL":
        assert read_csv_text(defused) == cell


def test_defusing_is_linear_in_the_text() -> None:
    # Each blank behind a separator is looked at once: ten million steps, not 10^12.
    begin = time.perf_counter()
    for unit in ("\n", "; ", ";\t \r"):
        csv_line([unit * 1_000_000])
    assert time.perf_counter() - begin < 30
