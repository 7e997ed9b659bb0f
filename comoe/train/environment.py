"""Setup of a process before the import of DeepSpeed: accelerator, threads, rendezvous, quiet libraries."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import logging
import os
import platform
import socket
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from comoe.train.launchers import LOOPBACK, settle_place, threads_of_rank

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""mallopt numbers of glibc: blocks above the first are mapped and unmapped, free space above the
second is returned."""

THRESHOLDS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""Bytes: what glibc comes to by itself, unless ``prepare_process`` asked this process for more. It
cannot be read back; whoever changes them for a while puts these back."""

PACKAGES = (
    "comoe",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "accelerate",
    "tensorboard",
    "numpy",
)


def prepare_process(*, verbose: bool) -> None:
    """Set the environment that DeepSpeed reads on import. Call it before ``comoe.train.parallel.setup`` is imported.

    A user need not set any variable: DeepSpeed gets the CPU accelerator without a GPU, a plain
    ``python`` start becomes a world of one rank, each rank takes its share of the cores, and on
    several machines it talks over the network that rank 0 is in, on a single one over none.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    if settle_place(os.environ) is None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    several = int(os.environ.get("CROSS_SIZE", "1")) > 1
    if interface := interface_towards(os.environ["MASTER_ADDR"] if several else LOOPBACK):
        # gloo takes the address of the machine's own name, which often is one of the loopback where
        # it should not, and one that others reach where nobody else has to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = threads_of_rank(os.environ, available_cores(), torchruns_own=_torchrun_set_threads())
    if threads is not None:
        torch.set_num_threads(threads)
    if not verbose:
        _quieten()


def _torchrun_set_threads() -> bool:
    """True if ``OMP_NUM_THREADS`` is torchrun's own 1, which the user did not give to torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        # What a process began with, not what it has set since.
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interface_towards(address: str) -> str:
    """Name of this machine's network interface toward an address; empty if there is none."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return ""
    found = [
        name
        for name, cards in psutil.net_if_addrs().items()
        if any(card.address == own for card in cards)
    ]
    return found[0] if found else ""


def describe_environment(**more: Any) -> Mapping[str, Any]:
    """Versions, machine and command, for ``environment.json``."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        **more,
    }


def _keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of returning them to the system.

    Every step frees and asks for the same gradients and buffers. Returned pages come back one fault
    at a time, zeroed: a quarter of a training step on a CPU (0.28 s of system time per step against
    0.01 s, measured on the default recipe). Does nothing where the C library is not glibc.
    """
    library = ctypes.util.find_library("c")
    libc = ctypes.CDLL(library) if library else None
    if hasattr(libc, "gnu_get_libc_version"):
        THRESHOLDS.update({M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: 2**31 - 1})
        set_thresholds(libc)


def set_thresholds(libc: Any) -> None:
    """Have glibc, loaded with ctypes, go by ``THRESHOLDS``."""
    for which, size in THRESHOLDS.items():
        # Older ones refuse to keep blocks above 32 MiB, and would stay at what was set before.
        if not libc.mallopt(which, size):
            libc.mallopt(which, 32 << 20)


def environment_of_a_child() -> dict[str, str]:
    """The variables with which ``python -m comoe...`` imports this comoe, whatever the working folder holds."""
    found = dict(os.environ, PYTHONSAFEPATH="1")
    root = Path(__file__).resolve().parents[2]
    # A checkout may not be installed. An installed package is found anyway, and its neighbors must
    # not come before the standard library.
    if (root / "launch").is_dir():
        found["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(root), os.environ.get("PYTHONPATH")])
        )
    return found


def free_port() -> int:
    """A free TCP port of this machine; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quieten() -> None:
    # DeepSpeed names its logger after itself and reads no variable at the level we want; the rest
    # are the usual ones.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "datasets", "transformers", "matplotlib", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("deepspeed", "torch", "transformers", "datasets", "tensorboard"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
