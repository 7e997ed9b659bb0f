"""Tiny random vision towers, models of both sides, and batches with pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    ResNetConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViltConfig,
    ViTConfig,
)

from comoe.config.recipe import ImageTextConfig, ModelConfig, VisionConfig
from comoe.models.build import build_model
from comoe.models.model import MultiTaskModel
from comoe.types import Batch
from tests.helpers_model import (
    BERT_LIKE,
    HALVES,
    HF_CONFIGS,
    TASKS,
    VARIANTS,
    moe_config,
    random_batch,
)

SIDE = 16
SEEING = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=SIDE,
    patch_size=8,
)
READING = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30, bos_token_id=0,
    eos_token_id=1, pad_token_id=1,
)  # fmt: skip
MAPS = dict(hidden_sizes=[8, 12], depths=[1, 1])
TOWERS = {
    "vit": ViTConfig(**SEEING),
    "deit": DeiTConfig(**SEEING),
    "beit": BeitConfig(**SEEING),
    "dinov2": Dinov2Config(**SEEING),
    "clip": CLIPConfig(vision_config=SEEING, text_config=READING, projection_dim=8),
    "clip, vision half": CLIPVisionConfig(**SEEING),
    "siglip": SiglipConfig(vision_config=SEEING, text_config=READING),
    "siglip, vision half": SiglipVisionConfig(**SEEING),
    "resnet": ResNetConfig(embedding_size=8, layer_type="basic", **MAPS),
    "convnext": ConvNextConfig(num_stages=2, **MAPS),
    "swin": SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=6, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
}
"""A small random-weight model of each kind; V is 12."""
VILT = ViltConfig(**BERT_LIKE, image_size=SIDE, patch_size=8)
FUSED = ("concat", "attention", "gated", "tokens", "vilt")
"""Keys of ``FUSIONS``, and the one stream."""


def save_tower(folder: Path, kind: str = "vit") -> Path:
    torch.manual_seed(3)
    AutoModel.from_config(TOWERS[kind]).save_pretrained(folder)
    return folder


def tower_config(kind: str = "vit") -> dict:
    config = TOWERS[kind]
    return getattr(config, "vision_config", config).to_dict()


def seeing_model(
    fusion="attention", *, moe=None, tasks=TASKS, family="bert", tower="vit", seed=0, recompute=False,
    dropout=0.0, image_text: ImageTextConfig | None = None, sharing: dict | None = None, **vision,
) -> MultiTaskModel:  # fmt: skip
    torch.manual_seed(seed)
    alone = fusion == "vilt"
    config = ModelConfig(
        dropout=dropout,
        projection_width=8,
        moe=moe_config() if moe is None else moe,
        vision=VisionConfig(
            tower=None if alone else "some/tower", fusion="attention" if alone else fusion, **vision
        ),
        **(sharing or {}),
    )
    return build_model(
        config,
        tasks,
        encoder_config=(VILT if alone else (HF_CONFIGS | VARIANTS | HALVES)[family]).to_dict(),
        tower_config=None if alone else tower_config(tower),
        image_text=image_text,
        recompute=recompute,
    )


def with_pictures(batch: Batch, rows, *, seed=0, step=0) -> Batch:
    """A batch whose given rows have pictures that depend on the post alone; a blank one where there is none."""
    posts = [int(batch.row_ids_B[row]) for row in rows]
    pictures = [
        torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1000 * seed + post))
        for post in posts
    ]
    return replace(
        batch,
        pixels_I3HW=torch.stack(pictures or [torch.zeros(3, SIDE, SIDE)]),
        image_rows_I=torch.tensor(list(rows) or [-1]),
        image_numbers_I=None,
        step=step,
    )


def seeing_batch(rows=6, *, pictures=(0, 2, 3, 5), seed=0, **options) -> Batch:
    return with_pictures(random_batch(rows=rows, seed=seed, **options), pictures)
