"""Parameters, bytes and seconds of a plan against sums made by hand, and against the models of the library."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, RobertaConfig

from comoe.config.load import recipe_from_dict
from comoe.config.recipe import Recipe
from comoe.experiments.cluster.costs import (
    Cluster,
    PlannedLayout,
    all_to_all_bytes,
    expert_operations,
    forward_operations,
    step_time,
    traffic,
)
from comoe.experiments.cluster.plan import alternatives, estimate, fits, plan_lines, recommend
from comoe.experiments.cluster.shape import PlannedModel, shape_of_recipe
from comoe.tasks.task import Task
from comoe.train.memory_plan import count_parameters
from tests.helpers_model import CAUSAL, HF_CONFIGS, moe_config, tiny_model

TINY = PlannedModel(
    layers=2, width=10, ffn_width=40, vocabulary=100, positions=20, tasks=2, outputs=5, projection=8,
    moe_layers=1, num_experts=4, top_k=2, expert_width=6,
)  # fmt: skip
LARGE = PlannedModel(layers=24, width=1024, ffn_width=4096, vocabulary=50265, positions=514, moe_layers=12,
                   num_experts=64, top_k=2, expert_width=1024)  # fmt: skip
GPU = Cluster(memory=80e9, per_node=8, intra=450e9, inter=50e9, flops=990e12, read=3.35e12)


def layout(**changes: object) -> PlannedLayout:
    sizes = {"ranks": 4, "ep_size": 2, "stage": 2, "tokens": 30, "length": 10}
    return PlannedLayout(**{**sizes, "bf16": False, **changes})


def test_parameters_are_counted_by_hand():
    attention, feed_forward, norms = 4 * 10 * 11, 2 * 400 + 40 + 10, 2 * 2 * 10
    encoder = (100 + 20 + 2) * 10 + 2 * 10 + 2 * (attention + feed_forward + norms)
    assert TINY.encoder_parameters == encoder
    block, heads = 2 * 10 + 4 * 10, 2 * 10 + 5 * 11 + 8 * 10
    assert TINY.dense_parameters == encoder + block + heads
    assert TINY.expert_parameters == 4 * 3 * 10 * 6
    assert TINY.active_parameters == TINY.dense_parameters + 2 * 3 * 10 * 6


ROBERTA = RobertaConfig(vocab_size=50265, hidden_size=1024, num_hidden_layers=24, intermediate_size=4096,
                        num_attention_heads=16, max_position_embeddings=514, type_vocab_size=2)  # fmt: skip


@pytest.mark.parametrize("config", [BertConfig(), ROBERTA])
def test_encoder_parameters_are_those_of_the_librarys_models(config):
    with torch.device("meta"):
        model = AutoModel.from_config(config, add_pooling_layer=False)
    shape = PlannedModel(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size,
                       config.max_position_embeddings)  # fmt: skip
    assert shape.encoder_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_operations_of_a_token_are_counted_by_hand():
    experts = 6 * 2 * 10 * 6
    assert expert_operations(TINY) == experts
    assert (
        forward_operations(TINY, 7) == 2 * (8 * 100 + 4 * 400 + 4 * 7 * 10) + 2 * 10 * 4 + experts
    )


def test_private_parts_are_counted_by_hand():
    private = replace(TINY, tasks=3, private_width=5)
    plain = replace(TINY, tasks=3)
    assert private.dense_parameters - plain.dense_parameters == 3 * (2 * 10 + 3 * 10 * 5)
    assert forward_operations(private, 7) - forward_operations(plain, 7) == 3 * 6 * 10 * 5


def test_routes_travel_four_times_and_six_under_recomputation():
    once = 4 * 30 * 2 * 10 / 2  # float32, tokens, k, M; half of the experts are here
    assert all_to_all_bytes(TINY, layout()) == 4 * once
    assert all_to_all_bytes(TINY, layout(recompute=True)) == 6 * once
    assert all_to_all_bytes(TINY, layout(accumulation=3, bf16=True)) == 4 * 3 * once / 2
    assert all_to_all_bytes(TINY, layout(ep_size=1)) == 0


def test_stages_1_and_2_send_gradients_twice_and_weights_once():
    dense, experts = 4 * TINY.dense_parameters, 4 * 360
    moved = traffic(TINY, layout())
    assert moved.dense_reduce == 2 * dense * 3 / 4 and moved.dense_gather == dense * 3 / 4
    # Two expert groups of two ranks: each set of experts is held by two ranks.
    assert moved.expert_reduce == 2 * experts / 2 and moved.expert_gather == experts / 2
    assert traffic(TINY, layout(ep_size=4)).expert_reduce == 0


def test_accumulation_repeats_the_gradients_of_stage_2_and_not_of_stage_1():
    once = traffic(TINY, layout()).dense_reduce
    assert traffic(TINY, layout(accumulation=3)).dense_reduce == pytest.approx(3 * once)
    assert traffic(TINY, layout(accumulation=3, stage=1)).dense_reduce == pytest.approx(once)
    assert (
        traffic(TINY, layout(accumulation=3)).dense_gather == traffic(TINY, layout()).dense_gather
    )


def test_stage_3_gathers_again_what_it_let_go():
    dense = 4 * TINY.dense_parameters * 3 / 4
    assert traffic(TINY, layout(stage=3)).dense_reduce == dense
    assert traffic(TINY, layout(stage=3)).dense_gather == dense
    whole = TINY.dense_parameters + 360
    assert traffic(TINY, layout(stage=3, keep=whole // 2)).dense_gather == pytest.approx(
        1.5 * dense, rel=1e-3
    )
    assert traffic(TINY, layout(stage=3, keep=0)).dense_gather == 2 * dense


def test_a_step_takes_the_sum_of_its_hand_computed_parts():
    slow = Cluster(
        memory=1e9, per_node=2, intra=100.0, inter=10.0, flops=1000.0, read=50.0, efficiency=0.5
    )
    here = layout(stage=2)
    time = step_time(TINY, here, slow)
    experts = max(3 * 30 * expert_operations(TINY) / 500, 3 * 4 * 360 / 50)
    rest = 3 * 30 * (forward_operations(TINY, 10) - expert_operations(TINY)) / 500
    assert time.compute == pytest.approx(experts + rest)
    # Both ranks of an expert group share a machine; the ring over four ranks leaves each machine by
    # two links.
    assert time.all_to_all == pytest.approx(all_to_all_bytes(TINY, here) / 100)
    moved = traffic(TINY, here)
    dense = (moved.dense_reduce + moved.dense_gather) / 20
    same_experts = (moved.expert_reduce + moved.expert_gather) / 10
    assert time.collectives == pytest.approx(dense + same_experts)
    share = (TINY.dense_parameters + TINY.expert_parameters) / 4
    assert time.optimizer == pytest.approx(share * 32 / 50)
    assert time.total == time.compute + time.all_to_all + time.collectives + time.optimizer


def test_an_expert_group_over_two_machines_pays_for_the_slow_link():
    inside = step_time(LARGE, PlannedLayout(16, 8, 1, 1000, 50), GPU).all_to_all
    across = step_time(LARGE, PlannedLayout(16, 16, 1, 1000, 50), GPU).all_to_all
    sent = all_to_all_bytes(LARGE, PlannedLayout(16, 16, 1, 1000, 50))
    assert across == pytest.approx(sent * (7 / 15 / 450e9 + 8 / 15 / 50e9))
    assert across > 4 * inside


def test_few_tokens_per_expert_make_the_reading_of_weights_rule():
    few, many = (
        step_time(LARGE, PlannedLayout(1, 1, 1, tokens, 50), GPU).compute for tokens in (64, 64_000)
    )
    weights = 3 * 2 * LARGE.expert_parameters / GPU.read
    assert few == pytest.approx(weights, rel=0.2)
    assert many == pytest.approx(3 * 64_000 * forward_operations(LARGE, 50) / (0.4 * GPU.flops))


def test_the_memory_of_a_candidate_counts_the_large_table_as_its_bucket():
    memory = estimate(LARGE, PlannedLayout(8, 8, 3, 640, 64), GPU).memory
    parts = {part.name: part.device_bytes for part in memory.parts}
    assert parts["reduction bucket"] == 2 * 50265 * 1024
    whole = LARGE.dense_parameters + LARGE.expert_parameters // 8
    # As ds_configs/zero3.json bounds it.
    assert parts["gathered weights"] == 2 * min(whole, 100_000_000)


def test_every_valid_ep_size_and_stage_is_an_alternative():
    found = alternatives(LARGE, GPU, ranks=8, length=64)
    layouts = [(c.layout.ep_size, c.layout.stage) for c in found]
    assert layouts == [(ep, stage) for ep in (1, 2, 4, 8) for stage in (1, 2, 3)]
    for shape, sizes in ((replace(LARGE, num_experts=6), {1, 2}), (PlannedModel(2, 8, 8, 9), {1})):
        found = alternatives(shape, GPU, ranks=8, length=64)
        assert {c.layout.ep_size for c in found} == sizes


def test_the_recommendation_fits_and_is_nearly_the_fastest():
    found = alternatives(LARGE, GPU, ranks=64, length=64)
    best = recommend(found, GPU)
    assert best is not None and fits(best, GPU)
    assert best.tokens_per_second >= 0.95 * max(c.tokens_per_second for c in found if fits(c, GPU))


def test_a_fixed_batch_is_shared_and_accumulated():
    for candidate in alternatives(LARGE, GPU, ranks=8, length=64, batch=4096):
        assert candidate.batch == 4096 and candidate.posts * candidate.layout.accumulation == 512


def test_less_memory_forces_more_sharding_and_too_little_is_said():
    # 2.8 billion parameters: 16 bytes each over 8 GPUs are 5.6 GB of optimizer state, before weights and gradients.
    tight = replace(GPU, memory=14e9)
    best = recommend(alternatives(LARGE, tight, ranks=8, length=64), tight)
    assert best is not None and (best.layout.stage, best.layout.ep_size) != (1, 1)
    lines = plan_lines(LARGE, replace(GPU, memory=1e9), gpus=[1], length=64)
    assert any("does not fit: one post needs GPUs of" in line for line in lines)


def test_the_printed_plan_has_a_row_per_number_of_gpus_and_the_details_of_the_last():
    text = "\n".join(plan_lines(LARGE, GPU, gpus=[8, 4096], length=64))
    for part in ("4096 GPUs, recommended", "4096 GPUs, alternatives", "2,415.9 M in experts"):
        assert part in text
    assert text.index("\n   8 ") < text.index("\n4096 ")


def recipe(**model: object) -> Recipe:
    return recipe_from_dict(
        {"model": model, "tasks": {"mood": {"path": "x", "labels": ["a", "b", "c"]}}}
    )


def test_a_shape_is_read_from_the_encoders_config_and_the_recipe(tmp_path):
    config = {"n_layers": 6, "dim": 32, "hidden_dim": 64, "vocab_size": 99}
    config |= {"max_position_embeddings": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of_recipe(
        recipe(encoder=str(tmp_path), moe={"num_experts": 4, "top_k": 2, "layers": "alternate"})
    )
    assert shape == PlannedModel(6, 32, 64, 99, 40, tasks=1, outputs=3, moe_layers=3, num_experts=4, top_k=2,
                               expert_width=16)  # fmt: skip
    dense = shape_of_recipe(recipe(encoder=str(tmp_path), moe={"num_experts": 0}))
    assert (dense.moe_layers, dense.top_k, dense.expert_parameters) == (0, 0, 0)


def test_own_layers_mixtures_and_an_attention_are_counted_as_a_model_has_them(tmp_path):
    HF_CONFIGS["bert"].save_pretrained(tmp_path)
    options = {"own_layers": 2, "pooling": "layers", "task_attention_width": 4}
    more = {"encoder": str(tmp_path), "projection_width": 8, **options}
    tasks = {name: {"path": "x", "labels": ["a", "b", "c"]} for name in ("mood", "topic", "side")}
    moe = {"layers": "all", "num_experts": 4, "expert_width": 16}
    made = recipe_from_dict({"model": more | {"moe": moe}, "tasks": tasks})
    named = [Task(name, "single_label", ("a", "b", "c"), "macro_f1") for name in tasks]
    model = tiny_model(moe_config(), tasks=named, **options)
    found, shape = count_parameters(model, top_k=2), shape_of_recipe(made)
    assert shape.moe_layers == len(model.moe_layers()) == 1
    # The library's pooler is left out there.
    assert shape.dense_parameters == found["dense"]
    assert shape.active_parameters == found["active"]
    # By the formulas of BERT, its two segments and 512 positions, the same.
    formula = shape_of_recipe(made, "3,16,24,60")
    assert formula.copied_parameters == shape.copied_parameters
    assert formula.dense_parameters == shape.dense_parameters


@pytest.mark.parametrize("text", ["24,1024,4096", "24,1024,4096,many", "0,1024,4096,50265", None])
def test_a_wrong_shape_or_a_missing_encoder_is_refused(text):
    with pytest.raises(ValueError, match="layers,width,feed-forward width,vocabulary"):
        shape_of_recipe(recipe(encoder="roberta-large"), text)


LORA = {
    "form": "lora",
    "num_experts": 4,
    "top_k": 4,
    "rank": 2,
    "route_by": "task",
    "balance": "none",
}
LORA |= {"layers": "all", "dropout": 0.1}


def decoder_recipe(folder, family: str, **model: object) -> Recipe:
    CAUSAL[family].save_pretrained(folder)
    tasks = {
        "mood": {
            "path": "x",
            "kind": "label_words",
            "labels": ["bad", "so so"],
            "prompt": "{text}",
        },
        "why": {"path": "x", "kind": "text", "prompt": "{text}", "max_answer_length": 9},
    }
    return recipe_from_dict({"model": {"encoder": str(folder), **model}, "tasks": tasks})


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_decoder_only_model_with_lora_experts_is_counted_on_its_shape(tmp_path, family):
    shape = shape_of_recipe(decoder_recipe(tmp_path, family, moe=LORA))
    with torch.device("meta"):
        library = AutoModelForCausalLM.from_config(CAUSAL[family])
    assert shape.encoder_parameters == shape.frozen == sum(p.numel() for p in library.parameters())
    layers = CAUSAL[family].num_hidden_layers
    if family == "gpt2":
        width, queries, sizes = 16, 16, [(16, 48), (16, 16), (16, 64), (64, 16)]
    else:
        width, queries = 16, 16
        sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    assert shape.width == width
    experts = layers * sum(8 * (a + b) for a, b in sizes)
    assert shape.expert_parameters == experts
    maps = layers * sum(2 * a * b for a, b in sizes)
    assert forward_operations(shape, 7) == maps + 4 * 7 * queries * layers + 2 * experts
    # Two words and an end token at most; a text of nine tokens; a post is of one of both tasks.
    memory = estimate(shape, layout(tokens=30, ep_size=1), GPU).memory
    parts = {part.name.split(" (")[0]: part.device_bytes for part in memory.parts}
    assert parts["logits of the vocabulary"] == 3 * 7 * 60 * 8
    trained = shape.dense_parameters - shape.frozen + experts
    assert parts["moments of adamw"] == pytest.approx(8 * trained / 4, abs=8)
    assert parts["weights"] == pytest.approx(4 * (shape.dense_parameters + experts), abs=4)


def test_frozen_weights_are_not_reduced_and_their_maps_have_no_gradient(tmp_path):
    lora = shape_of_recipe(decoder_recipe(tmp_path, "llama", moe=LORA))
    whole = replace(lora, counted=replace(lora.counted, frozen=0, frozen_operations=0))
    here = layout(ep_size=1)
    moved, all_moved = traffic(lora, here), traffic(whole, here)
    trained = lora.dense_parameters - lora.frozen
    assert moved.dense_reduce == 2 * moved.dense_gather == 2 * 4 * trained * 3 / 4
    assert all_moved.dense_reduce == 2 * 4 * lora.dense_parameters * 3 / 4
    third = traffic(lora, layout(ep_size=1, stage=3))
    assert third.dense_reduce == 4 * trained * 3 / 4
    assert third.dense_gather == 4 * lora.dense_parameters * 3 / 4
    cluster = replace(GPU, read=1e30)
    times = [step_time(shape, here, cluster).compute for shape in (lora, whole)]
    saved = 30 * lora.counted.frozen_operations / (cluster.flops * cluster.efficiency)
    assert times[1] - times[0] == pytest.approx(saved)
    found = alternatives(lora, GPU, ranks=4, length=16)
    assert {candidate.layout.ep_size for candidate in found} == {1}
    assert ", 0.0 M frozen" in plan_lines(lora, GPU, gpus=[4], length=16)[0]


def test_an_encoder_of_a_known_family_is_counted_with_its_frozen_layers(tmp_path):
    HF_CONFIGS["roberta"].save_pretrained(tmp_path)
    moe = {"num_experts": 4, "top_k": 2, "layers": "all"}
    shape = shape_of_recipe(recipe(encoder=str(tmp_path), moe=moe, train_layers=1))
    formula = PlannedModel(shape.layers, shape.width, shape.ffn_width, shape.vocabulary)
    # One segment instead of two.
    assert shape.encoder_parameters == formula.encoder_parameters - 16
    layer = 4 * 16 * 17 + 2 * 16 * 24 + 24 + 16 + 4 * 16
    assert shape.frozen == shape.encoder_parameters - layer
    assert forward_operations(replace(shape, counted=None), 5) == forward_operations(shape, 5)
