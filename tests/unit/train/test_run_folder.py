"""When a run folder is cleared; several real ranks take one in ``tests/multiprocess/test_beginning.py``."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers_export import tiny_tokenizer
from transformers import BertTokenizerFast

import comoe.train.run_folder as module
from comoe.config.recipe import Recipe
from comoe.tasks.task import Task
from comoe.train.run_folder import (
    LOCK,
    MARK,
    begun_in_bf16,
    check_same_groups,
    check_same_tasks,
    check_same_words,
    refuse_taken,
    take,
)


@pytest.fixture
def old(tmp_path) -> Path:
    """The folder of an earlier run."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    for name in ("config.yaml", MARK, "checkpoints/step-00000002/state.json", "metrics.jsonl"):
        (folder / name).write_text("old")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_an_earlier_run_stays_whole_where_a_machine_does_not_see_the_folder(old, monkeypatch):
    before = files(old)
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setattr(module, "all_gather_objects", lambda own: [own, "b (node 1)"])
    with (
        pytest.raises(
            ValueError, match="is not the same folder on all machines: b .node 1. cannot see"
        ),
        ExitStack() as held,
    ):
        take(old, held, fresh=True, overwrite=True)
    assert files(old) == before


@pytest.mark.parametrize("machines", ["1", "2"])
def test_an_earlier_run_goes_once_all_machines_have_seen_the_folder(old, monkeypatch, machines):
    monkeypatch.setenv("CROSS_SIZE", machines)
    monkeypatch.setenv(module.RUN_WORD, "ours")
    seen = os.open(old, os.O_RDONLY)
    with ExitStack() as held:
        take(old, held, fresh=True, overwrite=True)
    assert files(old) == {MARK: "ours"} and os.path.samestat(os.fstat(seen), old.stat()), (
        "what they saw is that folder"
    )
    os.close(seen)


def test_a_resumed_run_keeps_all_that_is_there(old, monkeypatch):
    before = files(old)
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setenv(module.RUN_WORD, "ours")
    with ExitStack() as held:
        take(old, held, fresh=False)
    assert files(old) == before | {MARK: "ours"}


def test_what_a_killed_start_left_goes_before_the_next_one(old, held):
    (old / "config.yaml").unlink()
    for folder in ("tokenizer", ".tokenizer.part", "export"):
        (old / folder).mkdir()
        (old / folder / "tokenizer.json").write_text("of another encoder")
    take(old, held, fresh=True)
    assert files(old).keys() == {MARK, LOCK}


def test_a_run_that_is_cleared_halfway_is_still_one_that_the_next_start_clears(
    old, held, monkeypatch
):
    (old / "config.yaml").unlink()
    monkeypatch.setattr(module.shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), ExitStack() as first:
        take(old, first, fresh=True)
    monkeypatch.undo()
    take(old, held, fresh=True)
    assert files(old).keys() == {MARK, LOCK}


