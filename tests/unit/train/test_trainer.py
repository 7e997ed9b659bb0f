"""The loop with a tiny engine in place of DeepSpeed: what is logged, saved, stopped, and said."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comoe.config.load import recipe_from_dict
from comoe.data.posts import unlabelled_posts
from comoe.data.report import DataReport
from comoe.data.sampling.sampler import SamplerConfig, TrainSampler
from comoe.evaluation.evaluate import Evaluation
from comoe.inference.checkpoint_folder import NEEDED, write_manifest
from comoe.tasks.task import Task
from comoe.train import trainer as following
from comoe.train.evaluator import EvaluationStopped, evaluate_split
from comoe.train.fault.signals import StopSignal
from comoe.train.parallel.ds_config import Layout
from comoe.train.parallel.engine import StepReport
from comoe.train.state import TrainingStopped, TrainState
from comoe.train.trainer import Trainer
from comoe.train.training_run import TrainingRun
from comoe.types import Batch, ModelOutput, StepOutput

HEAT = Task("heat", "regression", (), "mae", 1.0, None, 0.0, False)
POSTS = 20


class Posts:
    """A split that knows where its posts come from."""

    origins = [f"posts.jsonl:{number + 1}" for number in range(POSTS)]


def collate(split: Posts, indices: np.ndarray, **_: Any) -> Batch:
    rows = torch.from_numpy(indices)
    ones_BL = torch.ones(len(rows), 2, dtype=torch.int64)
    labels = {"heat": torch.zeros(len(rows))}
    return Batch(ones_BL, ones_BL, None, ones_BL > 0, torch.full_like(rows, -1), rows, labels)


@dataclass
class FakeEngine:
    """Answers zero to everything; ``on_step`` may raise, send signals, or say that the step was skipped."""

    on_step: Callable[[int], Any] = lambda step: None
    device: torch.device = torch.device("cpu")
    rates: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    norms: Iterator[float] = field(default_factory=lambda: repeat(0.5))
    steps: int = 0

    def set_rate_factor(self, factor: float) -> dict[str, float]:
        self.rates.append(factor)
        return {"encoder": factor}

    def train_step(self, batches: list[Batch], *, max_grad_norm: float) -> StepReport:
        self.steps += 1
        self.limits.append(max_grad_norm)
        self.progress.append(batches[0].progress)
        skipped = self.on_step(self.steps) == "skipped"
        loss = torch.tensor(float("nan") if skipped else 1.0 / self.steps)
        terms = {"task/heat": loss, "weight/heat": torch.tensor(1.0)}
        outputs = [
            StepOutput(
                loss, terms, ModelOutput({"heat": torch.zeros(len(rows_B), 1)}, {}, {}, (), rows_B)
            )
            for rows_B in (batch.row_ids_B for batch in batches)
        ]
        return StepReport(loss, terms, outputs, grad_norm=next(self.norms), skipped=skipped)


@dataclass
class FakeEvaluator:
    """Gives one value after another."""

    values: list[float]
    cut_short: int = 0

    def run(self, name: str, *, asked_to_stop: Callable[[], bool]) -> Evaluation | None:
        if self.cut_short:
            self.cut_short -= 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked_to_stop()
            raise EvaluationStopped
        if not self.values:
            return None
        return Evaluation({"heat": {"mae": -self.values.pop(0), "n": 1.0}}, {}, {})


@dataclass
class Log:
    """The monitor's place: keeps what it is told."""

    train: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    shown: list[dict[str, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)

    def log_train(self, step: int, *, posts_per_second: float, **_: Any) -> None:
        self.train.append(step)
        self.speeds.append(posts_per_second)

    def log_evaluation(self, step: int, **measured: Any) -> None:
        self.checks.append(step)
        self.shown.append({key: measured[key] for key in ("mean", "chosen")})

    def log_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)


@dataclass
class SavingTrainer(Trainer):
    """Writes the state alone: DeepSpeed's part of a checkpoint is tested with real ranks."""

    evaluator: FakeEvaluator = field(default_factory=lambda: FakeEvaluator([]))

    def _evaluate(self) -> Evaluation | None:
        return self.evaluator.run("validation", asked_to_stop=self.stop.asked)

    def _save(self) -> int:
        self.run.checkpoints.mkdir(exist_ok=True)
        text = json.dumps(self.run.state.to_dict())
        (self.run.checkpoints / f"state-{self.run.state.step}.json").write_text(text)
        return self.run.state.step


