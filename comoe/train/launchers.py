"""Which rank a launcher made of this process, read from the variables of each of them; and ranks without a launcher.

Torch is not imported before ranks are started: the supervisor of ``--restarts`` reads its place too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import psutil

Environment = Mapping[str, str]

LOOPBACK = "127.0.0.1"
"""Address that this machine alone can reach."""

STARTING = "comoe: starting"
"""Beginning of the line that says how many ranks a command starts."""

PORTS = (20000, 10000)
"""First and number of the ports of Slurm steps, below those that systems give to outgoing connections."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one process is in its run."""

    launcher: str
    """Key of ``LAUNCHERS``."""
    rank: int
    world: int
    """Ranks of the run."""
    local_rank: int
    local_size: int
    """Ranks on this machine."""
    node: int
    nodes: int
    address: str
    """Host of rank 0."""
    port: int


def place_of_rank(environment: Environment) -> RankPlace | None:
    """The place that a launcher gave to this process; None for a plain start.

    Raises:
        ValueError: a variable is missing, or is no number.
    """
    for read in LAUNCHERS.values():
        if place := read(environment):
            return place
    return None


def settle_place(environment: MutableMapping[str, str]) -> RankPlace | None:
    """``place_of_rank``, written down under the names that torch and DeepSpeed read."""
    place = place_of_rank(environment)
    if place is not None:
        numbers = {
            "RANK": place.rank, "WORLD_SIZE": place.world, "LOCAL_RANK": place.local_rank,
            "LOCAL_SIZE": place.local_size, "CROSS_RANK": place.node, "CROSS_SIZE": place.nodes,
            "MASTER_ADDR": place.address, "MASTER_PORT": place.port,
        }  # fmt: skip
        environment.update({name: str(number) for name, number in numbers.items()})
    return place


def threads_of_rank(environment: Environment, cores: int, *, torchruns_own: bool) -> int | None:
    """Threads that a rank should take; None where the user has settled it with ``OMP_NUM_THREADS``.

    Args:
        environment: after ``settle_place``.
        cores: that this process may run on.
        torchruns_own: whether torchrun set the variable, which it does to 1 where the user has not.
    """
    if "OMP_NUM_THREADS" in environment and not torchruns_own:
        return None
    share = max(1, cores // int(environment.get("LOCAL_SIZE", environment["WORLD_SIZE"])))
    # Slurm may have bound this task to cores of its own, which are not to be divided again.
    return min(cores, _number(environment, "SLURM_CPUS_PER_TASK", share))


def first_host(nodes: str) -> str:
    """The first machine of a list in Slurm's short form: ``gpu[07-09,12],login`` begins with ``gpu07``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else "")


def _number(environment: Environment, name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment has {name}={value!r}, where a launcher sets a whole number; unset "
            "what is left of another launcher, or set it."
        )
    return int(value)


def _place(launcher: str, environment: Environment, **numbers: int) -> RankPlace:
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    port = numbers.pop("port", None) or _number(environment, "MASTER_PORT", 29500)
    return RankPlace(launcher, address=address, port=port, **numbers)


def _torchrun(environment: Environment) -> RankPlace | None:
    if "LOCAL_WORLD_SIZE" not in environment or "RANK" not in environment:
        return None
    local_size, world = (_number(environment, name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return _place(
        "torchrun",
        environment,
        rank=_number(environment, "RANK"),
        world=world,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_size=local_size,
        node=_number(environment, "GROUP_RANK", 0),
        nodes=_number(environment, "GROUP_WORLD_SIZE", max(1, world // local_size)),
    )


def _deepspeed(environment: Environment) -> RankPlace | None:
    if "LOCAL_RANK" not in environment or "RANK" not in environment:
        return None
    world = _number(environment, "WORLD_SIZE")
    local_size = _number(environment, "LOCAL_SIZE", world)
    return _place(
        "deepspeed",
        environment,
        rank=_number(environment, "RANK"),
        world=world,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_size=local_size,
        node=_number(environment, "CROSS_RANK", 0),
        nodes=_number(environment, "CROSS_SIZE", -(-world // max(1, local_size))),
    )


def _kubernetes(environment: Environment) -> RankPlace | None:
    """One process in each pod, as the training operator and indexed jobs describe it."""
    index = "RANK" if "RANK" in environment else "JOB_COMPLETION_INDEX"
    if index not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, world = _number(environment, index), _number(environment, "WORLD_SIZE")
    if world > 1 and "MASTER_ADDR" not in environment:
        raise ValueError(
            f"{index} and WORLD_SIZE are set and MASTER_ADDR is not; set it to the host of rank 0."
        )
    numbers = {"rank": rank, "world": world, "node": rank, "nodes": world}
    return _place("kubernetes", environment, local_rank=0, local_size=1, **numbers)


def _slurm(environment: Environment) -> RankPlace | None:
    """A task of ``srun``; the shell of ``sbatch`` or ``salloc`` around it is none."""
    world = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if world < 2:
        return None
    node = _number(environment, "SLURM_NODEID", 0)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    first, number = PORTS
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    # Tasks of each machine: 2(x3),1 is 2, 2, 2, 1.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    per_node = [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]
    return _place(
        "slurm",
        {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(first + (37 * job + step) % number),
            **environment,
        },
        rank=_number(environment, "SLURM_PROCID"),
        world=world,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=per_node[node] if node < len(per_node) else max(1, world // nodes),
        node=node,
        nodes=nodes,
    )


LAUNCHERS: dict[str, Callable[[Environment], RankPlace | None]] = {
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "kubernetes": _kubernetes,
    "slurm": _slurm,
}
"""Launcher -> reader of its variables, the most particular first: torchrun may run inside of a Slurm step."""


RANK_BYTES = 1 << 28
"""Main memory that a rank takes at least, before it has a model: the libraries alone."""


def check_ranks(asked: int | None) -> None:
    """Refuse, before any is started, ranks that this machine cannot hold.

    Raises:
        ValueError: there are too many.
    """
    have = psutil.virtual_memory().total + psutil.swap_memory().total
    if asked is not None and asked * RANK_BYTES > have:
        raise ValueError(
            f"--ranks is {asked:,}; each takes {RANK_BYTES >> 20} MiB and more, and this machine "
            f"has {have / 2**30:,.1f} GiB: at most {have // RANK_BYTES:,}."
        )


def start_ranks_here(asked: int | None) -> int | None:
    """Start this command as several ranks on this machine, by torchrun's agent, and wait for them.

    Args:
        asked: number of ranks; None is one per GPU, or one where there is none.

    Returns:
        The exit code of the run; None if this process is to be the only rank.
    """
    import torch

    gpus = torch.cuda.device_count()
    ranks = asked or max(1, gpus)
    if ranks < 2:
        return None
    from comoe.distributed import run_as_ranks

    where = "one per GPU" if ranks == gpus else f"{gpus} GPUs" if gpus else "on the CPU"
    print(f"{STARTING} {ranks} ranks, {where}", file=sys.stderr, flush=True)
    return run_as_ranks(ranks, [sys.executable, "-u", *sys.orig_argv[1:]])


def refuse_restarts_under_torchrun(restarts: int) -> None:
    """The supervisors of ``--restarts`` meet on the launcher's port, which torchrun's agent holds.

    Raises:
        ValueError: both are asked for.
    """
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "--restarts does not work under torchrun, whose agent holds the port; start the ranks "
            "with comoe train --ranks N --restarts ..., or with deepspeed."
        )
