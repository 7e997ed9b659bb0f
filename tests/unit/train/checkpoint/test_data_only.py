"""DeepSpeed's files are read as data: what a pickle would run is refused, what DeepSpeed saves is read."""

import os

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from comoe.train.checkpoint.data_only import ANY_PICKLE, ONLY_DATA, reading_data_only


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def load_as_deepspeed_does(path):
    return torch.load(path, map_location="cpu", weights_only=False)


@pytest.fixture
def harmful(tmp_path):
    torch.save({"module": Command(f"touch {tmp_path}/ran")}, tmp_path / "states.pt")
    return tmp_path / "states.pt"


def test_a_pickle_that_runs_something_is_refused(harmful):
    said = "^step-3 holds a pickle of posix.system and not numbers alone; it was not read"
    with pytest.raises(ValueError, match=said), reading_data_only("step-3"):
        load_as_deepspeed_does(harmful)
    assert not harmful.with_name("ran").exists() and ONLY_DATA not in os.environ


def test_who_trusts_the_file_can_have_it_and_is_warned(harmful, monkeypatch, capsys):
    monkeypatch.setenv(ANY_PICKLE, "1")
    with reading_data_only("step-3"):
        load_as_deepspeed_does(harmful)
    assert harmful.with_name("ran").exists()
    assert "the files of step-3 may run code" in capsys.readouterr().err


def test_what_deepspeed_saves_is_read(tmp_path):
    saved = {
        "loss_scaler": LossScaler(2.0),
        "stage": ZeroStageEnum.weights,
        "slices": {"a": fragment_address(start=1, numel=2)},
        "moments": torch.arange(3.0),
    }
    torch.save(saved, tmp_path / "states.pt")
    with reading_data_only(tmp_path):
        found = load_as_deepspeed_does(tmp_path / "states.pt")
    assert found["loss_scaler"].cur_scale == 2.0 and found["stage"] is ZeroStageEnum.weights
    assert found["slices"] == saved["slices"] and torch.equal(found["moments"], saved["moments"])
