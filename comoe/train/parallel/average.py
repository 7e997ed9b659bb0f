"""Weights beside those that train (a moving average; Reptile's): in their place for evaluation, saved whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from comoe.train.parallel.setup import gather_full_state, local_shares


class WeightsBeside:
    """Values beside the trained weights of a model, at first the same, this rank's part of them, float32.

    Evaluations, ``weights/model.safetensors`` of a checkpoint and the export have them. At ZeRO 1
    and 2 a rank has all that it computes with, at ZeRO 3 its shares.

    Args:
        deepspeed_engine: its module is an ``Objective``.
    """

    def __init__(self, deepspeed_engine: Any) -> None:
        self.deepspeed = deepspeed_engine
        self._weights = {
            name: weight
            for name, weight in deepspeed_engine.module.model.named_parameters()
            if weight.requires_grad
        }
        self.values = {name: _own(weight).float().clone() for name, weight in self._weights.items()}

    def full_state(self) -> dict[str, Tensor]:
        """``gather_full_state`` with the values in the place of the weights."""
        return gather_full_state(self.deepspeed, self.values)

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor]) -> None:
        """Take the values from what ``full_state`` gave, on whatever layout.

        Args:
            read: plain name of a weight -> the weight, whole.
        """
        for name, value in local_shares(self.deepspeed, read, self._weights):
            self.values[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the values; afterwards its weights are what they were, to the bit."""
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


class WeightAverage(WeightsBeside):
    """The exponential moving average of the weights.

    After step t (from 0) it moves by 1 - min(decay, t / (t + 1)) towards the weights: it is their
    mean over all steps at first, and what the model began with counts for nothing.

    Args:
        deepspeed_engine: its module is an ``Objective``.
        decay: ``train.average_weights``.

    Source: Polyak & Juditsky 1992; the growing decay of Mean Teacher, arXiv:1703.01780.
    """

    def __init__(self, deepspeed_engine: Any, decay: float) -> None:
        super().__init__(deepspeed_engine)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimizer step, numbered from 0, that has changed the weights."""
        share = 1 - min(self.decay, step / (step + 1))
        for name, weight in self._weights.items():
            self.values[name].lerp_(_own(weight).float(), share)


class OuterWeights(WeightsBeside):
    """The weights W of Reptile, where an inner loop began, while the model's go on to W'.

    Source: Nichol, Achiam & Schulman 2018, arXiv:1803.02999, algorithm 1.
    """

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """After an inner loop: W becomes W + rate (W' - W), and the next loop begins there. Every rank must call it.

        Elementwise, so that any part of a weight is moved alone. The optimizer's moments stay.
        """
        for name, weight in self._weights.items():
            split = hasattr(weight, "ds_id")
            read, write = (
                (safe_get_local_fp32_param, safe_set_local_fp32_param)
                if split
                else (safe_get_full_fp32_param, safe_set_full_fp32_param)
            )
            # In bf16 the model's weights are rounded, and most of a small step is lost in them.
            ended = _own(weight) if weight.dtype == torch.float32 else read(weight)
            self.values[name].lerp_(ended.view_as(self.values[name]), rate)
            write(weight, self.values[name])
        self._set(self.values)


def _own(weight: nn.Parameter) -> Tensor:
    """This rank's numbers of a weight: its share at ZeRO 3, else all."""
    return weight.ds_tensor.data if hasattr(weight, "ds_id") else weight.data
