"""Tiny random encoders, batches and tasks for the tests of models, losses and objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    CamembertConfig,
    CLIPTextConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    ModernBertConfig,
    MPNetConfig,
    MT5Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SiglipTextConfig,
    T5Config,
    UMT5Config,
    XLMRobertaConfig,
)

from comoe.config.recipe import LossConfig, ModelConfig, MoeConfig
from comoe.losses.objective import Objective, count_units, unit_scale
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder_from_config
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch

WIDTH, VOCABULARY = 16, 60
BERT_LIKE = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
)
DISENTANGLED = dict(
    relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True,
    pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0,
)  # fmt: skip
T5_LIKE = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
BART_LIKE = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=40,
    decoder_start_token_id=2,
)  # fmt: skip
SEQ2SEQ = {
    # As T5 v1.0, whose output layer is the table of words; the others' is their own.
    "t5": T5Config(**T5_LIKE),
    "mt5": MT5Config(**T5_LIKE),
    "umt5": UMT5Config(**T5_LIKE),
    "bart": BartConfig(**BART_LIKE),
    "mbart": MBartConfig(**BART_LIKE, scale_embedding=True),
}
"""Encoder-decoders; with a smaller decoder."""
LLAMA_LIKE = BERT_LIKE | dict(
    num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
CAUSAL = {
    "llama": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "qwen3": Qwen3Config(**LLAMA_LIKE),
    # A window of three tokens in all layers but the last.
    "gemma3_text": Gemma3TextConfig(
        **LLAMA_LIKE, sliding_window=3, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
"""Decoder-only."""
HF_CONFIGS = {
    **SEQ2SEQ,
    **CAUSAL,
    "bert": BertConfig(**BERT_LIKE),
    "roberta": RobertaConfig(**BERT_LIKE, type_vocab_size=1),
    "xlm-roberta": XLMRobertaConfig(**BERT_LIKE, type_vocab_size=1),
    "camembert": CamembertConfig(**BERT_LIKE, type_vocab_size=1),
    "electra": ElectraConfig(**BERT_LIKE, embedding_size=8),
    "mpnet": MPNetConfig(**BERT_LIKE),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=3, n_heads=2, hidden_dim=24
    ),
    "deberta-v2": DebertaV2Config(**BERT_LIKE, **DISENTANGLED),
    # A window of four tokens, so that local attention differs from global in a short post.
    "modernbert": ModernBertConfig(
        **BERT_LIKE,
        pad_token_id=0,
        local_attention=4,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    ),
}
"""A small random-weight encoder of each family in ``FAMILIES`` of text; the DeBERTa is like the published
v3 ones."""
TEXT_HALF = BERT_LIKE | dict(
    max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1
)
HALVES = {
    "clip_text_model": CLIPTextConfig(**TEXT_HALF),
    "siglip_text_model": SiglipTextConfig(**TEXT_HALF, projection_size=8),
}
"""Text halves of models of two sides."""
VARIANTS = {
    "deberta-v2 with a convolution": DebertaV2Config(
        **BERT_LIKE, **DISENTANGLED, conv_kernel_size=3, conv_act="gelu"
    ),
    "deberta-v2 with positions": DebertaV2Config(**BERT_LIKE, type_vocab_size=2),
    "electra of one width": ElectraConfig(**BERT_LIKE, embedding_size=WIDTH),
}
"""Other forms of the same families."""
MOOD = Task("mood", "single_label", ("bad", "so-so", "good"), "macro_f1", contrastive=True)
TOPIC = Task("topic", "single_label", ("home", "world"), "macro_f1", contrastive=True)
HEAT = Task("heat", "regression", (), "pearson")
WORDS = Task("words", "tags", ("O", "B-PER"), "span_f1")
SIGNS = Task("signs", "multi_label", ("joy", "fear"), "macro_f1")
TASKS = (MOOD, TOPIC, HEAT, WORDS, SIGNS)


def moe_config(**options) -> MoeConfig:
    return MoeConfig(
        **{"num_experts": 4, "top_k": 2, "output_init": 0.5, "layers": "all"} | options
    )


def tiny_model(
    moe: MoeConfig | None = None,
    *,
    tasks=TASKS,
    family="bert",
    dropout=0.0,
    seed=0,
    recompute=False,
    **options,
) -> MultiTaskModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        dropout=dropout, projection_width=8, moe=moe_config() if moe is None else moe, **options
    )
    encoder_config = (HF_CONFIGS | VARIANTS | HALVES)[family].to_dict()
    return build_model(config, tasks, encoder_config=encoder_config, recompute=recompute)


def tiny_encoder(family: str, seed=0):
    torch.manual_seed(seed)
    return build_encoder_from_config((HF_CONFIGS | VARIANTS)[family].to_dict(), dropout=0.0)


def random_batch(rows=6, length=9, *, tasks=TASKS, seed=0, labelled=True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator) * mask + (1 - mask)
    labels = {
        task.name: labels_for(task, rows, length, generator, labelled=labelled) for task in tasks
    }
    task_ids = torch.randint(0, len(tasks), (rows,), generator=generator)
    return Batch(ids, mask, None, mask.bool(), task_ids, torch.arange(rows), labels)


def labels_for(
    task: Task, rows: int, length: int, generator: torch.Generator, *, labelled: bool
) -> torch.Tensor:
    shapes = {
        "single_label": (rows,),
        "tags": (rows, length),
        "regression": (rows,),
        "multi_label": (rows, 2),
    }
    shape, missing = (
        shapes[task.kind],
        IGNORED if task.kind in ("single_label", "tags") else math.nan,
    )
    if not labelled:
        return torch.full(shape, missing)
    if task.kind == "regression":
        return torch.randn(shape, generator=generator)
    values = torch.randint(0, max(len(task.labels), 2), shape, generator=generator)
    return values.float() if task.kind == "multi_label" else values


def take(batch: Batch, rows: list[int]) -> Batch:
    """The batch of some rows, padding kept."""
    labels = {name: values[rows] for name, values in batch.labels.items()}
    ids = (
        batch.input_ids_BL[rows],
        batch.attention_mask_BL[rows],
        None,
        batch.word_starts_BL[rows],
    )
    return Batch(*ids, batch.task_ids_B[rows], batch.row_ids_B[rows], labels, batch.unit_scale_T)


def scaled(batch: Batch, tasks=TASKS, *, accumulation=1) -> Batch:
    units = count_units(batch, tasks)
    return replace(batch, unit_scale_T=unit_scale(units, world_size=1, accumulation=accumulation))


def tiny_objective(
    moe: MoeConfig | None = None, *, tasks=TASKS, loss: LossConfig | None = None, **options
) -> Objective:
    moe = moe_config() if moe is None else moe
    return Objective(tiny_model(moe, tasks=tasks, **options), tasks, loss or LossConfig(), moe)


def cut(batch: Batch, rows: Sequence[list[int]], tasks=TASKS) -> list[Batch]:
    """The micro-batches of some rows each, under the one scale of their step."""
    parts = [batch.take(torch.tensor(part)) for part in rows]
    units = sum(count_units(part, tasks) for part in parts)
    scale = unit_scale(units, world_size=1, accumulation=len(parts))
    return [replace(part, unit_scale_T=scale) for part in parts]


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Trained weight -> its gradient."""
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def without_gradient(module: nn.Module) -> list[str]:
    """Trained weights that no backward pass has reached, or with a gradient that is not finite."""
    grads = gradients(module)
    return [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
