"""Reptile on every layout: the outer weights of a float64 loop, in evaluations, in checkpoints, after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.commands import read_lines
from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.sittings import sit, sit_twice
from tests.multiprocess.test_layouts import ADAMW, BF16, OFFLOAD
from tests.multiprocess.workers import make_encoder, recipe_of

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_reptile_ranks"
LOOP, STEPS, SAVED = 2, 6, 3
"""Three inner loops; saved in the middle of the second one."""
RATE = 0.8
OPTIONS = {
    **{key: value for key, value in ADAMW.items() if key != "seed"}, "model__train_layers": 1,
    "model__moe__route_by": "both", "train__reptile_steps": LOOP, "train__reptile_rate": RATE,
    "train__betas": [0.0, 0.999],
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1, "ep": 1},
    "ZeRO 2, experts shared": {"stage": 2, "ep": 2},
    "ZeRO 2, offloaded": {"stage": 2, "ep": 1, "settings": OFFLOAD},
    "ZeRO 3, experts shared": {"stage": 3, "ep": 2},
    # As in the shipped JSON, where DeepSpeed keeps small weights whole.
    "ZeRO 3, small weights whole": {
        "stage": 3, "ep": 1,
        "settings": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100000}},
    },
    "ZeRO 1 in bf16": {"stage": 1, "ep": 1, "settings": BF16},
    "ZeRO 3 in bf16": {"stage": 3, "ep": 2, "settings": BF16},
}  # fmt: skip
ORDINARY = ("ZeRO 1", "ZeRO 3, experts shared", "ZeRO 1 in bf16", "ZeRO 3 in bf16")
MOVED = "ZeRO 3, experts shared"
"""What "ZeRO 1" is resumed as too."""


def plain(encoder: str) -> dict[str, np.ndarray]:
    """The outer weights of one PyTorch process, in float64: after loop i of 3 a step of RATE (1 - i / 3)."""
    from comoe.losses.build import build_objective

    recipe = recipe_of(encoder, **OPTIONS)
    torch.manual_seed(5)
    objective = build_objective(recipe, workers.TASKS).train()
    trained = {
        name: weight for name, weight in objective.model.named_parameters() if weight.requires_grad
    }
    outer = {name: weight.detach().double() for name, weight in trained.items()}
    batches = [workers.own_batches(step) for step in range(STEPS)]
    for step, _ in enumerate(workers.train_plainly(objective, recipe, batches)):
        if step % LOOP < LOOP - 1:
            continue
        rate = RATE * (1 - (step // LOOP) / 3)
        for name, weight in trained.items():
            outer[name] = (1 - rate) * outer[name] + rate * weight.detach().double()
            weight.data.copy_(outer[name])
    return {name: value.numpy() for name, value in outer.items()}


def read_master(weight: torch.nn.Parameter) -> torch.Tensor:
    """This rank's float32 numbers of a weight that the optimizer steps on; every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    read = safe_get_local_fp32_param if hasattr(weight, "ds_id") else safe_get_full_fp32_param
    return read(weight)


