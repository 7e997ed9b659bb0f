"""Pre-trained encoders: loading them, and building the same network without weights for an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from comoe.models.families import family_of
from comoe.schema import ModelConfig


def build_encoder(config: ModelConfig) -> nn.Module:
    """Load the pre-trained encoder of ``model.encoder`` in float32, without its pooler.

    Raises:
        ValueError: no such folder or hub name, no network, unreadable or incomplete weights, or a family without a
            row in ``FAMILIES``.
    """
    name = config.encoder
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if (looks_local and not folder.is_dir()) or (folder.is_dir() and not (folder / "config.json").is_file()):
        raise ValueError(
            f"model.encoder ({name}) is not a folder with an encoder (config.json is missing); give a folder that "
            "save_pretrained wrote, a hub name, kit:minilm or smoke:encoder."
        )
    source = str(folder) if folder.is_dir() else name
    with _readable_errors(name):
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    arguments = _prepared(hf_config, config.dropout)
    with _readable_errors(name), _quiet():
        encoder, report = AutoModel.from_pretrained(
            source,
            config=hf_config,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    if report["missing_keys"]:
        # The library would fill them with random numbers and go on.
        raise ValueError(
            f"model.encoder ({name}) has no weights for {', '.join(sorted(report['missing_keys'])[:3])} "
            f"({len(report['missing_keys'])} in all); its weights file does not belong to its config.json."
        )
    return encoder


@contextmanager
def split_as_it_loads(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``build_encoder`` gives every rank only its ZeRO-3 share of each weight, and no rank holds the whole.

    A layer's weights are made and split at once, before the next layer's are; then rank 0 reads the file tensor by
    tensor, and each goes to the ranks in shares. Every rank must build the same encoder. Without this an encoder is
    whole on every rank until DeepSpeed splits it.

    Args:
        settings: complete DeepSpeed configuration of stage 3; weights are made in its precision.
    """
    # Needs accelerate, which prediction does not.
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # The library keeps a weak reference and asks it in each from_pretrained: the object must live as long as it counts.
    alive = HfDeepSpeedConfig(dict(settings))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"model.encoder ({name}) could not be loaded: {reason} Give the folder of a downloaded encoder, a hub name "
            "that this machine can reach, kit:minilm or smoke:encoder."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    # The library prints a bar and a table of unused weights on every rank; missing ones are an error above.
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def build_encoder_from_config(hf_config: dict[str, Any], *, dropout: float | None = None) -> nn.Module:
    """The same network with random weights, from ``encoder.config.to_dict()``: an export fills the weights in."""
    fields = dict(hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    arguments = _prepared(config, dropout)
    return AutoModel.from_config(config, dtype=torch.float32, **arguments)


def _prepared(hf_config: Any, dropout: float | None) -> dict[str, Any]:
    family = family_of(hf_config.model_type)
    if dropout is not None:
        for key, value in hf_config.to_dict().items():
            if "dropout" in key and isinstance(value, float | int):
                setattr(hf_config, key, dropout)
    return {"add_pooling_layer": False} if family.has_pooler else {}
