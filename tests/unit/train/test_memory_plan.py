"""The memory plan against sums made by hand."""

from dataclasses import fields, replace
from typing import Any

import pytest

from comoe.train.memory_plan import (
    DecoderWork,
    MemoryPlan,
    RunSize,
    Work,
    plan_memory,
    whole_tensors,
)

DENSE, EXPERTS = 1000, 800


def plan(
    tower: Work | None = None, decoder: DecoderWork | None = None, **changes: Any
) -> MemoryPlan:
    of_size = {field.name for field in fields(RunSize)} & changes.keys()
    size = RunSize(DENSE, EXPERTS, world_size=4, ep_size=2)
    size = replace(size, **{name: changes.pop(name) for name in of_size})
    return plan_memory(size, Work(**changes), tower=tower, decoder=decoder)


def device(memory_plan: MemoryPlan) -> dict[str, int]:
    return {part.name.split(" (")[0]: part.device_bytes for part in memory_plan.parts}


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_below_the_first_block_keep_each_text_once_where_the_gate_reads_tasks(recompute):
    size = {"layers": 4, "width": 8, "recompute": recompute}
    whole, some = Work(tokens=50, **size), Work(tokens=10, **size | {"layers": 3})
    shared = Work(tokens=50, shared_layers=3, shared_tokens=10, **size)
    kept = 8 * 4 if recompute else some.layer_token_bytes(4)
    assert whole.activation_bytes(4) - shared.activation_bytes(4) == 3 * 40 * kept


def test_stage_1_keeps_weights_and_gradients_whole_but_for_the_experts_of_other_ranks():
    parts = device(plan(stage=1))
    assert parts["weights"] == 4 * (1000 + 400)
    assert parts["gradients"] == 4 * (1000 + 400)
    assert parts["master copy"] == 4 * 450
    assert parts["moments of adamw"] == 8 * 450


def test_stage_2_splits_the_gradients_and_stage_3_the_weights_too():
    assert device(plan(stage=2))["gradients"] == 4 * 450
    assert device(plan(stage=2))["weights"] == 4 * 1400
    assert device(plan(stage=3))["weights"] == 4 * 450


def test_an_average_takes_four_bytes_of_each_trained_number_that_a_rank_computes_with():
    name = "weights beside those that train"
    assert name not in device(plan())
    assert device(plan(beside=True, frozen=300))[name] == 4 * (1400 - 300)
    assert device(plan(beside=True, stage=3, bf16=True))[name] == 4 * 450


def test_bf16_halves_the_weights_and_nothing_that_must_be_exact():
    full, half = device(plan()), device(plan(bf16=True))
    assert half["weights"] == full["weights"] / 2 == 2 * 1400
    assert {name: size for name, size in half.items() if name != "weights"} == {
        name: size for name, size in full.items() if name != "weights"
    }


def test_expert_parallelism_divides_the_weights_of_experts_and_not_the_optimizers_share():
    alone, shared = device(plan(ep_size=1)), device(plan(ep_size=4))
    assert alone["weights"] - shared["weights"] == 4 * (800 - 200)
    assert alone["moments of adamw"] == shared["moments of adamw"]


def test_frozen_weights_are_held_and_nothing_more():
    parts = device(plan(frozen=600))
    assert parts["weights"] == 4 * 1400
    assert parts["gradients"] == parts["master copy"] == 4 * 300
    assert parts["moments of adamw"] == 8 * 300
    assert device(plan(stage=1, frozen=600))["gradients"] == 4 * (400 + 400)


def test_one_rank_in_float32_with_adamw_needs_twenty_bytes_per_parameter():
    assert plan(world_size=1, ep_size=1).device_bytes == 20 * (DENSE + EXPERTS)


@pytest.mark.parametrize(("momentum", "numbers"), [(0.0, 0), (0.9, 1)])
def test_sgd_keeps_a_buffer_only_with_momentum(momentum, numbers):
    assert device(plan(optimizer="sgd", momentum=momentum))["moments of sgd"] == 4 * numbers * 450


def test_offload_moves_master_moments_and_gradients_to_the_host_and_keeps_the_sum():
    here, moved = plan(bf16=True), plan(bf16=True, offload=True)
    assert moved.host_bytes == (4 + 4 + 8) * 450
    assert moved.device_bytes == 2 * 1400
    assert moved.device_bytes + moved.host_bytes == here.device_bytes
    assert plan(offload=True, stage=1).host_bytes == (4 + 8) * 450


SHAPE = {"tokens": 10, "layers": 3, "width": 8, "moe_layers": 2, "top_k": 2, "expert_width": 5}


