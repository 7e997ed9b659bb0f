"""The memory of a machine against the plan of a run."""

import pytest
import torch
from torch import nn

from comoe.train import fits
from comoe.train.fits import main_memory, too_large
from comoe.train.memory_plan import ROUGH, MemoryPart, MemoryPlan, RunSize, Work, plan_memory

CPU = torch.device("cpu")


def plan(**parts):
    return MemoryPlan(tuple(MemoryPart(name, size) for name, size in parts.items()), "1 rank")


def module(floats=0):
    held = nn.Module()
    held.register_buffer("queue", torch.zeros(floats, device="meta"))
    return held


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(fits, "main_memory", lambda: 100)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)


@pytest.mark.parametrize(
    ("parts", "floats", "ranks", "fits"),
    [
        ({"weights": 100}, 0, 1, True),
        ({"weights": 101}, 0, 1, False),
        ({"weights": 60, "gradients": 41}, 0, 1, False),
        ({"weights": 60}, 11, 1, False),
        ({"weights": 60}, 10, 1, True),
        ({"weights": 50}, 0, 2, True),
        ({"weights": 51}, 0, 2, False),
        ({"weights": 10, "activations (rough)": 290}, 0, 1, True),
        ({"weights": 10, "activations (rough)": 291}, 0, 1, False),
    ],
)
def test_what_is_sure_must_fit_and_what_is_rough_must_fit_roughly(
    parts, floats, ranks, fits, memory, monkeypatch
):
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    problem = too_large(plan(**parts), module(floats), device=CPU)
    assert (problem == "") == fits
    if not fits:
        assert "this machine" in problem and ("for 2 ranks" in problem) == (ranks == 2)
        assert "most of it" in problem and "--gpus N" in problem


def test_a_dry_run_counts_the_ranks_that_a_start_would_have(memory):
    assert not too_large(plan(weights=50), module(), device=CPU, ranks=2)
    assert "for 3 ranks" in too_large(plan(weights=50), module(), device=CPU, ranks=3)


def test_offloaded_state_counts_in_main_memory(memory):
    parts = (MemoryPart("weights", 50), MemoryPart("moments of adamw", 0, 51))
    assert too_large(MemoryPlan(parts, ""), module(), device=CPU)


def test_the_rough_parts_are_parts_of_a_plan():
    size = RunSize(10, 10, stage=3, bucket_elements=1, gathered_elements=1)
    names = {part.name for part in plan_memory(size, Work(tokens=1, layers=1, width=1)).parts}
    assert {"weights", "gradients"} <= names - set(ROUGH) and set(ROUGH) - names == {
        "logits of the vocabulary"
    }


@pytest.mark.parametrize(("limit", "found"), [("4096", 4096), ("max", None), ("9" * 30, None)])
def test_a_container_has_less_than_its_machine(limit, found, tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "CGROUPS", ())
    whole = main_memory()
    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr(fits, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert main_memory() == (found or whole) and whole > 10**8
