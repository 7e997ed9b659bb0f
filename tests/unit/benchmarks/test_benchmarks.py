"""The benchmarks' own arithmetic: turns, ratios, forced loads, marks, the table, and one small run of each."""

import json
import re
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comoe.benchmarks import contrastive, precision, serving, training, updates
from comoe.benchmarks import contrastive as contrastive_costs
from comoe.benchmarks.contrastive import FORMS, make_posts
from comoe.benchmarks.experts import Clock, Size, add_ratios, clocked_routing
from comoe.benchmarks.ranks import ROOT, run_on_ranks
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Target,
    median,
    ratio,
    slowest,
    spread_of,
    take_turns,
)
from comoe.benchmarks.training import looked_up
from comoe.benchmarks.workload import (
    balanced_selection,
    force,
    load_skew,
    skewed_selection,
    steering_weight,
)
from comoe.models.moe.gate import SigmoidGate, SoftmaxGate
from tests.helpers_model import tiny_model
from tests.helpers_ranks import run_ranks

SMOKE = str(ROOT / "launch/configs/smoke.yaml")


def run_forked(function: str, world_size: int, **arguments: Any) -> Any:
    """``run_on_ranks`` without the imports of fresh processes; one test starts those."""
    return json.loads(json.dumps(run_ranks(function, world_size, **arguments)[0]))


def test_the_update_of_experts_is_measured_against_a_dense_block(tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "FORMS", {"": ((4,), ()), "mean": ((4,), (updates.MEAN,))})
    report = updates.run(tmp_path / "u.json", config=Path(SMOKE), rounds=3)
    default, mean = (row["value"] for row in report.rows)
    assert 0.6 < default < 1.6 and mean < 0.5 * default
    assert report.headline() == {"k4": default}


def test_a_server_is_measured_overrun_reloaded_and_ended(tmp_path, monkeypatch):
    for name, value in {"SECONDS": 2.5, "LOADED": 2.5, "BATCH": 64}.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = serving.run(tmp_path / "s.json", config=Path(SMOKE), rounds=1)
    assert report.headline()["smoke_over_batch"] > 0.05
    _, _, speed, faults = report.notes
    assert re.search(r"answers: \d+ times 200; p50 \d+ ms, p99 \d+ ms", speed)
    assert re.search(
        r"32 posts: \{.*429: \d+.*\}; replaced under load: \{200: \d+\} of 2 rev", faults
    )
    assert "exit code 0" in faults and "500: " not in faults


def test_contestants_take_turns_and_each_round_begins_with_the_next():
    order: list[str] = []
    contestants = {name: Contestant(lambda name=name: order.append(name)) for name in "abc"}
    times = take_turns(contestants, rounds=2, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert all(len(values) == 2 and min(values) >= 0 for values in times.values())


def test_a_slow_contestant_sits_out_rounds_and_its_ratio_rests_on_the_others():
    runs: list[int] = []
    contestants = {
        "slow": Contestant(lambda: runs.append(1), every=3),
        "fast": Contestant(lambda: None),
    }
    times = take_turns(contestants, rounds=6)
    assert [value is None for value in times["slow"]] == [False, True, True, False, True, True]
    assert len(runs) == 1 + 2 and ratio(times, "slow", "fast").rounds == 2


def test_a_ratio_is_taken_within_each_round():
    times = {"a": [2.0, 20.0, 3.0, None], "b": [1.0, 10.0, 1.0, 5.0]}
    assert ratio(times, "a", "b").value == 2.0 and ratio(times, "a", "b").rounds == 3
    assert median(times, "b") == 3.0
    # The spread is the quartiles, and the slowest rank counts.
    spread = spread_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.low, spread.value, spread.high) == (2.0, 3.0, 4.0)
    assert spread_of([7.0]).low == spread_of([7.0]).high == 7.0
    assert slowest([{"a": [1.0, None]}, {"a": [3.0, None]}]) == {"a": [3.0, None]}


@pytest.mark.parametrize("experts", [4, 8, 64])
def test_even_picks_load_every_expert_alike(experts):
    picks = balanced_selection(640, experts, 2)
    assert load_skew(picks, experts) == 1.0 and (picks[:, 0] != picks[:, 1]).all()


@pytest.mark.parametrize("experts", [8, 16, 64])
def test_skewed_picks_load_one_expert_three_times_the_mean_and_the_others_alike(experts):
    picks = skewed_selection(960, experts, 2, skew=3.0)
    counts = torch.bincount(picks.reshape(-1), minlength=experts)
    assert counts[0] == 3 * picks.numel() / experts and counts[1:].max() - counts[1:].min() <= 1
    assert (picks[:, 0] != picks[:, 1]).all()
    with pytest.raises(ValueError, match="a skew of 5 with 2 of 8 experts"):
        skewed_selection(10, 8, 2, skew=5)


