"""``AutoConfig`` and ``AutoModel`` of transformers for exports of comoe, once this module is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from comoe.config.plugins import consent
from comoe.inference.exported import Exported, load_exported
from comoe.inference.hub import copy_export, find_export
from comoe.types import Batch

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class ComoeConfig(PretrainedConfig):
    """``config.json`` of an export, each key an attribute."""

    model_type = "comoe"


@dataclass(frozen=True, slots=True)
class ComoeOutput:
    """What the model predicts."""

    logits: dict[str, Tensor]
    """Task -> (B, Y); of word tags (B, L, Y) for each piece."""


class ComoeModel(PreTrainedModel):
    """An export in the form of transformers: token ids in, logits of every task out.

    Texts, images, several passes per post, and labels instead of logits are what
    ``comoe.Predictor`` is for; the model of an export is ``.model``.
    """

    config_class = ComoeConfig
    base_model_prefix = "model"

    def __init__(self, config: ComoeConfig, exported: Exported) -> None:
        super().__init__(config)
        self.model = exported.model
        self.tasks = exported.tasks
        self._folder = exported.folder
        by_post = not exported.model_config.row_per_task or len(exported.tasks) == 1
        decoded = any(task.mode == "decoder" for task in exported.tasks)
        more = (exported.image_processor, exported.lexicon)
        self._plain = by_post and not decoded and more == (None, None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *arguments: Any,
        config: ComoeConfig | None = None,
        plugins: Sequence[str] = (),
        verify: bool = True,
        **options: Any,
    ) -> ComoeModel:
        """Load an export; options of the hub as for ``comoe.Predictor.from_pretrained``, others are ignored.

        Raises:
            ValueError: as ``comoe.Predictor.from_pretrained``.
        """
        consent(plugins)
        folder = find_export(
            pretrained_model_name_or_path,
            **{name: options[name] for name in HUB_OPTIONS if options.get(name) is not None},
        )
        config = config or ComoeConfig.from_pretrained(folder)
        return cls(config, load_exported(folder, verify=verify)).eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Copy the export."""
        copy_export(self._folder, Path(save_directory))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **ignored: Any,
    ) -> ComoeOutput:
        """Logits of every task, as the tokenizer of the export made the inputs, (B, L) each.

        Raises:
            ValueError: the model reads more than token ids: a task, a prompt, images, or a lexicon.
        """
        if not self._plain:
            raise ValueError(
                "this model reads more than token ids (the task, a prompt, images or a lexicon); use comoe.Predictor."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows_B = torch.arange(len(input_ids), device=input_ids.device)
        tasks_B = torch.full_like(rows_B, -1)
        batch = Batch(input_ids, mask, token_type_ids, mask.bool(), tasks_B, rows_B)
        return ComoeOutput(logits=dict(self.model(batch).logits))


AutoConfig.register(ComoeConfig.model_type, ComoeConfig, exist_ok=True)
AutoModel.register(ComoeConfig, ComoeModel, exist_ok=True)
