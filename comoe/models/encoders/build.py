"""Encoders and encoder-decoders: pre-trained, without weights for an export, and as a shape for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from comoe.config.recipe import ModelConfig
from comoe.deferred import Deferred
from comoe.models.encoders.bert import BertEncoder, bert_config
from comoe.models.encoders.families import (
    FAMILIES,
    Family,
    check_alike,
    family_of,
    keep_layers,
    text_half,
)
from comoe.models.encoders.pretrained import (
    ENCODER,
    Unfit,
    load_pretrained,
    quiet,
    read_config,
    whole_on_each_rank,
)

if TYPE_CHECKING:
    import transformers
else:
    transformers = Deferred("transformers")


ANSWERING = "comoe_answering"
"""Field of a whole encoder-decoder's configuration with what its texts depend on beside its
weights, so that an export, which has no other files of the model, predicts alike."""


TARGET_TOKENS = (
    "decoder_start_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "forced_bos_token_id",
)
"""What is kept of how a model's own folder says to generate: with which tokens a text begins and
ends. How it is searched for is the recipe's (``num_beams``, ``max_answer_length``)."""


def build_encoder(config: ModelConfig, *, generates: bool = False) -> nn.Module:
    """Load the pre-trained encoder of ``model.encoder`` in float32, without its pooler; of an
    encoder-decoder the encoder alone, of a CLIP or SigLIP the text half. ``model.keep_layers``
    chooses layers, ``model.random_width`` begins with random weights.

    Args:
        config: ``model``.
        generates: load the whole encoder-decoder, because a decoder predicts some task.

    Raises:
        ValueError: no such folder or hub name, no network, unreadable or incomplete weights, a
            family without a row in ``FAMILIES``, or one without the decoder that a task wants, or
            one whose layers or width cannot be chosen.
    """
    if config.random_width is not None:
        # Whole on each rank at ZeRO-3 too: small by design, and alike whatever the layout.
        with quiet(), whole_on_each_rank():
            return _from_name(config, generates=generates)

    def prepare(hf_config: Any) -> tuple[Any, dict[str, Any]]:
        hf_config = text_half(hf_config)
        arguments = _prepared(hf_config, config.dropout)
        _check_decoder(config.encoder, hf_config.model_type, generates=generates)
        return hf_config, arguments

    def auto_class(hf_config: Any) -> Any:
        return _auto_class(family_of(hf_config.model_type), generates=generates)

    encoder = load_pretrained(
        config.encoder,
        ENCODER,
        trust_remote_code=config.trust_remote_code,
        prepare=prepare,
        auto_class=auto_class,
    )
    encoder = _chosen(encoder, config)
    if not generates:
        return _alone(encoder)
    answering = _found_answering(encoder)
    if family_of(encoder.config.model_type).causal:
        _set_answering(encoder, answering)
        return encoder
    for field in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        if answering[field] is None:
            raise ValueError(
                f"model.encoder ({config.encoder}) does not say its {field}, without which its decoder cannot be "
                "trained; write it into the folder's config.json (the start of an mBART is the id "
                "of the answers' language)."
            )
    _set_answering(encoder, answering)
    return encoder


def _check_decoder(name: str, model_type: str, *, generates: bool) -> None:
    if not generates or family_of(model_type).stacks:
        return
    able = ", ".join(name for name, family in FAMILIES.items() if family.stacks)
    raise Unfit(
        f"model.encoder ({name}) is a {model_type}, which has no decoder, but a task is of kind text or label_words, "
        f"which a decoder predicts; choose a model with one ({able}), such as smoke:t5 or a "
        "Flan-T5, or give the task a kind that a head predicts, such as single_label."
    )


def _auto_class(family: Family, *, generates: bool) -> Any:
    """The library's loader; it knows some encoder-decoders' encoder alone."""
    if generates:
        return (
            transformers.AutoModelForCausalLM
            if family.causal
            else transformers.AutoModelForSeq2SeqLM
        )
    # It does not know SigLIP's text half.
    transformers.AutoModel.register(
        transformers.SiglipTextConfig, transformers.SiglipTextModel, exist_ok=True
    )
    return transformers.AutoModelForTextEncoding if family.encoder_alone else transformers.AutoModel


def _alone(model: nn.Module) -> nn.Module:
    family = family_of(model.config.model_type)
    for path in family.unread:
        setattr(model, path, nn.Identity())
    return model.get_encoder() if family.stacks and not family.causal else model


def _found_answering(model: nn.Module) -> dict[str, Any]:
    settings, config = model.generation_config, model.config
    found = {field: getattr(settings, field, None) for field in TARGET_TOKENS}
    found = {
        field: getattr(config, field, None) if value is None else value
        for field, value in found.items()
    }
    if found["decoder_start_token_id"] is None and family_of(config.model_type).starts_with_padding:
        found["decoder_start_token_id"] = found["pad_token_id"]
    # Under ZeRO-3 too the two are one tensor if and only if the file said so, see
    # ``split_as_it_loads``.
    return found | {"own_output": model.lm_head.weight is not model.get_input_embeddings().weight}


