"""Exports whose files were changed in any way, their digests too: read, or refused in one sentence."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from helpers_export import export_tiny
from hypothesis import given
from hypothesis import strategies as st

from comoe.commands.predict import main
from comoe.inference.checkpoint_folder import MANIFEST, write_manifest
from tests.unit.fuzz.mutations import Fault, damaged, files_below, fuzz, mutated, run_main

JSON = ("config.json", "manifest.json", "tokenizer_config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_tiny(folder)
    return folder / "export"


def change(draw, folder: Path) -> str:
    """Spoil one file of an export; its name."""
    name = draw(st.sampled_from([*JSON, "config.json", "config.json", "model.safetensors"]))
    file = folder / name
    content = file.read_bytes()
    if name in JSON and draw(st.integers(0, 3)):
        file.write_text(json.dumps(draw(mutated([json.loads(content)]))), encoding="utf-8")
    elif name == "model.safetensors":
        size = 8 + int.from_bytes(content[:8], "little")
        head = content[8:size]
        if draw(st.booleans()):
            changed = json.dumps(draw(mutated([json.loads(head)]))).encode()
        else:
            changed = draw(damaged([head]))
        length = len(changed) if draw(st.booleans()) else draw(st.integers(0, 2**63))
        file.write_bytes(length.to_bytes(8, "little") + changed + content[size:])
    else:
        file.write_bytes(draw(damaged([content])))
    if name != MANIFEST and draw(st.integers(0, 4)):
        # As one would who wants it to be read.
        (folder / MANIFEST).unlink(missing_ok=True)
        write_manifest(folder, spared=("README.md",))
    return name


FOUND = [
    ("tokenizer_config.json", {"model_max_length": []}),
    ("config.json", {"encoder": {"model_type": "bert", "hidden_size": 12 * 10**6}}),
    ("config.json", {"encoder": {"model_type": "bert", "num_hidden_layers": 10**9}}),
    ("config.json", {"tasks": None}),
    ("config.json", {"encoder": {"chunk_size_feed_forward": None}}),
]
"""Changes that once ended in a traceback, or could."""


@pytest.mark.parametrize(("name", "change"), FOUND)
def test_what_was_found_is_refused_in_one_sentence(name, change, export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "export")
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "posts.txt").write_text("good day\n")
    words = f"--model {folder} --input {tmp_path}/posts.txt --output {tmp_path}/out --no-verify"
    code, _, said = run_main(main, words.split())
    assert code == 2 and said.startswith("comoe predict: ") and said.count("\n") == 1
    assert re.search("cannot be read|does not fit config.json|does not compute", said)


@fuzz(25)
@given(data=st.data())
def test_an_export_is_read_or_refused_in_one_sentence(data, export):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(export, folder / "export")
        name = change(data.draw, folder / "export")
        (folder / "posts.txt").write_text("good day\nthe sunny rain @ann \U0001f600\n" + "a " * 99)
        words = f"--model {folder}/export --input {folder}/posts.txt --output {folder}/out".split()
        before = files_below(folder)
        code, _, said = run_main(main, words)
        assert files_below(folder) - before <= {"out"}
        if code:
            if code != 2 or len(said.strip().splitlines()) > 3 or len(said) > 4000:
                raise Fault(f"{name}: {said}")
            return
        rows = (folder / "out").read_text(encoding="utf-8").splitlines()
        found = [json.loads(row, parse_constant=pytest.fail) for row in rows]
        assert len(found) == 3, name
