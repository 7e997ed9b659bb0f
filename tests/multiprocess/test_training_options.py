"""Frozen layers, recomputed layers, every family and every gate train over real ranks as they do in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.helpers_model import HF_CONFIGS
from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import build, make_encoder, one_step, recipe_of

pytestmark = pytest.mark.multiprocess

SEPARATED = {"loss__task_separation_weight": 0.4}
RECOMPUTED = {"train__activation_checkpointing": True}
FAMILIES = ("electra", "deberta-v2", "xlm-roberta", "modernbert")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def run_cases(encoder: str, world_size: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cases = [{"steps": 3, **case} for case in cases]
    return run_ranks("tests.multiprocess.workers:many", world_size, encoder=encoder, cases=cases)[0]


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=rtol)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=10 * rtol)
    for task, logits in found["engine_logits"].items():
        np.testing.assert_allclose(logits, expected["engine_logits"][task], atol=2e-4, rtol=0)


def test_recomputed_layers_give_the_losses_of_kept_ones_in_every_layout(encoder: str) -> None:
    for changes in (SEPARATED, {"model__moe__route_by": "both", **SEPARATED}):
        (one,) = run_cases(encoder, 1, [{"stage": 1, **changes}])
        layouts = [(ep, stage) for ep in (1, 2) for stage in (2, 3)]
        several = run_cases(
            encoder, 2, [{"stage": stage, "parallel__ep_size": ep, **changes, **RECOMPUTED} for ep, stage in layouts]
        )
        for answer in several:
            assert_same(answer, one)
            # Loads that are counted twice would move the bias elsewhere.
            for key, value in answer["state"].items():
                if key.endswith("e_score_correction_bias"):
                    np.testing.assert_array_equal(value, one["state"][key])


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputed_layers_draw_the_same_dropout_again(encoder: str, stage: int) -> None:
    changes = {"stage": stage, "parallel__ep_size": 2, "model__dropout": 0.2, "accumulation": 2}
    kept, recomputed = run_cases(encoder, 2, [changes, changes | RECOMPUTED])
    assert_same(recomputed, kept, rtol=1e-6)
    for key, moved in kept["moves"].items():
        np.testing.assert_allclose(recomputed["moves"][key], moved, atol=2e-4, rtol=0, err_msg=key)


@pytest.mark.parametrize("train_layers", ["none", 1])
def test_a_partly_frozen_encoder_trains_alike_in_every_layout(encoder: str, train_layers: str | int) -> None:
    changes = {"model__train_layers": train_layers}
    (one,) = run_cases(encoder, 1, [{"stage": 1, **changes}])
    layouts = [(2, 2, {}), (2, 3, {}), (1, 3, {}), (2, 1, {}), (2, 3, RECOMPUTED)]
    several = run_cases(
        encoder, 2, [{"stage": stage, "parallel__ep_size": ep, **changes, **more} for ep, stage, more in layouts]
    )
    for answer in (one, *several):
        assert_same(answer, one)
        still = {key for key, moved in answer["moves"].items() if not np.abs(moved).max() > 0}
        trained = {key for key in answer["moves"] if ".block." in key or not key.startswith("encoder.")}
        if train_layers == 1:
            trained |= {key for key in answer["moves"] if key.startswith("encoder.encoder.layer.1.")}
        assert {key for key in trained & still if not key.endswith(("key.bias", "e_score_correction_bias"))} == set()
        assert still >= set(answer["moves"]) - trained


def frozen_resume(encoder: str, *, stage: int, folder: str) -> dict[str, Any]:
    """Two steps with a frozen encoder, a checkpoint, one more step; and that step again from the checkpoint."""
    from comoe.train.checkpoint import load_checkpoint, save_checkpoint
    from comoe.train.folders import find_checkpoint
    from comoe.train.state import TrainState

    recipe = recipe_of(encoder, model__train_layers="none", parallel__ep_size=2)
    engine, layout = build(recipe, stage=stage)
    for step in range(2):
        one_step(engine, step)
    roles = [group["role"] for group in engine.deepspeed.optimizer.param_groups]
    save_checkpoint(Path(folder), engine, TrainState(step=2), layout, keep=1)
    uninterrupted = float(one_step(engine, 2).loss)
    torch.manual_seed(3)
    fresh, layout = build(recipe, stage=stage)
    found = find_checkpoint(Path(folder))
    assert found is not None
    load_checkpoint(found.path, fresh, layout)
    return {"uninterrupted": uninterrupted, "resumed": float(one_step(fresh, 2).loss), "roles": set(roles)}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_a_frozen_encoder_resumes_and_its_optimizer_knows_no_encoder(
    encoder: str, stage: int, tmp_path: Path
) -> None:
    work = "tests.multiprocess.test_training_options:frozen_resume"
    for answer in run_ranks(work, 2, encoder=encoder, stage=stage, folder=str(tmp_path)):
        assert answer["resumed"] == pytest.approx(answer["uninterrupted"], rel=1e-6)
        assert answer["roles"] == {"experts", "heads"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_alike_under_zero_3_and_expert_parallelism(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    AutoModel.from_config(HF_CONFIGS[family]).save_pretrained(tmp_path)
    (one,) = run_cases(str(tmp_path), 1, [{"stage": 1}])
    layouts = [{"stage": 2}, {"stage": 3}, {"stage": 3, **RECOMPUTED}, {"stage": 3, "model__train_layers": 1}]
    *whole, frozen = run_cases(str(tmp_path), 2, [{"parallel__ep_size": 2, **layout} for layout in layouts])
    for answer in whole:
        assert_same(answer, one)
        still = [key for key, moved in answer["moves"].items() if not np.abs(moved).max() > 0]
        assert all(key.endswith(("key.bias", "e_score_correction_bias")) for key in still), still
    assert frozen["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 1, "top_k": 1},
        {"gate": "uniform"},
        {"gate": "softmax", "top_k": 1},
        {"shared_width": 8, "cooperation_threshold": 0.5, "top_k": 3},
    ],
)
def test_every_form_of_gate_and_experts_trains_alike_over_ranks(encoder: str, moe: dict[str, Any]) -> None:
    changes = {f"model__moe__{key}": value for key, value in moe.items()} | {"loss__balance_weight": 0.0} | SEPARATED
    (one,) = run_cases(encoder, 1, [{"stage": 1, **changes}])
    for answer in run_cases(encoder, 2, [{"stage": stage, **changes} for stage in (2, 3)]):
        assert_same(answer, one)
        moved = {key for key, move in answer["moves"].items() if np.abs(move).max() > 0}
        assert any("experts" in key for key in moved)