FOREIGN = (
    "config.yaml", "metrics.jsonl", "thesis.txt", "export/config.json", "predictions/test/mood.jsonl",
    "checkpoints/step-00000002/state.json", "tokenizer/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_comoe_did_not_make_is_refused(name, overwrite, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("theirs")
    for claim in (
        lambda held: refuse_taken(tmp_path, overwrite=overwrite),
        lambda held: take(tmp_path, held, fresh=True, overwrite=overwrite),
    ):
        with pytest.raises(ValueError, match="no run of comoe wrote"), ExitStack() as held:
            claim(held)
        assert files(tmp_path) == {name: "theirs"}


def test_a_folder_belongs_to_one_process_at_a_time(old, held):
    before = files(old)
    take(old, held, fresh=False)
    for options in ({"fresh": False}, {"fresh": True, "overwrite": True}):
        with pytest.raises(ValueError, match="is in use by process"), ExitStack() as other:
            take(old, other, **options)
    assert files(old).keys() == before.keys() | {LOCK}


def test_a_run_that_was_begun_while_this_one_read_its_posts_stays(old):
    before = files(old)
    with pytest.raises(ValueError, match="holds a run already"), ExitStack() as held:
        take(old, held, fresh=True)
    assert files(old) == before


MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1")
OPINION = Task("opinion", "text", (), "token_f1", prompt="opinion: {text}")


@pytest.mark.parametrize(
    ("now", "message"),
    [((MOOD,), "begun with the tasks mood, opinion, not mood; .* begin a new run"),
     ((OPINION, MOOD), "begun with the tasks mood, opinion, not opinion, mood"),
     ((replace(MOOD, labels=("good", "bad")), OPINION), r"tasks.mood.labels is \['good', 'bad'\], but .* learned"),
     ((replace(MOOD, kind="multi_label"), OPINION), "tasks.mood.kind is 'multi_label'"),
     ((MOOD, replace(OPINION, prompt="{text}")), "tasks.opinion.prompt is '{text}'"),
     ((replace(MOOD, label_std=2.0), OPINION), "tasks.mood.label_std is 2.0, but .* learned 1.0")],
)  # fmt: skip
def test_a_run_does_not_go_on_with_other_tasks_than_it_learned(tmp_path, now, message):
    began = [MOOD.to_dict(), OPINION.to_dict()]
    (tmp_path / "tasks.json").write_text(json.dumps(began), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        check_same_tasks(tmp_path, now)


def test_a_run_does_not_go_on_with_rates_by_layer_that_it_began_without(tmp_path):
    (tmp_path / "config.yaml").write_text("tasks: {a: {path: a}}\n")
    recipe = Recipe()
    check_same_groups(tmp_path, recipe)
    recipe.train.layer_decay = 0.9
    with pytest.raises(ValueError, match="train.layer_decay is 0.9, but .* has 1.0"):
        check_same_groups(tmp_path, recipe)
    (tmp_path / "config.yaml").write_text("tasks: {a: {path: a}}\ntrain: {layer_decay: 0.8}\n")
    check_same_groups(tmp_path, recipe)


def test_a_run_does_not_go_on_with_the_words_of_another_encoder(tmp_path):
    check_same_words(tmp_path, None)  # no tokenizer yet
    ours = tiny_tokenizer(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "tokenizer")
    check_same_words(tmp_path, ours)
    file = tmp_path / "ours/vocab.txt"
    words = file.read_text().splitlines()
    file.write_text("\n".join([*words[:-4], *reversed(words[-4:])]) + "\n")
    other = BertTokenizerFast(vocab=str(file))
    with pytest.raises(
        ValueError, match=f"another vocabulary .*: 4 of {len(words)} words, such as"
    ):
        check_same_words(tmp_path, other)


def test_a_run_goes_on_with_its_tasks_also_where_an_older_version_wrote_them_down(tmp_path):
    check_same_tasks(tmp_path, (MOOD,))
    began = [MOOD.to_dict() | {"metric": "accuracy"}]
    for key in ("prompt", "label_mean", "label_std"):
        del began[0][key]
    (tmp_path / "tasks.json").write_text(json.dumps(began), encoding="utf-8")
    check_same_tasks(tmp_path, (MOOD,))


@pytest.mark.parametrize("content", ["[1]", "{", '[{"name": "a"}]', '[{"nmae": "a"}]', "\ufeff"])
def test_a_damaged_tasks_file_is_named(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content, encoding="utf-16")
    with pytest.raises(ValueError, match="tasks.json"):
        check_same_tasks(tmp_path, [])
    (tmp_path / "tasks.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="tasks.json"):
        check_same_tasks(tmp_path, [])


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"bf16": 1}'])
def test_a_damaged_record_of_the_precision_is_named(tmp_path, content):
    (tmp_path / "ds_config.json").write_text(content)
    with pytest.raises(ValueError, match="ds_config.json"):
        begun_in_bf16(tmp_path)
