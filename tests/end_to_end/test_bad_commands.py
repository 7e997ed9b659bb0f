"""What a user gets wrong on the command line: one clear sentence, once, no traceback, exit code 2."""

import json
import os
import re
import shutil
from typing import Any

import pytest

from tests.end_to_end.commands import ROOT, SMOKE, Done, deepspeed
from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.end_to_end


def sentence(done: Done) -> str:
    """The message of a command that refused; it is there once and nothing else is said."""
    assert done.code == 2, done.said
    lines = [line for line in done.said.splitlines() if line.strip()]
    assert len(lines) == 1, done.said
    return re.sub(r"^comoe: (rank 0: )?", "", lines[0])


def test_a_clash_between_the_ranks_and_the_recipe_is_one_sentence(terminal, tmp_path):
    words = ("--config", SMOKE, f"run.output_dir={tmp_path / 'runs'}", "parallel.ep_size=4")
    done = terminal.run(*deepspeed(2), *words)
    assert sentence(done) == (
        "parallel.ep_size (4) must divide both the ranks (2) and model.moe.num_experts (4); set it to one of [1, 2]."
    )
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_run_that_is_there_is_refused_and_leaves_it(smoke_run, terminal):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")}
    done = terminal.python(
        "launch/train.py",
        "--config",
        SMOKE,
        "--dry-run",
        f"run.output_dir={smoke_run.folder.parent}",
    )
    assert (done.code, done.err) == (
        2,
        f"comoe: {smoke_run.folder} holds a run already: go on with --resume {smoke_run.folder}, choose another "
        f"run.name, or delete it with run.overwrite=true.\n",
    )
    assert "# memory" in done.out
    assert {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")} == before


def refusals(requests: list[dict[str, Any]], home: str) -> list[str]:
    """The messages of several starts in one process, which loads its libraries once."""
    from comoe.train.request import Request
    from comoe.train.run import run_request

    os.environ["COMOE_HOME"] = home
    said = []
    for request in requests:
        try:
            run_request(Request(**request))
            said.append("it started")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def refused(tmp_path_factory, smoke_run, home) -> dict[str, str]:
    """What is wrong -> what was said. A run to be replaced lies in the way of all of them."""
    folder = tmp_path_factory.mktemp("refused")
    old = folder / "runs" / "smoke"
    old.mkdir(parents=True)
    for name in ("config.yaml", ".begun"):
        (old / name).write_text("an older run", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "runs" / "thesis").mkdir()
    (folder / "runs" / "thesis" / "config.yaml").write_text("years of work", encoding="utf-8")
    wordless = shutil.copytree(home / "smoke-2" / "encoder", folder / "wordless")
    for file in wordless.glob("*tok*"):
        file.unlink()
    for file in wordless.glob("vocab*"):
        file.unlink()
    (folder / "older" / "checkpoints").mkdir(parents=True)
    shutil.copy(smoke_run.folder / "config.yaml", folder / "older" / "config.yaml")
    zero2 = json.loads((ROOT / "ds_configs/zero2.json").read_text(encoding="utf-8"))
    settings = {
        "a clash": zero2 | {"train_batch_size": 7},
        "an auto without filling": zero2
        | {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
        "an optimizer": zero2 | {"optimizer": {"type": "Adam"}},
        "stage 0": zero2 | {"zero_optimization": {"stage": 0}},
    }
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    common = {"config": ROOT / SMOKE, "deepspeed": ROOT / "ds_configs/zero2.json"}
    overrides = [f"run.output_dir={folder / 'runs'}", "run.overwrite=true"]
    requests: dict[str, dict[str, Any]] = {
        name: common | {"deepspeed": folder / f"{name}.json", "overrides": overrides}
        for name in (*settings, "no JSON")
    }
    for name, word in {
        "no encoder": f"model.encoder={folder / 'none'}",
        "no data": "tasks.mood.path=revews",
        "no such metric": "train.early_stop_metric=mood/macrof1",
        "no words": f"model.encoder={wordless}",
        "another's folder": "run.name=thesis",
    }.items():
        requests[name] = common | {"overrides": [*overrides, word]}
    requests["a run that is there"] = {
        "config": ROOT / SMOKE,
        "overrides": [f"run.output_dir={smoke_run.folder.parent}"],
    }
    requests["no recipe"] = common | {"config": folder / "none.yaml"}
    requests["nothing to resume"] = {"resume": folder / "empty"}
    requests["a recipe beside a resume"] = common | {"resume": smoke_run.folder}
    requests["a run without its file"] = {"resume": folder / "older"}
    before = {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")}
    work = "tests.end_to_end.test_bad_commands:refusals"
    answers = run_ranks(work, 1, requests=list(requests.values()), home=str(home))[0]
    assert (old / "config.yaml").read_text(encoding="utf-8") == "an older run", (
        "nothing is deleted for a bad start"
    )
    assert {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")} == before
    theirs = folder / "runs" / "thesis" / "config.yaml"
    assert theirs.read_text(encoding="utf-8") == "years of work"
    return dict(zip(requests, answers, strict=True))


EXPECTED = {
    "a clash": 'train_batch_size is 7 in the DeepSpeed JSON and 96 by the recipe and the ranks; write "auto"',
    "an auto without filling": 'zero_optimization.reduce_bucket_size is "auto" in the DeepSpeed JSON, but nothing',
    "an optimizer": "optimizer must not be in the DeepSpeed JSON: train.optimizer, train.learning_rate and",
    "stage 0": "zero_optimization.stage is 0; it must be 1, 2 or 3",
    "no JSON": "no JSON.json: no such file; give a path, or the name of a ready one: zero2.",
    "no encoder": "model.encoder",
    "no data": "revews",
    "no such metric": "train.early_stop_metric",
    "no words": "its tokenizer has no vocabulary",
    "another's folder": "thesis holds files that no run of comoe wrote (config.yaml)",
    "a run that is there": "smoke holds a run already: go on with --resume ",
    "no recipe": "none.yaml: the recipe cannot be read",
    "nothing to resume": "no config.yaml there; give the folder of a run, such as runs/starter.",
    "a recipe beside a resume": "a run goes on by its own config.yaml. Leave --config out and change single options",
    "a run without its file": "no deepspeed.json there, as runs of earlier versions have none; add --deepspeed with",
}


@pytest.mark.parametrize("what", EXPECTED)
def test_a_bad_start_is_refused_in_one_sentence(what, refused):
    assert EXPECTED[what] in refused[what]
    assert "\n" not in refused[what]


def test_every_bad_start_has_its_test(refused):
    assert set(refused) == set(EXPECTED)
