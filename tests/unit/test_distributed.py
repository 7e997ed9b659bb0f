"""Process groups of one rank; collectives of several are tried in ``tests/multiprocess``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from comoe.distributed import choose_device, gather_detached, wait_for_ranks_up_to


@pytest.fixture
def group() -> Iterator[Any]:
    """A group that a library made without saying how long it waits."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield dist.new_group([0])
    dist.destroy_process_group()


def waits(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_one_process_gathers_its_own_rows_without_gradient():
    rows = torch.ones(3, 2, requires_grad=True)
    gathered, start = gather_detached(rows, sizes=[3])
    assert torch.equal(gathered, rows) and not gathered.requires_grad and start == 0


def test_the_time_to_wait_reaches_the_groups_of_libraries_too(group: Any) -> None:
    assert waits(group) == 1800, "torch's default"
    wait_for_ranks_up_to(7200.0)
    assert waits(dist.group.WORLD) == waits(group) == 7200


@pytest.mark.parametrize(
    "cuda, mps, found", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_a_gpu_where_there_is_one(
    cuda: bool, mps: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda _size, device: tried.append(device))
    assert choose_device("auto") == torch.device(found) and tried == [torch.device(found)]
