"""Families of encoders: where their layers are, where the cooperative blocks attach, and which layers train."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from comoe.config.errors import unknown_name
from comoe.config.recipe import MoeConfig
from comoe.models.encoders.adapters import (
    BeforeResidualNorm,
    BesideFeedForward,
    wrap,
    wrap_pair,
    wrap_t5,
)
from comoe.models.moe.block import CooperativeBlock


@dataclass(frozen=True, slots=True)
class Family:
    """Where one model family keeps its layers and its feed-forward, and what its forward takes."""

    layers: str = "encoder.layer"
    """Path of the list of layers, of an encoder-decoder in each of its stacks."""
    attach: Callable[[nn.Module, CooperativeBlock], None] = wrap("output", BeforeResidualNorm)
    """Puts a block beside a layer's feed-forward."""
    dropout: str | None = "hidden_dropout_prob"
    """Field of the configuration with the dropout of the block's update; None where the layer drops
    out the sum, or nothing."""
    has_pooler: bool = True
    """True where the constructor takes ``add_pooling_layer``: the pooler is left out, it would get
    no gradient."""
    has_segments: bool = True
    """True where the forward takes ``token_type_ids``."""
    first_position: int | None = 0
    """Positions of the table that no token ever uses (RoBERTa counts from padding + 1); None where
    there is none."""
    after_layers: tuple[str, ...] = ()
    """Paths of modules that run after the last layer, of an encoder-decoder in each stack: they
    train with it."""
    after_first: str | None = None
    """Path of a module, or of None, that runs behind the first layer and reads its input too."""
    single_stream: bool = False
    """True where one encoder reads text and pixels, and needs no vision tower."""
    stacks: tuple[str, ...] = ()
    """Paths of encoder and decoder in the whole of an encoder-decoder, of the layers' owner in the
    whole of a decoder-only model; none in families that predict no text."""
    causal: bool = False
    """True for decoder-only models: a token sees those before it, and the whole model is the one
    stack with its output layer."""
    encoder_alone: bool = False
    """True where the library has a class of its encoder alone, so that no decoder need be read."""
    starts_with_padding: bool = False
    """True where generated texts begin with the padding sign unless the configuration says otherwise."""
    vocabulary: Callable[[nn.Module, Tensor], Tensor] | None = None
    """(whole model, last states of its decoder (..., M)) -> logits of the next token (..., V)."""
    feed_forward: tuple[str, ...] = ("intermediate_size",)
    """Fields of the configuration with the hidden width of the feed-forward, of encoder and decoder
    where they have their own."""
    gated: bool = False
    """True where the feed-forward is gated whatever the configuration says."""
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    """Fields with the number of layers of each stack."""
    without_experts: tuple[str, ...] = ()
    """Ends of the paths, within a layer, of linear maps that ``model.moe.form: lora`` gives no
    experts: they read more than the layer's own tokens."""
    alike: bool = True
    """True where all layers of the only stack are alike, so that any of them make an encoder."""
    reads_embeddings: bool = True
    """True where the forward takes word embeddings in place of ids."""
    unread: tuple[str, ...] = ()
    """Names of modules whose output nothing reads, and which would get no gradient: they are left out."""


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face ``model_type``; ValueError with the supported ones for others."""
    if model_type not in FAMILIES:
        raise unknown_name("model.encoder: the encoder's model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def text_half(hf_config: Any) -> Any:
    """Of the configuration of a model of two sides that of its text half; any other as it is."""
    return hf_config.text_config if hf_config.model_type in TWO_SIDED else hf_config


def is_whole(encoder: nn.Module) -> bool:
    """True for a model with an output layer for words, False for its stack or an encoder alone."""
    return bool(family_of(encoder.config.model_type).stacks) and encoder.can_generate()


def has_decoder(encoder: nn.Module) -> bool:
    """True for the whole of an encoder-decoder, False for an encoder alone and for decoder-only models."""
    return is_whole(encoder) and not family_of(encoder.config.model_type).causal


def stacks_of(encoder: nn.Module) -> list[nn.Module]:
    """The encoder, or the only stack; of an encoder-decoder both stacks, the encoder's first."""
    if not is_whole(encoder):
        return [encoder]
    return [
        operator.attrgetter(path)(encoder) for path in family_of(encoder.config.model_type).stacks
    ]


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """The encoder's layers, first to last; behind them the decoder's."""
    return [layer for layers in layers_by_stack(encoder) for layer in layers]


