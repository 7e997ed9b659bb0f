"""Frozen layers, recomputed layers, every family and every gate train over real ranks as they do in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.helpers_model import HF_CONFIGS
from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.workers import (
    batch_of,
    build,
    make_encoder,
    make_tower,
    one_step,
    posts,
    recipe_of,
)

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_training_options"
SEPARATED = {"loss__task_separation_weight": 0.4}
RECOMPUTED = {"train__activation_checkpointing": True}
SHARED = {"parallel__ep_size": 2}
FAMILIES = ("electra", "deberta-v2", "xlm-roberta", "modernbert")

ALONE = {"parallel__ep_size": 1}
# All tasks contrasted (tags by two views, so two forward passes), learned temperatures, a queue:
# the large batch in one process against chunks of it on two ranks, some of them without a post.
QUEUE = {"weight": 0.7, "learn_temperature": True, "queue_size": 64, "queue_warmup": 1}
CONTRASTED = {
    "tasks__mood__contrastive": True, "loss__balance_weight": 0.0, "loss__contrastive": QUEUE,
}  # fmt: skip
CHUNKS = {"accumulation": 3, "loss__contrastive": {**QUEUE, "chunk_size": 4}}
BEFORE = {**QUEUE, "weight": 0.0, "first_steps": 2}
FIRST = CONTRASTED | {
    "loss__contrastive": BEFORE, "loss__weighting": "gradnorm", "loss__r_drop_weight": 0.0,
    "loss__adversarial": {"weight": 0.3, "hidden_width": 8},
}  # fmt: skip
# Both losses between the sides: contrast over all ranks, and texts of one rank beside pictures of
# another.
SEEING = {"model__vision__train_tower": True, "loss__balance_weight": 0.0}
ROUTED = {"model__vision__fusion": "tokens", "model__vision__route_image_tokens": True}
FORMS: dict[str, dict[str, Any]] = {
    "one expert": {"num_experts": 1, "top_k": 1},
    "softmax": {"gate": "softmax", "top_k": 1},
    "threshold": {"shared_width": 8, "cooperation_threshold": 0.5, "top_k": 3},
}

# Only losses that do not depend on how posts are cut into micro-steps.
WEIGHED = {
    "loss__contrastive": {"weight": 0.0},
    "loss__balance_weight": 0.0,
    "loss__weighting_rate": 0.1,
}
# Both start alike, and at a small rate three steps are too few to tell them apart.
FAST = {"loss__weighting_rate": 1.0}
WEIGHTED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "posts": ({}, [{"stage": 3, **SHARED, "accumulation": 3}]),
    "uncertainty": (FAST, [{"stage": 3, **SHARED}]),
    "uncertainty_positive": (FAST, [{"stage": 1, **ALONE}, {"stage": 2, **SHARED, "accumulation": 3}]),
    "dynamic_average": ({"loss__weighting_window": 1}, [{"stage": 3, **SHARED, "accumulation": 3}]),
    "gradnorm": ({}, [{"stage": 3, **ALONE, **RECOMPUTED, "accumulation": 3}]),
    "pcgrad": ({}, [{"stage": 1, **ALONE, "accumulation": 3}, {"stage": 3, **SHARED}]),
    "cagrad": ({}, [{"stage": 2, **SHARED, **RECOMPUTED}, {"stage": 3, **SHARED, "accumulation": 3}]),
}  # fmt: skip

SHARING = {
    "loss__contrastive": {"weight": 0.0}, "loss__balance_weight": 0.0, "model__private_width": 8,
    "loss__adversarial": {"weight": 0.3, "hidden_width": 8},
    "tasks__mood__confidence": "sure", "tasks__mood__confidence_strategy": "input_output",
}  # fmt: skip

# Name -> (encoder, options of both, layouts over two ranks). All share two worlds: a world takes
# long to start. What options and layouts do to each other is spread over the cases; not every
# option meets every layout.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "recomputed by token": (
        "bert", SEPARATED, [{"stage": 2, **ALONE, **RECOMPUTED}, {"stage": 3, **SHARED, **RECOMPUTED}],
    ),
    "recomputed by both": (
        "bert", SEPARATED | {"model__moe__route_by": "both"},
        [{"stage": 2, **SHARED, **RECOMPUTED}, {"stage": 3, **ALONE, **RECOMPUTED}],
    ),
    "two views and a queue": ("bert", CONTRASTED, [{"stage": 3, **SHARED}, {"stage": 1, "parallel__ep_size": 1}]),
    "grad cache": (
        "bert", CONTRASTED, [
            {"stage": 3, **SHARED, **CHUNKS}, {"stage": 1, **CHUNKS}, {"stage": 2, **SHARED, **CHUNKS, **RECOMPUTED},
        ],
    ),
    # Two steps of the contrastive loss alone, and one of the tasks alone; with what must rest in each.
    "contrast first": (
        "bert", FIRST, [
            {"stage": 3, **SHARED, "accumulation": 3, "loss__contrastive": {**BEFORE, "chunk_size": 4}},
            {"stage": 2, **ALONE}, {"stage": 1, **SHARED},
        ],
    ),
    # Without dropout both passes are alike; with it they are held by the resumed runs.
    "two passes": (
        "bert", CONTRASTED | {"loss__r_drop_weight": 1.0},
        [{"stage": 3, **SHARED, **CHUNKS}, {"stage": 2, **SHARED, **RECOMPUTED}, {"stage": 1, **ALONE}],
    ),
    # Weights that are learned, remembered, and found from the gradients of a whole step, in one
    # pass and in three.
    **{
        weighting: ("bert", WEIGHED | options | {"loss__weighting": weighting}, layouts)
        for weighting, (options, layouts) in WEIGHTED.items()
    },
    # A discriminator, posts that count in part, a part of its own for each task; the orthogonal
    # term alone depends on how posts are cut into micro-steps.
    "adversarial": ("bert", SHARING, [{"stage": 3, **SHARED, **RECOMPUTED, "accumulation": 3}]),
    # Three passes over each micro-batch, for the tasks' gradients, for the contrastive ones and to
    # train.
    "everything": (
        "bert", SHARING | CONTRASTED | {"loss__weighting": "pcgrad", "model__moe__route_by": "both"},
        [{"stage": 3, **SHARED, **CHUNKS, **RECOMPUTED}],
    ),
    "orthogonal": ("bert", SHARING | {"loss__orthogonal_weight": 1e7}, [{"stage": 3, **ALONE}]),
    "pictures": ("bert", SEEING, [{"stage": 3, **SHARED}, {"stage": 1, "parallel__ep_size": 1}]),
    "image tokens": (
        "bert", SEEING | ROUTED, [{"stage": 3, **SHARED}, {"stage": 2, **SHARED, **RECOMPUTED}],
    ),
    "frozen": (
        "bert", {"model__train_layers": "none"},
        [{"stage": 1, **SHARED}, {"stage": 2, **SHARED}, {"stage": 3, **SHARED, **RECOMPUTED}],
    ),
    "rates by layer": (
        "bert", {"train__layer_decay": 0.5},
        [{"stage": 1, **ALONE}, {"stage": 2, **SHARED}, {"stage": 3, **SHARED}],
    ),
    "last layer": (
        "bert", {"model__train_layers": 1}, [
            {"stage": 2, **SHARED, **RECOMPUTED}, {"stage": 3, **ALONE}, {"stage": 3, **SHARED},
            {"stage": 3, **SHARED, **RECOMPUTED},
        ],
    ),
    **{family: (family, {}, [{"stage": 2, **SHARED}, {"stage": 3, **SHARED, **RECOMPUTED}]) for family in FAMILIES},
    **{
        form: (
            "bert",
            {f"model__moe__{key}": value for key, value in moe.items()} | {"loss__balance_weight": 0.0} | SEPARATED,
            [{"stage": 2}, {"stage": 3}],
        )
        for form, moe in FORMS.items()
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    folders = {"bert": make_encoder(tmp_path_factory.mktemp("bert"))}
    folders["tower"] = make_tower(tmp_path_factory.mktemp("tower"))
    for family in FAMILIES:
        torch.manual_seed(1)
        folders[family] = str(tmp_path_factory.mktemp(family))
        AutoModel.from_config(HF_CONFIGS[family]).save_pretrained(folders[family])
    return folders


def in_folders(options: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    tower = {"model__vision__tower": folders["tower"]}
    return options | (tower if "model__vision__train_tower" in options else {})


def run_all(work: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Two steps: the second one sees what weights of tasks and a queue remember. Three where it takes as many."""
    return [
        workers.case(encoder, steps=2 + takes_three(options), plainly=False, **options)
        for encoder, options in work
    ]


