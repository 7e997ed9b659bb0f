"""What share of a block's own time goes into deciding who computes, by clocks inside one and the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comoe.benchmarks.layers import Block
from comoe.benchmarks.timing import Ratio, clocked, spread_of, wait_for


class Clock:
    """Sums the time between ``start`` and ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        """Begin to count."""
        wait_for(self.device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Count up to now."""
        assert self._began is not None, "stop() comes after start()"
        wait_for(self.device)
        self.seconds += time.perf_counter() - self._began
        self._began = None


class _Mark(torch.autograd.Function):
    """Identity whose backward pass calls a function."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


@contextmanager
def clocked_routing(layer: nn.Module, clock: Clock) -> Any:
    """While open, ``clock`` runs in everything that ``layer`` does to decide, forward and backward.

    Forward: from the layer's start to the start of its experts: logits, scores, top-k, counts, sort. With one rank
    nothing is sent in between; on a GPU, AutoEP's gather of the rows is, so the share is an upper limit there.
    Backward: from the gradient of the routes' weights to that of the router's input, which autograd works through
    without anything else in between.
    """
    handles = [
        layer.register_forward_pre_hook(lambda module, arguments: clock.start()),
        layer.experts.register_forward_pre_hook(lambda module, arguments: clock.stop()),
        layer.router.register_forward_pre_hook(
            lambda module, arguments: (_Mark.apply(arguments[0], clock.stop), *arguments[1:])
        ),
        layer.router.register_forward_hook(
            lambda module, arguments, answer: (_Mark.apply(answer[0], clock.start), *answer[1:])
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def routing_share(block: Block, run: Callable[[], None], *, rounds: int, device: torch.device) -> Ratio:
    """Time of routing over time of the block's whole forward and backward pass.

    Args:
        block: on one rank.
        run: one forward and backward pass of the block.
        rounds: repetitions; each gives one share.
        device: of the block.
    """
    shares = []
    run()
    for _ in range(rounds):
        clock = Clock(device)
        with clocked_routing(block.mixture, clock):
            whole = clocked(run, device)
        shares.append(clock.seconds / whole)
    return spread_of(shares)
