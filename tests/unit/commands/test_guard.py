"""No error leaves a command as a traceback: one sentence, an exit code, and a log where it is ours."""

import errno
import os
import threading
from pathlib import Path

import pytest

from comoe.commands.eval import main as evaluate
from comoe.commands.export import main as export
from comoe.commands.guard import guarded
from comoe.commands.predict import main as predict
from comoe.config.errors import unknown_name


def full():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error.add_note("writing out.jsonl")
    return error


def own():
    return unknown_name("gate", "gtae", ["gate"])


def run(raised, **options):
    """Exit code of a command in which this is raised."""

    @guarded("predict", **options)
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (full(), 1, "writing out.jsonl: No space left on device; free some space."),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied; get the right"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 1, "out of memory; "),
        (KeyError("tasks"), 1, "unexpected KeyError: 'tasks'. The traceback is in "),
        (ValueError("of a library"), 1, "of a library The traceback is in "),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(raised, code, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))
    assert run(raised) == code
    found = capsys.readouterr().err
    assert found.startswith(f"comoe predict: {said}") and found.count("\n") == 1
    logs = list(tmp_path.rglob("*.log"))
    assert len(logs) == ("traceback is in" in said)
    for log in logs:
        assert f"{log}" in found and "Traceback (most recent" in log.read_text()


def test_the_code_is_the_commands(capsys):
    assert run(full(), code=2) == 2
    assert run(KeyboardInterrupt(), interrupted="stopped") == 130
    assert capsys.readouterr().err.endswith("comoe predict: stopped.\n")


def test_a_traceback_is_printed_where_the_user_wants_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))
    monkeypatch.setenv("COMOE_TRACEBACK", "1")
    run(KeyError("x"))
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent") and not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_printed(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMOE_HOME", str(tmp_path / "file"))
    assert run(KeyError("x")) == 1
    assert "Traceback (most recent" in capsys.readouterr().err


def test_a_thread_that_fails_is_a_warning(capsys):
    @guarded("predict")
    def main():
        thread = threading.Thread(target=lambda: os.stat("/no/such\x1b"))
        thread.start()
        thread.join()

    main()
    said = capsys.readouterr().err
    assert said.startswith("warning: a thread has ended: /no/such\\x1b: No such file")


BAD = {
    "no export": (predict, ["--model", "{}", "--input", "in.txt", "--output", "out"], "is not an export"),
    "a device": (predict, ["--model", "{}/export", "--device", "tpu:9", "--input", "in.txt", "--output", "out"],
                 "device tpu:9 cannot be used here"),
    "a folder as output": (evaluate, ["--model", "{}/export", "--data", "in.jsonl", "--output", "{}"],
                           "Is a directory"),
    "a foreign checkpoint": (export, ["--checkpoint", "{}/export", "--output", "{}/new"], "holds no whole checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_a_user_gets_wrong_is_one_sentence(what, capsys, model, monkeypatch):
    main, words, said = BAD[what]
    monkeypatch.chdir(model)
    with pytest.raises(SystemExit) as ended:
        main([word.format(model) for word in words])
    found = capsys.readouterr().err
    assert ended.value.code == 1 and said in found and found.count("\n") == 1


def test_a_full_disk_names_the_predictions(capsys, model, monkeypatch):
    monkeypatch.chdir(model)
    words = "--model export --input in.txt --output /dev/full --device cpu"
    with pytest.raises(SystemExit):
        predict(words.split())
    said = capsys.readouterr().err
    assert said == "comoe predict: writing /dev/full: No space left on device; free some space.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from helpers_export import export_tiny

    folder = tmp_path_factory.mktemp("model")
    export_tiny(folder)
    (folder / "in.txt").write_text("good day\n")
    (folder / "in.jsonl").write_text('{"text": "good", "label": "good"}\n')
    return folder
