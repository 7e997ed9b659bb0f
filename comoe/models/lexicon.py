"""What a lexicon says of a word, as an input of the encoder beside the word's embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.encoders.families import stacks_of
from comoe.models.model import MultiTaskModel
from comoe.models.moe.block import ContextHolder
from comoe.tasks.lexicon import Lexicon


class LexiconInput(nn.Module):
    """Adds a linear map of the lexicon's numbers to the embedding of each piece of a word; 0 at the start.

    The encoder's table of words calls it, in each encode whose context has such numbers.

    Args:
        encoder: a model of ``build_encoder``.
        holder: its context has the numbers of the running encode.
        lexicon: of K numbers per word.
    """

    def __init__(self, encoder: nn.Module, holder: ContextHolder, lexicon: Lexicon) -> None:
        super().__init__()
        self.digest = lexicon.digest
        words = stacks_of(encoder)[0].get_input_embeddings()
        # Zeros draw no random numbers: all else begins as it does without them.
        self.weight = nn.Parameter(torch.zeros(words.embedding_dim, lexicon.width + 1))

        def add(module: nn.Module, inputs: Any, output_BLM: Tensor) -> Tensor | None:
            numbers_BLK = holder.context and holder.context.lexicon_BLK
            return None if numbers_BLK is None else output_BLM + self(numbers_BLK).to(output_BLM)

        words.register_forward_hook(add)

    def forward(self, numbers_BLK: Tensor) -> Tensor:
        """What is added to the embeddings, (B, L, their width)."""
        return F.linear(numbers_BLK.to(self.weight.dtype), self.weight)


def add_lexicon(model: MultiTaskModel, lexicon: Lexicon, *, as_input: bool) -> None:
    """Let a model know how many numbers a word has, and ``as_input`` read them; in place.

    Raises:
        ValueError: an input, but the encoder reads images too.
    """
    model.word_numbers = lexicon.width
    if not as_input:
        return
    if model.fusion is not None and model.fusion.in_encoder:
        raise ValueError(
            "model.lexicon.input is true, but the encoder reads images among the words (a ViLT, or "
            "model.vision.fusion tokens); set it to false, or choose fusion concat, attention or gated."
        )
    model.lexicon = LexiconInput(model.encoder, model.holder, lexicon)
