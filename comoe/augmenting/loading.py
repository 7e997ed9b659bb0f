"""Loads a generative model by name or folder, or says what is wrong with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from comoe.augmenting.hugging_face import HuggingFaceGenerator
from comoe.models.pretrained import Role, quiet, read_config
from comoe.rules import unknown_name
from comoe.starter import PREFIXES, READY_MADE, prepare

GENERATIVE = Role("--model", "a generative model", "kit:smollm2")
"""The model's role, in the words of error messages."""


def load_generator(
    name: str,
    *,
    device: str = "auto",
    max_new_tokens: int = 32,
    temperature: float = 0.7,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> HuggingFaceGenerator:
    """Load a generative model: float32 on a CPU, bfloat16 on a GPU. Its weights are safetensors, never a pickle.

    Args:
        name: folder, hub name or a ready-made one of ``READY_MADE``.
        device: a torch device; auto is the first GPU, or the CPU where there is none.
        max_new_tokens: tokens of an answer.
        temperature: of drawn answers.
        trust_remote_code: let the repository run its own Python code.
        progress: report what is done, and draw bars on a terminal.

    Raises:
        ValueError: no such folder or name, no network, a model that does not write text, missing weights, no tokenizer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more.")
    place = _place(device)
    if place.type == "cpu":
        # The library imports DeepSpeed when it generates, which else prints that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name.startswith(PREFIXES) and name not in READY_MADE["--model"]:
        raise unknown_name("ready-made --model", name, READY_MADE["--model"])
    folder = str(prepare([name], progress=progress)[name]) if name.startswith(PREFIXES) else name
    with _no_retry_lines():
        source, config = read_config(folder, GENERATIVE, trust_remote_code=trust_remote_code)
    auto = _class_for(name, config, trust_remote_code=trust_remote_code)
    with _readable_errors(name), quiet(), _no_retry_lines():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, report = auto.from_pretrained(
            source, config=config, dtype=torch.float32 if place.type == "cpu" else torch.bfloat16, use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    if report["missing_keys"]:
        # The library would fill them with random numbers and go on.
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"--model ({name}) has no weights for {', '.join(missing[:3])} ({len(missing)} in all), so it cannot "
            "write; give a whole generative model."
        )
    return HuggingFaceGenerator(
        model.to(place).eval(), tokenizer, name=name, max_new_tokens=max_new_tokens, temperature=temperature or 1.0
    )


def _place(device: str) -> torch.device:
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); name another one, or auto.") from error
    return place


def _class_for(name: str, config: Any, *, trust_remote_code: bool) -> Any:
    """The library's class that builds the model."""
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    # BERT and its kin are in both tables, but write only where they were trained as decoders.
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not fills_gaps
    if known or (trust_remote_code and not config.is_encoder_decoder and not fills_gaps):
        return AutoModelForCausalLM
    raise ValueError(
        f"--model ({name}) is a {config.model_type} model, which reads text but does not write any; give a generative "
        "model: an encoder-decoder (Flan-T5, BART) or a causal one (Llama, SmolLM, kit:smollm2)."
    )


@contextmanager
def _no_retry_lines() -> Iterator[None]:
    """Inside, the hub's library does not tell each time that it cannot reach the hub: the error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"--model ({name}) could not be loaded: {reason} Give a folder with safetensors and a tokenizer, a hub "
            "name that this machine can reach, or kit:smollm2."
        ) from error
