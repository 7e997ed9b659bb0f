"""Two hosts on one machine: two network namespaces that a pair of virtual cards joins, a command typed on each.

Needs root and ``ip``; skips itself otherwise, saying why.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.commands import (
    EVENTFUL,
    SMOKE,
    Terminal,
    Typed,
    deepspeed,
    losses,
    processes_of,
    rank_process,
    train_lines,
    wait_for,
)

pytestmark = pytest.mark.end_to_end

PORT = "29500"


@dataclass(frozen=True, slots=True)
class Hosts:
    """Two namespaces."""

    names: tuple[str, str]
    cards: tuple[str, str]
    address: str
    """Of the first."""
    folder: Path

    def type_on_each(self, terminal: Terminal, *words: str | Path) -> list[Typed]:
        """The README's command on both, each with a cache folder of its own."""
        hosts = self.folder / "hosts.txt"
        hosts.write_text("machine-a slots=1\nmachine-b slots=1\n", encoding="utf-8")
        typed = []
        for number, name in enumerate(self.names):
            there = f"ip netns exec {name} env COMOE_HOME={self.folder / f'home-{number}'}"
            launch = (
                f"--hostfile {hosts} --no_ssh --node_rank {number} --master_addr {self.address}"
            )
            script = f"--master_port {PORT} launch/train.py --deepspeed ds_configs/zero2.json"
            line = [*there.split(), deepspeed(1)[0], *launch.split(), *script.split(), *words]
            typed.append(terminal.start(*line))
        return typed


def ip(*words: str) -> str:
    """Run ``ip``; what it complains of."""
    return subprocess.run(["ip", *words], capture_output=True, text=True).stderr.strip()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (package iproute2)")
    mark = os.getpid()
    names, cards = (f"comoe-{mark}-a", f"comoe-{mark}-b"), (f"c{mark}a", f"c{mark}b")
    subnet = f"10.213.{mark % 250 + 1}"
    try:
        steps = [f"netns add {name}" for name in names]
        steps.append(
            f"link add {cards[0]} netns {names[0]} type veth peer name {cards[1]} netns {names[1]}"
        )
        for number, (name, card) in enumerate(zip(names, cards, strict=True), start=1):
            steps.append(f"-n {name} addr add {subnet}.{number}/24 dev {card}")
            steps += [f"-n {name} link set {device} up" for device in ("lo", card)]
        for step in steps:
            if problem := ip(*step.split()):
                pytest.skip(f"this system makes no two hosts: ip {step}: {problem}")
        yield Hosts(names, cards, f"{subnet}.1", tmp_path_factory.mktemp("hosts"))
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts_give_the_losses_of_one_and_a_crash_on_one_restarts_both(
    hosts, terminal, tmp_path, uninterrupted
):
    folder = tmp_path / "smoke"
    words = ("--restarts", "1", "--config", SMOKE, f"run.output_dir={tmp_path}", *EVENTFUL)
    typed = hosts.type_on_each(terminal, *words)
    wait_for(lambda: max(train_lines(folder), default=0) >= 5, what="step 5")
    rank_process(tmp_path, 1).send_signal(signal.SIGKILL)
    done = [each.wait() for each in typed]
    assert [each.code for each in done] == [0, 0], done[0].said + done[1].said
    np.testing.assert_allclose(losses(folder), losses(uninterrupted), rtol=1e-6)
    assert "comoe: rank 1 was ended by SIGKILL. Starting again, restart 1 of 1." in done[0].said
    assert re.search(r"rank 1 on machine \S+ \(node 1\) died at step \d+", done[0].said)
    caches = [(hosts.folder / f"home-{number}" / "smoke-1").is_dir() for number in (0, 1)]
    assert caches == [True, True], "each host keeps its own cache"


def test_a_network_that_breaks_ends_the_run_on_both_hosts(hosts, terminal, tmp_path):
    typed = hosts.type_on_each(
        terminal, "--config", SMOKE, f"run.output_dir={tmp_path}", "train.max_steps=4000", "train.eval_every=2000",
        "parallel.timeout_seconds=5",
    )  # fmt: skip
    wait_for(lambda: max(train_lines(tmp_path / "smoke"), default=0) >= 4, what="step 4")
    began = time.monotonic()
    assert ip("-n", hosts.names[1], "link", "set", hosts.cards[1], "down") == ""
    try:
        done = [each.wait(60) for each in typed]
        assert time.monotonic() - began < 25
    finally:
        ip("-n", hosts.names[1], "link", "set", hosts.cards[1], "up")
    wait_for(lambda: not processes_of(tmp_path), what="the end of all processes", seconds=30)
    for number, each in enumerate(done):
        (message,) = [line for line in each.said.splitlines() if line.startswith("comoe: ")]
        assert re.match(
            rf"comoe: rank {number}: rank {1 - number} on machine \S+ \(node {1 - number}\) ",
            message,
        )
        assert each.code not in (0, None) and "Traceback" not in each.said
