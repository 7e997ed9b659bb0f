"""Starts the ranks of a benchmark on this machine and collects the result of the first one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comoe.train.environment import free_port, prepare_process

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package."""


def run_on_ranks(
    function: str,
    world_size: int,
    *,
    timeout: float = 900.0,
    threads: int | None = None,
    **arguments: Any,
) -> Any:
    """Call ``module:function(**arguments)`` in ``world_size`` fresh processes; the result of rank 0.

    Each rank has one thread on a CPU, unless ``OMP_NUM_THREADS`` is set, so that ratios do not
    depend on the number of cores.

    Args:
        function: "package.module:name".
        world_size: number of ranks.
        timeout: seconds until all ranks are killed.
        threads: of each rank, whatever the environment says.
        arguments: JSON values.

    Raises:
        RuntimeError: a rank failed or timed out; the message has the end of the ranks' logs.
    """
    print(f"{function} on {world_size} rank(s) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
        folder = Path(name)
        (folder / "in.json").write_text(json.dumps([function, arguments]), encoding="utf-8")
        port = free_port()
        chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        ranks = [_start(folder, rank, world_size, port, chosen) for rank in range(world_size)]
        try:
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(process.returncode for process in ranks) or not (folder / "out.json").is_file():
            tails = [
                (folder / f"log{rank}").read_text(errors="replace")[-2000:]
                for rank in range(world_size)
            ]
            raise RuntimeError(f"{function} failed on {world_size} ranks:\n" + "\n".join(tails))
        return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def _start(
    folder: Path, rank: int, world_size: int, port: int, chosen: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    environment = (
        {"OMP_NUM_THREADS": "1"} | os.environ | {key: str(value) for key, value in places.items()}
    )
    # The working folder may hold another checkout, which ``-m`` would import first.
    environment |= {
        **chosen,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONSAFEPATH": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    with (folder / f"log{rank}").open("wb") as log:
        # A session of its own: a rank cannot stop the benchmark through the terminal.
        return subprocess.Popen(
            [sys.executable, "-m", "comoe.benchmarks.ranks", str(folder)], env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> None:
    end = time.monotonic() + timeout
    # Until all are done, one has failed (the others would wait forever), or the time is up.
    while time.monotonic() < end and not any(process.poll() for process in ranks):
        if all(process.poll() == 0 for process in ranks):
            return
        time.sleep(0.05)


def _main(folder: Path) -> None:
    prepare_process(verbose=False)
    # DeepSpeed reads the environment when it is imported, so it comes after that.
    from comoe.distributed import barrier, is_main

    function, arguments = json.loads((folder / "in.json").read_text(encoding="utf-8"))
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**arguments)
    if is_main():
        (folder / "out.json").write_text(json.dumps(result), encoding="utf-8")
    barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort a normal exit.
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