@pytest.mark.parametrize("gate", [SigmoidGate, SoftmaxGate])
def test_forced_tokens_make_every_gate_pick_as_told(gate):
    picks = skewed_selection(100, 8, 2, skew=3.0)
    logits = force(torch.randn(100, 12), picks, 8) @ steering_weight(8, 12).T
    assert torch.equal(gate(2)(logits, torch.zeros(8)).indices_Sk, picks)


class SlowLayer(nn.Module):
    """A layer with the parts that ``clocked_routing`` hooks: router and experts, each as slow as it is told."""

    def __init__(self, routing: float, experts: float) -> None:
        super().__init__()
        self.router, self.experts = Slow(routing, routes=True), Slow(experts)

    def forward(self, x):
        weights, _ = self.router(x)
        return self.experts(x) * weights


class Slow(nn.Module):
    def __init__(self, seconds: float, routes: bool = False) -> None:
        super().__init__()
        self.seconds, self.routes = seconds, routes

    def forward(self, x):
        time.sleep(self.seconds)
        answer = Wait.apply(x, self.seconds)
        return (answer, None) if self.routes else answer


class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


def test_the_clock_counts_routing_forward_and_backward_and_nothing_else():
    layer, clock = SlowLayer(0.02, 0.2), Clock(torch.device("cpu"))
    x = torch.randn(3, requires_grad=True)
    with clocked_routing(layer, clock):
        layer(x).sum().backward()
    assert 0.04 <= clock.seconds < 0.2
    before = clock.seconds
    layer(x).sum().backward()
    assert clock.seconds == before


def test_targets_judge_the_headline_only(tmp_path):
    report = Measurements("title", {"fast": Target(at_most=1.3), "far": Target(at_least=2.0)})
    report.add("fast", {"value": 1.2, "low": 1.1, "high": 1.4, "rounds": 5})
    report.add("fast", {"value": 9.0, "low": 8.0, "high": 10.0, "rounds": 5}, case="E=64")
    report.add("far", {"value": 1.5, "low": 1.0, "high": 2.5, "rounds": 5})
    report.add_time("block", 0.25, case="E=8")
    assert report.missed() == ["far"]
    table = "\n".join(report.lines())
    assert "<= 1.3" in table and "MISSED" in table and "250.0" in table
    report.publish(tmp_path / "new" / "figures.json")
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["fast"] == 1.2 and written["far"] == 1.5 and len(written["rows"]) == 3


def test_a_key_without_an_expert_count_is_that_of_the_smallest():
    cases = product(("block", "native"), ("posts", "balanced", "skew3"), (4, 8))
    times = {"/".join(map(str, case)): [1.0, 2.0] for case in cases}
    times |= {"dense": [1.0, 2.0], "block/balanced/8": [2.0, 4.0]}
    report = Measurements("title", {})
    add_ratios(report, times, (4, 8), suffix="_x")
    assert report.headline() == {
        "block_over_dense_x": 1.0, "native_over_block_skew3_x": 1.0, "native_over_block_balanced_x": 1.0,
        "e8_over_e4_x": 2.0,
    }  # fmt: skip
    assert [row["value"] for row in report.rows if row["case"] == "E=8"] == [1.0, 1.0, 0.5]


def test_a_rank_that_fails_is_an_error_with_its_last_words():
    with pytest.raises(RuntimeError, match="ModuleNotFoundError.*no_such_module"):
        run_on_ranks("comoe.no_such_module:measure", 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_layers_are_measured_on_real_ranks(ranks):
    size = dict(model_width=32, expert_width=16, tokens=64, top_k=2, rounds=2, alone=ranks == 1)
    measured = run_forked(
        "comoe.benchmarks.experts:measure", ranks, config=SMOKE, experts=[8, 16], **size
    )
    expected = {
        f"{what}/{load}/{e}"
        for what in ("block", "native")
        for load in ("balanced", "skew3")
        for e in (8, 16)
    }
    assert expected | {"dense", "block/posts/8", "step of native/16"} <= measured["times"].keys()
    assert ("reference/posts/8" in measured["times"]) == (ranks == 1)
    assert all(value > 0 for name in expected for value in measured["times"][name])
    assert all(0 < share["value"] < 1 for share in measured["shares"].values())
    assert len(measured["shares"]) == 4 - 2 * ranks
    assert "generated posts" in measured["notes"][1]
    assert Size(experts=(8, 16), **size).rounds == 2


@pytest.mark.multiprocess
def test_routing_by_task_is_measured_with_and_without_the_fan_out():
    size = {"layers": ["top-1"], "posts": 4, "rounds": 1}
    measured = run_forked("comoe.benchmarks.routing:measure", 1, config=SMOKE, **size)
    assert len(measured["times"]["top-1"]) == 6
    assert all(seconds > 0 for times in measured["times"]["top-1"].values() for seconds in times)


def test_every_form_of_the_contrastive_loss_is_timed_and_its_memory_measured(monkeypatch, tmp_path):
    def here(function, world_size, /, **arguments):
        name = function.rpartition(":")[2]
        if name == "wire":
            return {"ours": 1.0, "gather with gradient": 2.0}
        return getattr(contrastive_costs, name)(**arguments)

    monkeypatch.setattr(contrastive, "run_on_ranks", here)
    size = contrastive.Size(batches=(256, 1024), ranks=4, width=16, rounds=2, checked=2048)
    report = contrastive.run(tmp_path / "figures.json", size=size)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {
        "time_over_full_1024",
        "time_over_local_1024",
        "time_over_full_1024_one_rank",
    } <= figures.keys()
    assert figures["wire_over_gather_grad"] == 0.5
    assert "wire_over_gather_grad" not in report.missed()
    # Resident memory of a small case: what the process held before is used again, so only the order
    # is sure.
    assert 0.4 < figures["full_measured_over_computed"] < 2
    assert {row["what"] for row in report.seconds} == {"ours", "full", "local", "reference"}


def test_a_form_that_does_not_fit_is_left_out():
    needed = contrastive_costs.needs("full", 512, 4, 16)
    assert 0.9 * needed < contrastive_costs.BYTES_PER_PAIR * 512**2 < needed
    for limit, expected in ((needed, set(FORMS)), (needed - 1, set(FORMS) - {"full"})):
        found = contrastive_costs.times([512], ranks=4, width=16, rounds=1, limit=int(limit))[
            "times"
        ]
        assert {name.partition("/")[0] for name in found} == expected


def test_the_exact_forms_have_one_gradient():
    posts = make_posts(64, 1, width=16)
    gradients = {name: form(posts)() for name, form in FORMS.items() if name != "reference"}
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["full"], atol=1e-6, rtol=1e-5)


