"""Run a function on several real ranks (gloo, one process each) and get their results back.

The ranks fork from one server process that has imported the libraries already: imports take longer
than most of what the ranks do.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = [
    "torch", "transformers", "transformers.models.bert.modeling_bert", "deepspeed", "datasets", "setuptools", "pytest",
    "comoe.train.build", "comoe.train.finalize", "comoe.train.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine loads it, and with it torch._dynamo
]  # fmt: skip
SHARED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Environment of every rank, which the libraries read when they are imported."""


def run_ranks(
    function: str, world_size: int, *, timeout: float = 240.0, **arguments: Any
) -> list[Any]:
    """Call ``module:function(**arguments)`` on every rank; a list of what the ranks returned, in rank order.

    Args:
        function: "tests.module:name".
        world_size: number of ranks.
        timeout: seconds after which all ranks are ended and the test fails.
        arguments: anything that pickles.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        (Path(folder) / "in").write_bytes(pickle.dumps((function, arguments)))
        processes = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            for process in processes:
                process.join(timeout)
            codes = [process.exitcode for process in processes]
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


def forking() -> Any:
    """The context of multiprocessing whose processes fork from a server that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    # The server keeps the environment of its start.
    os.environ.update(SHARED)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _start(folder: str, rank: int, world_size: int, port: int) -> BaseProcess:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **SHARED,
    }
    own = os.environ | {key: str(value) for key, value in environment.items()}
    process = forking().Process(target=_run, args=(folder, own))
    process.start()
    return process


def _run(folder: str, environment: dict[str, str]) -> None:
    # Nothing that was imported is garbage; looking through it would copy the server's memory too.
    gc.freeze()
    rank = environment["RANK"]
    log = os.open(Path(folder) / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        function, arguments = pickle.loads((Path(folder) / "in").read_bytes())
        module, name = function.split(":")
        result = getattr(importlib.import_module(module), name)(**arguments)
        (Path(folder) / f"out{rank}").write_bytes(pickle.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort an ordinary exit after correct results.
    os._exit(code)