collate.pixels = None


def trainer_in(
    folder: Path,
    *,
    on_step: Callable[[int], Any] = lambda step: None,
    values: list[float] | None = None,
    **train: Any,
) -> SavingTrainer:
    raw = {
        "batch_size": 5,
        "max_steps": 6,
        "eval_every": 2,
        "save_every": 100,
        "warmup_fraction": 0.0,
    } | train
    recipe = recipe_from_dict({"tasks": {"heat": {"path": "x"}}, "train": raw})
    sampler = TrainSampler(
        np.full(POSTS, 3), np.zeros(POSTS, dtype=int), SamplerConfig(recipe.train.batch_size)
    )
    run = TrainingRun(
        recipe=recipe,
        folder=folder,
        tasks=(HEAT,),
        splits={"train": Posts()},
        report=DataReport(),
        collator=collate,
        sampler=sampler,
        parameters={},
        layout=Layout(1, 1, 2, micro_batch_size=5, accumulation=1, bf16=False),
        settings={},
        engine=FakeEngine(on_step),
        state=TrainState(),
        monitor=Log(),
    )
    return SavingTrainer(run, evaluator=FakeEvaluator(list(values or [])))


def saved(trainer: Trainer) -> dict[int, dict[str, Any]]:
    paths = trainer.run.checkpoints.glob("state-*.json")
    return {int(path.stem.removeprefix("state-")): json.loads(path.read_text()) for path in paths}


def best(trainer: Trainer) -> int:
    return json.loads((trainer.run.checkpoints / "best.json").read_text())["step"]


def test_a_run_logs_checks_and_saves_when_it_should(tmp_path):
    trainer = trainer_in(tmp_path, values=[0.1, 0.3, 0.2], log_every=4, save_every=5)
    trainer.train()
    run, kept = trainer.run, saved(trainer)
    assert (run.monitor.train, run.monitor.checks) == ([4, 6], [2, 4, 6])
    # The two best so far, the one that is due, and the last. Posts count also where no line is due.
    assert {step: (state["finished"], state["posts_seen"]) for step, state in kept.items()} == {
        2: ("", 10), 4: ("", 20), 5: ("", 25), 6: ("all steps done", 30)}  # fmt: skip
    assert best(trainer) == 4 and run.state.finished == "all steps done"


@pytest.mark.parametrize(("loop", "every"), [(0, 2), (3, 3), (2, 2)])
def test_evaluations_come_after_whole_inner_loops(tmp_path, loop, every):
    run = trainer_in(tmp_path, eval_every="auto", save_every="auto", reptile_steps=loop).run
    assert run.sampler.steps_per_epoch == 4 and (run.eval_every, run.save_every) == (every, every)
    fixed = trainer_in(tmp_path, eval_every=1, reptile_steps=loop).run
    assert fixed.eval_every == 1


