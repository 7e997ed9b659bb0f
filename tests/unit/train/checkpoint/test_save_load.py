"""Which checkpoints an engine must be built for, decided before it is built."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comoe.config.load import recipe_from_dict
from comoe.inference.checkpoint_folder import write_manifest
from comoe.train.checkpoint.save_load import load_checkpoint, needs_conversion, saved_elsewhere
from comoe.train.parallel.ds_config import Layout

HERE = Layout(world_size=1, ep_size=1, stage=2, micro_batch_size=4, accumulation=1, bf16=False)


def save(folder: Path, step: int, layout: Layout, *, best_step: int) -> Path:
    path = folder / f"step-{step:08d}"
    (path / "weights").mkdir(parents=True)
    (path / "weights/model.safetensors").touch()
    saved = {name: getattr(layout, name) for name in ("world_size", "ep_size", "stage", "bf16")}
    (path / "state.json").write_text(json.dumps({"layout": saved, "best_step": best_step}))
    write_manifest(path, step=step)
    return path


@pytest.mark.parametrize(
    "change",
    [{"world_size": 2}, {"world_size": 2, "ep_size": 2}, {"stage": 1}, {"stage": 3}, {"bf16": True}],
)  # fmt: skip
def test_a_checkpoint_of_another_layout_is_converted(tmp_path, change):
    path = save(tmp_path, 8, replace(HERE, **change), best_step=8)
    assert "this start has 1 ranks, ep_size 1, ZeRO 2, float32" in saved_elsewhere(path, HERE)
    assert needs_conversion(path, HERE)


def test_so_it_is_for_the_sake_of_the_best_one_which_the_end_of_the_run_loads(tmp_path):
    best = save(tmp_path, 4, replace(HERE, world_size=2, ep_size=2), best_step=4)
    path = save(tmp_path, 8, HERE, best_step=4)
    assert saved_elsewhere(path, HERE) == "" and needs_conversion(path, HERE)
    (best / "manifest.json").unlink()
    assert not needs_conversion(path, HERE), "a broken one is never loaded"


def test_on_the_same_layout_nothing_is_converted(tmp_path):
    save(tmp_path, 4, HERE, best_step=4)
    assert not needs_conversion(save(tmp_path, 8, HERE, best_step=4), HERE)


def test_a_run_with_sgd_does_not_move_and_says_where_it_resumes(tmp_path):
    path = save(tmp_path, 8, replace(HERE, world_size=2), best_step=8)
    about = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(about | {"threads": torch.get_num_threads()}))
    engine = SimpleNamespace(
        recipe=recipe_from_dict({"train": {"optimizer": "sgd"}}),
        deepspeed=SimpleNamespace(load_universal_checkpoint=lambda: True),
    )
    with pytest.raises(
        ValueError,
        match=r"saved with 2 ranks, .*\. SGD's moments do not move; resume on the layout",
    ):
        load_checkpoint(path, engine, HERE)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"layout": 1}'])
def test_a_damaged_state_is_named(tmp_path, content):
    path = save(tmp_path, 8, HERE, best_step=8)
    (path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json"):
        load_checkpoint(path, SimpleNamespace(), HERE)