def takes_three(options: dict[str, Any]) -> bool:
    """A ratio of the losses of two steps before, or two steps of the contrastive loss alone."""
    first = options.get("loss__contrastive", {}).get("first_steps")
    return bool(first) or "loss__weighting_window" in options


@pytest.fixture(scope="module")
def one_process(encoders) -> dict[str, Any]:
    cases = [(encoder, {"stage": 1, **options}) for encoder, options, _ in CASES.values()]
    work = [(encoders[encoder], in_folders(options, encoders)) for encoder, options in cases]
    return dict(zip(CASES, run_ranks(f"{HERE}:run_all", 1, work=work)[0], strict=True))


@pytest.fixture(scope="module")
def world(encoders, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks answers to all that is asked of two."""
    work = [(encoders[encoder], in_folders(options | layout, encoders))
            for encoder, options, layouts in CASES.values() for layout in layouts]  # fmt: skip
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return run_ranks(
        f"{HERE}:in_one_world", 2, timeout=600, work=work, encoder=encoders["bert"], folder=folder
    )


@pytest.fixture(scope="module")
def two_ranks(world) -> dict[str, list[Any]]:
    found = iter(world[0]["cases"])
    return {name: [next(found) for _ in layouts] for name, (_, _, layouts) in CASES.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=rtol)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=10 * rtol)
    for task, logits in found["engine_logits"].items():
        np.testing.assert_allclose(logits, expected["engine_logits"][task], atol=2e-4, rtol=0)


def still(answer: dict[str, Any]) -> set[str]:
    """Weights that did not move. A key's bias has no gradient in exact arithmetic; the balance bias is no weight."""
    return {
        key for key, moved in answer["moves"].items()
        if not np.abs(moved).max() > 0 and not key.endswith(("key.bias", "e_score_correction_bias"))
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_logits_agree_with_one_process(name, one_process, two_ranks):
    for answer in two_ranks[name]:
        assert_same(answer, one_process[name])


def test_the_weightings_train_differently_so_that_equal_losses_mean_something(one_process):
    answers = [one_process[name]["engine_logits"]["mood"] for name in WEIGHTED]
    for number, answer in enumerate(answers):
        assert all(np.abs(answer - other).max() > 1e-4 for other in answers[:number])


@pytest.mark.parametrize("name", ["recomputed by token", "recomputed by both"])
def test_loads_of_recomputed_layers_are_counted_once(name, one_process, two_ranks):
    biases = [key for key in one_process[name]["state"] if key.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for answer in two_ranks[name]:
        for key in biases:
            np.testing.assert_array_equal(answer["state"][key], one_process[name]["state"][key])


@pytest.mark.parametrize(
    ("name", "last"), [("frozen", ()), ("last layer", ("encoder.encoder.layer.1.",))]
)
def test_frozen_weights_stay_and_experts_and_heads_train(name, last, one_process, two_ranks):
    for answer in (one_process[name], *two_ranks[name]):
        encoder = {
            key for key in answer["moves"] if key.startswith("encoder.") and ".block." not in key
        }
        frozen = {key for key in encoder if not key.startswith(last + (" ",))}
        assert frozen and all(not answer["moves"][key].any() for key in frozen)
        assert still(answer) - frozen == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_trains(family, one_process, two_ranks):
    for answer in (one_process[family], *two_ranks[family]):
        assert still(answer) == set()


@pytest.mark.parametrize("form", FORMS)
def test_experts_train_under_every_form_of_gate(form, two_ranks):
    for answer in two_ranks[form]:
        assert not [key for key in still(answer) if "experts" in key]


def test_recomputed_layers_draw_the_same_dropout_again(world):
    answers = world[0]["dropout"]
    for kept, recomputed in (answers[:2], answers[2:]):
        assert_same(recomputed, kept, rtol=1e-6)
        for key, moved in kept["moves"].items():
            np.testing.assert_allclose(
                recomputed["moves"][key], moved, atol=2e-4, rtol=0, err_msg=key
            )


def in_one_world(
    work: list[tuple[str, dict[str, Any]]], encoder: str, folder: str
) -> dict[str, Any]:
    common = {**SHARED, "model__dropout": 0.2, "accumulation": 2}
    drawing = [common | {"stage": stage} | more for stage in (2, 3) for more in ({}, RECOMPUTED)]
    return {
        "cases": run_all(work),
        "dropout": run_all([(encoder, options) for options in drawing]),
        "resumed": [
            frozen_resume(encoder, stage=stage, folder=f"{folder}/{stage}") for stage in (2, 3)
        ],
        "uniform": uniform_loads(encoder),
        "recomputing": recomputing(encoder),
    }


def frozen_resume(encoder: str, *, stage: int, folder: str) -> dict[str, Any]:
    """Two steps with a frozen encoder, a checkpoint, one more step; and that step again from the checkpoint."""
    from comoe.train.checkpoint.folder import find_checkpoint
    from comoe.train.checkpoint.save_load import load_checkpoint, save_checkpoint
    from comoe.train.state import TrainState

    recipe = recipe_of(encoder, model__train_layers="none", **SHARED)
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
    resumed = float(one_step(fresh, 2).loss)
    return {"uninterrupted": uninterrupted, "resumed": resumed, "roles": set(roles)}


def test_a_run_with_a_frozen_encoder_resumes_and_its_optimizer_knows_no_encoder(world):
    for answer in [stage for rank in world for stage in rank["resumed"]]:
        assert answer["resumed"] == pytest.approx(answer["uninterrupted"], rel=1e-6)
        assert answer["roles"] == {"experts", "heads", "router"}


def uniform_loads(encoder: str) -> list[list[int]]:
    """Two steps under the uniform gate; each layer's loads on this rank in the second."""
    engine, _ = build(recipe_of(encoder, model__moe__gate="uniform", **SHARED), stage=2)
    reports = [one_step(engine, step) for step in range(2)]
    assert all(torch.isfinite(report.loss) and not report.skipped for report in reports)
    return [routing.counts_E.tolist() for routing in reports[1].outputs[0].output.routings]


def test_the_uniform_gate_loads_every_expert_alike_on_every_rank(world):
    # Not the same numbers as in one process: a token's turn depends on how many came before it on
    # its rank.
    for layers in [rank["uniform"] for rank in world]:
        assert len(layers) == 2
        assert all(max(loads) - min(loads) <= 1 and sum(loads) > 8 for loads in layers)


def recomputing(encoder: str) -> dict[str, Any]:
    """How often a layer ran in one training step and in one answer, and which weights stayed gathered after them."""
    engine, _ = build(recipe_of(encoder, **RECOMPUTED, **SHARED), stage=3)
    calls: list[None] = []
    engine.objective.model.encoder.encoder.layer[1].attention.register_forward_hook(
        lambda *_: calls.append(None)
    )
    one_step(engine, 0)
    trained = len(calls)
    gathered = [
        name for name, p in engine.objective.named_parameters() if p.ds_status.name == "AVAILABLE"
    ]
    engine.forward(batch_of(posts(0, 2)))
    return {"trained": trained, "answered": len(calls) - trained, "gathered": gathered}


def test_under_zero_3_a_layer_runs_twice_in_training_and_no_weight_stays_gathered(world):
    for answer in [rank["recomputing"] for rank in world]:
        assert answer == {"trained": 2, "answered": 1, "gathered": []}
