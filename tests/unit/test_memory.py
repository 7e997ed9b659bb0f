"""The memory plan against sums made by hand."""

import pytest

from comoe.memory import MemoryPlan, plan_memory

DENSE, EXPERTS = 1000, 800


def plan(**changes: object) -> MemoryPlan:
    settings = {"expert_parameters": EXPERTS, "world_size": 4, "ep_size": 2, "stage": 2, "bf16": False}
    return plan_memory(DENSE, **{**settings, "optimizer": "adamw", **changes})


def device(memory_plan: MemoryPlan) -> dict[str, int]:
    return {part.name.split(" (")[0]: part.device_bytes for part in memory_plan.parts}


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


def test_one_rank_in_float32_with_adamw_needs_twenty_bytes_per_parameter():
    assert plan(world_size=1, ep_size=1).device_bytes == 20 * (DENSE + EXPERTS)


@pytest.mark.parametrize(("momentum", "numbers"), [(0.0, 0), (0.9, 1)])
def test_sgd_keeps_a_buffer_only_with_momentum(momentum: float, numbers: int):
    assert device(plan(optimizer="sgd", momentum=momentum))["moments of sgd"] == 4 * numbers * 450


def test_offload_moves_master_moments_and_gradients_to_the_host_and_keeps_the_sum():
    here, moved = plan(bf16=True), plan(bf16=True, offload=True)
    assert moved.host_bytes == (4 + 4 + 8) * 450
    assert moved.device_bytes == 2 * 1400
    assert moved.device_bytes + moved.host_bytes == here.device_bytes
    assert plan(offload=True, stage=1).host_bytes == (4 + 8) * 450


def test_activations_count_every_layer_and_every_route_of_a_token():
    shape = {"tokens": 10, "layers": 3, "width": 8, "moe_layers": 2, "top_k": 2, "expert_width": 5}
    encoder, experts = 3 * 10 * 8 * 34, 2 * 10 * 2 * (16 + 20) * 2
    assert device(plan(bf16=True, **shape))["activations"] == encoder + experts
    assert device(plan(**shape))["activations"] == 3 * 10 * 8 * 66 + 2 * experts
    assert device(plan())["activations"] == 0


def test_the_reduction_bucket_has_the_width_of_the_weights():
    assert device(plan(bucket_elements=100))["reduction bucket"] == 400
    assert device(plan(bucket_elements=100, bf16=True))["reduction bucket"] == 200


def test_the_printed_plan_names_the_layout_and_adds_up():
    lines = plan_memory(
        2**20, expert_parameters=0, world_size=1, ep_size=1, stage=2, bf16=False, optimizer="adamw"
    ).lines()
    assert lines[0] == "memory per rank, estimated (1 rank, EP 1, ZeRO 2, float32)"
    assert lines[-1].split() == ["total", "20.0", "MiB"]
    assert not any("host" in line for line in lines)


def test_the_printed_plan_has_a_host_column_with_an_offload():
    lines = plan(offload=True).lines()
    assert "optimizer offload" in lines[0] and lines[1].split() == ["device", "host"]
    assert all(line.count("MiB") == 2 for line in lines[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "train.optimizer is 'adam'.*did you mean adamw"),
        ({"stage": 0}, "zero_optimization.stage is 0; it must be 1, 2 or 3"),
        ({"ep_size": 3}, r"ep_size \(3\) must divide the number of ranks \(4\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
