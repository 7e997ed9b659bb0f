"""No error leaves a command as a traceback: one sentence, an exit code, and a log where it is ours."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comoe.commands.eval import main as evaluate
from comoe.commands.export import main as export
from comoe.commands.guard import guarded
from comoe.commands.main import COMMANDS
from comoe.commands.main import main as comoe_command
from comoe.commands.predict import main as predict
from comoe.config.errors import unknown_name

ROOT = Path(__file__).parents[3]


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
        (full(), 2, "writing out.jsonl: No space left on device; free some space."),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied; get the right"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 1, "out of memory; "),
        (KeyError("tasks"), 1, "unexpected KeyError: 'tasks'. The traceback is in "),
        (ValueError("of a library"), 2, "of a library The traceback is in "),
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


def test_a_command_says_what_it_leaves_after_an_interrupt(capsys):
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
    "a summary over the posts": (predict, ["--model", "{}/export", "--input", "in.txt", "--output", "out",
                                           "--json-summary", "./in.txt"], "would replace what --input names"),
    "a summary over the predictions": (predict, ["--model", "{}/export", "--input", "in.txt", "--output", "out",
                                                 "--json-summary", "out"], "would replace what --output names"),
    "a summary over the model": (predict, ["--model", "{}/export", "--input", "in.txt", "--output", "out",
                                           "--json-summary", "export/config.json"], "would replace what --model names"),
    "scores over the model": (evaluate, ["--model", "{}/export", "--data", "in.jsonl", "--output",
                                         "export/manifest.json"], "is a file of the model"),
    "a foreign checkpoint": (export, ["--checkpoint", "{}/export", "--output", "{}/new"], "holds no whole checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_a_user_gets_wrong_is_one_sentence(what, capsys, model, monkeypatch):
    main, words, said = BAD[what]
    monkeypatch.chdir(model)
    with pytest.raises(SystemExit) as ended:
        main([word.format(model) for word in words])
    found = capsys.readouterr().err
    assert ended.value.code == 2 and said in found and found.count("\n") == 1


WORDS = {
    "init": "bad.jsonl", "train": "--config bad.yaml", "tune": "--config bad.yaml --space bad.yaml",
    "compare": "--config bad.yaml", "scale": "--config bad.yaml", "bench": "experts --config bad.yaml",
    "predict": "--model export --input bad.jsonl --output out",
    "select": "--model export --input bad.jsonl --output chosen",
    "eval": "--model export --data bad.jsonl --task mood",
    "report": "bad.jsonl", "augment": "--input bad.jsonl --model kit:smollm2 --output out.jsonl",
    "serve": "bad", "push": "--model bad --to a/b", "ablate": "--run bad", "export": "--checkpoint bad --output out",
}  # fmt: skip
"""Command -> words with an input that is damaged; ``comoe doctor`` reads none."""


@pytest.mark.parametrize("word", sorted(COMMANDS.keys() - {"doctor"}))
def test_a_bad_input_file_is_one_sentence_and_exit_code_2(word, capfd, model, monkeypatch):
    monkeypatch.chdir(model)
    if word == "train":  # ends its process itself
        command = [sys.executable, "-m", "comoe", word, *WORDS[word].split()]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    else:
        with pytest.raises(SystemExit) as ended:
            comoe_command([word, *WORDS[word].split()])
        code = ended.value.code
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(f"comoe{f' {word}' * (word != 'train')}: ")]
    assert code == 2 and len(said) == 1 and "bad" in said[0], lines


def test_a_dash_as_output_is_standard_output(capfd, model, monkeypatch):
    monkeypatch.chdir(model)
    words = "--model export --input in.txt --output - --device cpu --task mood"
    predict(words.split())
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["text"] == "good day" and not (model / "-").exists()
    with pytest.raises(SystemExit):
        predict([*words.split(), "--json-summary", "-"])
    assert "are both standard output" in capfd.readouterr().err


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
    (folder / "bad").mkdir()
    (folder / "bad.jsonl").write_text('{"text": \n[\n')
    (folder / "bad.yaml").write_text("run: [\n")
    (folder / "in.jsonl").write_text('{"text": "good", "label": "good"}\n')
    return folder
