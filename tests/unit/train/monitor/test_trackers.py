"""Trackers: numbers arrive, a resumed run goes on, and nothing that they raise ends a run."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, tracking

from comoe.train.monitor.monitor import Monitor
from comoe.train.monitor.trackers import Trackers, check_trackers
from tests.unit.train.monitor.test_monitor import TASKS, train_line

RECIPE = {"run": {"name": "x"}, "train": {"seed": 3, "betas": [0.9, 0.999]}, "tasks": {}}


class Recorded(tracking.GeneralTracker):
    """A tracker of the library's form that keeps what it is given."""

    name, requires_logging_directory = "trackio", False
    made: list = []

    def __init__(self, run_name: str, name: str) -> None:
        super().__init__()
        self.calls: list = [("made", run_name, name)]
        self.made.append(self)

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.calls.append(("options", values))

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


class Broken(Recorded):
    """One whose server is gone."""

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        raise ConnectionError("no server")


def monitor(folder: Path, names: list[str], *, resumed: bool = False) -> Monitor:
    trackers = Trackers(names, folder, RECIPE, resumed=resumed)
    at = 10 if resumed else None
    return Monitor(
        folder, enabled=True, tasks=TASKS, recipe_text="", trackers=trackers, resumed_at=at
    )


def test_numbers_and_options_arrive_and_tensorboard_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    one = monitor(tmp_path / "run", ["trackio"])
    train_line(one, 10)
    one.close()
    (tracker,) = Recorded.made
    assert tracker.calls[0] == ("made", "comoe", "run") and tracker.calls[-1] == "finished"
    options = {"run.name": "x", "train.seed": 3, "train.betas": "[0.9, 0.999]"}
    assert tracker.calls[1] == ("options", options)
    step, values = tracker.calls[2]
    assert step == 10 and values["train/loss"] == 1.5 and values["train/mood/loss"] == 0.5
    assert not (tmp_path / "run/tensorboard").exists()
    assert (tmp_path / "run/metrics.jsonl").is_file()


def test_what_a_tracker_raises_is_said_once_and_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Broken)
    one = monitor(tmp_path / "run", ["tensorboard", "trackio"])
    train_line(one, 10)
    train_line(one, 20)
    one.close()
    told = capsys.readouterr().err
    assert told.count("trackio lacks something (ConnectionError: no server)") == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_named_with_the_line_for_pip(
    monkeypatch,
):
    monkeypatch.setattr("comoe.config.extras.find_spec", lambda name: None)
    monkeypatch.setattr("comoe.train.monitor.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'run.trackers mlflow needs .* "comoe\[track\]"$'):
        check_trackers(["mlflow"])
    with pytest.raises(ValueError, match="run.trackers wandb needs wandb, .* pip install wandb"):
        check_trackers(["wandb"])


def test_a_rank_among_others_begins_no_group_and_keeps_its_threads(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorded)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    PartialState._reset_state()
    threads = torch.get_num_threads()
    Trackers(["trackio"], tmp_path / "run", RECIPE)
    assert torch.get_num_threads() == threads and not torch.distributed.is_initialized()
    assert PartialState().num_processes == 1 and os.environ["WORLD_SIZE"] == "2"


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra track is not installed")
def test_mlflow_holds_the_run_in_a_folder_and_a_resumed_one_goes_on(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for resumed, step in ((False, 10), (True, 20)):
        one = monitor(tmp_path / "runs/x", ["mlflow"], resumed=resumed)
        train_line(one, step)
        one.close()
    (run,) = mlflow.search_runs(experiment_names=["comoe"], output_format="list")
    assert run.info.run_name == "x" and run.info.status == "FINISHED"
    assert run.data.params["train.betas"] == "[0.9, 0.999]"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/mood/accuracy")
    assert [(point.step, point.value) for point in history] == [(10, 0.75), (20, 0.75)]
    kept = json.loads((tmp_path / "runs/x/trackers.json").read_text())
    assert kept == {"mlflow": run.info.run_id}
