"""Every collective of the project. All work in one process without ``init_process_group`` too.

Rule of the house: guard the output, never the collective. Each function here must be reached by
every rank.
"""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True when a process group exists."""
    return dist.is_available() and dist.is_initialized()


def join_alone(backend: str, *, seconds: float) -> None:
    """Make the process group of a single rank, in the memory of this process, unless it has one: it opens no port."""
    if is_distributed():
        return
    store, timeout = dist.HashStore(), timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """True on the rank that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def wait_for_ranks_up_to(seconds: float) -> None:
    """How long a collective waits from now on, in every group that exists and this rank is in.

    What the group of all ranks began with was for them to find together; groups that a library
    makes without saying begin with torch's default (gloo 30 min, NCCL 10 min).
    """
    if is_distributed():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def run_as_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run a command as so many ranks of this machine, under the agent of torchrun, and wait for their end.

    A signal to this process is passed on to the ranks, which may take ten minutes to save.

    Returns:
        The exit code of the rank that failed first, 128 + signal where one ended it, else 0.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent logs what the ranks say better themselves.
    logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        # Under nohup; the agent would end the run at the end of the terminal.
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def lost_connection(error: BaseException | None) -> bool:
    """True for what a collective raises when another rank is gone or does not answer."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or any(word in text for word in _TRANSPORT):
            return True
        error = error.__cause__
    return False


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over ranks, without gradient; the argument is left as it is."""
    total = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum of a tensor over ranks; its gradient is the sum over ranks of the sum's gradients.

    So where every rank computes the same number from it, the mean over ranks of the gradients is
    that number's gradient. All ranks must run the backward pass, which is a collective too.
    """
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


def max_over_ranks(value: float) -> float:
    """Largest of the ranks' numbers, the same on all of them."""
    if not is_distributed():
        return value
    holder = torch.tensor(value, dtype=torch.float64, device=collective_device())
    dist.all_reduce(holder, op=dist.ReduceOp.MAX)
    return float(holder)


def all_gather_objects(value: Any) -> list[Any]:
    """What every rank passed in, in rank order. Pickles: only between ranks of one run."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def collective_device() -> torch.device:
    """Device on which small control tensors must live for the backend in use."""
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gpu_lacks_bf16() -> str:
    """Why this process's GPU has neither bfloat16 nor grouped matrix products; empty if it has, or there is none."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    # AMD's count is another one, and theirs have it.
    if torch.version.hip or major >= 8:
        return ""
    return (
        f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, bfloat16 needs 8.0"
    )


def choose_device(name: str) -> torch.device:
    """A device of one process; ``auto`` is the first GPU, Apple's (mps) too, or the CPU where there is none.

    Raises:
        ValueError: it does not exist, or cannot be used on this machine.
    """
    found = "mps" if torch.backends.mps.is_available() else "cpu"
    found = "cuda" if torch.cuda.is_available() else found
    try:
        device = torch.device(found if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device {name} cannot be used here ({reason}); name another one, or auto."
        ) from error
    return device


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Concatenate the first dimension over ranks, with gradient.

    Ranks may bring different numbers of rows, none too. The backward pass sums every rank's
    gradient and hands each rank its own rows, so a rank whose rows are used elsewhere gets the full
    gradient; all ranks must therefore run the backward pass of a floating-point gather.

    Args:
        rows: shape (N, ...), the same trailing shape and dtype on all ranks.

    Returns:
        All rows in rank order, shape (sum of N, ...), and the index of this rank's first row.
    """
    if world_size() == 1:
        return rows, 0
    own = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    sizes_W = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(sizes_W, own)
    sizes = [int(size) for size in torch.cat(sizes_W).tolist()]
    gathered = (
        _GatherRows.apply(rows, sizes)
        if rows.is_floating_point()
        else _all_gather_uneven(rows, sizes)
    )
    return gathered, sum(sizes[: rank()])


def gather_detached(rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Concatenate the first dimension over ranks, without gradient: one collective.

    Args:
        rows: shape (N, ...), the same trailing shape and dtype on all ranks.
        sizes: rows of each rank, the same list on all of them; None says that all bring as many.

    Returns:
        All rows in rank order, and the index at which this rank's rows begin.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows, 0
    sizes = [len(rows)] * world_size() if sizes is None else list(sizes)
    return _all_gather_uneven(rows, sizes), sum(sizes[: rank()])


def all_gather_in_group(tensor: Tensor, group: Any) -> Tensor:
    """Equal shares of the ranks of one group, concatenated in group order along the first dimension; no gradient."""
    if not is_distributed() or dist.get_world_size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def _all_gather_uneven(rows: Tensor, sizes: list[int]) -> Tensor:
    if min(sizes) == max(sizes) > 0:
        everyone = rows.new_empty((sum(sizes), *rows.shape[1:]))
        dist.all_gather(list(everyone.split(sizes)), rows.contiguous())
        return everyone
    # Padded to the largest share: gloo has no all-gather of unequal tensors.
    padded = rows.new_zeros((max(max(sizes), 1), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    """All-gather of unequal rows; its gradient is the sum over ranks of the rows' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather_uneven(rows, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]], None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward pass is the same all-reduce."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous())


_TRANSPORT = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error",
              "ncclRemoteError", "ncclSystemError", "Timed out waiting")  # fmt: skip
"""Words in the messages of gloo and NCCL, which have no class of their own."""