@pytest.mark.parametrize(
    ("option", "limits", "clipped"),
    [("auto", [0.0, 6.0, 9.0, 12.0, 12.0, 12.0], [3, 6]), (5.0, [5.0] * 6, [3, 6]), (0.0, [0.0] * 6, []),
     (1.0, [1.0] * 6, [1, 2, 3, 4, 6])],
)  # fmt: skip
def test_gradients_are_clipped_by_the_norms_before_them_also_after_a_restart(
    tmp_path, option, limits, clipped
):
    """Step 5 is skipped. Medians of 2; 2 and 4; 2, 4 and 50; 2, 4, 4 and 50; by hand, times 3."""
    norms = [2.0, 4.0, 50.0, 4.0, float("inf"), 99.0]

    def skip(step: int) -> str:
        return "skipped" if norms[step - 1] == float("inf") else ""

    def started(folder: Path, at: int) -> SavingTrainer:
        folder.mkdir()
        trainer = trainer_in(folder, max_grad_norm=option, log_every=1, save_every=3)
        engine = trainer.run.engine
        engine.norms, engine.steps = iter(norms[at:]), at
        engine.on_step = skip
        return trainer

    whole = started(tmp_path / "whole", 0)
    whole.train()
    assert whole.run.engine.limits == limits
    state = whole.run.state
    assert state.clipped_total == len(clipped)
    assert state.grad_norms == [2.0, 4.0, 50.0, 4.0, 99.0]
    resumed = started(tmp_path / "resumed", 3)
    resumed.run.state = TrainState(**saved(whole)[3])
    resumed.train()
    assert resumed.run.engine.limits == limits[3:]
    assert resumed.run.state.clipped_total == len(clipped)
    # Only so many norms are kept.
    state.grad_norms = [1.0] * 100
    state.record_norm(7.0, limit=0.0)
    assert state.grad_norms == [1.0] * 99 + [7.0]


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_run_begun_or_restored_at_a_step_does_the_rest_of_the_schedule(tmp_path, at):
    trainer = trainer_in(tmp_path, schedule="linear", log_every=1)
    trainer.run.state = TrainState(step=at)
    trainer.train()
    left = range(at, 6)
    assert trainer.run.engine.rates == pytest.approx([1 - step / 6 for step in left])
    assert trainer.run.engine.progress == pytest.approx([step / 6 for step in left])
    assert trainer.run.monitor.train == [step + 1 for step in left]
    # Without a validation split it still ends with a checkpoint.
    assert sorted(saved(trainer)) == [6] and not (trainer.run.checkpoints / "best.json").exists()


def test_posts_per_second_leave_out_evaluation_and_saving_and_count_all_steps_between_two_lines(
    tmp_path, monkeypatch
):
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer = trainer_in(
        tmp_path, values=[0.1] * 6, on_step=lambda step: spend(0.1), log_every=3, eval_every=1
    )
    run_validation = trainer.evaluator.run
    trainer.evaluator.run = lambda name, **more: (spend(0.4), run_validation(name, **more))[1]
    trainer.train()
    # Three steps of five posts in 0.3 seconds; with the evaluations it would be 1.5 seconds.
    assert trainer.run.monitor.speeds == pytest.approx([50.0, 50.0])


def test_patience_ends_the_run_at_the_evaluation_that_uses_it_up(tmp_path):
    trainer = trainer_in(tmp_path, values=[0.3, 0.2, 0.1, 0.9], patience=2, max_steps=20)
    trainer.train()
    assert trainer.run.state.step == 6
    assert trainer.run.state.finished == "no better value in 2 evaluations"
    assert best(trainer) == 2
    assert saved(trainer)[6]["finished"] == trainer.run.state.finished


def skipping(folder, steps, **train):
    """A trainer of which these steps are not finite."""
    return trainer_in(folder, on_step=lambda step: "skipped" if step in steps else None, **train)


def test_n_steps_in_a_row_that_are_not_finite_stop_the_run_with_the_posts(tmp_path, capsys):
    trainer = skipping(tmp_path, (2, 4, 5, 6), max_nonfinite=3)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    rows = sorted(trainer.run.sampler.global_batch(5).tolist())
    said = str(caught.value)
    assert said.startswith("3 steps in a row (up to step 6)")
    assert ", ".join(f"posts.jsonl:{row + 1}" for row in rows) in said
    assert said.endswith("No checkpoint was saved: begin again.")
    assert (trainer.run.state.nonfinite_in_a_row, trainer.run.state.nonfinite_total) == (3, 4)
    assert [event["step"] for event in trainer.run.monitor.events] == [2, 4, 5, 6]
    assert trainer.run.monitor.events[-1]["posts"] == rows
    assert "step 2 skipped" in capsys.readouterr().out
    now_and_then = skipping(tmp_path, (1, 3, 5), max_nonfinite=2)
    now_and_then.train()
    state = now_and_then.run.state
    assert (state.finished, state.nonfinite_total) == ("all steps done", 3)


def test_an_evaluation_shows_the_mean_and_what_the_recipe_asks_for(tmp_path):
    """The error falls while the loss rises: by hand, larger is better."""
    trainer = trainer_in(tmp_path, values=[-3.0, -2.0, -1.0], early_stop_metric="heat/loss")
    losses, evaluate = iter([1.0, 2.0, 4.0]), trainer.evaluator.run

    def with_loss(name: str, **options: Any) -> Evaluation:
        evaluation = evaluate(name, **options)
        evaluation.metrics["heat"]["loss"] = next(losses)
        return evaluation

    trainer.evaluator.run = with_loss
    trainer.train()
    assert trainer.run.monitor.shown == [
        {"mean": -3.0, "chosen": -1.0}, {"mean": -2.0, "chosen": -2.0}, {"mean": -1.0, "chosen": -4.0},
    ]  # fmt: skip
    assert best(trainer) == 2 and trainer.run.state.best_value == -1.0


