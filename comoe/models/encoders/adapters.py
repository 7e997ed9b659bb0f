"""Ways to put a cooperative block beside a layer's feed-forward, and to run rows of one text together below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from comoe.models.moe.block import ContextHolder, CooperativeBlock


class BeforeResidualNorm(nn.Module):
    """Wraps a layer's ``output`` module, LN(dropout(dense(hidden)) + x): the block's update joins the residual x.

    So the sum under the norm is FFN(x) + block(x) + x: the block sits beside the feed-forward.
    """

    def __init__(self, inner: nn.Module, block: CooperativeBlock) -> None:
        super().__init__()
        self.inner = inner
        self.block = block

    def forward(self, hidden_BLF: Tensor, x_BLM: Tensor) -> Tensor:
        """The layer's output; ``hidden_BLF`` is the feed-forward's hidden state, ``x_BLM`` its input."""
        return self.inner(hidden_BLF, x_BLM + self.block(x_BLM))


class BesideFeedForward(nn.Module):
    """Wraps a whole feed-forward: FFN(x) + block(x)."""

    def __init__(self, inner: nn.Module, block: CooperativeBlock) -> None:
        super().__init__()
        self.inner = inner
        self.block = block

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The feed-forward's output with the block's update, before residual and norm."""
        return self.inner(x_BLM) + self.block(x_BLM)


class _Passed:
    """Takes a feed-forward's input past its first half; empty before and after each call of the layer."""

    value: Tensor | None = None


class FirstHalf(nn.Module):
    """Wraps the first linear layer of a feed-forward that is no module of its own; returns what it does."""

    def __init__(self, inner: nn.Module, passed: _Passed) -> None:
        super().__init__()
        self.inner = inner
        self._passed = passed

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The first half's hidden state."""
        self._passed.value = x_BLM
        return self.inner(x_BLM)


class SecondHalf(nn.Module):
    """Wraps the second linear layer: FFN(x) + block(x), x being what the first one read in the same call."""

    def __init__(self, inner: nn.Module, block: CooperativeBlock, passed: _Passed) -> None:
        super().__init__()
        self.inner = inner
        self.block = block
        self._passed = passed

    def forward(self, hidden_BLF: Tensor) -> Tensor:
        """The feed-forward's output with the block's update, before dropout, residual and norm."""
        x_BLM, self._passed.value = self._passed.value, None
        return self.inner(hidden_BLF) + self.block(x_BLM)


def wrap(site: str, wrapper: Any) -> Any:
    """(layer, block) -> None: put ``wrapper(module, block)`` in the place of the layer's module ``site``."""

    def attach(layer: nn.Module, block: CooperativeBlock) -> None:
        setattr(layer, site, wrapper(getattr(layer, site), block))

    return attach


def wrap_t5(layer: nn.Module, block: CooperativeBlock) -> None:
    """T5's feed-forward lies in the last of a layer's sub-layers, behind its norm and before its dropout."""
    wrap("DenseReluDense", BesideFeedForward)(layer.layer[-1], block)


def wrap_pair(layer: nn.Module, block: CooperativeBlock) -> None:
    """BART's layers call two linear layers, and the dropout behind them, themselves."""
    passed = _Passed()
    layer.fc1, layer.fc2 = FirstHalf(layer.fc1, passed), SecondHalf(layer.fc2, block, passed)


def run_per_row(layers: Iterable[nn.Module], holder: ContextHolder) -> None:
    """Let layers run once per row, in place, whether what they are given is per text or per row.

    Args:
        layers: the first one with a block, and all behind it.
        holder: its context has the ``fan_out`` of the running encode.
    """
    for layer in layers:
        # The forward is wrapped, not the module: the names of its weights stay as they are.
        layer.forward = partial(_per_row, layer.forward, holder)


def _per_row(
    forward: Callable[..., Any], holder: ContextHolder, *inputs: Any, **options: Any
) -> Any:
    context = holder.context
    if context is None or context.fan_out is None:
        return forward(*inputs, **options)
    to_rows = context.fan_out.to_rows
    return forward(*map(to_rows, inputs), **{key: to_rows(value) for key, value in options.items()})
