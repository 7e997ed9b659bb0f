"""Every layout computes what one process computes: losses, first gradients, weights after training, exported logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import make_encoder

pytestmark = pytest.mark.multiprocess

ADAMW = {"train__max_grad_norm": 0.5}
# Without momentum, decay and clipping, and with a rate that dwarfs the weights, one step shows the gradient itself:
# Adam would hide a constant factor.
SGD = {"train__optimizer": "sgd", "train__max_grad_norm": 0.0, "train__weight_decay": 0.0}
GRADIENT = SGD | {"train__learning_rate": 1e3, "train__expert_learning_rate": 1e3, "train__head_learning_rate": 1e3}
PAPER = {
    "model__moe__route_by": "task",
    "model__moe__top_k": 4,
    "model__moe__balance": "none",
    "loss__balance_weight": 0.0,
}

CASES: dict[str, dict[str, Any]] = {
    "adamw": {"steps": 10, **ADAMW},
    "sgd": {"steps": 10, **SGD},
    "gradient": {"steps": 1, **GRADIENT},
    "accumulation": {"steps": 4, "accumulation": 3, **SGD},
    "paper": {"steps": 4, **PAPER},
}
LAYOUTS = {
    2: [("adamw", 1, 2), ("adamw", 2, 1), ("adamw", 2, 2), ("adamw", 2, 3), ("adamw", 1, 3), ("sgd", 1, 1),
        ("sgd", 1, 2), ("sgd", 1, 3), ("sgd", 2, 1), ("sgd", 2, 2),
        ("sgd", 2, 3), ("gradient", 1, 1), ("gradient", 2, 1), ("gradient", 2, 2), ("gradient", 2, 3),
        ("accumulation", 2, 2), ("accumulation", 2, 3), ("paper", 2, 2)],
    4: [("adamw", 2, 1), ("adamw", 2, 2), ("adamw", 2, 3), ("sgd", 2, 1), ("sgd", 2, 2), ("sgd", 2, 3),
        ("gradient", 2, 1), ("gradient", 2, 2), ("gradient", 2, 3)],
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def run_cases(encoder: str, world_size: int, layouts: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], Any]:
    cases = [dict(CASES[name], stage=stage, parallel__ep_size=ep) for name, ep, stage in layouts]
    answers = run_ranks("tests.multiprocess.workers:many", world_size, encoder=encoder, cases=cases)[0]
    return dict(zip(layouts, answers, strict=True))


@pytest.fixture(scope="module")
def one_process(encoder: str) -> dict[str, Any]:
    return {name: answer for (name, _, _), answer in run_cases(encoder, 1, [(name, 1, 1) for name in CASES]).items()}


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def several(request: pytest.FixtureRequest, encoder: str) -> dict[tuple[str, int, int], Any]:
    return run_cases(encoder, request.param, LAYOUTS[request.param])


def test_losses_of_every_layout_agree_with_one_process(one_process: Any, several: Any) -> None:
    for (name, ep, stage), answer in several.items():
        assert answer["ep"] == ep
        np.testing.assert_allclose(
            answer["losses"], one_process[name]["losses"], rtol=1e-5, err_msg=f"{name} {ep} {stage}"
        )


def test_first_gradients_agree_to_a_hundred_thousandth_of_each_tensors_norm(one_process: Any, several: Any) -> None:
    for (name, ep, stage), answer in several.items():
        if name != "gradient":
            continue
        for key, moved in answer["moves"].items():
            expected = one_process[name]["moves"][key]
            # The gradient of an attention key's bias is zero in exact arithmetic: compare it absolutely.
            scale = 1e3 if key.endswith("key.bias") else max(np.linalg.norm(expected), 1e-3)
            assert np.linalg.norm(moved - expected) <= 1e-5 * scale, f"{key} at ep {ep}, stage {stage}"


def test_a_gradient_reaches_every_trained_tensor(one_process: Any) -> None:
    still = [key for key, moved in one_process["gradient"]["moves"].items() if not np.abs(moved).max() > 0]
    assert all(key.endswith(("key.bias", "e_score_correction_bias")) or "position" in key for key in still), still


def test_gradient_norms_of_every_layout_agree_with_one_process(one_process: Any, several: Any) -> None:
    for (name, ep, stage), answer in several.items():
        if name == "adamw":
            np.testing.assert_allclose(answer["norms"], one_process[name]["norms"], rtol=1e-5, err_msg=f"{ep} {stage}")


def test_the_balance_bias_follows_the_load_of_all_ranks(one_process: Any, several: Any) -> None:
    for (name, _, _), answer in several.items():
        for key, value in answer["state"].items():
            if key.endswith("e_score_correction_bias"):
                np.testing.assert_array_equal(value, one_process[name]["state"][key])
    biases = [value for key, value in one_process["adamw"]["state"].items() if key.endswith("e_score_correction_bias")]
    assert max(np.abs(bias).max() for bias in biases) > 0.002


def test_the_plain_model_with_the_gathered_weights_answers_like_the_engine(one_process: Any, several: Any) -> None:
    for (name, ep, stage), answer in several.items():
        for task, logits in answer["engine_logits"].items():
            np.testing.assert_allclose(
                answer["plain_logits"][task], logits, atol=1e-5, rtol=0, err_msg=f"{name} {ep} {stage} {task}"
            )


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1}, "ZeRO 2": {"stage": 2}, "ZeRO 3": {"stage": 3},
    # In bf16 ZeRO 1 is another optimizer class of DeepSpeed.
    "ZeRO 1 in bf16": {"stage": 1, "settings": BF16}, "ZeRO 2 in bf16": {"stage": 2, "settings": BF16},
    "ZeRO 3 in bf16": {"stage": 3, "settings": BF16}, "ZeRO 2 offloaded": {"stage": 2, "settings": OFFLOAD},
}  # fmt: skip


def run_engines(work: str, encoder: str, folder: Path | None = None) -> dict[str, list[Any]]:
    """Engine -> what each of two ranks answered."""
    more = [{"folder": str(folder / str(number))} if folder else {} for number in range(len(ENGINES))]
    cases = [options | place for options, place in zip(ENGINES.values(), more, strict=True)]
    answers = run_ranks("tests.multiprocess.workers:many", 2, encoder=encoder, cases=cases, work=work)
    return {name: [by_rank[number] for by_rank in answers] for number, name in enumerate(ENGINES)}


@pytest.fixture(scope="module")
def resumed(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_engines("resumed", encoder, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", ENGINES)
def test_resumed_run_equals_uninterrupted_run(resumed: dict[str, list[Any]], name: str) -> None:
    for answer in resumed[name]:
        np.testing.assert_allclose(answer["resumed"], answer["uninterrupted"], rtol=1e-7)
        assert answer["groups_before"] == answer["groups_after"]
        assert answer["state"] == {"step": 3, "best_value": 0.25, "evaluations_without_gain": 2}


@pytest.fixture(scope="module")
def poisoned(encoder: str) -> dict[str, list[Any]]:
    return run_engines("poisoned", encoder)


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_with_a_loss_that_is_not_finite_on_one_rank_changes_no_weight(
    poisoned: dict[str, list[Any]], name: str
) -> None:
    for answer in poisoned[name]:
        assert answer["skipped"] == [False, True, False]
        assert answer["changed"] == [True, False, True]


def test_autoep_keeps_the_contract_that_our_router_relies_on(encoder: str) -> None:
    answer = run_ranks("tests.multiprocess.workers:contract", 1, encoder=encoder)[0]
    assert answer["layers"] == [
        "encoder.encoder.layer.0.output.block.mixture",
        "encoder.encoder.layer.1.output.block.mixture",
    ]
    assert answer["router"] == ["CooperativeRouter"]
    assert answer["bias_dtype"] == ["torch.float32"]
    assert answer["parameters"] == ["experts.w1", "experts.w2", "experts.w3", "router.gate.weight"]
