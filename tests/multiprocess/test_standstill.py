"""Real ranks that all live while none gets any further."""

import os
import time

import pytest

from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess


def one_is_late() -> tuple[list[int], str]:
    """Rank 1 sleeps while rank 0 waits for it in a collective: exit codes asked for, and the message."""
    from comoe.distributed import sum_over_ranks
    from comoe.train.environment import prepare_process
    from comoe.train.fault.watchdog import Watchdog

    prepare_process(verbose=False)
    import torch

    from comoe.train.parallel.setup import start_ranks

    start_ranks(timeout_seconds=60)
    codes: list[int] = []
    watch = Watchdog(end=codes.append)
    watch.start(timeout_seconds=2.0)
    watch.reached(9)
    if os.environ["RANK"] == "1":
        end = time.monotonic() + 20
        while not codes and time.monotonic() < end:
            time.sleep(0.05)
    sum_over_ranks(torch.ones(1))
    return codes, watch._gone[int(os.environ["RANK"])][1]


def test_the_message_of_a_standstill_names_the_rank_that_is_in_no_collective():
    answers = run_ranks("tests.multiprocess.test_standstill:one_is_late", 2)
    assert [codes for codes, _ in answers] == [[4], [4]] and answers[0][1] == answers[1][1]
    said = answers[0][1]
    assert said.startswith(
        "no rank made progress for 2 s (parallel.timeout_seconds) at step 9 (training): rank 1 on"
    )
    assert "is in test_standstill.py:" in said
    assert said.endswith("the others wait for it in a collective.")


def open_ports() -> list[tuple[str, str]]:
    """Addresses at which this rank listens, after all ranks have met and one collective."""
    import psutil

    from comoe.distributed import barrier
    from comoe.train.environment import prepare_process
    from comoe.train.fault.watchdog import Watchdog

    prepare_process(verbose=False)
    from comoe.train.parallel.setup import start_ranks

    # A program may train twice.
    for _ in range(2):
        start_ranks(timeout_seconds=60)
    watch = Watchdog()
    watch.start(timeout_seconds=30.0)
    barrier()
    end = time.monotonic() + 10
    while watch._channel._server is not None and time.monotonic() < end:
        time.sleep(0.05)
    found = [each for each in psutil.Process().net_connections() if each.status == "LISTEN"]
    # The store of torch, on the port of the launcher, listens everywhere; a single rank has none.
    store = int(os.environ["MASTER_PORT"]) if os.environ["WORLD_SIZE"] != "1" else 0
    barrier()
    watch.leave(0)
    return [(each.laddr.ip, each.laddr.port) for each in found if each.laddr.port != store]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_one_machine_listen_at_its_loopback_alone(ranks: int) -> None:
    found = run_ranks("tests.multiprocess.test_standstill:open_ports", ranks)
    # That of gloo, which has one even for a single rank.
    assert {ip for ports in found for ip, _ in ports} <= {"127.0.0.1"}