@pytest.mark.parametrize("skipped", [(5, 6), (1, 2, 3, 4, 5, 6)])
def test_a_run_whose_last_steps_are_not_finite_is_not_called_finished(skipped, tmp_path):
    trainer = skipping(tmp_path, skipped, max_nonfinite=7)
    folder = trainer.run.checkpoints / "step-00000004"
    (folder / "weights").mkdir(parents=True)
    for name in NEEDED:
        (folder / name).touch()
    write_manifest(folder, step=4)
    wanted = rf"the last {len(skipped)} of 6 steps .* step-00000004 is the newest whole checkpoint"
    with pytest.raises(TrainingStopped, match=wanted):
        trainer.train()
    assert not trainer.run.state.finished and not saved(trainer)


@pytest.mark.parametrize("end", [math.inf, math.nan])
def test_weights_with_a_loss_that_is_not_finite_are_never_the_best(tmp_path, end):
    trainer = trainer_in(tmp_path, values=[3.0, 2.0, 1.0])
    losses = iter([1.0, math.inf, end])
    evaluate = trainer.evaluator.run

    def with_loss(name: str, **options: Any) -> Evaluation:
        evaluation = evaluate(name, **options)
        evaluation.metrics["heat"]["loss"] = next(losses)
        return evaluation

    trainer.evaluator.run = with_loss
    wanted = "diverged by step 6: losses on validation posts are heat nan"
    with pytest.raises(TrainingStopped, match=wanted) if math.isnan(end) else nullcontext():
        trainer.train()
    assert (trainer.run.state.best_step, best(trainer)) == (2, 2)


CPU_MEMORY = (
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
)


@pytest.mark.parametrize(
    ("error", "told"),
    [(torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError(CPU_MEMORY), True),
     (RuntimeError("Connection closed by peer"), False)],
)  # fmt: skip
def test_out_of_memory_names_the_micro_batch_to_try_and_other_errors_pass(tmp_path, error, told):
    def fail(step: int) -> None:
        raise error

    with pytest.raises(TrainingStopped if told else RuntimeError) as caught:
        trainer_in(tmp_path, on_step=fail, batch_size=20).train()
    said = str(caught.value)
    parts = ("5 posts per forward pass on rank 0", "train.micro_batch_size=2", "data.max_length")
    assert all(part in said for part in parts) if told else caught.value is error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, capsys):
    trainer = trainer_in(
        tmp_path, on_step=lambda step: os.kill(os.getpid(), number) if step == 3 else None
    )
    before = signal.getsignal(number)
    trainer.train()
    assert (trainer.run.state.step, trainer.run.state.finished) == (3, "")
    assert saved(trainer)[3]["posts_seen"] == 15
    assert f"stopping at step 3 ({number.name})" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    # What was noted before the run is asked too.
    early = trainer_in(tmp_path)
    early.stop = StopSignal()
    early.stop.reason = "the launcher is gone"
    early.train()
    assert (early.run.state.step, early.run.state.finished) == (0, "") and 0 in saved(early)


