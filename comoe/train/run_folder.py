"""The run folder before the first step: its owner, its first files, and its visibility on all machines."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.failure import doing, parsing
from comoe.config.files import locked, read_json, write_atomic, write_json
from comoe.config.load import load_saved_recipe, recipe_to_yaml
from comoe.config.recipe import Recipe
from comoe.data.seen_posts import SEEN, write_seen
from comoe.distributed import all_gather_objects, barrier, broadcast_object, is_main, world_size
from comoe.tasks.lexicon import FILE, Lexicon
from comoe.tasks.task import Task, tasks_from
from comoe.train.environment import describe_environment
from comoe.train.fault.supervisor import RUN_WORD, is_child, restart_record
from comoe.train.state import ALL_STEPS

if TYPE_CHECKING:
    # Brings in DeepSpeed's and transformers' settings, which wait for ``prepare_process``.
    from comoe.train.training_run import TrainingRun

MARK = ".begun"
"""Holds an identifier of the start that created or resumed the run; a folder without it is not
comoe's to write to."""

LOCK = ".lock"
"""There while a process trains in the folder."""

PROBE = ".seen"
"""In the folder while the machines check whether they see it."""

OWN_SETTINGS = "deepspeed.json"
"""The DeepSpeed JSON as the user wrote it, "auto" included; ``FILLED_SETTINGS`` is what it
became."""

FILLED_SETTINGS = "ds_config.json"

SET_ASIDE = "set_aside.jsonl"
"""Every row that was left out, or kept without its image, with file, line and reason."""

LEARNED = ("kind", "labels", "label_words", "prompt", "label_mean", "label_std")
"""Fields of a task that the weights of a run depend on."""

AGAIN = "copy it from a backup, or begin the run again"
"""What to do about a damaged file of a run folder."""

PATIENCE = 30.0
"""Seconds until a network folder must show one machine's file on another one."""


