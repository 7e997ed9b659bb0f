"""Every layout computes what one plain PyTorch process computes: losses, first gradients, weights after training.

The reference knows nothing of DeepSpeed: ``workers.plain_case``, with torch's optimizer and torch's
clipping. Posts are padded, and ranks get different numbers of posts and tokens.

The gradient of an attention key's bias is zero in exact arithmetic. What float32 leaves of it, 1e-9
or so, Adam's first steps would blow up to whole learning rates, differently in every layout. An
epsilon of 1e-5 instead of 1e-8 keeps them as small as they are: so the weights of all tensors,
these too, can be held to one tolerance after 20 steps.

The figures of each layout, printed:

    python -m tests.multiprocess.test_layouts
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import Picks, make_encoder

pytestmark = pytest.mark.multiprocess
MANY = "tests.multiprocess.workers:many"

# Seed 5: of the first two dozen the one whose closest pick is farthest from a tie, so that another
# processor's rounding flips no token either.
ADAMW = {"seed": 5, "train__max_grad_norm": 0.5, "train__epsilon": 1e-5}


def sgd(rate: float) -> dict[str, Any]:
    rates = {f"train__{name}learning_rate": rate for name in ("", "expert_", "router_", "head_")}
    zero = {"train__max_grad_norm": 0.0, "train__weight_decay": 0.0}
    return {"seed": 5, "train__optimizer": "sgd", **zero, **rates}


SGD = sgd(0.01)
# Without momentum, decay and clipping, and with a rate that dwarfs the weights, one step shows the
# gradient itself: Adam would hide a constant factor.
RATE = 1e3
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
PAPER = {
    "model__moe__route_by": "task", "model__moe__top_k": 4, "model__moe__balance": "none",
    "loss__balance_weight": 0.0,
}  # fmt: skip
LORA = {"model__moe__form": "lora", "model__moe__gate_scale": 1.0, **PAPER}
LORA_BY_TOKEN = {
    "model__moe__form": "lora", "model__moe__gate_scope": "layer", "model__moe__targets": "attention",
    "model__moe__route_by": "both",
}  # fmt: skip
# Layers, a mixture of layers and an attention of the tasks' own; experts in the layer below.
SOFT = {
    "model__own_layers": 1, "loss__soft_sharing_weight": 0.05, "model__pooling": "layers",
    "model__task_attention_width": 8,
}  # fmt: skip
SUMMED = {"steps": 2, "accumulation": 3}
RECOMPUTED = {"train__activation_checkpointing": True}

CASES: dict[str, dict[str, Any]] = {
    "adamw": {"steps": 20, **ADAMW},
    "clipped by the norms so far": {"steps": 5, **SGD, "train__max_grad_norm": "auto"},
    "sgd": {"steps": 20, **SGD},
    # Several ranks on two cores are slow.
    "adamw short": {"steps": 6, **ADAMW},
    "sgd short": {"steps": 6, **SGD},
    "gradient": {"steps": 1, **sgd(RATE)},
    "accumulation": {**SUMMED, **SGD},
    "paper": {"steps": 4, **ADAMW, **PAPER},
    # Fewer posts than ranks, with four of these: some ranks run on filler rows alone.
    "tiny": {"steps": 4, "count": 2, **SGD},
    "offloaded": {"steps": 4, **ADAMW, "settings": OFFLOAD},
    "kept": {"steps": 4, **ADAMW, "model__keep_layers": 1},
    "narrow": {"steps": 4, **ADAMW, "model__random_width": 16},
    "own experts": {
        "steps": 4,
        **ADAMW,
        "model__moe__route_by": "both",
        "model__moe__num_experts": 8,
        "model__moe__task_prior": "own",
        "model__moe__top_k": 1,
        "model__moe__shared_width": 8,
    },
    "drawn experts": {
        "steps": 4,
        **ADAMW,
        "model__moe__gate": "random",
        "model__moe__top_k": 1,
        "model__moe__balance": "none",
        "loss__balance_weight": 0.0,
        "loss__z_weight": 0.0,
        "loss__r_drop_weight": 0.5,
    },
    "experts that lean": {
        "steps": 4,
        **ADAMW,
        "model__moe__route_by": "task",
        "model__moe__task_prior": 1.5,
    },
    # Lower layers run once per text; in the one process once per row.
    "paired": {
        "steps": 4,
        **ADAMW,
        **RECOMPUTED,
        "model__moe__route_by": "both",
        "model__moe__layers": [1],
        "paired": True,
    },
    "soft sharing": {"steps": 4, **ADAMW, **SOFT, **RECOMPUTED, "paired": True},
    # Ranks without a post, and tasks without one anywhere.
    "soft sharing tiny": {"steps": 2, "count": 2, **SGD, **SOFT},
    # Of a frozen model.
    "lora": {"steps": 4, **ADAMW, **LORA},
    "lora by token": {"steps": 4, **ADAMW, **LORA_BY_TOKEN, **RECOMPUTED, "paired": True},
    "recomputed": {**SUMMED, **ADAMW, **RECOMPUTED},
    "bf16": {**SUMMED, **SGD, "settings": BF16},
    "bf16 recomputed": {**SUMMED, **SGD, "settings": BF16, **RECOMPUTED},
}
STAGES = (1, 2, 3)
Cell = tuple[str, int, int]
"""(case, EP, ZeRO stage)."""
LAYOUTS: dict[int, list[Cell]] = {
    world: [(name, ep, stage) for name in names for ep in eps for stage in STAGES] + more
    for world, names, eps, more in (
        (1, ("adamw", "sgd", "gradient", "lora"), (1,), []),
        (2, ("adamw short", "sgd short", "gradient"), (1, 2), [
            *(("accumulation", 2, stage) for stage in STAGES), ("paper", 2, 2), ("kept", 2, 2),
            ("kept", 2, 3), ("narrow", 2, 3), *(("paired", 2, stage) for stage in STAGES),
            *((name, 1, stage) for stage in STAGES for name in ("lora", "lora by token")),
            *(("own experts", 2, stage) for stage in STAGES), ("experts that lean", 2, 3),
            *(("drawn experts", 2, stage) for stage in STAGES),
            *(("soft sharing", ep, stage) for stage, ep in zip(STAGES, (1, 2, 2), strict=True)),
            *(("clipped by the norms so far", 2, stage) for stage in STAGES),
        ]),
        (4, ("adamw short", "sgd short", "gradient"), (2, 4), [
            ("tiny", 2, 1), ("tiny", 2, 2), ("tiny", 4, 3), ("offloaded", 2, 2), ("soft sharing tiny", 2, 3),
            ("recomputed", 2, 2), ("recomputed", 2, 3), *(("bf16", 2, stage) for stage in STAGES),
            ("bf16 recomputed", 2, 3),
        ]),
    )
}  # fmt: skip
"""World size -> its cells. All of one world share its ranks: a world takes longer to start than a
cell to run."""
NEAR = 1e-5
"""Two scores this close may change places by rounding."""
TOLERANCE = 1e-5
"""Of losses and gradient norms, relative; of first gradients, by each tensor's norm; of final
weights, absolute."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def run_cells(encoder: str, world_size: int, cells: list[Cell]) -> dict[Cell, Any]:
    """What rank 0 answered in each cell; ``picks`` of all ranks, [rank][step]."""
    cases = [dict(CASES[name], stage=stage, parallel__ep_size=ep) for name, ep, stage in cells]
    ranks = run_ranks(MANY, world_size, timeout=400, encoder=encoder, cases=cases)
    return {
        cell: answers[0] | {"picks": [answer["picks"] for answer in answers]}
        for cell, answers in zip(cells, zip(*ranks, strict=True), strict=True)
    }


