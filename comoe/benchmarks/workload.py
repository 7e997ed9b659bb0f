"""Inputs of the benchmarks: real posts if the starter kit is available, and forced expert loads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from comoe.benchmarks.ranks import ROOT
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.corpus import load_corpus
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.models.encoders.build import build_encoder, build_encoder_from_config
from comoe.starter.registry import resolve
from comoe.tasks.lexicon import load_lexicon

RECIPE, SMOKE = ROOT / "launch/configs/starter.yaml", ROOT / "launch/configs/smoke.yaml"
"""The default recipe, and its replacement where the starter kit is not available."""

SELECTED_LOGITS, OTHER_LOGIT = (2.0, 1.5), -2.0
"""Logits of the forced first and second expert, and of every other expert."""


@dataclass(frozen=True, slots=True)
class Source:
    """A recipe whose encoder and posts are local folders."""

    recipe: Recipe
    """The given recipe, or the smoke recipe where the starter kit is not available."""
    name: str
    """Description of the posts, for the report: generated ones have other lengths and routing."""


def find_posts(config: str | None = None, overrides: Sequence[str] = ()) -> Source:
    """A recipe with its posts, or with generated posts where the starter kit is not available.

    Args:
        config: recipe file; None is the default recipe.
        overrides: ``key=value`` changes.
    """
    path = Path(config) if config else RECIPE
    # Every rank may call it: one of them prepares, and the others wait.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        recipe = load_recipe(path, overrides)
        generated = (recipe.data.root or "").startswith("smoke:")
        try:
            recipe = resolve(recipe, progress=False)
        except ValueError:
            recipe, generated = resolve(load_recipe(SMOKE, overrides), progress=False), True
    name = "posts of the starter kit" if path == RECIPE else f"posts of {path.name}"
    return Source(recipe, "generated posts" if generated else name)


def tokenized_posts(recipe: Recipe, limit: int) -> tuple[TokenizedSplit, Collator]:
    """About ``limit`` training posts of each data set, and their collator."""
    corpus = load_corpus(replace(recipe, data=replace(recipe.data, limit_per_task=limit)))
    tokenizer = load_tokenizer(recipe.model.encoder)
    path = recipe.model.lexicon.path
    lexicon = None if path is None else load_lexicon(path)
    about = {"tasks": corpus.tasks, "config": recipe.data, "lexicon": lexicon}
    split = tokenize_split(corpus.splits["train"], tokenizer, **about)
    return split, Collator(tokenizer, corpus.tasks, lexicon=lexicon)


@torch.no_grad()
def hidden_states(source: Source, *, tokens: int, width: int, seed: int) -> Tensor:
    """Hidden states of real tokens as input of a block: the encoder's output, float32, (tokens, width).

    With another ``width`` than the encoder's, a random encoder of two layers of that width reads
    the posts; its states still differ between tokens and repeat with the words.
    """
    split, collator = tokenized_posts(source.recipe, limit=max(64, tokens // 20))
    torch.manual_seed(seed)
    encoder = build_encoder(source.recipe.model)
    if encoder.config.hidden_size != width:
        sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
        encoder = build_encoder_from_config(encoder.config.to_dict() | sizes)
    encoder.eval()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).numpy()
    found: list[Tensor] = []
    start = 0
    while sum(len(part) for part in found) < tokens:
        # Small splits repeat.
        batch = collator(split, order[[i % len(split) for i in range(start, start + 32)]])
        output = encoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
        found.append(output.last_hidden_state[batch.attention_mask_BL.bool()])
        start += 32
    return torch.cat(found)[:tokens].contiguous()


def balanced_selection(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Round-robin over all experts: equal loads; int64, (tokens, k)."""
    return (torch.arange(tokens * top_k) % num_experts).view(tokens, top_k)


def skewed_selection(tokens: int, num_experts: int, top_k: int, *, skew: float) -> Tensor:
    """One expert has ``skew`` times the mean load, the others share the rest evenly; int64, (tokens, k).

    Raises:
        ValueError: an impossible skew: each token selects an expert at most once.
    """
    hot = skew * top_k / num_experts
    if not 0 < hot <= 1:
        raise ValueError(
            f"a skew of {skew} with {top_k} of {num_experts} experts per token is not possible."
        )
    steps = torch.arange(tokens + 1, dtype=torch.float64) * hot
    is_hot_S = steps[1:].floor() > steps[:-1].floor()
    selected_Sk = torch.empty((tokens, top_k), dtype=torch.int64)
    free_Sk = torch.ones((tokens, top_k), dtype=torch.bool)
    free_Sk[:, 0] = ~is_hot_S
    selected_Sk[~free_Sk] = 0
    selected_Sk[free_Sk] = 1 + torch.arange(int(free_Sk.sum())) % (num_experts - 1)
    return selected_Sk


def force(x_SM: Tensor, selected_Sk: Tensor, num_experts: int) -> Tensor:
    """A copy whose first E features make a gate with ``steering_weight`` select ``selected_Sk`` (k at most 2)."""
    forced_SM = x_SM.clone()
    forced_SM[:, :num_experts] = OTHER_LOGIT
    logits_k = torch.tensor(
        SELECTED_LOGITS[: selected_Sk.shape[1]], dtype=x_SM.dtype, device=x_SM.device
    )
    return forced_SM.scatter_(1, selected_Sk.to(x_SM.device), logits_k.expand(selected_Sk.shape))


def steering_weight(num_experts: int, width: int) -> Tensor:
    """Gate weight that reads logit e from feature e, so that every contestant runs its own router and
    all of them select the same experts. float32, (E, width)."""
    return torch.eye(num_experts, width)


def load_skew(selected_Sk: Tensor, num_experts: int) -> float:
    """Largest load over mean load."""
    counts = torch.bincount(selected_Sk.reshape(-1), minlength=num_experts).double()
    return float(counts.max() / counts.mean())
