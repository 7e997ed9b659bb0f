"""Averaged weights on every layout: those of a float64 loop, in evaluations, in checkpoints, after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.test_layouts import ADAMW, BF16
from tests.multiprocess.workers import make_encoder, recipe_of

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_average_ranks"
DECAY, STEPS, SAVED = 0.7, 6, 4
# In the first three steps the decay is 0, 1/2 and 2/3; then 0.7.
OPTIONS = {**{key: value for key, value in ADAMW.items() if key != "seed"}, "model__train_layers": 1,
           "train__average_weights": DECAY, "model__moe__route_by": "both"}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1, "ep": 1},
    "ZeRO 2, experts shared": {"stage": 2, "ep": 2},
    "ZeRO 3, experts shared": {"stage": 3, "ep": 2},
    # As in the shipped JSON, where DeepSpeed keeps small weights whole.
    "ZeRO 3, small weights whole": {
        "stage": 3, "ep": 1,
        "settings": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100000}},
    },
    "ZeRO 2 in bf16": {"stage": 2, "ep": 2, "settings": BF16},
    "ZeRO 3 in bf16": {"stage": 3, "ep": 2, "settings": BF16},
}  # fmt: skip
MOVED = "ZeRO 3, experts shared"
"""What "ZeRO 1" is resumed as too."""


def plain(encoder: str) -> dict[str, np.ndarray]:
    """The averages of one PyTorch process, in float64."""
    from comoe.losses.build import build_objective

    recipe = recipe_of(encoder, **OPTIONS)
    torch.manual_seed(5)
    objective = build_objective(recipe, workers.TASKS).train()
    trained = {
        name: weight for name, weight in objective.model.named_parameters() if weight.requires_grad
    }
    batches = [workers.own_batches(step) for step in range(STEPS)]
    average = {name: torch.zeros_like(weight).double() for name, weight in trained.items()}
    for step, _ in enumerate(workers.train_plainly(objective, recipe, batches)):
        decay = min(DECAY, step / (step + 1))
        for name, weight in trained.items():
            average[name] = decay * average[name] + (1 - decay) * weight.detach().double()
    return {name: value.numpy() for name, value in average.items()}


def averaged(encoder: str, *, folder: str, engines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from comoe.losses.build import build_objective
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.parallel.setup import gather_full_state
    from comoe.train.state import TrainState

    def built(name: str, **more: Any) -> Any:
        options = engines[name]
        recipe = recipe_of(encoder, parallel__ep_size=options["ep"], **OPTIONS)
        settings = options.get("settings", {}) | more
        return workers.build(recipe, stage=options["stage"], settings=settings, seed=5)

    def train(engine: Any, first: int, last: int) -> dict[str, torch.Tensor]:
        for step in range(first, last):
            workers.one_step(engine, step)
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
        after, average = gather_full_state(engine.deepspeed), engine.full_state()
        answer = {"back": all(torch.equal(before[key], after[key]) for key in before)}
        if average:
            model = build_objective(recipe_of(encoder, **OPTIONS), workers.TASKS).model.eval()
            model.load_state_dict(average)
            with torch.no_grad():
                expected = model(batch).logits
            answer["logits_off"] = max(
                float((logits[task].float() - expected[task]).abs().max()) for task in expected
            )
        uncut = train(engine, SAVED, STEPS)
        path = find_checkpoint(place).path
        fresh, layout = built(name)
        load_checkpoint(path, fresh, layout)
        resumed = train(fresh, SAVED, STEPS)
        answer["state"] = {key: value.numpy() for key, value in uncut.items()}
        answer["resumed_off"] = max(
            [float((resumed[key] - uncut[key]).abs().max()) for key in uncut], default=0.0
        )
        found[name] = answer
    place = Path(folder) / "ZeRO-1"
    engine, layout = built(MOVED, checkpoint={"load_universal": True})
    load_checkpoint(find_checkpoint(place).path, engine, layout)
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
    return run_ranks(f"{HERE}:averaged", 2, timeout=600, **arguments)[0]


@pytest.mark.parametrize("name", [name for name in ENGINES if "bf16" not in name] + ["moved"])
def test_the_average_is_that_of_one_process_in_float64(name, expected, found):
    state = found["moved"] if name == "moved" else found[name]["state"]
    for key, value in expected.items():
        np.testing.assert_allclose(state[key], value, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ENGINES)
def test_evaluation_sees_the_average_and_training_goes_on_with_the_weights(name, found):
    assert found[name]["back"]
    assert found[name]["logits_off"] < (0.1 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_average_is_that_of_the_uninterrupted_run(name, found):
    # Sums over ranks may come in another order.
    assert found[name]["resumed_off"] < 1e-7