def run_plain(encoder: str) -> dict[str, Any]:
    cases = [
        {key: value for key, value in case.items() if key != "settings"} for case in CASES.values()
    ]
    answers = run_ranks(MANY, 1, encoder=encoder, cases=cases, work="plain_case")
    return dict(zip(CASES, answers[0], strict=True))


@pytest.fixture(scope="module")
def one_process(encoder) -> dict[str, Any]:
    return run_plain(encoder)


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def several(request, encoder) -> dict[Cell, Any]:
    return run_cells(encoder, request.param, LAYOUTS[request.param])


def in_float32(several: dict[Cell, Any]) -> dict[Cell, Any]:
    return {cell: answer for cell, answer in several.items() if "bf16" not in cell[0]}


def flips(expected: list[Picks], by_rank: list[list[Picks]]) -> list[float]:
    """Margins, in the one process, of the tokens that a layout sent to another set of experts."""
    margins: list[float] = []
    for step, one in enumerate(expected):
        tokens = np.concatenate([ranks[step].tokens_S for ranks in by_rank])
        picks = np.concatenate([ranks[step].picks_LSk for ranks in by_rank], axis=1)
        picks = picks[:, tokens.argsort()]
        np.testing.assert_array_equal(np.sort(tokens), one.tokens_S)
        margins += one.margins_LS[(picks != one.picks_LSk).any(axis=2)].tolist()
    return margins