def test_activations_count_every_layer_and_every_route_of_a_token():
    # bf16: 34 bytes per unit and layer; 6 for the embeddings. Block: 2 x 2 + 4 + 1 per unit, 2 M +
    # 4 F per route.
    block = 10 * (8 * 9 + 2 * (16 + 20) * 2)
    assert (
        device(plan(bf16=True, **SHAPE))["activations"] == 3 * 10 * 8 * 34 + 10 * 8 * 6 + 2 * block
    )
    block = 10 * (8 * 13 + 2 * (16 + 20) * 4)
    assert device(plan(**SHAPE))["activations"] == 3 * 10 * 8 * 66 + 10 * 8 * 12 + 2 * block
    assert device(plan())["activations"] == 0


def test_a_narrow_feed_forward_and_heads_change_the_activations_by_hand_computed_sums():
    plain, narrow = device(plan(**SHAPE)), device(plan(**SHAPE, ffn_width=16))
    assert plain["activations"] - narrow["activations"] == 3 * 10 * 2 * (32 - 16) * 4
    heads = (
        device(plan(bf16=True, **SHAPE, tasks=3))["activations"]
        - device(plan(bf16=True, **SHAPE))["activations"]
    )
    assert heads == 10 * 8 * 3 * 4
    assert device(plan(**SHAPE, tasks=3)) == plain  # float32 states need no copy


def test_private_parts_add_their_own_activations():
    parts = {"private_parts": 3, "private_width": 4}
    for bf16, number in ((True, 2), (False, 4)):
        more, plain = device(plan(bf16=bf16, **SHAPE, **parts)), device(plan(bf16=bf16, **SHAPE))
        assert more["activations"] - plain["activations"] == 3 * 10 * ((2 * 8 + 4 * 4) * number + 8)


def test_recomputation_keeps_the_inputs_of_all_layers_and_one_layer_whole():
    layer, block, outside = 10 * 8 * 66, 10 * (8 * 13 + 2 * (16 + 20) * 4), 10 * 8 * 12
    assert (
        device(plan(**SHAPE, recompute=True))["activations"]
        == 3 * 10 * 8 * 4 + layer + block + outside
    )


def test_dispatch_holds_four_copies_of_one_layers_routes():
    assert device(plan(**SHAPE))["dispatch buffers"] == 4 * 4 * 10 * 2 * 8
    assert device(plan(**{**SHAPE, "moe_layers": 0}))["dispatch buffers"] == 0


def test_only_stage_3_gathers_weights_for_the_moment():
    assert device(plan(stage=3, gathered_elements=50))["gathered weights"] == 200
    assert device(plan(stage=2, gathered_elements=50))["gathered weights"] == 0


def test_stage_1_in_bf16_keeps_the_gradients_in_both_widths():
    assert device(plan(stage=1, bf16=True))["gradients"] == (4 + 2) * 1400


def test_a_share_that_cuts_tensors_counts_them_whole():
    # 10 elements over 2 ranks: the first share ends inside the tensor of 6, which both ranks then hold.
    assert whole_tensors([4, 6], ranks=2) == 10
    assert whole_tensors([5, 5], ranks=2) == 5
    assert whole_tensors([1, 1, 8, 2], ranks=4) == 10
    assert whole_tensors([3, 4], ranks=1) == 7


def test_float32_gradients_of_stage_2_count_the_whole_tensors_and_other_stages_do_not():
    groups = [([600, 400], 4), ([800], 2)]
    assert device(plan(tensor_groups=groups))["gradients"] == 4 * (1000 + 800)
    assert device(plan(tensor_groups=groups, bf16=True))["gradients"] == 4 * 450
    assert device(plan(tensor_groups=groups, stage=3))["gradients"] == 4 * 450


def test_the_reduction_bucket_has_the_width_of_the_weights():
    assert device(plan(bucket_elements=100))["reduction bucket"] == 400
    assert device(plan(bucket_elements=100, bf16=True))["reduction bucket"] == 200


def test_the_printed_plan_names_the_layout_and_adds_up():
    lines = plan_memory(RunSize(2**20, 0)).lines()
    assert lines[0] == "memory per rank, estimated (1 rank, EP 1, ZeRO 2, float32)"
    assert lines[-1].split() == ["total", "20.0", "MiB"]
    assert not any("host" in line for line in lines)
    lines = plan_memory(RunSize(640 * 2**20, 0)).lines()
    assert lines[1].split()[-2:] == ["2,560.0", "MiB"] and lines[-1].split()[-2:] == ["12.5", "GiB"]
    lines = plan(offload=True).lines()
    assert "optimizer offload" in lines[0] and lines[1].split() == ["device", "host"]
    assert all(line.count("MiB") == 2 for line in lines[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"stage": 0}, "zero_optimization.stage is 0; it must be 1, 2 or 3"),
     ({"ep_size": 3}, r"ep_size \(3\) must divide the number of ranks \(4\)")],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