def test_peak_memory_is_that_of_the_call():
    held = []
    peak = contrastive_costs.peak_bytes(lambda: held.append(torch.ones(1 << 24)))
    assert 0.9 * 2**26 < peak < 1.5 * 2**26


@pytest.mark.multiprocess
def test_bytes_are_counted_where_they_are_sent():
    sent = run_forked("comoe.benchmarks.contrastive:wire", 2, count=64, width=128)
    # 32 rows of [128 | label | two halves of the post] in float32, two float64 each, and one int64 count.
    assert sent["ours"] == 32 * (131 * 4 + 16) + 8
    assert sent["gather with gradient"] == 32 * (128 * 4 * 2 + 8)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("bert", ("word_embeddings", "position_embeddings", "token_type_embeddings")), ("t5", ("embed_tokens", "bias")),
     ("bart", ("embed_tokens", "embed_positions"))],
)  # fmt: skip
def test_tables_of_any_encoder_are_no_arithmetic(family, expected):
    encoder = tiny_model(family=family).encoder
    tables = [
        weight
        for name, weight in encoder.named_parameters()
        if name.split(".")[-2].endswith(expected)
    ]
    assert looked_up(encoder) == sum(weight.numel() for weight in tables)
    assert len(tables) == len(expected)


def few_steps() -> dict[str, Any]:
    training.STEPS, training.EVAL_EVERY = 8, 4
    return training.measure_monitoring(SMOKE)


@pytest.mark.multiprocess
def test_monitoring_is_timed_inside_a_run():
    measured = run_forked("tests.unit.benchmarks.test_benchmarks:few_steps", 1)
    assert 0 < measured["share"]["value"] < 1 and measured["share"]["rounds"] == 8
    assert 0 < measured["evaluation_share"]["value"] < 1


@pytest.mark.multiprocess
def test_whole_steps_of_comoe_and_of_the_trainer_take_turns(monkeypatch):
    monkeypatch.setenv("COMOE_BF16", "1")
    measured = run_forked(
        "comoe.benchmarks.training:measure_steps",
        1,
        config=SMOKE,
        overrides=["data.limit_per_task=150"],
        rounds=3,
    )
    assert set(measured["times"]) == {"comoe", "hf", "hf grouped"}
    assert all(len(values) == 3 and min(values) > 0 for values in measured["times"].values())
    assert all(min(values) > 0 for values in measured["tokens"].values())
    assert all(
        measured["optimizer"][name] < sum(measured["times"][name]) for name in measured["times"]
    )
    assert measured["mfu"] is None and "bf16 in all contestants" in measured["notes"][0]


@pytest.mark.multiprocess
def test_precisions_take_turns_and_layouts_whole_starts(monkeypatch):
    starts = []

    def start(function, ranks, *, threads=1, **arguments):
        starts.append((ranks, threads))
        if function.endswith("measure_alone"):
            return [float(ranks)] * 3
        return run_forked(function, ranks, **arguments)

    monkeypatch.setattr(precision, "run_on_ranks", start)
    report = Measurements("train", {})
    precision.add_precision(report, SMOKE, ["data.limit_per_task=50"], rounds=1, cores=2)
    assert set(report.headline()) == {*precision.RATIOS, "two_ranks_over_two_threads"}
    assert report.headline()["two_ranks_over_two_threads"] == 2.0
    assert starts == [(1, 1), (1, 2), (2, 1), (2, 1), (1, 2), (1, 2), (2, 1)]
    assert all(row["seconds"] > 0 for row in report.seconds)