def layers_by_stack(encoder: nn.Module) -> list[nn.ModuleList]:
    """The layers of each of ``stacks_of``."""
    path = operator.attrgetter(family_of(encoder.config.model_type).layers)
    return [path(stack) for stack in stacks_of(encoder)]


def reads_segments(hf_config: Any) -> bool:
    """True where the encoder tells segments apart: a table of one row would fail on the second segment's id."""
    return family_of(hf_config.model_type).has_segments and hf_config.type_vocab_size > 1


def check_alike(option: str, value: Any, model_type: str) -> None:
    """ValueError for a family whose layers and widths cannot be chosen by ``option``."""
    if not family_of(model_type).alike:
        able = ", ".join(name for name, family in FAMILIES.items() if family.alike)
        raise ValueError(
            f"{option} ({value}) is not possible for a {model_type}, whose layers differ in form "
            f"or serve a decoder; leave it out, or choose an encoder of another family ({able})."
        )


def keep_layers(encoder: nn.Module, kept: int | str) -> None:
    """Leave only some layers, in place, and in the configuration, so that an export builds the same.

    Args:
        encoder: a model of ``build_encoder``, before blocks are attached.
        kept: ``model.keep_layers``.

    Raises:
        ValueError: more layers than there are, or a family whose layers are not alike.
    """
    config = encoder.config
    check_alike("model.keep_layers", kept, config.model_type)
    family = family_of(config.model_type)
    (layers,) = layers_by_stack(encoder)
    numbers = kept_layers(kept, len(layers))
    above, _, name = family.layers.rpartition(".")
    stack = operator.attrgetter(above)(encoder)
    setattr(stack, name, nn.ModuleList(layers[number] for number in numbers))
    setattr(config, family.num_layers[0], len(numbers))


def kept_layers(kept: int | str, num_layers: int) -> list[int]:
    """Numbers of the layers of ``model.keep_layers``, ascending; ValueError where some are missing."""
    place, count = ("even", kept) if isinstance(kept, int) else kept.split("-")
    if int(count) > num_layers:
        raise ValueError(
            f"model.keep_layers ({kept}) must name at most {num_layers} layers, as many as model.encoder has."
        )
    return KEPT_LAYERS[place](int(count), num_layers)


def freeze_encoder(encoder: nn.Module, train_layers: int | str) -> None:
    """Leave only the last layers to training, in place; before ``attach_experts``, as experts always train.

    Args:
        encoder: a model of ``build_encoder``.
        train_layers: ``model.train_layers``: all, none, or the number of last layers, of encoder
            and decoder each. A number freezes the embeddings and all else that runs before those
            layers; an output layer of its own trains.

    Raises:
        ValueError: a number of layers that the encoder does not have.
    """
    by_stack = layers_by_stack(encoder)
    if isinstance(train_layers, str):
        encoder.requires_grad_(TRAINED_LAYERS[train_layers])
        return
    deepest = max(map(len, by_stack))
    if not 1 <= train_layers <= deepest:
        raise ValueError(
            f"model.train_layers ({train_layers}) must be all, none, or a number from 1 to "
            f"{deepest}, the layers of {encoder.config.model_type} here."
        )
    encoder.requires_grad_(False)
    family = family_of(encoder.config.model_type)
    trained = [layer for layers in by_stack for layer in layers[-train_layers:]]
    trained += [
        operator.attrgetter(path)(stack)
        for stack in stacks_of(encoder)
        for path in family.after_layers
    ]
    if (output := _own_output(encoder)) is not None:
        trained.append(output)
    for module in trained:
        module.requires_grad_(True)


