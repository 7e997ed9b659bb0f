"""Every key of a DeepSpeed JSON that is passed on, in real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comoe.train.parallel.ds_keys import PASSED
from tests.end_to_end.commands import LEAN, losses, train_in_ranks

ZERO = {
    "contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 5e5,
    "allgather_bucket_size": 500_000,
}  # fmt: skip
STAGE_3 = {
    "stage": 3, "stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 10,
    "stage3_max_live_parameters": 100_000, "stage3_max_reuse_distance": 1000,
    "offload_optimizer": {"device": "none", "pin_memory": False},
}  # fmt: skip
SETTINGS = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1,
    "gradient_clipping": "auto", "bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"},
    "expert_parallel": {
        "enabled": True, "autoep_size": 1, "top_k": "auto", "use_grouped_mm": False, "score_func": "sigmoid",
        "route_norm": True,
    },
}  # fmt: skip
STAGES = {2: {**ZERO, "stage": 2}, 3: STAGE_3}


def keys(node: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in node.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def test_all_keys_are_tried() -> None:
    tried = [keys(SETTINGS | {"zero_optimization": zero}) for zero in STAGES.values()]
    assert set().union(*tried) == set(PASSED)


def run(folder: Path, settings: Path | None = None) -> list[float]:
    """The losses of a run of one rank."""
    words = [*LEAN, "train.max_steps=2", "data.limit_per_task=32", "data.limit_eval=16"]
    train_in_ranks(1, folder, [f"run.output_dir={folder}", *words], settings=settings)
    return losses(folder / "smoke")


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> list[float]:
    return run(tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_them_has_the_losses_of_one_without(stage: int, without, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(SETTINGS | {"zero_optimization": STAGES[stage]}))
    found = run(tmp_path / "with", file)
    assert found == pytest.approx(without, rel=1e-5) and len(found) == 2
