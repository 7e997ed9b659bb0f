"""Losses between the two sides of posts with images: contrast (ITC) and matching (ITM), over all ranks.

Source: docs/images.md; the auxiliary losses of arXiv:2309.07794, contrast as in CLIP
(arXiv:2103.00020), hard negatives as in ALBEF (arXiv:2107.07651). Random draws are made such that
every rank draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import ImageTextConfig
from comoe.distributed import gather_detached, gather_rows, world_size
from comoe.losses.contrastive.closed_form import TILE_BYTES, TILE_BYTES_ELSEWHERE
from comoe.types import Batch, ImageText, ModelOutput


class Pairs(NamedTuple):
    """An image and the text of its post, by post."""

    posts_N: Tensor
    """Index of the post in its split, int64; -1 is a blank image, which nothing counts."""
    tasks_N: Tensor
    """Task of its row, int64, -1 for all; a post may have a row per task."""
    keys_N: Tensor
    """The same number for the same tokens, int64: where two posts have the same text, either is
    right."""

    def part(self, rows: slice) -> Pairs:
        """Some of them."""
        return Pairs(*[numbers_N[rows] for numbers_N in self])

    def negatives(self, others: Pairs) -> Tensor:
        """Whether the two are real, of different posts, and of different texts: bool (N, O)."""
        differ = (self.posts_N[:, None] != others.posts_N) & (self.keys_N[:, None] != others.keys_N)
        return differ & (self.posts_N[:, None] >= 0) & (others.posts_N >= 0)


class AllPairs(NamedTuple):
    """Pairs of this rank and of all ranks."""

    own: Pairs
    """Of this rank, I of them."""
    everyone: Pairs
    """Of all ranks, G of them."""
    offset: int
    """Index of this rank's first among all."""
    sizes: list[int]
    """How many each rank has."""
    longest: int
    """Most tokens per text on any rank."""

    @property
    def real_I(self) -> Tensor:
        """Which of this rank's are no blank images, bool."""
        return self.own.posts_N >= 0

    @property
    def number(self) -> Tensor:
        """Real pairs of all ranks, at least 1, int64 scalar."""
        return (self.everyone.posts_N >= 0).sum().clamp_min(1)


def gather_pairs(sides: ImageText, batch: Batch) -> AllPairs:
    """The pairs of all ranks; two collectives."""
    rows_I = sides.rows_I.clamp_min(0)
    posts_I = torch.where(sides.rows_I >= 0, batch.row_ids_B[rows_I], -1)
    own = Pairs(posts_I, batch.task_ids_B[rows_I], text_keys(batch)[rows_I])
    shape_12 = torch.tensor([[len(rows_I), batch.input_ids_BL.shape[1]]], device=rows_I.device)
    sizes, lengths = gather_detached(shape_12)[0].T.tolist()
    everyone_G3, offset = gather_detached(torch.stack(own, dim=1), sizes=sizes)
    return AllPairs(own, Pairs(*everyone_G3.unbind(dim=1)), offset, sizes, max(lengths))


def text_keys(batch: Batch) -> Tensor:
    """A number per row, int64 (B,), made of its real tokens in their order, whatever the padding."""
    ids_BL = batch.input_ids_BL
    places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    mixed_BL = (mix(ids_BL, places_L) << 31) ^ mix(ids_BL, places_L, 1)
    return (mixed_BL * batch.attention_mask_BL).sum(dim=1)


