"""Run a function on several real ranks (gloo, one process each) and get their answers back."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(
    function: str, world_size: int, *, timeout: float = 240.0, **arguments: Any
) -> list[Any]:
    """Call ``module:function(**arguments)`` on every rank; a list of what the ranks returned, in rank order.

    Args:
        function: "tests.module:name". The module is imported afresh in each process.
        world_size: number of ranks.
        timeout: seconds after which all ranks are ended and the test fails.
        arguments: anything that pickles.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        (Path(folder) / "in").write_bytes(pickle.dumps((function, arguments)))
        processes = []
        for rank in range(world_size):
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_SIZE": world_size,
            }
            environment = os.environ | {key: str(value) for key, value in places.items()} | {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            # As a module: as a script the folder of this file would hide the package multiprocess
            # behind ours.
            command = [sys.executable, "-m", "tests.helpers_ranks", folder]
            log = (Path(folder) / f"log{rank}").open("wb")
            processes.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = "\n".join(
            (Path(folder) / f"log{rank}").read_text(errors="replace")[-3000:]
            for rank in range(world_size)
        )
        assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
        return [
            pickle.loads((Path(folder) / f"out{rank}").read_bytes()) for rank in range(world_size)
        ]


def _main(folder: Path) -> None:
    import importlib

    import torch

    torch.set_num_threads(1)
    function, arguments = pickle.loads((folder / "in").read_bytes())
    module, name = function.split(":")
    answer = getattr(importlib.import_module(module), name)(**arguments)
    (folder / f"out{os.environ['RANK']}").write_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # gloo's threads sometimes abort an ordinary exit after correct results.
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
