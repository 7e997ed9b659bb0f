"""A moving average of the weights: beside them, in their place for evaluation, saved whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comoe.train.parallel.setup import gather_full_state, local_shares


class WeightAverage:
    """The exponential moving average of the trained weights of a model, this rank's part of it, float32.

    After step t (from 0) it moves by 1 - min(decay, t / (t + 1)) towards the weights: it is their
    mean over all steps at first, and what the model began with counts for nothing. The same on any
    layout: at ZeRO 1 and 2 a rank averages what it computes with, at ZeRO 3 its shares.

    Args:
        deepspeed_engine: its module is an ``Objective``.
        decay: ``train.average_weights``.

    Source: Polyak & Juditsky 1992; the growing decay of Mean Teacher, arXiv:1703.01780.
    """

    def __init__(self, deepspeed_engine: Any, decay: float) -> None:
        self.deepspeed = deepspeed_engine
        self.decay = decay
        self._weights = {
            name: weight
            for name, weight in deepspeed_engine.module.model.named_parameters()
            if weight.requires_grad
        }
        self.values = {name: _own(weight).float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimizer step, numbered from 0, that has changed the weights."""
        share = 1 - min(self.decay, step / (step + 1))
        for name, weight in self._weights.items():
            self.values[name].lerp_(_own(weight).float(), share)

    def full_state(self) -> dict[str, Tensor]:
        """``gather_full_state`` with the averages in the place of the weights."""
        return gather_full_state(self.deepspeed, self.values)

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor]) -> None:
        """Take the averages from what ``full_state`` gave, on whatever layout.

        Args:
            read: plain name of a weight -> the weight, whole.
        """
        for name, value in local_shares(self.deepspeed, read, self._weights):
            self.values[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the averages; afterwards its weights are what they were, to the bit."""
        kept = {name: _own(weight).clone() for name, weight in self._weights.items()}
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            if hasattr(weight, "ds_id"):
                # A weight that is whole at the moment would go on as it is; the next pass gathers
                # it again.
                weight.partition()
            _own(weight).copy_(values[name])


def _own(weight: nn.Parameter) -> Tensor:
    """This rank's numbers of a weight: its share at ZeRO 3, else all."""
    return weight.ds_tensor.data if hasattr(weight, "ds_id") else weight.data
