"""A run that starts from a dense one is the same on every layout, from its first step on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from comoe.inference.export import Backbone, export_model
from comoe.losses.build import build_objective
from tests.helpers_export import tiny_tokenizer
from tests.helpers_ranks import run_ranks
from tests.multiprocess.test_layouts import ADAMW, MANY, TOLERANCE, off_in_losses, off_in_weights
from tests.multiprocess.workers import TASKS, make_encoder, recipe_of

pytestmark = pytest.mark.multiprocess

DENSE = {
    "num_experts": 1, "top_k": 1, "balance": "none", "expert_width": 40, "layers": "all", "output_init": 0.05,
}  # fmt: skip
EXPERTS = {"model__moe__shared_width": 8, "model__moe__route_by": "both", "steps": 4, **ADAMW}


def export_dense(encoder: str, folder: Path) -> str:
    recipe = recipe_of(encoder, model__moe=DENSE, loss__balance_weight=0.0)
    torch.manual_seed(1)
    model = build_objective(recipe, TASKS).model
    export_model(
        folder / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=TASKS,
        backbone=Backbone(model.encoder.config.to_dict(), tiny_tokenizer(folder / "vocabulary")),
    )
    return str(folder / "export")


def test_experts_made_of_a_dense_block_train_alike_on_every_layout(tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    options: dict[str, Any] = EXPERTS | {"model__start_from": export_dense(encoder, tmp_path)}
    alone = [options, options | {"model__start_from": None}]
    plain, fresh = run_ranks(MANY, 1, encoder=encoder, cases=alone, work="plain_case")[0]
    assert off_in_losses(fresh, plain) > 0.01
    cells = [(1, 1), (2, 2), (1, 3), (2, 3)]
    cases = [options | {"stage": stage, "parallel__ep_size": ep} for ep, stage in cells]
    for cell, found in zip(cells, run_ranks(MANY, 2, encoder=encoder, cases=cases)[0], strict=True):
        assert off_in_losses(found, plain) <= TOLERANCE, cell
        assert max(off_in_weights(found, plain).values()) <= TOLERANCE, cell
