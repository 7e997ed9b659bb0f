"""Pictures with their texts over all ranks: who is whose rival, and random draws that every rank makes alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from comoe.losses.closed_form import TILE_BYTES, TILE_BYTES_ELSEWHERE
from comoe.protocols import Batch, ImageText


class Gather(Protocol):
    """Rows of all ranks in rank order, without gradient, and where this rank's begin."""

    def __call__(self, rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
        """``sizes``: rows of each rank; None says that all bring as many."""
        ...


class Pairs(NamedTuple):
    """A picture and the text of its post, by post."""

    posts_N: Tensor
    """Index of the post in its split, int64; -1 is a blank picture, which nothing counts."""
    tasks_N: Tensor
    """Task of its row, int64, -1 for all; a post may have a row per task."""
    keys_N: Tensor
    """The same number for the same tokens, int64: where two posts say the same, either text is right."""

    def part(self, rows: slice) -> Pairs:
        """Some of them."""
        return Pairs(*[numbers_N[rows] for numbers_N in self])

    def rivals(self, others: Pairs) -> Tensor:
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
        """Which of this rank's are no blank pictures, bool."""
        return self.own.posts_N >= 0

    @property
    def number(self) -> Tensor:
        """Real pairs of all ranks, at least 1, int64 scalar."""
        return (self.everyone.posts_N >= 0).sum().clamp_min(1)


def gather_pairs(sides: ImageText, batch: Batch, gather: Gather) -> AllPairs:
    """The pairs of all ranks; two collectives."""
    rows_I = sides.rows_I.clamp_min(0)
    posts_I = torch.where(sides.rows_I >= 0, batch.row_ids_B[rows_I], -1)
    own = Pairs(posts_I, batch.task_ids_B[rows_I], text_keys(batch)[rows_I])
    shape_12 = torch.tensor([[len(rows_I), batch.input_ids_BL.shape[1]]], device=rows_I.device)
    sizes, lengths = gather(shape_12)[0].T.tolist()
    everyone_G3, offset = gather(torch.stack(own, dim=1), sizes=sizes)
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
    pairs: AllPairs, similarity: Callable[[slice], Tensor] | None, *, step: int, seed: int, share: float = 0.5
) -> Tensor:
    """Which text takes the place of each picture's own one, for the matching loss.

    By numbers that are drawn from seed, step, post and task, so the choice depends neither on the number of ranks nor
    on the order of the posts.

    Args:
        pairs: of all ranks.
        similarity: some of this rank's pictures -> their similarity to all texts, (pictures, G); a text is drawn with
            probability in proportion to its exponential. None draws all alike.
        step: optimizer step.
        seed: of the run.
        share: of the pictures that get another text.

    Returns:
        Index of the text among those of all ranks, int64 (I,); -1 where the picture keeps its own, where there is no
        other post with another text, and for blank pictures.
    """
    own, everyone = pairs.own, pairs.everyone
    chosen_I = torch.full_like(own.posts_N, -1)
    for rows in row_tiles(len(chosen_I), 8 * len(everyone.posts_N), chosen_I.device):
        some = own.part(rows)
        numbers = (seed, step, some.posts_N[:, None], some.tasks_N[:, None], everyone.posts_N, everyone.tasks_N)
        scores = -(-drawn(*numbers).log()).log()
        if similarity is not None:
            scores += similarity(rows)
        rivals = some.rivals(everyone)
        chosen = scores.masked_fill_(~rivals, -torch.inf).argmax(dim=1)
        replaced = (drawn(seed, step, some.posts_N, some.tasks_N) < share) & rivals.any(dim=1)
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