def layers_above(encoder: nn.Module) -> dict[int, int]:
    """``id`` of each parameter -> layers of its stack that run behind it.

    Embeddings and all else that runs before the layers count as one layer below the deepest stack's
    first one; what runs behind the last layer counts as part of it.
    """
    by_stack = layers_by_stack(encoder)
    above = dict.fromkeys(map(id, encoder.parameters()), max(map(len, by_stack)))
    family, places = family_of(encoder.config.model_type), []
    for stack, layers in zip(stacks_of(encoder), by_stack, strict=True):
        places += [(layer, len(layers) - number) for number, layer in enumerate(layers, start=1)]
        places += [(operator.attrgetter(path)(stack), 0) for path in family.after_layers]
    if (output := _own_output(encoder)) is not None:
        places.append((output, 0))
    for module, count in places:
        above |= dict.fromkeys(map(id, module.parameters()), count)
    return above


def _own_output(encoder: nn.Module) -> nn.Module | None:
    """The output layer of an encoder-decoder where it is not the embeddings once more."""
    if not is_whole(encoder) or encoder.lm_head.weight is encoder.get_input_embeddings().weight:
        return None
    return encoder.lm_head


def expert_width(config: MoeConfig, model_width: int) -> int:
    """Hidden width F of one expert; ``auto`` is a quarter of the encoder's width, at least 16."""
    if config.expert_width == "auto":
        return max(16, model_width // 4)
    return config.expert_width


def chosen_layers(layers: str | list[int], num_layers: int) -> list[int]:
    """Numbers of the layers that get experts, ascending; ValueError for a number out of range."""
    if isinstance(layers, str) and layers in LAYER_CHOICES:
        return LAYER_CHOICES[layers](num_layers)
    if isinstance(layers, str):
        last = int(layers.removeprefix("top-"))
        if last > num_layers:
            raise ValueError(
                f"model.moe.layers ({layers}): there are {num_layers} layers; set it to "
                f"top-{num_layers} at most."
            )
        return list(range(num_layers - last, num_layers))
    if max(layers) >= num_layers:
        raise ValueError(
            f"model.moe.layers ({layers}) must list different numbers from 0 to {num_layers - 1}, "
            "at least one; set model.moe.num_experts to 0 for an encoder without experts."
        )
    return sorted(layers)


def chosen_of_stacks(layers: str | list[int], counts: Sequence[int]) -> list[int]:
    """Numbers of the layers that get experts, those of the decoder behind the encoder's.

    Args:
        layers: ``model.moe.layers``; a word counts in each stack by itself, a list numbers all
            layers.
        counts: layers of each stack.
    """
    if not isinstance(layers, str):
        return chosen_layers(layers, sum(counts))
    return [
        sum(counts[:place]) + number
        for place, count in enumerate(counts)
        for number in chosen_layers(layers, count)
    ]


def longest_input(hf_config: Any) -> int:
    """Most tokens that the encoder's position table can number; a number without end where it has none."""
    first = family_of(hf_config.model_type).first_position
    return sys.maxsize if first is None else hf_config.max_position_embeddings - first


def _t5_vocabulary(model: nn.Module, states: Tensor, *, scales: str | None) -> Tensor:
    # Where the output layer is the table of words the states are scaled; which field says so
    # differs by model.
    scale = (
        model.config.d_model**-0.5 if scales is not None and getattr(model.config, scales) else 1.0
    )
    return model.lm_head(states * scale)


def _bart_vocabulary(model: nn.Module, states: Tensor) -> Tensor:
    logits = model.lm_head(states)
    return logits + model.final_logits_bias[0].to(logits.dtype)


def _causal_vocabulary(model: nn.Module, states: Tensor) -> Tensor:
    logits = model.lm_head(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


LAYER_CHOICES: dict[str, Callable[[int], list[int]]] = {
    "all": lambda count: list(range(count)),
    "alternate": lambda count: list(range((count - 1) % 2, count, 2)),
    "last_half": lambda count: list(range(count // 2, count)),
}
"""Word in ``model.moe.layers`` -> number of layers -> chosen layers."""


KEPT_LAYERS: dict[str, Callable[[int, int], list[int]]] = {
    "even": lambda kept, count: [(place + 1) * count // kept - 1 for place in range(kept)],
    "top": lambda kept, count: list(range(count - kept, count)),
    "bottom": lambda kept, count: list(range(kept)),
}
"""Word in ``model.keep_layers`` (a number alone is even) -> layers to keep, layers -> their
numbers."""


TRAINED_LAYERS: dict[str, bool] = {"all": True, "none": False}
"""Word in ``model.train_layers`` -> whether the encoder trains; a number means so many last
layers."""


_T5 = Family(
    layers="block",
    attach=wrap_t5,
    dropout=None,
    has_pooler=False,
    has_segments=False,
    first_position=None,
    after_layers=("final_layer_norm",),
    stacks=("encoder", "decoder"),
    encoder_alone=True,
    starts_with_padding=True,
    vocabulary=partial(_t5_vocabulary, scales="scale_decoder_outputs"),
    feed_forward=("d_ff",),
    without_experts=("EncDecAttention.k", "EncDecAttention.v"),
    num_layers=("num_layers", "num_decoder_layers"),
    alike=False,
)


_BART = Family(
    layers="layers",
    attach=wrap_pair,
    dropout=None,
    has_pooler=False,
    has_segments=False,
    stacks=("model.encoder", "model.decoder"),
    vocabulary=_bart_vocabulary,
    feed_forward=("encoder_ffn_dim", "decoder_ffn_dim"),
    without_experts=("encoder_attn.k_proj", "encoder_attn.v_proj"),
    num_layers=("encoder_layers", "decoder_layers"),
    alike=False,
)


_LLAMA = Family(
    layers="layers",
    attach=wrap("mlp", BesideFeedForward),
    dropout=None,
    has_pooler=False,
    has_segments=False,
    first_position=None,
    after_layers=("norm",),
    stacks=("model",),
    causal=True,
    vocabulary=_causal_vocabulary,
    gated=True,
    alike=False,
)


_CLIP = Family(
    layers="encoder.layers",
    attach=wrap("mlp", BesideFeedForward),
    dropout=None,
    has_pooler=False,
    has_segments=False,
    after_layers=("final_layer_norm",),
    reads_embeddings=False,
)


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(first_position=2),
    "xlm-roberta": Family(first_position=2),
    "camembert": Family(first_position=2),
    "electra": Family(has_pooler=False),
    "deberta-v2": Family(
        has_pooler=False,
        after_first="encoder.conv",
        # They read a table of relative positions too.
        without_experts=("query_proj", "key_proj"),
    ),
    "mpnet": Family(has_segments=False, first_position=2),
    "distilbert": Family(
        layers="transformer.layer",
        attach=wrap("ffn", BesideFeedForward),
        dropout="dropout",
        has_pooler=False,
        has_segments=False,
        feed_forward=("hidden_dim",),
    ),
    "modernbert": Family(
        layers="layers",
        attach=wrap("mlp", BesideFeedForward),
        dropout="mlp_dropout",
        has_pooler=False,
        has_segments=False,
        after_layers=("final_norm",),
        # Its first layer has no norm, and every third one looks at all tokens.
        alike=False,
    ),
    # A layer before its norm: the block brings a norm of its own.
    "vilt": Family(after_layers=("layernorm",), single_stream=True),
    # The text halves of models of two sides; CLIP's tokens see those before them.
    "clip_text_model": _CLIP,
    "siglip_text_model": replace(_CLIP, unread=("head",)),
    # Encoder-decoders. Their layers drop out the sum of feed-forward and block themselves.
    "t5": _T5,
    "mt5": replace(_T5, vocabulary=partial(_t5_vocabulary, scales=None)),
    "umt5": replace(_T5, vocabulary=partial(_t5_vocabulary, scales="tie_word_embeddings")),
    "bart": _BART,
    "mbart": replace(_BART, after_layers=("layer_norm",)),
    # Decoder-only.
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": replace(
        _LLAMA,
        layers="h",
        dropout="resid_pdrop",
        first_position=0,
        after_layers=("ln_f",),
        stacks=("transformer",),
        feed_forward=("n_inner",),
        gated=False,
    ),
}
"""Hugging Face ``model_type`` -> family."""


TWO_SIDED = ("clip", "siglip")
"""``model_type`` of models of a text and a vision half; either half is a model of its own."""
