"""The experts' arithmetic on a GPU: all experts at once, and the host never waits for the counts.

bfloat16 goes through PyTorch's grouped matrix product. It takes nothing else on most GPUs, so float32 (prediction from
an export, for one) goes through batched products over tiles: each expert's rows are filled up to whole tiles, each
tile meets its expert's weights, and how many tiles there may be at most follows from the shapes alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_TILE, MOST_TILE = 16, 1024
"""Rows of one tile."""
TILES_PER_EXPERT = 4
"""An even load gives each expert at least so many tiles. Larger tiles mean more padding, half a tile per expert on
average; smaller ones more copies of the experts' weights, one per tile."""


def run_grouped(x_NM: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """All experts in two grouped matrix products.

    Args:
        x_NM: rows, those of expert 0 first; bfloat16.
        counts_E: rows per expert, int64, on the same device.
        gate_up_proj: (E, 2F, M), F and M multiples of 8.
        down_proj: (E, M, F).

    Returns:
        What each row's expert answers, shape (N, M).
    """
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_NF = gated(F.grouped_mm(x_NM, gate_up_proj.transpose(1, 2), offs=ends_E))
    return F.grouped_mm(hidden_NF, down_proj.transpose(1, 2), offs=ends_E)


def run_tiled(x_NM: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The same for any dtype and width, by batched matrix products over tiles of rows of one expert."""
    (N, M), E = x_NM.shape, counts_E.shape[0]
    tile = tile_rows(N, E)
    tiles = N // tile + E
    needed_E = (counts_E + tile - 1) // tile
    # The last group takes the tiles that nobody needs: with it the sum is known without asking the device.
    spare = tiles - needed_E.sum(dim=0, keepdim=True)
    owners = torch.arange(E + 1, device=x_NM.device).remainder(E)
    owner_of_tile = owners.repeat_interleave(torch.cat([needed_E, spare]), output_size=tiles)
    expert_of_row = torch.arange(E, device=x_NM.device).repeat_interleave(counts_E, output_size=N)
    moved_E = (needed_E.cumsum(0) - needed_E) * tile - (counts_E.cumsum(0) - counts_E)
    places_N = torch.arange(N, device=x_NM.device) + moved_E[expert_of_row]
    padded = x_NM.new_zeros(tiles * tile, M).index_copy(0, places_N, x_NM).view(tiles, tile, M)
    hidden = gated(padded @ gate_up_proj[owner_of_tile].transpose(1, 2))
    return (hidden @ down_proj[owner_of_tile].transpose(1, 2)).view(-1, M).index_select(0, places_N)


def tile_rows(rows: int, num_experts: int) -> int:
    """Rows per tile: a power of two, from the shapes alone."""
    even = max(1, rows // (TILES_PER_EXPERT * num_experts))
    return min(MOST_TILE, max(LEAST_TILE, 1 << (even.bit_length() - 1)))


def gated(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half of the last axis."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
