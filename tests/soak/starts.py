"""One start of ``comoe train`` as forked ranks: the command itself, without the seconds that its imports take."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from comoe.train.environment import free_port
from tests.helpers_ranks import PRELOADED, SHARED

PRELOAD = [*PRELOADED, "comoe.train.finalize", "comoe.train.trainer", "comoe.train.dry_run"]


@dataclass(slots=True)
class Start:
    """Ranks that may still run."""

    ranks: list[BaseProcess]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float, until: Callable[[], object] = lambda: False) -> bool:
        """Wait for the end of all ranks or ``until``; False when they do nothing for so long."""
        due, worked = time.monotonic() + seconds, self._work()
        while True:
            if not any(rank.is_alive() for rank in self.ranks) or until():
                return True
            if time.monotonic() > due:
                # On a busy machine everything takes long; what hangs does not work at all.
                before, worked = worked, self._work()
                if worked - before < 0.5:
                    return False
                due = time.monotonic() + seconds
            time.sleep(0.003)

    def _work(self) -> float:
        """Seconds of the processor that the ranks had."""
        total = 0.0
        for rank in self.ranks:
            try:
                total += sum(psutil.Process(rank.pid).cpu_times()[:4])
            except psutil.Error:
                continue
        return total

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks; None is all."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            if self.ranks[rank].is_alive():
                os.kill(self.ranks[rank].ident, number)

    def end(self, seconds: float) -> list[int | None]:
        """Exit codes; None for a rank that had to be killed because it hung."""
        self.wait(seconds)
        hung = [rank.is_alive() for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return [
            None if late else rank.exitcode for late, rank in zip(hung, self.ranks, strict=True)
        ]

    def said(self) -> str:
        """What all ranks printed."""
        # A rank that was killed at once has none.
        return "".join(log.read_text(errors="replace") for log in self.logs if log.is_file())


def start(
    words: Sequence[str],
    ranks: int,
    logs: Path,
    *,
    home: Path,
    largest_file: int | None = None,
    deaf: bool = False,
) -> Start:
    """Start ``comoe train`` with these words and do not wait.

    Args:
        words: the command line.
        ranks: number of them.
        logs: file that the ranks' numbers are appended to.
        home: ``COMOE_HOME``.
        largest_file: bytes beyond which a file cannot grow, as on a full disk; None for no limit.
        deaf: nobody reads standard output any more.
    """
    before = dict(os.environ)
    os.environ.update(SHARED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    made, files = [], []
    try:
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "COMOE_HOME": home}
            place |= {"COMOE_BF16": 0, "HF_HUB_OFFLINE": 1, **SHARED}
            variables = {key: str(value) for key, value in place.items()}
            file = logs.with_name(f"{logs.name}-{rank}")
            arguments = (list(words), variables, str(file), largest_file, deaf)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            made.append(process)
            files.append(file)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Start(made, files)


def _rank(
    words: list[str], variables: dict[str, str], log: str, largest: int | None, deaf: bool
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if deaf:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    os.environ.update(variables)
    sys.argv = ["comoe train", *words]
    import torch

    from comoe.commands.train import main
    from comoe.train.monitor.monitor import Monitor

    torch.set_num_threads(1)
    # Figures take longer than a run of a few steps, and no fault has to do with them.
    Monitor._figure = lambda *_: None
    Monitor._draw_curves = lambda *_: None
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    main(words)
    os._exit(99)  # the command ends its process itself
