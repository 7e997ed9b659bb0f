"""Errors of the system in one sentence, and what is printed to a terminal."""

import errno
import io
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from comoe.config import files
from comoe.config.failure import doing, is_foreign, parsing, sentence
from comoe.config.files import atomic_file, cache_file, check_target, write_atomic
from comoe.config.terminal import SafeStream, printable
from tests.helpers_data import files_up_to

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nä \U0001f600", "a\tb\nä \U0001f600"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("safe\rspoof", "safe\\rspoof"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("half \ud800", "half \\ud800"),
        ("a\x00\x7f\u2028", "a\\x00\\x7f\\u2028"),
    ],
)
def test_control_characters_of_a_text_are_shown_and_do_nothing(text, shown):
    assert printable(text) == shown
    stream = io.StringIO()
    assert SafeStream(stream).write(text) == len(text)
    assert stream.getvalue() == shown


def test_a_progress_bar_keeps_its_carriage_returns():
    stream = io.StringIO()
    safe = SafeStream(stream)
    for text in ("\r 10%|#  | \x1b", "\r", "\r\r"):
        safe.write(text)
    assert stream.getvalue() == "\r 10%|#  | \\x1b\r\r\r"


def test_letters_that_the_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("gut \u00e4")
    stream.flush()
    assert raw.getvalue() == b"gut \\xe4"


PRINTER = """
import os, sys
from comoe.config.terminal import safe_streams
with safe_streams():
    for number in range(200):
        print("a line", number, flush=number % 2)
        print("another", file=sys.stderr)
    open(sys.argv[1], "w").write("came to its end")
"""


@pytest.mark.parametrize("how", ["a closed pipe", "not there", "a full disk"])
def test_output_that_nobody_takes_ends_nothing(how, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    if how == "a full disk":
        writer = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", PRINTER, str(tmp_path / "end")]
    if how == "not there":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    done = subprocess.run(
        command, stdout=writer, stderr=writer, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "came to its end"


def test_a_sentence_has_file_action_and_remedy(tmp_path):
    missing = tmp_path / "no" / "file"
    with pytest.raises(OSError) as raised:
        missing.open()
    assert sentence(raised.value) == f"{missing}: No such file or directory; correct the path."
    assert sentence(ValueError("two\n lines")) == "two lines"
    assert sentence(KeyError()) == "KeyError"


WRITERS = {
    "text": lambda path: write_atomic(path, "a" * 10000),
    "numpy": lambda path: np.savez(path.open("wb"), a=np.zeros(10000)),
    "torch": lambda path: torch.save({"a": torch.zeros(100000)}, path),
    "torch, at its end": lambda path: torch.save({"a": torch.zeros(750)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(100000)}, path),
}
LIMITED = """
import resource, sys
from pathlib import Path
from comoe.config.failure import doing, sentence
from tests.unit.config.test_failure import WRITERS
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for name, write in WRITERS.items():
    path = Path(sys.argv[1]) / name
    try:
        with doing("writing", path):
            write(path)
    except OSError as error:
        print(sentence(error))
"""


def test_whoever_writes_a_file_that_can_grow_no_more_says_which_one(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for name, line in zip(WRITERS, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"writing {tmp_path / name}: File too large; "), done.stderr


def full(path):
    with closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA max_page_count = 3; CREATE TABLE a (x)")
        db.execute("INSERT INTO a VALUES (zeroblob(100000))")


def read_only(path):
    sqlite3.connect(path).close()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("CREATE TABLE a (x)")


def no_folder(path):
    sqlite3.connect(path / "db").close()


def no_room(path):
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE a (x); INSERT INTO a VALUES (zeroblob(100000))")


def busy(path):
    with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(path, timeout=0)) as two:
        one.execute("BEGIN EXCLUSIVE")
        two.execute("CREATE TABLE a (x)")


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (full, "No space left on device; free some space."),
        (read_only, "Permission denied; get the right to it, or choose another path."),
        (no_folder, "No such file or directory; correct the path."),
        (no_room, "File too large; raise the limit"),
        (busy, "Device or resource busy; another process uses it; wait"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_sqlite_says_is_an_error_of_the_system(use, said, wrapped, tmp_path):
    room = files_up_to(4096) if use is no_room else nullcontext()
    with pytest.raises(OSError) as raised, room, doing("writing", tmp_path / "db"):
        try:
            use(tmp_path / "db")
        except sqlite3.OperationalError as error:
            if wrapped:
                raise RuntimeError("of the library around it") from error
            raise
    assert sentence(raised.value).startswith(f"writing {tmp_path / 'db'}: {said}")


def test_a_wrong_question_to_sqlite_stays_one(tmp_path):
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        with doing("reading", tmp_path / "db"), closing(sqlite3.connect(":memory:")) as db:
            db.execute("SELECT x FROM a")


def test_a_file_that_cannot_be_made_is_named_and_not_its_part(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(PermissionError) as raised, atomic_file(tmp_path / "out"):
        pass
    assert sentence(raised.value).startswith(f"{tmp_path / 'out'}: Permission denied; ")


def test_a_full_disk_costs_a_cache_and_not_the_start(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with cache_file(tmp_path / "tokens" / "a.npz") as file:
        file.write(b"tokens")
    assert list((tmp_path / "tokens").iterdir()) == []
    said = capsys.readouterr().err
    assert said == (
        f"warning: not cached: writing {tmp_path}/tokens/a.npz: No space left on device; "
        "free some space.\n"
    )


def test_a_target_is_tried_before_the_work(tmp_path):
    check_target(tmp_path / "new" / "scores.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(IsADirectoryError, match="new"):
        check_target(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_target(tmp_path / "file" / "scores.json")
    check_target(Path("/dev/stdout"))


def test_errors_of_a_library_name_the_file():
    with pytest.raises(ValueError, match=r"^x.json cannot be read \(KeyError: 'a'\); copy it\.$"):
        with parsing("x.json", "copy it"):
            raise KeyError("a")
    with pytest.raises(ValueError) as foreign:
        int("x")
    assert is_foreign(foreign.value)


def test_an_error_that_is_not_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="^other$"), doing("writing", tmp_path):
        raise RuntimeError("other")
