"""``comoe bench contrastive``: the closed form, the full matrix, open_clip's local form, the reference code."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Target,
    machine_note,
    median,
    ratio,
    spread_of,
    take_turns,
)
from comoe.config.recipe import ContrastiveConfig
from comoe.losses.contrastive.loss import ContrastiveLoss
from comoe.tasks.task import Task
from comoe.train.environment import M_MMAP_THRESHOLD, set_thresholds
from comoe.types import Batch, ModelOutput

TEMPERATURE = 0.1

LABELS = 3

REFERENCE_POSTS = 4
"""Posts of one rank in the reference code's own settings."""


@dataclass(frozen=True, slots=True)
class EmbeddedPosts:
    """The posts of all ranks on the first rank before the loss."""

    own_BP: Tensor
    others_GP: Tensor
    """Embeddings that the other ranks send."""
    labels_G: Tensor
    """Labels of all posts, its own first."""

    def gathered(self) -> Tensor:
        """Result of a gather: a new tensor with the rows of all ranks."""
        return torch.cat([self.own_BP, self.others_GP])


def make_posts(count: int, ranks: int, *, width: int) -> EmbeddedPosts:
    """Random unit-length rows with random labels, the same on every call."""
    draw = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(count, width, generator=draw), dim=1)
    own = count // ranks
    return EmbeddedPosts(
        rows[:own].clone(), rows[own:].clone(), torch.randint(0, LABELS, (count,), generator=draw)
    )


def ours(posts: EmbeddedPosts) -> Callable[[], Tensor]:
    """The closed form."""
    task = Task(
        "posts", "single_label", tuple(map(str, range(LABELS))), "accuracy", contrastive=True
    )
    own, ranks = len(posts.own_BP), len(posts.labels_G) // len(posts.own_BP)
    loss = ContrastiveLoss(
        (task,),
        ContrastiveConfig(temperature=TEMPERATURE),
        width=posts.own_BP.shape[1],
        gather=SimulatedRanks(posts, ranks),
        ranks=ranks,
    )
    blank, ids = torch.ones(own, 1, dtype=torch.int64), torch.arange(own)
    batch = Batch(blank, blank, None, blank.bool(), ids, ids, {"posts": posts.labels_G[:own]})

    def step() -> Tensor:
        own_BP = posts.own_BP.detach().requires_grad_()
        loss(ModelOutput({}, {"posts": own_BP}, {}, (), ids[:0]), batch)[0].backward()
        return own_BP.grad

    return step


