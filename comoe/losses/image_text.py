"""Losses between the two sides of posts with pictures: contrast (ITC) and matching (ITM), over all ranks.

Source: methods.md section 7; the auxiliary losses of arXiv:2309.07794, contrast as in CLIP (arXiv:2103.00020), hard
negatives as in ALBEF (arXiv:2107.07651).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.losses.pairs import AllPairs, Gather, draw_texts, gather_pairs, row_tiles
from comoe.protocols import Batch, ModelOutput
from comoe.schema import ImageTextConfig

MAX_SCALE = 100.0
"""Cosines are never multiplied by more (CLIP)."""
OTHER, OWN = 0, 1
"""Answers of the matching question: another post's text, the picture's own."""

GatherWithGradient = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this rank, any number of them -> (rows of all ranks with gradient, index of this rank's first row)."""


class ITCLoss(nn.Module):
    """Image-text contrast: every picture and its own text, among the pictures and texts of all ranks.

    L = 1/2N sum over pairs i of [lse over texts j of s_ij - s_ii + lse over pictures j of s_ji - s_ii], where s is the
    cosine divided by a learned temperature. Rows of one post, and posts of the same text, are no rivals.

    Four gathers per call, none in the backward pass; every rank must reach them, with pictures or without. Memory grows
    with the pictures of all ranks, not with their square.

    Args:
        config: ``loss.image_text``.
        gather: the collective (``comoe.distributed.gather_detached``).
        world_size: ranks W that the gradient is averaged over.
    """

    def __init__(self, config: ImageTextConfig, *, gather: Gather, world_size: int) -> None:
        super().__init__()
        self.gather = gather
        self.world_size = world_size
        # Read in forward only: outside of its own module's forward ZeRO-3 leaves a parameter empty.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(config.temperature)]))

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def forward(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share, whose mean over ranks is the global value; terms ``itc``, ``itc_temperature``."""
        sides = output.image_text
        pairs = gather_pairs(sides, batch, self.gather)
        share = contrast(
            sides.image_embeddings_IP,
            sides.text_embeddings_IP,
            self.log_scale,
            pairs,
            gather=self.gather,
            world_size=self.world_size,
        )
        temperature = self.log_scale.detach().float().exp().clamp_max(MAX_SCALE).reciprocal().squeeze()
        return share, {"itc": share.detach(), "itc_temperature": temperature}


def contrast(
    image_IP: Tensor, text_IP: Tensor, log_scale: Tensor, pairs: AllPairs, *, gather: Gather, world_size: int
) -> Tensor:
    """This rank's share of the contrast (``ITCLoss``): scalar, differentiable by the first three arguments.

    The gradient is known as soon as the value is. That of picture i is W scale / 2N times the sum over texts j of
    (e^(s_ij - row_i) + e^(s_ij - column_j)) text_j, minus 2 text_i; that of a text has the sides exchanged. So the
    logarithms of the sums travel, and no gradient does. Tiles are made twice: before the sums of the others, and after.

    Args:
        image_IP: unit-length rows, blank ones too.
        text_IP: likewise.
        log_scale: logarithm of the inverse temperature, shape (1,); above ``MAX_SCALE`` its gradient counts only where
            it leads back.
        pairs: whose they are.
        gather: the collective; reached twice.
        world_size: W.
    """
    with torch.no_grad():
        numbers = [image_IP, text_IP, log_scale]
        # Float32 also where the model is not; float64 stays.
        exact = torch.float64 if image_IP.dtype == torch.float64 else torch.float32
        image, text, logarithm = (number.to(exact) for number in numbers)
        scale = logarithm.exp().clamp_max(MAX_SCALE)
        both_G2P, _ = gather(torch.stack([image, text], dim=1), sizes=pairs.sizes)
        image_GP, text_GP = both_G2P.unbind(dim=1)
        block = _Block(image, text, image_GP, text_GP, scale, pairs)
        lse, own = image.new_zeros(2, len(image)), image.new_zeros(2, len(image))
        slope_I = image.new_zeros(len(image))
        for rows, similar, diagonal in block.tiles():
            lse[:, rows], own[:, rows] = similar.logsumexp(dim=2), similar[diagonal]
            shares = (similar - lse[:, rows, None]).exp()
            # Derivative by the logarithm of the scale, per pair.
            slope_I[rows] = ((shares * similar.nan_to_num(neginf=0.0)).sum(dim=2) - own[:, rows]).sum(dim=0)
        slope_I *= pairs.real_I
        packed_G3, _ = gather(torch.cat([lse.T, slope_I[:, None]], dim=1), sizes=pairs.sizes)
        factor = (world_size / (2 * pairs.number.double())).to(image.dtype)
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        for rows, similar, diagonal in block.tiles():
            # How column j of the other side's sums pulls at row i.
            pull = (similar - lse[:, rows, None]).exp() + (similar - packed_G3[:, [1, 0]].T.unsqueeze(1)).exp()
            pull[diagonal] -= 2
            pull *= (factor * scale * pairs.real_I[rows])[:, None]
            image_gradient[rows], text_gradient[rows] = pull[0] @ text_GP, pull[1] @ image_GP
        # All ranks judge by the sum over all: the share of one may lead the other way.
        stuck = (scale >= MAX_SCALE) & (packed_G3[:, 2].sum() < 0)
        slope = torch.where(stuck, 0.0, factor * slope_I.sum())
        value = factor * ((lse - own) * pairs.real_I).sum()
    return _Known.apply(value, *numbers, image_gradient, text_gradient, slope)


class _Block(NamedTuple):
    """The similarities of this rank's pairs to those of all ranks, made tile by tile."""

    image_IP: Tensor
    text_IP: Tensor
    image_GP: Tensor
    text_GP: Tensor
    scale: Tensor
    pairs: AllPairs

    def tiles(self) -> Iterator[tuple[slice, Tensor, tuple[slice, Tensor, Tensor]]]:
        """(own rows, their similarities, where each row's own pair is in these). Similarities are (2, rows, G), of
        pictures to all texts and of texts to all pictures; -inf where the two are no rivals."""
        size = 2 * len(self.image_GP) * self.image_GP.itemsize
        for rows in row_tiles(len(self.image_IP), size, self.image_GP.device):
            images, texts = self.image_IP[rows] @ self.text_GP.T, self.text_IP[rows] @ self.image_GP.T
            counts = self.pairs.own.part(rows).rivals(self.pairs.everyone)
            here = torch.arange(len(counts), device=counts.device)
            places = here + rows.start + self.pairs.offset
            counts[here, places] = True
            similar = (self.scale * torch.stack([images, texts])).masked_fill_(~counts, -torch.inf)
            yield rows, similar, (slice(None), here, places)


class _Known(torch.autograd.Function):
    """A value whose gradients are known: (value, three arguments, their three gradients)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *numbers: Tensor) -> Tensor:
        arguments, gradients = numbers[:3], numbers[3:]
        ctx.save_for_backward(*[known.to(given.dtype) for known, given in zip(gradients, arguments, strict=True)])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[(gradient * known).to(known.dtype) for known in ctx.saved_tensors], None, None, None


class ITMLoss:
    """Image-text matching: is this the picture's own text? About half of the pictures get another post's.

    Whose text depends on seed, step and post alone (``draw_texts``): hard ones are drawn by similarity. Texts of all
    ranks take part: what the fusion reads of those that replace another (the states of all their tokens) travels to
    every rank, with gradient, so memory grows with the pictures of all ranks. Own texts are judged as the tasks saw
    them; the others take one more pass of the fusion, or of the encoder where that reads the picture too.

    Every rank runs that pass, with a pair of weight 0 if need be.

    Args:
        config: ``loss.image_text``.
        seed: of the run.
        gather: the collective (``comoe.distributed.gather_detached``).
        gather_with_gradient: for states of texts (``comoe.distributed.gather_rows``).
        world_size: ranks W that the gradient is averaged over.
    """

    def __init__(
        self,
        config: ImageTextConfig,
        *,
        seed: int,
        gather: Gather,
        gather_with_gradient: GatherWithGradient,
        world_size: int,
    ) -> None:
        self.hard = HARD[config.negatives]
        self.temperature = config.temperature
        self.seed = seed
        self.gather = gather
        self.gather_with_gradient = gather_with_gradient
        self.world_size = world_size

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share, whose mean over ranks is the global value; terms ``itm``, ``itm_accuracy``, detached."""
        sides = output.image_text
        pairs = gather_pairs(sides, batch, self.gather)
        chosen_I = draw_texts(pairs, self._similarity(output, pairs), step=batch.step, seed=self.seed)
        texts, places_I = self._exchange(sides.texts, chosen_I, pairs)
        # One of no replaced pair stands in where there is none.
        numbers_J = (chosen_I >= 0).nonzero()[:, 0]
        weight = float(len(numbers_J) > 0)
        if not weight:
            numbers_J = numbers_J.new_zeros(1)
        # Neither the dropout of the tasks' next pass, nor GradCache, may depend on this one.
        with torch.random.fork_rng([chosen_I.device] if chosen_I.is_cuda else []):
            others_J2 = sides.match(tuple(text[places_I[numbers_J]] for text in texts), numbers_J)
        kept_I = pairs.real_I & (chosen_I < 0)
        factor = self.world_size / pairs.number
        own_I = F.cross_entropy(sides.match_logits_I2, torch.full_like(chosen_I, OWN), reduction="none")
        other = F.cross_entropy(others_J2, torch.full_like(numbers_J, OTHER), reduction="sum")
        share = factor * ((own_I * kept_I).sum() + weight * other)
        # A gather with gradient is a collective in the backward pass too.
        share = share + 0.0 * sum(text.sum() for text in texts if text.is_floating_point())
        right = ((sides.match_logits_I2.argmax(dim=1) == OWN) & kept_I).sum()
        right = right + weight * (others_J2.argmax(dim=1) == OTHER).sum()
        return share, {"itm": share.detach(), "itm_accuracy": (factor * right).to(share.dtype)}

    def _similarity(self, output: ModelOutput, pairs: AllPairs) -> Callable[[slice], Tensor] | None:
        sides = output.image_text
        if not self.hard or sides.text_embeddings_IP is None:
            return None
        texts_GP, _ = self.gather(sides.text_embeddings_IP, sizes=pairs.sizes)
        images_IP = sides.image_embeddings_IP.detach()
        return lambda rows: images_IP[rows] @ texts_GP.T / self.temperature

    def _exchange(
        self, texts: tuple[Tensor, ...], chosen_I: Tensor, pairs: AllPairs
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The texts that some rank asks for, and behind them this rank's first; and where each picture's is."""
        chosen_G, _ = self.gather(chosen_I, sizes=pairs.sizes)
        wanted_K = torch.unique(chosen_G[chosen_G >= 0])
        ends = torch.tensor(pairs.sizes, device=wanted_K.device).cumsum(0)
        sizes = torch.bincount(torch.searchsorted(ends, wanted_K, right=True), minlength=len(ends)).tolist()
        here = (wanted_K >= pairs.offset) & (wanted_K < pairs.offset + len(chosen_I))
        found = []
        for text in texts:
            longer = F.pad(text, (*[0, 0] * (text.ndim - 2), 0, pairs.longest - text.shape[1]))
            mine = longer[wanted_K[here] - pairs.offset]
            if text.is_floating_point():
                everyone, _ = self.gather_with_gradient(mine)
            else:
                everyone, _ = self.gather(mine, sizes=sizes)
            found.append(torch.cat([everyone, longer[:1]]))
        places_I = torch.where(chosen_I >= 0, torch.searchsorted(wanted_K, chosen_I), len(wanted_K))
        return tuple(found), places_I


HARD: dict[str, bool] = {"hard": True, "random": False}
"""``loss.image_text.negatives`` -> whether similarity decides."""