def refuse_taken(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a run, unless it may be deleted, or another's files; every rank must call it.

    Raises:
        ValueError: it does; go on with it, rename, or overwrite.
    """
    if problem := taken_folder(folder, overwrite=overwrite):
        raise ValueError(problem)


def taken_folder(folder: Path, *, overwrite: bool) -> str:
    """Why a new run may not have a folder, empty when it may; every rank must call it."""
    return broadcast_object(_taken(folder, overwrite=overwrite) if is_main() else None)


def _taken(folder: Path, *, overwrite: bool) -> str:
    """Why a new run may not have a folder; empty when it may."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in there if name not in (LOCK, PROBE)]
    if foreign and MARK not in there:
        return (
            f"{folder} holds files that no run of comoe wrote ({', '.join(foreign[:5])}), and a run would replace "
            "them: that is refused, also with run.overwrite=true. Choose another run.name, or move them away."
        )
    if "config.yaml" in there and not overwrite:
        return (
            f"{folder} holds a run already: go on with --resume {folder}, choose another run.name, "
            "or delete it with run.overwrite=true."
        )
    return ""


def check_same_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Refuse to go on with other tasks than a run began with, which its weights do not predict.

    Args:
        folder: of the run.
        tasks: as the recipe, with the words of this start, has them.

    Raises:
        ValueError: other tasks, or another kind, other labels, or another prompt of one.
    """
    place = folder / "tasks.json"
    if not place.is_file():
        return
    # A key may be missing in runs of older versions, which had what is its default now.
    with parsing(place, AGAIN):
        written = tasks_from(read_json(place), place=place)
    began = {task.name: task.to_dict() for task in written}
    now = {task.name: task.to_dict() for task in tasks}
    advice = "give the resumed run no such words, or begin a new run with another run.name."
    if list(began) != list(now):
        raise ValueError(
            f"{folder} was begun with the tasks {', '.join(began)}, not {', '.join(now)}; {advice}"
        )
    for name, plain in now.items():
        for key in LEARNED:
            if plain[key] != began[name][key]:
                raise ValueError(
                    f"tasks.{name}.{key} is {plain[key]!r}, but {folder} learned {began[name][key]!r}; {advice}"
                )


def check_same_words(folder: Path, tokenizer: Any) -> None:
    """Refuse to go on with another vocabulary than a run learned, which its export will have.

    Args:
        folder: of the run.
        tokenizer: of this start.

    Raises:
        ValueError: more than a hundredth of its words have another number.
    """
    from comoe.data.tokens.vocabulary import load_tokenizer  # brings in transformers

    place = folder / "tokenizer"
    if not place.is_dir():
        return
    began, now = load_tokenizer(str(place)).get_vocab(), tokenizer.get_vocab()
    other = [word for word, number in began.items() if now.get(word) != number]
    if 100 * len(other) > len(began):
        raise ValueError(
            f"model.encoder has another vocabulary than {folder} learned: {len(other):,} of {len(began):,} words, such "
            f"as {other[0]!r}, are not there or have another number; give the encoder that the run "
            "was begun with, or begin a new run with another run.name."
        )


def check_same_lexicon(folder: Path, lexicon: Lexicon | None) -> None:
    """Refuse to go on with another lexicon than a run learned with, which its export will have.

    Raises:
        ValueError: other words or numbers, or a lexicon in one of both alone.
    """
    began = Lexicon.load(folder / "tokenizer")
    if (began and began.digest) != (lexicon and lexicon.digest):
        now, then = (
            f"a lexicon of {len(one.numbers):,} words" if one else "no lexicon"
            for one in (lexicon, began)
        )
        raise ValueError(
            f"model.lexicon.path gives {now}, but {folder} learned with {then} (tokenizer/{FILE}), of other words or "
            "numbers; give the one that the run was begun with, or begin a new run with another run.name."
        )


def begun_in_bf16(folder: Path) -> bool | None:
    """Precision of the run in the folder; None where it was not yet begun."""
    filled = folder / FILLED_SETTINGS
    if not filled.is_file():
        return None
    with parsing(filled, AGAIN):
        return bool(read_json(filled)["bf16"]["enabled"])


def check_same_groups(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with other parameter groups than the optimizer of a run was saved with.

    Raises:
        ValueError: ``train.layer_decay`` is 1 in one of both alone.
    """
    began, now = (
        each.train.layer_decay for each in (load_saved_recipe(folder / "config.yaml"), recipe)
    )
    if (began == 1) != (now == 1):
        raise ValueError(
            f"train.layer_decay is {now}, but {folder} has {began}: its optimizer has other groups "
            "of weights. Leave it as it was, or begin a new run with another run.name."
        )


def begun_by_this_start(folder: Path) -> bool:
    """Whether the run in the folder is that of an earlier attempt of ``--restarts``; every rank must call it."""
    mark = folder / MARK
    ours = (
        is_main() and RUN_WORD in os.environ and (folder / "config.yaml").exists() and mark.exists()
    )
    return broadcast_object(ours and mark.read_text(encoding="utf-8") == os.environ[RUN_WORD])


def take(folder: Path, held: ExitStack, *, fresh: bool, overwrite: bool = False) -> None:
    """Claim the run folder for this start; every rank must call it.

    Args:
        folder: of the run.
        held: gets the lock on the folder, which it gives back at its end.
        fresh: delete what an earlier start left in it, which goes only now that recipe, posts and
            encoder proved to be good, and that all machines see the folder.
        overwrite: also a run.

    Raises:
        ValueError: another process trains there, a run was begun there since ``refuse_taken``, or a
            machine of the run does not see the folder that rank 0 writes to.
    """
    word = broadcast_object(os.environ.get(RUN_WORD) or uuid.uuid4().hex)
    problem = ""
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(locked(folder / LOCK, str(folder)))
        except ValueError as error:
            problem = str(error)
    if problem := broadcast_object(problem):
        raise ValueError(problem)
    if fresh:
        refuse_taken(folder, overwrite=overwrite)
    if int(os.environ.get("CROSS_SIZE", "1")) > 1:
        _refuse_unseen(folder, word)
    if is_main():
        if fresh:
            _clear(folder)
        write_atomic(folder / MARK, word)
    barrier()


def resume_advice(folder: Path) -> str:
    """What a user does after an error while training."""
    good = "The last whole checkpoint is good"
    return f"{good}." if is_child() else f"{good}: go on with --resume {folder}."


def begin_run_folder(run: TrainingRun, own_settings: Mapping[str, Any]) -> None:
    """Write the run folder, but not over a finished run: its recipe is the one that its results came from."""
    state = run.state
    if state.finished == ALL_STEPS and state.step < run.total_steps:
        state.finished = ""
    if is_main() and not state.finished:
        write_run_folder(run, own_settings=own_settings)
        if restarted := restart_record():
            run.monitor.log_event({"event": "restart", "step": state.step, **restarted})


def write_run_folder(run: TrainingRun, *, own_settings: Mapping[str, Any]) -> None:
    """What an export and a resume need beside the weights; every file whole or not at all, ``config.yaml`` last.

    Args:
        run: ready to train.
        own_settings: the DeepSpeed JSON as it was read.
    """
    folder = run.folder
    # A start without a checkpoint may have been resumed with another encoder.
    if run.state.step == 0 or not (folder / "tokenizer").is_dir():
        aside = folder / ".tokenizer.part"
        shutil.rmtree(aside, ignore_errors=True)
        with doing("writing", folder / "tokenizer"):
            run.collator.tokenizer.save_pretrained(aside)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        aside.replace(folder / "tokenizer")
    if run.collator.pixels is not None:
        # Next to the tokenizer, as a part of preprocessing.
        with doing("writing", folder / "tokenizer"):
            run.collator.pixels.processor.save(folder / "tokenizer")
    if run.collator.lexicon is not None:
        run.collator.lexicon.save(folder / "tokenizer")
    write_atomic(
        folder / SET_ASIDE,
        "".join(json.dumps(row, default=str) + "\n" for row in run.report.rows()),
    )
    write_seen(folder / SEEN, run.splits["train"].posts)
    contents = {
        FILLED_SETTINGS: run.settings,
        OWN_SETTINGS: own_settings,
        "environment.json": describe_environment(world_size=world_size()),
        "encoder_config.json": run.model.encoder.config.to_dict(),
        "tasks.json": [task.to_dict() for task in run.tasks],
    }
    if run.model.tower is not None:
        contents["tower_config.json"] = run.model.tower.inner.config.to_dict()
    for name, content in contents.items():
        write_json(folder / name, content, default=str)
    # This file makes a folder a run.
    write_atomic(folder / "config.yaml", recipe_to_yaml(run.recipe))


def _refuse_unseen(folder: Path, word: str) -> None:
    # By a file of its own: the mark of an earlier run stays what it is as long as that run is
    # there.
    if is_main():
        write_atomic(folder / PROBE, word)
    barrier()
    here = f"{platform.node()} (node {os.environ.get('CROSS_RANK', '0')})"
    blind = [
        machine for machine in all_gather_objects(None if _sees(folder, word) else here) if machine
    ]
    if is_main():
        (folder / PROBE).unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"{folder} is not the same folder on all machines: {', '.join(sorted(set(blind)))} cannot see what "
            "rank 0 wrote there. Every rank writes its part of a checkpoint into it: set "
            f"run.output_dir to a folder that all machines share."
        )


def _clear(folder: Path) -> None:
    # The folder itself stays the one that all machines have just seen, and its mark: who is
    # interrupted here begins here again.
    for entry in folder.iterdir():
        if entry.name in (LOCK, MARK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sees(folder: Path, word: str) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            # Listing refreshes a network file system.
            os.listdir(folder)
            if (folder / PROBE).read_text(encoding="utf-8") == word:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
