"""BERT and its relatives for predictions, in PyTorch alone: importing those of transformers takes 3 s.

Modules and weights have the names of transformers, and the same operations follow in the same order,
so that the bits of the states are the same (``tests/unit/models/encoders/test_bert.py``).

Source: Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692 (positions);
Clark et al. 2020, arXiv:2003.10555 (narrow embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""``hidden_act`` -> function; a model with another one is left to transformers."""

FROM_PADDING = {
    "bert": False,
    "electra": False,
    "roberta": True,
    "xlm-roberta": True,
    "camembert": True,
}
"""``model_type`` -> whether positions count real tokens from ``pad_token_id`` + 1 on."""


@dataclass(slots=True)
class BertConfig:
    """The fields of the configuration in transformers that these models read."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int
    embedding_size: int
    """Width of the embeddings; ``hidden_size`` in all families but ELECTRA."""


PLAIN = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "gradient_checkpointing": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "position_embedding_type": "absolute",
}
"""Fields of which these models know one value, which counts where they are missing."""

IDLE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "classifier_dropout",
        "directionality",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_past",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "problem_type",
        "return_dict",
        "summary_activation",
        "summary_last_dropout",
        "summary_type",
        "summary_use_proj",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that do not change the states."""


def bert_config(given: Mapping[str, Any], *, dropout: float | None = None) -> BertConfig | None:
    """The configuration of an encoder that these models compute; None for another, or one that is not whole.

    Args:
        given: ``encoder.config.to_dict()``, of any family.
        dropout: ``model.dropout``.
    """
    wanted = {"embedding_size": given.get("hidden_size")} | dict(given)
    own = {field.name: field.type for field in fields(BertConfig)}
    if any(wanted.get(name, value) != value for name, value in PLAIN.items()):
        return None
    if wanted.keys() - own.keys() - PLAIN.keys() - IDLE or own.keys() - wanted.keys():
        return None
    found = {name: wanted[name] for name in own}
    if dropout is not None:
        found |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    kinds = {"int": int, "str": str, "float": (int, float)}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, kinds[own[name]]):
            return None
    config = BertConfig(**found)
    if config.model_type not in FROM_PADDING or config.hidden_act not in ACTIVATIONS:
        return None
    heads = config.num_attention_heads
    return None if heads < 1 or config.hidden_size % heads else config


class BertOutput(NamedTuple):
    """What the encoder gives."""

    last_hidden_state: Tensor
    """(B, L, M)."""


class BertEmbeddings(nn.Module):
    """Sum of the embeddings of words, segments and positions, normalized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, padding = config.embedding_size, config.pad_token_id
        self.padding = padding if FROM_PADDING[config.model_type] else None
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=padding)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids_BL: Tensor, segments_BL: Tensor | None) -> Tensor:
        """(B, L, width of the embeddings)."""
        if self.padding is None:
            positions_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        else:
            real_BL = ids_BL.ne(self.padding).int()
            positions_BL = (real_BL.cumsum(dim=1).int() * real_BL).long() + self.padding
        segments_BL = torch.zeros_like(ids_BL) if segments_BL is None else segments_BL
        states_BLM = self.word_embeddings(ids_BL) + self.token_type_embeddings(segments_BL)
        states_BLM = states_BLM + self.position_embeddings(positions_BL)
        return self.dropout(self.LayerNorm(states_BLM))


class BertSelfAttention(nn.Module):
    """Scaled dot-product attention over the tokens of a row, without its output map."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_width = width // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, states_BLM: Tensor, mask_B1LL: Tensor | None) -> Tensor:
        """(B, L, M)."""
        shape = (*states_BLM.shape[:2], -1, self.head_width)
        query, key, value = (
            linear(states_BLM).view(shape).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_B1LL,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.head_width**-0.5,
        )
        return mixed.transpose(1, 2).reshape(states_BLM.shape)


class BertResidual(nn.Module):
    """A linear map, and the norm of its sum with what the layer's half has read."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BLF: Tensor, x_BLM: Tensor) -> Tensor:
        """(B, L, M)."""
        return self.LayerNorm(self.dropout(self.dense(hidden_BLF)) + x_BLM)


class BertIntermediate(nn.Module):
    """The first half of the feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BLM: Tensor) -> Tensor:
        """(B, L, F)."""
        return self.activation(self.dense(x_BLM))


class BertLayer(nn.Module):
    """Attention, then the feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = BertSelfAttention(config)
        self.attention.output = BertResidual(config, config.hidden_size)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config, config.intermediate_size)

    def forward(self, states_BLM: Tensor, mask_B1LL: Tensor | None) -> Tensor:
        """(B, L, M)."""
        mixed_BLM = self.attention.self(states_BLM, mask_B1LL)
        read_BLM = self.attention.output(mixed_BLM, states_BLM)
        return self.output(self.intermediate(read_BLM), read_BLM)


class BertEncoder(nn.Module):
    """The encoder of a ``BertConfig``: what comoe uses of the models of transformers, without a pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(config) for _ in range(config.num_hidden_layers)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of words."""
        return self.embeddings.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> BertOutput:
        """Last states of texts.

        Args:
            input_ids: (B, L).
            attention_mask: 1 on real tokens, (B, L).
            token_type_ids: segments, (B, L); None is the first of all.
        """
        states_BLM = self.embeddings(input_ids, token_type_ids)
        real_BL = attention_mask.to(torch.bool)
        mask_B1LL = None
        if not real_BL.all():  # attention without a mask has a faster kernel, with other last bits
            mask_B1LL = real_BL[:, None, None].expand(-1, 1, real_BL.shape[1], -1)
        if self.config.embedding_size != self.config.hidden_size:
            states_BLM = self.embeddings_project(states_BLM)
        for layer in self.encoder.layer:
            states_BLM = layer(states_BLM, mask_B1LL)
        return BertOutput(states_BLM)
