"""Every key of a DeepSpeed JSON that is passed on, in real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comoe.train.parallel.ds_keys import PASSED

ROOT = Path(__file__).parents[2]

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


def losses(folder: Path, *words: str) -> list[float]:
    command = [
        sys.executable,
        "-m",
        "comoe",
        "train",
        "smoke",
        "train.max_steps=2",
        "train.log_every=1",
        *words,
    ]
    command += [f"run.output_dir={folder}", "data.limit_per_task=32", "data.limit_eval=16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COMOE_BF16": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / "smoke" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line and line["split"] == "train"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_them_has_the_losses_of_one_without(stage: int, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(SETTINGS | {"zero_optimization": STAGES[stage]}))
    found = losses(tmp_path / "with", "--deepspeed", str(file))
    assert found == pytest.approx(losses(tmp_path / "without"), rel=1e-5) and len(found) == 2
