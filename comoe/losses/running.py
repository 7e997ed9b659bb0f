"""Sums over an optimizer step whose micro-steps are differentiated one after another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class RunningSums:
    """What all ranks have summed since the step began, with the gradient of the present micro-step.

    For terms that are no mean over rows: such a term is taken of all that the step has seen so far.

    Args:
        sum_with_gradient: sum over ranks whose gradient is the sum of the ranks' gradients; reached by every rank in
            every call, and in every backward pass.
    """

    def __init__(self, sum_with_gradient: Callable[[Tensor], Tensor]) -> None:
        self._sum_with_gradient = sum_with_gradient
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the sums: a new optimizer step begins."""
        self._earlier: Tensor | None = None
        self._calls = 0

    def add(self, own: Tensor) -> Tensor:
        """The sums with this rank's share of one more micro-step."""
        sums = self._sum_with_gradient(own)
        self._calls += 1
        if self._earlier is not None:
            # The step's mean over micro-steps divides this gradient by their number, while a sum over more tokens
            # turns less: together that would count a token of a late micro-step for less than one of the first.
            sums = self._earlier + sums.detach() + self._calls * (sums - sums.detach())
        self._earlier = sums.detach()
        return sums
