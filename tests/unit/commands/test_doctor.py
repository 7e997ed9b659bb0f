"""``comoe doctor``: a line per finding, a fault with what mends it, and an exit code."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
from collections.abc import Sequence

import pytest
import torch

from comoe.commands import doctor


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def findings(
    words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int | str | None, list[str]]:
    with pytest.raises(SystemExit) as ended:
        doctor.main(words)
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_a_machine_that_runs_these_tests_has_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = findings(["--no-step"], capsys)
    assert code == 0
    names = [line[9:].partition(":")[0] for line in lines]
    assert set(names) == set(doctor.CHECKS) - {"training step"}
    assert {line[:7].strip() for line in lines} <= {doctor.OK, doctor.WARNING}
    assert "ok       versions: extra train is installed" in lines


def test_what_is_wrong_is_found_and_says_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version
    old = {"transformers": "4.40.0"}
    monkeypatch.setattr(doctor, "version", lambda name: old.get(name) or real(name))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    usage = shutil.disk_usage("/")._replace(free=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, lines = findings(["--no-step"], capsys)
    assert code == 1
    for line in (
        "FAULT    versions: transformers is 4.40.0: pip install",
        'warning  versions: extra augment lacks gguf: pip install "comoe[augment]"',
        "warning  devices: GPU 0: Tesla T4, compute capability 7.5, 1.0 of 16.0 GiB free",
        "warning  devices: Tesla T4 has compute capability 7.5, bfloat16 needs 8.0: training is in float32",
        "warning  compiler: none found",
        "warning  network: the name localhost leads to ",
        "warning  network: the Hugging Face hub does not answer (HF_HUB_OFFLINE is set): name folders",
        "warning  memory: shared memory 0.5 GiB free; give a container more with --shm-size=8g",
        "warning  disk: the working folder has 0.5 GiB free",
    ):
        assert any(found.startswith(line) for found in lines), (line, lines)