def row_tiles(height: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Rows, as many at a time as one tile may take (``closed_form.TILE_BYTES``), at least one."""
    tall = max(1, TILE_BYTES.get(device.type, TILE_BYTES_ELSEWHERE) // max(row_bytes, 1))
    for row in range(0, height, tall):
        yield slice(row, min(row + tall, height))


def draw_texts(
    pairs: AllPairs,
    similarity: Callable[[slice], Tensor] | None,
    *,
    step: int,
    seed: int,
    share: float = 0.5,
) -> Tensor:
    """Which text takes the place of each image's own one, for the matching loss.

    By numbers that are drawn from seed, step, post and task, so the choice depends neither on the
    number of ranks nor on the order of the posts.

    Args:
        pairs: of all ranks.
        similarity: some of this rank's images -> their similarity to all texts, (images, G); a
            text is drawn with probability in proportion to its exponential. None draws all alike.
        step: optimizer step.
        seed: of the run.
        share: of the images that get another text.

    Returns:
        Index of the text among those of all ranks, int64 (I,); -1 where the image keeps its own,
        where no other post has another text, and for blank images.
    """
    own, everyone = pairs.own, pairs.everyone
    chosen_I = torch.full_like(own.posts_N, -1)
    for rows in row_tiles(len(chosen_I), 8 * len(everyone.posts_N), chosen_I.device):
        some = own.part(rows)
        numbers = (
            seed,
            step,
            some.posts_N[:, None],
            some.tasks_N[:, None],
            everyone.posts_N,
            everyone.tasks_N,
        )
        scores = -(-drawn(*numbers).log()).log()
        if similarity is not None:
            scores += similarity(rows)
        negatives = some.negatives(everyone)
        chosen = scores.masked_fill_(~negatives, -torch.inf).argmax(dim=1)
        replaced = (drawn(seed, step, some.posts_N, some.tasks_N) < share) & negatives.any(dim=1)
        chosen_I[rows] = torch.where(replaced, chosen, -1)
    return chosen_I


def mix(*numbers: Tensor | int) -> Tensor:
    """Whole numbers thoroughly mixed, int64 from 0 to 2^32 - 1: as if drawn, yet the same wherever they are mixed."""
    mixed: Any = 0x9E3779B9
    for number in numbers:
        mixed = ((mixed ^ (number & 0xFFFFFFFF)) * 0x7FEB352D) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
    return mixed


def drawn(*numbers: Tensor | int) -> Tensor:
    """Numbers in (0, 1), float64, as if drawn evenly, by ``mix``."""
    return (mix(*numbers).double() + 0.5) / 2**32


MAX_SCALE = 100.0
"""Cosines are never multiplied by more (CLIP)."""


OTHER, OWN = 0, 1
"""Classes of the matching loss: another post's text, the image's own."""


class ITCLoss(nn.Module):
    """Image-text contrast: every image and its own text, among the images and texts of all ranks.

    L = 1/2N sum over pairs i of [lse over texts j of s_ij - s_ii + lse over images j of s_ji -
    s_ii], where s is the cosine divided by a learned temperature. Rows of one post, and posts of
    the same text, are no negatives of each other.

    Four gathers per call, none in the backward pass; every rank must reach them, with images or
    without. Memory grows with the images of all ranks, not with their square.

    Args:
        config: ``loss.image_text``.
    """

    def __init__(self, config: ImageTextConfig) -> None:
        super().__init__()
        # Read in forward only: outside of its own module's forward ZeRO-3 leaves a parameter empty.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(config.temperature)]))

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def forward(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share, whose mean over ranks is the global value; terms ``itc``, ``itc_temperature``."""
        sides = output.image_text
        pairs = gather_pairs(sides, batch)
        share = contrast(sides.image_embeddings_IP, sides.text_embeddings_IP, self.log_scale, pairs)
        temperature = (
            self.log_scale.detach().float().exp().clamp_max(MAX_SCALE).reciprocal().squeeze()
        )
        return share, {"itc": share.detach(), "itc_temperature": temperature}


def contrast(image_IP: Tensor, text_IP: Tensor, log_scale: Tensor, pairs: AllPairs) -> Tensor:
    """This rank's share of the contrast (``ITCLoss``): scalar, differentiable by the first three arguments.

    The gradient is known as soon as the value is. That of image i is W scale / 2N times the sum
    over texts j of (e^(s_ij - row_i) + e^(s_ij - column_j)) text_j, minus 2 text_i; that of a text
    has the sides exchanged. So the logarithms of the sums travel, and no gradient does. Tiles are
    made twice: before the sums of the others, and after.

    Args:
        image_IP: unit-length rows, blank ones too.
        text_IP: likewise.
        log_scale: logarithm of the inverse temperature, shape (1,); above ``MAX_SCALE`` its
            gradient counts only where it leads back.
        pairs: whose they are.
    """
    with torch.no_grad():
        numbers = [image_IP, text_IP, log_scale]
        # Float32 also where the model is not; float64 stays.
        exact = torch.float64 if image_IP.dtype == torch.float64 else torch.float32
        image, text, logarithm = (number.to(exact) for number in numbers)
        scale = logarithm.exp().clamp_max(MAX_SCALE)
        both_G2P, _ = gather_detached(torch.stack([image, text], dim=1), sizes=pairs.sizes)
        image_GP, text_GP = both_G2P.unbind(dim=1)
        block = (image, text, both_G2P, scale, pairs)
        lse, own = image.new_zeros(2, len(image)), image.new_zeros(2, len(image))
        slope_I = image.new_zeros(len(image))
        for rows, similar, diagonal in _similarity_tiles(*block):
            lse[:, rows], own[:, rows] = similar.logsumexp(dim=2), similar[diagonal]
            shares = (similar - lse[:, rows, None]).exp()
            # Derivative by the logarithm of the scale, per pair.
            slope_I[rows] = (
                (shares * similar.nan_to_num(neginf=0.0)).sum(dim=2) - own[:, rows]
            ).sum(dim=0)
        slope_I *= pairs.real_I
        packed_G3, _ = gather_detached(
            torch.cat([lse.T, slope_I[:, None]], dim=1), sizes=pairs.sizes
        )
        factor = (world_size() / (2 * pairs.number.double())).to(image.dtype)
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        for rows, similar, diagonal in _similarity_tiles(*block):
            # How column j of the other side's sums pulls at row i.
            pull = (similar - lse[:, rows, None]).exp() + (
                similar - packed_G3[:, [1, 0]].T.unsqueeze(1)
            ).exp()
            pull[diagonal] -= 2
            pull *= (factor * scale * pairs.real_I[rows])[:, None]
            image_gradient[rows], text_gradient[rows] = pull[0] @ text_GP, pull[1] @ image_GP
        # All ranks decide by the sum over all: the share of one may lead the other way.
        stuck = (scale >= MAX_SCALE) & (packed_G3[:, 2].sum() < 0)
        slope = torch.where(stuck, 0.0, factor * slope_I.sum())
        value = factor * ((lse - own) * pairs.real_I).sum()
    return _Known.apply(value, *numbers, image_gradient, text_gradient, slope)


def _similarity_tiles(
    image_IP: Tensor, text_IP: Tensor, both_G2P: Tensor, scale: Tensor, pairs: AllPairs
) -> Iterator[tuple[slice, Tensor, tuple[slice, Tensor, Tensor]]]:
    """Similarities of this rank's pairs to those of all ranks, made tile by tile.

    Yields (own rows, their similarities, where each row's own pair is in these). Similarities are
    (2, rows, G), of images to all texts and of texts to all images; -inf where the two are no
    negatives.
    """
    image_GP, text_GP = both_G2P.unbind(dim=1)
    for rows in row_tiles(len(image_IP), 2 * len(both_G2P) * both_G2P.itemsize, both_G2P.device):
        counts = pairs.own.part(rows).negatives(pairs.everyone)
        here = torch.arange(len(counts), device=counts.device)
        places = here + rows.start + pairs.offset
        counts[here, places] = True
        similar = torch.stack([image_IP[rows] @ text_GP.T, text_IP[rows] @ image_GP.T])
        similar.mul_(scale).masked_fill_(~counts, -torch.inf)
        yield rows, similar, (slice(None), here, places)


class _Known(torch.autograd.Function):
    """A value whose gradients are known: (value, three arguments, their three gradients)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *numbers: Tensor) -> Tensor:
        arguments, gradients = numbers[:3], numbers[3:]
        ctx.save_for_backward(
            *[known.to(given.dtype) for known, given in zip(gradients, arguments, strict=True)]
        )
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [(gradient * known).to(known.dtype) for known in ctx.saved_tensors]
        return None, *gradients, None, None, None


class ITMLoss:
    """Image-text matching: is this the image's own text? About half of the images get another
    post's text.

    Whose text depends on seed, step and post alone (``draw_texts``): hard ones are drawn by
    similarity. Texts of all ranks take part: what the fusion reads of those that replace another
    (the states of all their tokens) travels to every rank, with gradient, so memory grows with the
    images of all ranks. Own texts are as the tasks saw them; the others take one more pass
    of the fusion, or of the encoder where that reads the image too.

    Every rank runs that pass, with a pair of weight 0 if need be.

    Args:
        config: ``loss.image_text``.
        seed: of the run.
    """

    def __init__(self, config: ImageTextConfig, *, seed: int) -> None:
        self.hard = HARD[config.negatives]
        self.temperature = config.temperature
        self.seed = seed

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share, whose mean over ranks is the global value; terms ``itm``, ``itm_accuracy``, detached."""
        sides = output.image_text
        pairs = gather_pairs(sides, batch)
        similarity = None
        if self.hard and sides.text_embeddings_IP is not None:
            texts_GP, _ = gather_detached(sides.text_embeddings_IP, sizes=pairs.sizes)
            images_IP = sides.image_embeddings_IP.detach()

            def similarity(rows: slice) -> Tensor:
                return images_IP[rows] @ texts_GP.T / self.temperature

        chosen_I = draw_texts(pairs, similarity, step=batch.step, seed=self.seed)
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
        factor = world_size() / pairs.number
        own_I = F.cross_entropy(
            sides.match_logits_I2, torch.full_like(chosen_I, OWN), reduction="none"
        )
        other = F.cross_entropy(others_J2, torch.full_like(numbers_J, OTHER), reduction="sum")
        share = factor * ((own_I * kept_I).sum() + weight * other)
        # A gather with gradient is a collective in the backward pass too.
        share = share + 0.0 * sum(text.sum() for text in texts if text.is_floating_point())
        right = ((sides.match_logits_I2.argmax(dim=1) == OWN) & kept_I).sum()
        right = right + weight * (others_J2.argmax(dim=1) == OTHER).sum()
        return share, {"itm": share.detach(), "itm_accuracy": (factor * right).to(share.dtype)}

    def _exchange(
        self, texts: tuple[Tensor, ...], chosen_I: Tensor, pairs: AllPairs
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The texts that some rank draws, behind them this rank's first, and the index of each image's."""
        chosen_G, _ = gather_detached(chosen_I, sizes=pairs.sizes)
        wanted_K = torch.unique(chosen_G[chosen_G >= 0])
        ends = torch.tensor(pairs.sizes, device=wanted_K.device).cumsum(0)
        sizes = torch.bincount(
            torch.searchsorted(ends, wanted_K, right=True), minlength=len(ends)
        ).tolist()
        here = (wanted_K >= pairs.offset) & (wanted_K < pairs.offset + len(chosen_I))
        found = []
        for text in texts:
            longer = F.pad(text, (*[0, 0] * (text.ndim - 2), 0, pairs.longest - text.shape[1]))
            mine = longer[wanted_K[here] - pairs.offset]
            if text.is_floating_point():
                everyone, _ = gather_rows(mine)
            else:
                everyone, _ = gather_detached(mine, sizes=sizes)
            found.append(torch.cat([everyone, longer[:1]]))
        places_I = torch.where(chosen_I >= 0, torch.searchsorted(wanted_K, chosen_I), len(wanted_K))
        return tuple(found), places_I


HARD: dict[str, bool] = {"hard": True, "random": False}
"""``loss.image_text.negatives`` -> whether similarity decides."""