def meta_trained(
    encoder: str, *, folder: str, engines: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    from comoe.losses.build import build_objective
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.parallel.setup import gather_full_state
    from comoe.train.state import TrainState, outer_rate

    def built(name: str, *, changes: dict[str, Any] | None = None, **more: Any) -> Any:
        options = engines[name]
        changes = OPTIONS | {"parallel__ep_size": options["ep"]} | (changes or {})
        settings = options.get("settings", {}) | more
        recipe = recipe_of(encoder, **changes)
        return workers.build(recipe, stage=options["stage"], settings=settings, seed=5)

    def train(engine: Any, first: int, last: int, rate: float | None = None) -> dict[str, Any]:
        for step in range(first, last):
            workers.one_step(engine, step)
            config = engine.recipe.train
            share = rate or outer_rate(step + 1, total=STEPS, config=config)
            if share and engine.outer:
                engine.outer.move(share)
        return engine.full_state()

    found: dict[str, Any] = {}
    batch = workers.batch_of(workers.posts(99, 4))
    for name in engines:
        place = Path(folder) / name.replace(" ", "-")
        engine, layout = built(name)
        train(engine, 0, SAVED)
        save_checkpoint(place, engine, TrainState(step=SAVED), layout, keep=1)
        before = gather_full_state(engine.deepspeed)
        with engine.averaged():
            logits = engine.forward(batch).logits
        after, outer = gather_full_state(engine.deepspeed), engine.full_state()
        answer = {"back": all(torch.equal(before[key], after[key]) for key in before)}
        if outer:
            answer["inside"] = any(not torch.equal(outer[key], after[key]) for key in outer)
            model = build_objective(recipe_of(encoder, **OPTIONS), workers.TASKS).model.eval()
            model.load_state_dict(outer)
            with torch.no_grad():
                expected = model(batch).logits
            answer["logits_off"] = max(
                float((logits[task].float() - expected[task]).abs().max()) for task in expected
            )
        uncut = train(engine, SAVED, STEPS)
        answer["masters"] = all(
            torch.equal(read_master(weight).view_as(value), value)
            for weight, value in zip(
                engine.outer._weights.values(), engine.outer.values.values(), strict=True
            )
        )
        fresh, layout = built(name)
        load_checkpoint(find_checkpoint(place).path, fresh, layout)
        resumed = train(fresh, SAVED, STEPS)
        answer["state"] = {key: value.numpy() for key, value in uncut.items()}
        answer["resumed"] = all(torch.equal(resumed[key], uncut[key]) for key in uncut)
        # The whole way after every step is no Reptile at all.
        states = []
        for steps in (1, 0) if name in ORDINARY else ():
            engine, _ = built(name, changes={"train__reptile_steps": steps})
            train(engine, 0, 3, rate=1.0)
            states.append(gather_full_state(engine.deepspeed))
        if states:
            one, other = states
            answer["ordinary"] = all(torch.equal(one[key], other[key]) for key in one)
        found[name] = answer
    engine, layout = built(MOVED, checkpoint={"load_universal": True})
    load_checkpoint(find_checkpoint(Path(folder) / "ZeRO-1").path, engine, layout)
    moved = train(engine, SAVED, STEPS)
    found["moved"] = {key: value.numpy() for key, value in moved.items()}
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def expected(encoder) -> dict[str, np.ndarray]:
    return run_ranks(f"{HERE}:plain", 1, encoder=encoder)[0]


@pytest.fixture(scope="module")
def found(encoder, tmp_path_factory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    arguments = {"encoder": encoder, "folder": folder, "engines": ENGINES}
    return run_ranks(f"{HERE}:meta_trained", 2, timeout=600, **arguments)[0]


@pytest.mark.parametrize("name", [*ENGINES, "moved"])
def test_the_outer_weights_are_those_of_one_process_in_float64(name, expected, found):
    state = found["moved"] if name == "moved" else found[name]["state"]
    for key, value in expected.items():
        # In bf16 what is summed up is float32, but made of rounded weights.
        atol = 0.02 if "bf16" in name else 1e-5
        np.testing.assert_allclose(state[key], value, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ENGINES)
def test_evaluation_sees_the_outer_weights_and_the_inner_loop_goes_on(name, found):
    assert found[name]["back"] and found[name]["inside"]
    assert found[name]["logits_off"] < (0.1 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_the_next_inner_loop_begins_at_the_outer_weights(name, found):
    assert found[name]["masters"]


@pytest.mark.parametrize("name", ENGINES)
def test_a_resume_inside_an_inner_loop_equals_the_uninterrupted_run(name, found):
    assert found[name]["resumed"]


@pytest.mark.parametrize("name", ORDINARY)
def test_the_whole_way_after_every_step_is_ordinary_training(name, found):
    assert found[name]["ordinary"]


RUN = (
    "data.cache=false", "run.histograms=false", "run.plots=false", "train.max_steps=12", "train.reptile_steps=4",
    "train.betas=[0.0,0.999]", "train.eval_every=4", "train.save_every=2", "train.keep_checkpoints=9",
    "train.measure_experts=false", "model.dropout=0.1", "train.batch_size=24", "train.log_every=1",
)  # fmt: skip
STOPPED_AT = 6


@pytest.fixture(scope="module")
def whole_and_resumed(tmp_path_factory) -> list[Path]:
    """Run folders: one sitting, two sittings; without dropout one rank and two."""
    whole, cut, one, two = (
        tmp_path_factory.mktemp(name) for name in ("whole", "cut", "one", "two")
    )
    sit(whole, overrides=RUN)
    sit_twice(cut, overrides=RUN, stop_at=STOPPED_AT)
    for folder, ranks in ((one, 1), (two, 2)):
        sit(
            folder,
            ranks=ranks,
            overrides=[*RUN, "model.dropout=0", "train.max_steps=8"],
            float32=True,
        )
    return [folder / "smoke" for folder in (whole, cut, one, two)]


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/weights/model.safetensors")


def test_a_run_cut_inside_an_inner_loop_exports_what_the_run_in_one_sitting_does(whole_and_resumed):
    whole, cut, *_ = whole_and_resumed
    for step in (8, 12):
        one, other = weights_at(whole, step), weights_at(cut, step)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_inside_an_inner_loop_has_the_weights_where_it_began(whole_and_resumed):
    whole = whole_and_resumed[0]
    began, inside, ended = (weights_at(whole, step) for step in (4, 6, 8))
    same = {key for key in began if torch.equal(began[key], inside[key])}
    # The balance bias follows each step.
    assert {key for key in began if not key.endswith("score_correction_bias")} <= same
    assert any(not torch.equal(inside[key], ended[key]) for key in same)


def test_the_export_has_the_outer_weights_of_its_checkpoint(whole_and_resumed):
    whole = whole_and_resumed[0]
    export = load_file(whole / "export/model.safetensors")
    found = [weights_at(whole, step) for step in (4, 8, 12)]
    assert any(all(torch.equal(state[key], export[key]) for key in export) for state in found)


def test_each_loop_of_a_run_is_of_one_data_set_and_two_ranks_equal_one(whole_and_resumed):
    whole, _, one, two = (
        [line for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]
        for folder in whole_and_resumed
    )
    assert [line["step"] for line in whole] == list(range(1, 13))
    loops = [tuple(sorted(line["tasks"])) for line in whole]
    assert all(loops[step] == loops[step // 4 * 4] for step in range(12)) and len({*loops}) > 1
    assert [sorted(line["tasks"]) for line in two] == [sorted(line["tasks"]) for line in one]
    np.testing.assert_allclose(
        [line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4
    )