class SimulatedRanks:
    """The gather of the first rank: its rows and those of the other ranks in a new tensor.

    Numbers that the others would compute from their own rows are replaced by the first rank's.
    """

    def __init__(self, posts: EmbeddedPosts, ranks: int) -> None:
        self.ranks = ranks
        others = posts.labels_G[len(posts.own_BP) :, None]
        self.packed_GQ = torch.cat(
            [posts.others_GP, others, torch.zeros(len(others), 1), others], dim=1
        )

    def __call__(self, rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
        is_packed = rows.shape[1] == self.packed_GQ.shape[1]
        return torch.cat([rows, self.packed_GQ]) if is_packed else rows.repeat(self.ranks, 1), 0


def full(posts: EmbeddedPosts) -> Callable[[], Tensor]:
    """Gather with gradient, and the matrix of all anchors with all rows, by autograd; as in the SupCon paper."""
    return lambda: _dense(posts.gathered().requires_grad_(), posts.labels_G, len(posts.labels_G))


def local(posts: EmbeddedPosts) -> Callable[[], Tensor]:
    """open_clip's ``local_loss``: this rank's anchors with all rows, gathered with gradient, by autograd."""
    return lambda: _dense(posts.gathered().requires_grad_(), posts.labels_G, len(posts.own_BP))


def reference(posts: EmbeddedPosts) -> Callable[[], Tensor]:
    """The loss in the code of the TaCL-CoMoE paper: the few posts of one rank, normalized over the anchors."""

    def step() -> Tensor:
        rows_NP = posts.own_BP[:REFERENCE_POSTS].detach().requires_grad_()
        labels_N = posts.labels_G[:REFERENCE_POSTS]
        similarity_NN = F.normalize(rows_NP, dim=1) @ F.normalize(rows_NP, dim=1).T / TEMPERATURE
        other_NN = ~torch.eye(len(rows_NP), dtype=torch.bool)
        positive_NN = (labels_N[:, None] == labels_N) & other_NN
        exp_NN = similarity_NN.exp() * other_NN
        log_NN = similarity_NN - torch.log(exp_NN.sum(dim=0, keepdim=True) + 1e-12)
        (-(log_NN * positive_NN).sum(1) / (positive_NN.sum(1) + 1e-12)).mean().backward()
        return rows_NP.grad

    return step


def _dense(rows_GP: Tensor, labels_G: Tensor, anchors: int) -> Tensor:
    similarity_AG = (rows_GP[:anchors] / TEMPERATURE) @ rows_GP.T
    self_AG = torch.eye(anchors, len(rows_GP), dtype=torch.bool)
    positive_AG = (labels_G[:anchors, None] == labels_G) & ~self_AG
    lse_A = similarity_AG.masked_fill(self_AG, -torch.inf).logsumexp(dim=1)
    counts_A = (torch.bincount(labels_G) - 1)[labels_G[:anchors]]
    attraction_A = (similarity_AG * positive_AG).sum(dim=1) / counts_A.clamp_min(1)
    ((lse_A - attraction_A) * (counts_A > 0)).mean().backward()
    return rows_GP.grad


FORMS: dict[str, Callable[[EmbeddedPosts], Callable[[], Tensor]]] = {
    "ours": ours,
    "full": full,
    "local": local,
    "reference": reference,
}
"""Contestant -> (posts) -> one forward and backward pass, which returns the gradient of its rows."""


def times(
    batches: Sequence[int], *, ranks: int, width: int, rounds: int, limit: int
) -> dict[str, Any]:
    """Seconds of one forward and backward pass on the first of ``ranks`` ranks, interleaved; see ``Size``."""
    found = {}
    for count in batches:
        posts = make_posts(count, ranks, width=width)
        contestants = {
            name: Contestant(form(posts))
            for name, form in FORMS.items()
            if needs(name, count, ranks, width) <= limit
        }
        # The large ones take seconds a round.
        taken = take_turns(contestants, rounds=max(3, min(rounds, rounds * 8192 // count)))
        found |= {f"{name}/{count}": values for name, values in taken.items()}
    return {"times": found, "note": machine_note("CPU", torch.get_num_threads())}


def needs(name: str, count: int, ranks: int, width: int) -> float:
    """Peak bytes of a contestant, from the tensors that its form needs at one time."""
    anchors = {"full": count, "local": count // ranks}.get(name, 0)
    return BYTES_PER_PAIR * anchors * count + 4 * 2 * count * width


BYTES_PER_PAIR = 2 * 4 + 2 * 1 + 4 * 4
"""Peak of a dense form per anchor and row, in the backward pass of logsumexp: saved are similarities,
masked similarities and two masks; four matrices are intermediate."""


def peak(form: str, *, count: int, ranks: int, width: int) -> float:
    """Peak bytes that a forward and backward pass adds to this process, which should be fresh."""
    # Large blocks are mapped one by one and unmapped when freed, so that none is cached.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    try:
        FORMS[form](make_posts(256, ranks, width=width))()
        return peak_bytes(FORMS[form](make_posts(count, ranks, width=width)))
    finally:
        set_thresholds(libc)


def peak_bytes(step: Callable[[], None]) -> float:
    """Peak resident memory of a call, above that before it; Linux only, as it resets the kernel's high-water mark.

    Raises:
        RuntimeError: the kernel has no such mark.
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
    """Bytes that rank 0 sends to each other rank in collectives, by contestant, on real ranks."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    posts = make_posts(count, ranks, width=width)
    own = len(posts.own_BP)
    task = Task("posts", "single_label", ("0", "1", "2"), "accuracy", contrastive=True)
    loss = ContrastiveLoss((task,), ContrastiveConfig(), width=width, ranks=ranks)
    blank, ids = torch.ones(own, 1, dtype=torch.int64), torch.arange(own)
    labels = posts.labels_G[:own]
    batch = Batch(blank, blank, None, blank.bool(), ids, ids, {"posts": labels})
    with counted_bytes() as ours_sent:
        own_BP = posts.own_BP.detach().requires_grad_()
        loss(ModelOutput({}, {"posts": own_BP}, {}, (), ids[:0]), batch)[0].backward()
    with counted_bytes() as reference_sent:
        own_BP = posts.own_BP.detach().requires_grad_()
        rows_GP = _GatherWithGradient.apply(own_BP)
        labels_G = [torch.empty_like(labels) for _ in range(ranks)]
        dist.all_gather(labels_G, labels.contiguous())
        similarity = rows_GP @ rows_GP.T
        (similarity * (torch.cat(labels_G) == torch.cat(labels_G)[:, None])).sum().backward()
    return {"ours": ours_sent[0], "gather with gradient": reference_sent[0]}


@contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """Within the context the first item counts the bytes of collectives for one other rank."""
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
    # All rows go to each other rank.
    "all_gather": lambda arguments: _bytes(arguments[1]),
    # One part of W goes to each.
    "all_to_all_single": lambda arguments: _bytes(arguments[1]) / dist.get_world_size(),
    # The minimum: a reduce-scatter, then an all-gather.
    "all_reduce": lambda arguments: 2 * _bytes(arguments[0]) / dist.get_world_size(),
}
"""Collective -> (its arguments) -> bytes for one other rank."""


class _GatherWithGradient(torch.autograd.Function):
    """As in torch.distributed.nn: the gradients of the gathered rows are summed on their ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A reduce-scatter, which gloo lacks, by an all-to-all and a sum.
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient.contiguous())
        return received.view(dist.get_world_size(), -1, gradient.shape[1]).sum(0)


COSTS = "comoe.benchmarks.contrastive"


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the benchmark."""

    batches: tuple[int, ...] = (256, 1024, 4096, 8192, 16384, 65536)
    """Posts G on all ranks."""
    ranks: int = 8
    """Ranks W that one process simulates, itself the first."""
    width: int = 128
    """P."""
    rounds: int = 15
    """Timed rounds of the small batches; the large ones have fewer."""
    limit: int = 3 << 30
    """Maximum bytes of a contestant's matrices; larger ones do not run, and their memory is computed."""
    checked: int = 8192
    """Posts at which the computed memory of the full form is compared with the measured one."""


TARGETS = {
    "memory_over_full_65536": Target(at_most=0.05),
    "time_over_full_1024": Target(at_most=1.0),
    "time_over_full_8192": Target(at_most=1.0),
    "wire_over_gather_grad": Target(at_most=0.55),
}
"""Rows without a target are informative."""


def run(
    json_path: Path | None = None,
    *,
    config: Path | None = None,
    rounds: int | None = None,
    size: Size | None = None,
) -> Measurements:
    """Measure, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: ignored, because the loss does not depend on a recipe.
        rounds: timed rounds instead of the default.
        size: sizes instead of the default.
    """
    size = size or Size()
    size = size if rounds is None else replace(size, rounds=rounds)
    title = "contrastive: forward and backward of the loss on one rank of several"
    report = Measurements(title, TARGETS)
    shape = {"width": size.width, "rounds": size.rounds, "limit": size.limit}
    shape |= {"batches": list(size.batches)}
    spread = run_on_ranks(f"{COSTS}:times", 1, ranks=size.ranks, **shape)
    few = [count for count in size.batches if count in (1024, 8192)]
    single = run_on_ranks(f"{COSTS}:times", 1, ranks=1, **(shape | {"batches": few}))
    report.notes += [
        spread["note"],
        f"width {size.width}, {size.ranks} ranks, one process simulates the first; full: every rank computes G x G",
        "one rank: the same with all posts on a single rank, so all anchors are its own",
    ]
    add_memory(report, size)
    add_times(report, spread["times"], suffix="")
    add_times(report, single["times"], suffix="_one_rank")
    sent = run_on_ranks(f"{COSTS}:wire", 2, count=1024, width=size.width)
    sent_ratio = spread_of([sent["ours"] / sent["gather with gradient"]])
    report.add("wire_over_gather_grad", asdict(sent_ratio))
    report.publish(json_path)
    return report


def add_memory(report: Measurements, size: Size) -> None:
    """Peak extra memory of ours, measured in fresh processes, over that of the full form."""
    shape = {"ranks": size.ranks, "width": size.width}
    for count in size.batches:
        measured = run_on_ranks(f"{COSTS}:peak", 1, form="ours", count=count, **shape)
        whole = needs("full", count, size.ranks, size.width)
        report.add(f"memory_over_full_{count}", asdict(spread_of([measured / whole])))
        mib = measured / 2**20
        report.notes.append(f"peak extra memory of ours at {count:,} posts: {mib:,.0f} MiB")
    peaks = {
        name: run_on_ranks(f"{COSTS}:peak", 1, form=name, count=size.checked, **shape)
        for name in FORMS
    }
    computed = needs("full", size.checked, size.ranks, size.width)
    report.add("full_measured_over_computed", asdict(spread_of([peaks["full"] / computed])))
    listed = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in peaks.items())
    report.notes += [
        f"peak extra memory at {size.checked:,} posts: {listed}",
        f"memory of the full form is computed: {BYTES_PER_PAIR} bytes per pair, {computed / 2**20:,.0f} MiB at "
        f"{size.checked:,}; measured there: {peaks['full'] / 2**20:,.0f} MiB",
    ]


def add_times(report: Measurements, times: Mapping[str, Any], *, suffix: str) -> None:
    """Time of ours over that of each other form that ran, per batch, and the medians."""
    for name in times:
        form, _, count = name.partition("/")
        # The reference code's few posts are the same work at every size: no ratio.
        if form in ("full", "local"):
            figure = asdict(ratio(times, f"ours/{count}", name))
            report.add(f"time_over_{form}_{count}{suffix}", figure)
        case = f"{int(count):,} posts{suffix.replace('_', ' ')}"
        report.add_time(form, median(times, name), case=case)
