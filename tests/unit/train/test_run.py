"""How a run ends: exit codes and what is said."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import comoe.train.exit as module
from comoe.config.failure import sentence
from comoe.config.recipe import LossConfig, TrainConfig
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.train.fault.supervisor import FINAL
from comoe.train.fault.watchdog import Watchdog
from comoe.train.request import Request, load_requested
from comoe.train.run import _train_and_finalize
from comoe.train.state import TrainState
from comoe.train.trainer import Trainer
from comoe.train.training_run import TrainingRun


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def end_by(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))

    def leave(code: int) -> None:
        raise Left(code)

    def end(
        error: BaseException, *, training: bool, request: Request | None = None
    ) -> tuple[int, str]:
        """Exit code and words of a run in which something is raised, while it trains or before."""

        def train(_trainer: Trainer) -> None:
            raise error

        def run_request(_request: Request, stop: object, watch: Watchdog) -> None:
            if not training:
                raise error
            state = TrainState()
            run = SimpleNamespace(folder=Path("runs/x"), watch=watch, state=state, tasks=())
            _train_and_finalize(run, stop)

        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(Trainer, "train", train)
        monkeypatch.setattr(module, "run_request", run_request)
        monkeypatch.setattr(module.os, "_exit", leave)
        with pytest.raises(Left) as left:
            module.run_and_exit(request or Request())
        return left.value.args[0], capsys.readouterr().err

    return end


STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "runs/x/checkpoints/.part")
INSIDE = ValueError("optimizer got an empty parameter list")


@pytest.mark.parametrize("error", [STALE, INSIDE, BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_an_error_while_training_is_no_mistake_of_the_users_and_can_be_restarted(end_by, error):
    code, said = end_by(error, training=True)
    assert code == 1 and code not in FINAL
    found = re.fullmatch(
        rf"comoe: unexpected {type(error).__name__}: .*\. The traceback is in (\S+)\.\n", said
    )
    assert found and "Traceback" not in said
    log = Path(found[1]).read_text(encoding="utf-8")
    assert "Traceback (most recent call last):" in log and "in train\n" in log


def test_the_traceback_is_printed_where_the_user_wants_it(end_by, monkeypatch):
    monkeypatch.setenv("COMOE_TRACEBACK", "1")
    code, said = end_by(STALE, training=True)
    assert code == 1 and said.startswith("Traceback") and "The traceback is in" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_ends_training_for_good_in_one_sentence(end_by, number):
    error = OSError(number, os.strerror(number))
    error.add_note("writing runs/x/metrics.jsonl")
    code, said = end_by(error, training=True)
    assert code == 3 and code in FINAL
    assert said.startswith(f"comoe: writing runs/x/metrics.jsonl: {os.strerror(number)}; ")
    assert said.count("\n") == 1


def test_an_error_of_the_system_in_the_words_of_a_library_is_one_of_the_system(end_by):
    said = f"File too large (os error {errno.EFBIG})"
    for training, expected in ((True, 3), (False, 2)):
        code, message = end_by(RuntimeError(said), training=training)
        assert code == expected and message.startswith(f"comoe: {os.strerror(errno.EFBIG)}; ")


@pytest.mark.parametrize("error", [STALE, INSIDE])
def test_an_error_before_training_is_one_sentence(end_by, error):
    code, said = end_by(error, training=False)
    assert code == 2 and said.startswith(f"comoe: {sentence(error)}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "yaml, words, shown",
    [("run: {verbose: true}", [], True), ("run: {}", ["run.verbose=true"], True), ("run: {}", [], False),
     ("run: {verbose: true}", ["run.verbose=false"], False), ("run: {verbos: true}", ["run.verbose=true"], False)],
)  # fmt: skip
def test_the_traceback_of_a_users_mistake_is_shown_when_the_recipe_says_so(
    end_by, tmp_path, yaml, words, shown
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{yaml}\ntasks: {{mood: {{kind: single_label, path: posts.jsonl}}}}\n")
    code, said = end_by(INSIDE, training=False, request=Request(config=recipe, overrides=words))
    assert code == 2
    assert said.startswith("Traceback") == shown
    assert f"comoe: {INSIDE}" in said


def test_a_resumed_run_keeps_the_optimizer_group_of_its_router(tmp_path):
    written = "tasks: {mood: {path: mood.csv}}\ntrain: {seed: 1}\n"
    (tmp_path / "config.yaml").write_text(written)
    (tmp_path / "deepspeed.json").write_text("{}")
    rate = "train.router_learning_rate"
    assert load_requested(Request(resume=tmp_path)).train.router_learning_rate is None
    with pytest.raises(ValueError, match=f"{rate} is auto, but .* was begun with None"):
        load_requested(Request(resume=tmp_path, overrides=[f"{rate}=auto"]))
    (tmp_path / "config.yaml").write_text(written.replace("seed: 1", "router_learning_rate: 0.1"))
    now = load_requested(Request(resume=tmp_path, overrides=[f"{rate}=0.2"]))
    assert now.train.router_learning_rate == 0.2


def test_a_folder_with_a_recipe_alone_is_no_run_to_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("tasks: {mood: {path: mood.csv}}\n")
    with pytest.raises(ValueError, match="has a config.yaml and nothing else of a run; begin one"):
        load_requested(Request(resume=tmp_path))


def test_a_classical_model_is_no_run_to_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("tasks: {mood: {path: mood.csv}}\n")
    for name, text in (
        (".begun", "x"),
        ("tasks.json", "[]"),
        ("results.json", '{"finished": "all"}'),
    ):
        (tmp_path / name).write_text(text)
    load_requested(Request(resume=tmp_path))
    (tmp_path / "results.json").write_text('{"finished": "fitted", "baseline": ["naive_bayes"]}')
    with pytest.raises(ValueError, match=r"holds a classical model \(naive_bayes\).* begin a run"):
        load_requested(Request(resume=tmp_path, deepspeed="zero2"))


@pytest.mark.parametrize(
    ("loss", "train", "sentences"),
    [
        ({}, {}, []),
        ({"weighting": "dynamic_average", "weighting_window": 20}, {}, []),
        (
            {"weighting": "dynamic_average", "weighting_window": 24},
            {},
            ["two windows of 24 steps before it weighs, and this run has 48: .* an epoch \\(16\\)"],
        ),
        ({}, {"reptile_steps": 4}, ["no inner loop for irony, hate; more steps"]),
        ({}, {"patience": 2, "eval_every": 16}, []),
        ({}, {"patience": 3, "eval_every": 16}, ["patience is 3, .* every 16 of its 48 steps"]),
        ({}, {"patience": 9}, []),
    ],
)
def test_what_a_run_is_too_short_for_is_told(loss, train, sentences):
    run = SimpleNamespace(
        recipe=SimpleNamespace(loss=LossConfig(**loss), train=TrainConfig(**train)),
        total_steps=48,
        eval_every=TrainConfig(**train).eval_every,
        engine=SimpleNamespace(
            objective=SimpleNamespace(
                weighting=WEIGHTINGS[LossConfig(**loss).weighting]([], LossConfig(**loss))
            )
        ),
        sampler=SimpleNamespace(steps_per_epoch=16, without_turn=lambda steps: [1, 2]),
        splits={
            "train": SimpleNamespace(
                groups=np.array([0, 2, 3]),
                posts=SimpleNamespace(group_names=["emotion", "empty", "irony", "hate"]),
            )
        },
    )
    found = TrainingRun.too_short_for.fget(run)
    assert len(found) == len(sentences)
    for rule, told in zip(sentences, found, strict=True):
        assert re.search(rule, told)
