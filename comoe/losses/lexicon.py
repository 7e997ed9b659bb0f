"""Auxiliary regression of a lexicon's numbers, by which the encoder learns what they say of words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from comoe.types import LEXICON, Batch, ModelOutput


class LexiconLoss(nn.Module):
    """Mean squared error of the standardized numbers of the lexicon's words, predicted by a linear map of
    the last shared state at a word's first piece.

    The mean is over numbers and over the words of the whole optimizer step that are in the lexicon,
    on all ranks (``Batch.lexicon_starts_BL``); 0 where there are none. A word counts in each row
    that has it. Shared states are those before any private part.

    Args:
        model_width: M.
        num_numbers: K, of a word.
    """

    def __init__(self, model_width: int, num_numbers: int) -> None:
        super().__init__()
        self.head = nn.Linear(model_width, num_numbers)

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def forward(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share of the term, float32 or wider; ``lexicon``, detached."""
        # A rank without such words comes here too: every parameter needs a gradient on every rank.
        predicted_BLK = self.head(output.sharing.shared_BLM.to(self.head.weight.dtype))
        predicted_BLK = predicted_BLK.to(torch.promote_types(predicted_BLK.dtype, torch.float32))
        squared_BL = (predicted_BLK - batch.lexicon_BLK[:, :, :-1]).square().mean(dim=2)
        total = batch.unit_scale_T[LEXICON] * (squared_BL * batch.lexicon_starts_BL).sum()
        return total, {"lexicon": total.detach()}


def count_words(batch: Batch) -> Tensor:
    """Words of the lexicon in this micro-batch, float64 scalar."""
    if batch.lexicon_starts_BL is None:
        return torch.zeros((), dtype=torch.float64, device=batch.row_ids_B.device)
    return batch.lexicon_starts_BL.sum(dtype=torch.float64)