def _set_answering(model: nn.Module, answering: Mapping[str, Any]) -> None:
    setattr(model.config, ANSWERING, dict(answering))
    model.generation_config = transformers.GenerationConfig(
        **{field: answering[field] for field in TARGET_TOKENS}
    )


def build_encoder_from_config(
    hf_config: dict[str, Any],
    *,
    dropout: float | None = None,
    generates: bool = False,
    plain: bool = False,
) -> nn.Module:
    """The same network with random weights, from ``encoder.config.to_dict()``: an export fills the weights in.

    Args:
        hf_config: of the encoder, or of the whole encoder-decoder.
        dropout: ``model.dropout``.
        generates: build the whole encoder-decoder.
        plain: take ``BertEncoder`` where it computes the same, which transformers need not be
            imported for.
    """
    if plain and not generates:
        own = bert_config(hf_config, dropout=dropout)
        if own is not None:
            return BertEncoder(own)
    fields = dict(hf_config)
    answering = fields.pop(ANSWERING, None)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    encoder = _from_config(
        config, dropout, generates=generates, own_output=bool(answering and answering["own_output"])
    )
    if generates:
        _set_answering(encoder, answering or _found_answering(encoder))
    return encoder


def build_encoder_shape(config: ModelConfig, *, generates: bool = False) -> nn.Module:
    """The network of ``model.encoder`` on the meta device: sizes without numbers, for which config.json suffices.

    Raises:
        ValueError: as ``build_encoder``, but for the weights, which are not looked at.
    """
    with torch.device("meta"), quiet():
        encoder = _from_name(config, generates=generates)
    if generates:
        _set_answering(encoder, _found_answering(encoder))
    return encoder


def _from_name(config: ModelConfig, *, generates: bool) -> nn.Module:
    """The network of ``model.encoder`` from its config.json alone."""
    source, hf_config = read_config(
        config.encoder, ENCODER, trust_remote_code=config.trust_remote_code
    )
    hf_config = text_half(hf_config)
    _check_decoder(config.encoder, hf_config.model_type, generates=generates)
    if config.random_width is not None:
        _set_width(hf_config, config.random_width)
    # The T5 configurations forget the word; without it the file of weights would have to tell.
    own_output = (
        transformers.PreTrainedConfig.get_config_dict(source)[0].get("tie_word_embeddings", True)
        is False
    )
    return _chosen(
        _from_config(hf_config, config.dropout, generates=generates, own_output=own_output), config
    )


def _chosen(encoder: nn.Module, config: ModelConfig) -> nn.Module:
    """The encoder with the layers of ``model.keep_layers``."""
    if config.keep_layers is not None:
        keep_layers(encoder, config.keep_layers)
    return encoder


def _set_width(hf_config: Any, width: int) -> None:
    """``model.random_width`` in a configuration, in place."""
    check_alike("model.random_width", width, hf_config.model_type)
    old, heads = hf_config.hidden_size, hf_config.num_attention_heads
    if width % (old // heads):
        raise ValueError(
            f"model.random_width ({width}) must be a multiple of {old // heads}, the width of an "
            "attention head of model.encoder."
        )
    for field in family_of(hf_config.model_type).feed_forward:
        setattr(hf_config, field, getattr(hf_config, field) * width // old)
    hf_config.hidden_size, hf_config.num_attention_heads = width, width // (old // heads)


def as_encoder_output(states_BLM: Tensor) -> Any:
    """Last states of an encoder as the library's ``generate`` wants them."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states_BLM)


def _from_config(
    hf_config: Any, dropout: float | None, *, generates: bool, own_output: bool
) -> nn.Module:
    arguments = _prepared(hf_config, dropout)
    auto_class = _auto_class(family_of(hf_config.model_type), generates=generates)
    encoder = auto_class.from_config(hf_config, dtype=torch.float32, **arguments)
    if not generates:
        return _alone(encoder)
    if own_output and encoder.lm_head.weight is encoder.get_input_embeddings().weight:
        # The library ties every T5, and finds out that it should not have when it reads the
        # weights.
        encoder.lm_head.weight = nn.Parameter(encoder.lm_head.weight.detach().clone())
    return encoder


def _prepared(hf_config: Any, dropout: float | None) -> dict[str, Any]:
    family = family_of(hf_config.model_type)
    for key, value in hf_config.to_dict().items():
        drops = "dropout" in key or key.endswith("_pdrop")
        if dropout is not None and drops and isinstance(value, float | int):
            setattr(hf_config, key, dropout)
        if "layerdrop" in key:
            # A layer that one rank leaves out is a layer whose experts the others wait for.
            setattr(hf_config, key, 0.0)
    return {"add_pooling_layer": False} if family.has_pooler else {}