def off_in_losses(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.array(found["losses"]) / np.array(expected["losses"]) - 1)))


def off_in_gradients(found: Any, expected: Any) -> dict[str, float]:
    """Tensor -> difference of the gradient by its norm; of a gradient below 1e-6, which is rounding, by 1e-6."""
    # A key's bias has none in exact arithmetic; the final weights of the other cells hold it.
    moves = {key: moved for key, moved in expected["moves"].items() if not key.endswith("key.bias")}
    norm = np.linalg.norm
    return {
        key: float(norm(found["moves"][key] - moved) / max(norm(moved), 1e-6 * RATE))
        for key, moved in moves.items()
    }


def off_in_weights(found: Any, expected: Any) -> dict[str, float]:
    return {
        key: float(np.abs(found["state"][key] - value).max())
        for key, value in expected["state"].items()
    }


def test_losses_of_every_layout_agree_with_one_process(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        assert answer["ep"] == ep
        assert len(answer["losses"]) == CASES[name]["steps"]
        off = off_in_losses(answer, one_process[name])
        assert off <= TOLERANCE, f"{name}, EP {ep}, ZeRO {stage}: {off}"


def test_first_gradients_agree_to_a_hundred_thousandth_of_each_tensors_norm(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        if name == "gradient":
            for key, off in off_in_gradients(answer, one_process[name]).items():
                assert off <= TOLERANCE, f"{key}, EP {ep}, ZeRO {stage}: {off}"


def test_final_weights_of_every_layout_agree_with_one_process(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        if name != "gradient":
            for key, off in off_in_weights(answer, one_process[name]).items():
                assert off <= TOLERANCE, f"{key}, {name}, EP {ep}, ZeRO {stage}: {off}"


def test_training_moves_the_weights_far_more_than_the_tolerance(one_process):
    # Without Adam's scaling the attention's weights, whose gradients are small, hardly move: the
    # first gradients and the losses hold those.
    for name, factor in (("adamw", 100), ("sgd", 10)):
        moved = {key: np.abs(values).max() for key, values in one_process[name]["moves"].items()}
        assert sum(size > factor * TOLERANCE for size in moved.values()) > 0.6 * len(moved), moved


def test_tokens_change_experts_at_near_ties_only(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        margins = flips(one_process[name]["picks"], answer["picks"])
        print(
            f"{name}, EP {ep}, ZeRO {stage}: {len(margins)} tokens went to other experts, margins {margins}"
        )
        assert all(margin < NEAR for margin in margins)


def test_a_token_that_went_elsewhere_is_counted_with_its_margin():
    picks, margins = np.array([[[0, 1], [0, 2], [1, 3]]]), np.array([[0.5, 0.25, 0.125]])
    one = Picks(np.array([100, 101, 300]), picks, margins)
    first = Picks(np.array([300]), np.array([[[1, 2]]]), np.array([[0.0]]))
    second = Picks(np.array([100, 101]), np.array([[[0, 1], [0, 3]]]), np.array([[0.0, 0.0]]))
    assert flips([one], [[first], [second]]) == [0.25, 0.125]
    assert flips([one], [[one]]) == []


def test_a_gradient_reaches_every_trained_tensor(one_process):
    moves = one_process["gradient"]["moves"]
    still = [key for key, moved in moves.items() if not np.abs(moved).max() > 0]
    fixed = ("key.bias", "e_score_correction_bias")
    assert all(key.endswith(fixed) or "position" in key for key in still), still


def test_gradient_norms_of_every_layout_agree_with_one_process(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        if name.startswith("adamw"):
            np.testing.assert_allclose(
                answer["norms"], one_process[name]["norms"], rtol=TOLERANCE, err_msg=f"{ep} {stage}"
            )


def test_the_balance_bias_follows_the_load_of_all_ranks(one_process, several):
    biases = [key for key in one_process["adamw"]["state"] if "e_score_correction_bias" in key]
    for (name, _, _), answer in in_float32(several).items():
        expected = one_process[name]["state"]
        for key in filter(expected.__contains__, biases):  # a smaller encoder has fewer
            np.testing.assert_array_equal(answer["state"][key], expected[key])
    assert max(np.abs(one_process["adamw"]["state"][key]).max() for key in biases) > 0.0015


def test_the_plain_model_with_the_gathered_weights_answers_like_the_engine(one_process, several):
    for (name, ep, stage), answer in in_float32(several).items():
        for task, logits in answer["engine_logits"].items():
            plain, where = answer["plain_logits"][task], f"{name} {ep} {stage} {task}"
            np.testing.assert_allclose(plain, logits, atol=1e-5, rtol=1e-6, err_msg=where)


def test_bfloat16_with_float32_sums_of_gradients_stays_close_to_one_float32_process(
    one_process, several
):
    for (name, ep, stage), answer in several.items():
        if "bf16" in name:
            # Bfloat16 has 8 bits: the forward pass is off by up to 0.4 % per rounding, whatever the
            # layout.
            expected, where = one_process[name]["losses"], f"{name} {ep} {stage}"
            np.testing.assert_allclose(answer["losses"], expected, rtol=5e-3, err_msg=where)
            assert set(answer["sums"]) == {"torch.float32"}, (name, ep, stage)


ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1}, "ZeRO 2": {"stage": 2}, "ZeRO 3": {"stage": 3},
    # In bf16 ZeRO 1 is another optimizer class of DeepSpeed.
    "ZeRO 1 in bf16": {"stage": 1, "settings": BF16}, "ZeRO 2 in bf16": {"stage": 2, "settings": BF16},
    "ZeRO 3 in bf16": {"stage": 3, "settings": BF16}, "ZeRO 2 offloaded": {"stage": 2, "settings": OFFLOAD},
}  # fmt: skip


OTHERS = {
    f"LoRA, ZeRO {stage}": {"stage": stage, "parallel__ep_size": 1, **LORA} for stage in STAGES
} | {f"soft sharing, ZeRO {stage}": {"stage": stage, **SOFT} for stage in STAGES}
ASKED: dict[str, dict[str, Any]] = {
    "resumed": {"work": "resumed"},
    # By a run of an earlier version.
    "saved with plain Adam": {"work": "resumed", "fused": False},
    "poisoned": {"work": "poisoned"},
}


@pytest.fixture(scope="module")
def two_ranks(encoder, tmp_path_factory) -> dict[tuple[str, str], list[Any]]:
    """(what is asked, engine) -> what each of two ranks answered; all in one world."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cells = {(asked, name): ASKED[asked] | ENGINES[name] for asked in ASKED for name in ENGINES}
    cells |= {("resumed", name): ASKED["resumed"] | options for name, options in OTHERS.items()}
    places = [{"folder": str(folder / str(number))} for number in range(len(cells))]
    cases = [
        case | (place if case["work"] == "resumed" else {})
        for case, place in zip(cells.values(), places, strict=True)
    ]
    ranks = run_ranks(MANY, 2, timeout=600, encoder=encoder, cases=cases)
    return dict(zip(cells, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("name", [*ENGINES, *OTHERS])
def test_resumed_run_equals_uninterrupted_run(two_ranks, name):
    for answer in two_ranks["resumed", name]:
        np.testing.assert_allclose(answer["resumed"], answer["uninterrupted"], rtol=1e-7)
        assert answer["groups_before"] == answer["groups_after"]
        assert answer["state"] == {"step": 3, "best_value": 0.25, "evaluations_without_gain": 2}


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_with_plain_adam_goes_on_with_fused_adam(two_ranks, name):
    for answer in two_ranks["saved with plain Adam", name]:
        # A weight next to a rounding boundary of bfloat16 may fall on the other side.
        rtol = 2e-3 if "bf16" in name else 1e-6
        np.testing.assert_allclose(answer["resumed"], answer["uninterrupted"], rtol=rtol)
        assert all(answer["fused"])


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_with_a_loss_that_is_not_finite_on_one_rank_changes_no_weight(two_ranks, name):
    for answer in two_ranks["poisoned", name]:
        assert answer["skipped"] == [False, True, False]
        assert answer["changed"] == [True, False, True]


@pytest.fixture(scope="module")
def one_rank(encoder) -> list[dict[str, Any]]:
    """The losses of many steps in float32 and in bf16, and what AutoEP makes of a model."""
    many = {"stage": 2, "steps": 25, "plainly": False}
    cases = [many, many | {"settings": BF16}, {"work": "contract"}]
    return run_ranks(MANY, 1, encoder=encoder, cases=cases)[0]


def test_losses_in_bf16_follow_those_in_float32_over_many_steps_of_adam(one_rank):
    # Measured: 0.41 %.
    np.testing.assert_allclose(one_rank[1]["losses"], one_rank[0]["losses"], rtol=0.02)


def test_autoep_keeps_the_contract_that_our_router_relies_on(one_rank):
    answer = one_rank[2]
    assert answer["layers"] == [
        "encoder.encoder.layer.0.output.block.mixture",
        "encoder.encoder.layer.1.output.block.mixture",
    ]
    assert answer["router"] == ["CooperativeRouter"]
    assert answer["bias_dtype"] == ["torch.float32"]
    assert answer["parameters"] == ["experts.w1", "experts.w2", "experts.w3", "router.gate.weight"]


def main() -> None:
    """Print what the tests assert: the largest deviation of each cell and where it is."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = make_encoder(Path(folder))
        plain = run_plain(encoder)
        closest = min(
            one.margins_LS.min() for name in ("adamw", "sgd") for one in plain[name]["picks"]
        )
        print(f"closest pick in the one process: a margin of {closest:.1e}")
        for world, cells in LAYOUTS.items():
            cells = [(name.removesuffix(" short"), *layout) for name, *layout in cells]
            for (name, ep, stage), answer in run_cells(encoder, world, cells).items():
                expected = plain[name]
                figures = [f"losses {off_in_losses(answer, expected):.1e}"]
                kind, offs = (
                    ("gradients", off_in_gradients(answer, expected)) if name == "gradient"
                    else ("weights", off_in_weights(answer, expected))
                )  # fmt: skip
                worst = max(offs, key=lambda key: offs[key])
                figures += [f"{kind} {offs[worst]:.1e} ({worst})"]
                figures += [f"flips {len(flips(expected['picks'], answer['picks']))}"]
                print(f"({world}, {ep}) ZeRO {stage} {name:<13}{'  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
