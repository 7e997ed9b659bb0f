"""Runs in the processes of ``launch/bench.py contrastive``: time, memory and bytes on the wire of the losses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comoe.benchmarks.contrastive_forms import FORMS, make_posts
from comoe.benchmarks.report import machine_note
from comoe.benchmarks.timing import Contestant, take_turns
from comoe.distributed import gather_detached
from comoe.losses.contrastive import ContrastiveLoss
from comoe.protocols import Batch, ModelOutput
from comoe.schema import ContrastiveConfig
from comoe.tasks.catalog import Task
from comoe.train.environment import M_MMAP_THRESHOLD, set_thresholds


def times(batches: Sequence[int], *, ranks: int, width: int, rounds: int, limit: int) -> dict[str, Any]:
    """Seconds of one forward and backward pass on the first of ``ranks`` ranks, all contestants in turns.

    Args:
        batches: posts G on all ranks.
        ranks: W.
        width: P.
        rounds: timed rounds.
        limit: bytes that a contestant's matrices may take; who needs more is left out.
    """
    found = {}
    for count in batches:
        posts = make_posts(count, ranks, width=width)
        contestants = {
            name: Contestant(form(posts)) for name, form in FORMS.items() if needs(name, count, ranks, width) <= limit
        }
        # The large ones take seconds a round.
        taken = take_turns(contestants, rounds=max(3, min(rounds, rounds * 8192 // count)))
        found |= {f"{name}/{count}": values for name, values in taken.items()}
    return {"times": found, "note": machine_note("CPU", torch.get_num_threads())}


def needs(name: str, count: int, ranks: int, width: int) -> float:
    """Bytes that a contestant holds at its peak, from the tensors that its form needs at one time."""
    anchors = {"full": count, "local": count // ranks}.get(name, 0)
    return BYTES_PER_PAIR * anchors * count + 4 * 2 * count * width


BYTES_PER_PAIR = 2 * 4 + 2 * 1 + 4 * 4
"""Of a dense form, per anchor and row, at its peak, in the backward pass of logsumexp: the similarities and the masked
ones, saved, two masks, saved, and four matrices on the way to the gradient of the similarities."""


def peak(form: str, *, count: int, ranks: int, width: int) -> float:
    """Most bytes that a forward and backward pass adds to this process, which should be a fresh one."""
    # Every large block mapped on its own, and unmapped when freed: what the allocator keeps is no need of the form.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    try:
        FORMS[form](make_posts(256, ranks, width=width))()
        return peak_bytes(FORMS[form](make_posts(count, ranks, width=width)))
    finally:
        set_thresholds(libc)


def peak_bytes(step: Callable[[], None]) -> float:
    """Most resident memory during a call, above that before it; Linux only, for it resets the kernel's high-water mark.

    Raises:
        RuntimeError: the kernel keeps no such mark.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError("peak memory is measured on Linux only: it reads /proc/self/status.")
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}.")


def wire(count: int, *, width: int) -> dict[str, float]:
    """Bytes that rank 0 hands to collectives, by contestant, on real ranks; of what it sends to each other rank."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    posts = make_posts(count, ranks, width=width)
    own = len(posts.own_BP)
    task = Task("posts", "single_label", ("0", "1", "2"), "accuracy", contrastive=True)
    loss = ContrastiveLoss((task,), ContrastiveConfig(), width=width, gather=gather_detached, world_size=ranks)
    blank, ids = torch.ones(own, 1, dtype=torch.int64), torch.arange(own)
    labels = posts.labels_G[:own]
    batch = Batch(blank, blank, None, blank.bool(), ids, ids, {"posts": labels})
    with counted_bytes() as ours_sent:
        own_BP = posts.own_BP.detach().requires_grad_()
        loss(ModelOutput({}, {"posts": own_BP}, {}, (), ids[:0]), batch)[0].backward()
    with counted_bytes() as theirs_sent:
        own_BP = posts.own_BP.detach().requires_grad_()
        rows_GP = _GatherWithGradient.apply(own_BP)
        labels_G = [torch.empty_like(labels) for _ in range(ranks)]
        dist.all_gather(labels_G, labels.contiguous())
        similarity = rows_GP @ rows_GP.T
        (similarity * (torch.cat(labels_G) == torch.cat(labels_G)[:, None])).sum().backward()
    return {"ours": ours_sent[0], "gather with gradient": theirs_sent[0]}


@contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """While open, the first item grows by what this rank hands to a collective for one other rank."""
    sent = [0.0]
    originals = {name: getattr(dist, name) for name in SHARES}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            sent[0] += SHARES[name](arguments)
            return originals[name](*arguments, **named)

        return call

    for name in SHARES:
        setattr(dist, name, wrapped(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


SHARES: Mapping[str, Callable[[Sequence[Any]], float]] = {
    # All of the rows go to each other rank.
    "all_gather": lambda arguments: _bytes(arguments[1]),
    # One part of W goes to each.
    "all_to_all_single": lambda arguments: _bytes(arguments[1]) / dist.get_world_size(),
    # The best there is: scatter the sums, then gather them.
    "all_reduce": lambda arguments: 2 * _bytes(arguments[0]) / dist.get_world_size(),
}
"""Collective -> (its arguments) -> bytes for one other rank."""


class _GatherWithGradient(torch.autograd.Function):
    """As torch.distributed.nn does it: the gradient of the gathered rows goes back to their ranks, summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A reduce-scatter, which gloo lacks: each rank sends every other rank its part, and sums what it gets.
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient.contiguous())
        return received.view(dist.get_world_size(), -1, gradient.shape[1]).sum(0)