def test_epochs_and_auto_become_steps(tmp_path):
    # 20 posts in batches of 5: four steps per epoch.
    run = trainer_in(tmp_path, max_steps=None, epochs=2.5, eval_every="auto", save_every="auto").run
    assert (run.total_steps, run.eval_every, run.save_every) == (10, 2, 2)
    run = trainer_in(tmp_path, max_steps=7, eval_every=3, save_every="auto").run
    assert (run.total_steps, run.eval_every, run.save_every) == (7, 3, 3)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for_by_the_resume(
    tmp_path, which, capsys
):
    values = [0.3, 0.2, 0.4]
    uncut, cut, resumed = (trainer_in(tmp_path / name, values=values) for name in ("a", "b", "b"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    uncut.train()
    evaluate, calls = cut.evaluator.run, []

    def run_or_stop(name, **options):
        calls.append(name)
        cut.evaluator.cut_short = len(calls) == which
        return evaluate(name, **options)

    cut.evaluator.run = run_or_stop
    cut.train()
    state = cut.run.state
    assert (state.step, state.evaluated_at, state.finished) == (2 * which, 2 * (which - 1), "")
    assert "stopping" in capsys.readouterr().out
    resumed.run.state = TrainState(**saved(cut)[2 * which])
    resumed.evaluator.values = values[which - 1 :]
    resumed.train()
    assert resumed.run.state.finished == uncut.run.state.finished != ""
    assert resumed.run.monitor.checks == uncut.run.monitor.checks[which - 1 :]
    for name in ("best_step", "best_value"):
        assert getattr(resumed.run.state, name) == getattr(uncut.run.state, name)


class TwoSets(Posts):
    """Posts of two data sets."""

    groups = np.repeat([0, 1], [12, 8])
    labelled = np.ones((POSTS, 1), dtype=bool)
    posts = replace(unlabelled_posts([], tasks=[]), group_names=("old", "new"))


def following_trainer(
    folder: Path, losses: list[float], *, stop_after: int | None = None
) -> SavingTrainer:
    """Draws follow the progress; what each step was trained on is kept in ``trainer.drawn``."""
    drawn: dict[int, list[int]] = {}
    trainer = trainer_in(folder, max_steps=7, save_every=1)
    trainer.run.sampler = TrainSampler(
        np.full(POSTS, 3), TwoSets.groups, SamplerConfig(5, mixing="progress")
    )
    trainer.run.splits, trainer.drawn = {"train": TwoSets()}, drawn
    made = trainer.run.engine.train_step

    def train_step(batches: list[Batch], **options: Any) -> StepReport:
        drawn[trainer.run.state.step] = [
            row for batch in batches for row in batch.row_ids_B.tolist()
        ]
        if trainer.run.state.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(batches, **options)

    def run_evaluation(name: str, **_: Any) -> Evaluation:
        loss = losses[trainer.run.state.step // 2 - 1]
        return Evaluation({"heat": {"mae": loss, "loss": loss, "n": 1.0}}, {}, {})

    trainer.run.engine.train_step, trainer.evaluator.run = train_step, run_evaluation
    return trainer


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_resumed_run_draws_the_posts_of_the_uninterrupted_one_at_rates_that_follow_the_progress(
    stop_after, tmp_path, monkeypatch
):
    # Rates that say which evaluation made them.
    monkeypatch.setattr(
        following, "progress_rates",
        lambda base_G, gains_G: base_G if np.isnan(gains_G[0]) else np.array([gains_G[0], 1 - gains_G[0]]),
    )  # fmt: skip
    losses = [1.0, 0.1, 0.08, 0.05]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    uncut = following_trainer(tmp_path / "a", losses)
    uncut.train()
    cut = following_trainer(tmp_path / "b", losses, stop_after=stop_after)
    cut.train()
    assert cut.run.state.step == stop_after
    resumed = following_trainer(tmp_path / "b", losses)
    resumed.run.state = TrainState(**saved(cut)[stop_after])
    resumed.train()
    assert cut.drawn | resumed.drawn == uncut.drawn and not cut.drawn.keys() & resumed.drawn.keys()
    assert resumed.run.state.mixing == uncut.run.state.mixing
    assert [entry["step"] for entry in uncut.run.state.mixing] == [2, 4, 6, 7]
    # From 1.0 to 0.1: nine tenths of the draws from step 4 on are of the first data set.
    assert uncut.run.state.mixing[1]["rates"] == pytest.approx([0.9, 0.1])
    assert sum(TwoSets.groups[row] == 0 for step in (4, 5) for row in uncut.drawn[step]) == 9


def test_rates_that_follow_the_progress_are_those_of_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "broadcast_object", lambda own: [0.75, 0.25])
    trainer = following_trainer(tmp_path, [1.0, 0.5, 0.4, 0.3])
    trainer.train()
    assert [entry["rates"] for entry in trainer.run.state.mixing] == [[0.75, 0.25]] * 4


def test_a_long_evaluation_stops_after_a_few_batches_when_asked_to(tmp_path):
    class Split:
        lengths = np.full(64 * 40, 3)
        labelled = np.ones((64 * 40, 1), dtype=bool)
        texts: list[str] = []
        posts = unlabelled_posts([], tasks=[])

        def __len__(self) -> int:
            return len(self.lengths)

    class Counting:
        device = torch.device("cpu")
        forwards = 0
        averaged = staticmethod(nullcontext)

        class objective:
            class model:
                first_decoder_layer = None

                class config:
                    num_local_experts = 0

                @staticmethod
                def moe_layers() -> list[Any]:
                    return []

        def forward(self, batch: Batch) -> ModelOutput:
            self.forwards += 1
            rows_B = batch.row_ids_B
            flat = torch.zeros(len(rows_B), 1)
            return ModelOutput({"heat": flat}, {"heat": flat}, {}, (), rows_B)

    engine = Counting()

    def collate_rows(split: Split, indices: np.ndarray, *, all_tasks: bool) -> Batch:
        return collate(Posts(), indices)

    collate_rows.detokenize = None
    run = trainer_in(tmp_path).run
    run.engine, run.splits, run.collator = engine, {"validation": Split()}, collate_rows
    with pytest.raises(EvaluationStopped):
        evaluate_split(run, "validation", asked_to_stop=lambda: engine.forwards > 10)
    assert 10 < engine.forwards < 20


def test_the_posts_of_a_bad_step_are_those_of_the_forward_passes_that_were_bad_on_any_rank(
    tmp_path, monkeypatch
):
    trainer = trainer_in(tmp_path)
    batches = [collate(Posts(), np.array(rows)) for rows in ([0, 1], [2, -1])]
    outputs = [StepOutput(torch.tensor(loss), {}, ModelOutput({}, {}, {}, (), batches[0].row_ids_B))
               for loss in (1.0, float("nan"))]  # fmt: skip
    report = StepReport(torch.tensor(float("nan")), {}, outputs, grad_norm=None, skipped=True)
    theirs = [(True, [5, 6]), (False, [12, 7])]
    monkeypatch.setattr("comoe.train.trainer.all_gather_objects", lambda ours: [ours, theirs])
    assert trainer._posts_to_blame(report, batches) == (
        [2, 7, 12],
        "posts.jsonl:3, posts.jsonl:8, posts.jsonl:13",
    )
    # A gradient alone: nobody knows whose.
    fine = StepReport(report.loss, {}, [outputs[0]] * 2, grad_norm=None, skipped=True)
    monkeypatch.setattr(
        "comoe.train.trainer.all_gather_objects", lambda ours: [ours, [(True, list(range(10, 20)))]]
    )
    rows, said = trainer._posts_to_blame(fine, batches)
    assert rows == [0, 1, 2, *range(10, 20)] and said.endswith("posts.jsonl:15 and 5 more")


def test_the_watchdog_counts_steps_and_the_batches_of_an_evaluation_and_nothing_else(tmp_path):
    seen: list[tuple[str, bool]] = []
    trainer = trainer_in(tmp_path, values=[0.1] * 3, on_step=lambda step: note())
    watch, run_validation = trainer.run.watch, trainer.evaluator.run

    def note() -> None:
        seen.append((watch.phase, watch.counted))

    def run_noted(name: str, **more: Any) -> Any:
        note()
        for counted in (True, False):
            watch.batch(counted)
            note()
        return run_validation(name, **more)

    trainer.evaluator.run = run_noted
    trainer.train()
    evaluation = [("evaluation", counted) for counted in (False, True, False)]
    step = [("training", True)]
    assert seen == [("first step", False), *step, *evaluation, *2 * (2 * step + evaluation)]
    assert (watch.phase, watch.counted, watch.step) == ("finishing", False, 6)


def test_a_contrastive_stage_is_not_evaluated_and_its_norms_are_forgotten(tmp_path):
    trainer = trainer_in(tmp_path, values=[-1.0, -2.0])
    trainer.run.recipe.loss.contrastive.first_steps = 3
    trainer.train()
    run = trainer.run
    assert run.monitor.checks == [4, 6]
    assert run.monitor.events == [{"event": "tasks_begin", "step": 3}]
    assert run.engine.limits == [0.0, 1.5, 1.5, 0.0, 1.5, 1.5]
    assert run.engine.rates == pytest.approx([1, 2 / 3, 1 / 3] * 2)
