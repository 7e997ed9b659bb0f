"""The DeepSpeed JSON: what is filled, and every clash, with its message."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from comoe.config.load import recipe_from_dict
from comoe.config.recipe import Recipe
from comoe.train.parallel import ds_config
from comoe.train.parallel.ds_config import ZERO_2, Layout, fill_settings, load_settings, plan_layout
from comoe.train.parallel.ds_keys import PASSED, REFUSED, SECTIONS, SET, check_gate

DS_CONFIGS = Path(__file__).parents[4] / "ds_configs"
STAGE_2 = {"zero_optimization": {"stage": 2}}


def recipe_of(*, experts: int = 8, ep_size: int | str = "auto", **train: Any) -> Recipe:
    return recipe_from_dict({
        "model": {"moe": {"num_experts": experts, "top_k": min(2, max(1, experts))}},
        "parallel": {"ep_size": ep_size},
        "tasks": {"mood": {"path": "x"}},
        "train": train,
    })  # fmt: skip


def filled(
    settings: dict[str, Any],
    recipe: Recipe | None = None,
    *,
    world_size: int = 2,
    gpu: bool = False,
) -> Any:
    recipe = recipe or recipe_of()
    layout = plan_layout(recipe, settings, world_size=world_size, gpu=gpu)
    return fill_settings(settings, recipe, layout, gpu=gpu)


def refusal(settings: dict[str, Any], recipe: Recipe | None = None, *, world_size: int = 2) -> str:
    with pytest.raises(ValueError) as caught:
        filled(settings, recipe, world_size=world_size)
    return str(caught.value)


def autos(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [found for value in node.values() for found in autos(value)]
    return [node] if node == "auto" else []


def test_the_settings_of_a_run_without_a_file_are_those_of_the_file_for_zero_2():
    assert ZERO_2 == load_settings(DS_CONFIGS / "zero2.json")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_no_auto_is_left_in_any_of_the_four_files(name, gpu):
    answer = filled(load_settings(DS_CONFIGS / f"{name}.json"), gpu=gpu)
    assert autos(answer) == []
    assert answer["bf16"]["enabled"] is gpu and answer["expert_parallel"]["use_grouped_mm"] is gpu
    assert ("data_types" in answer) is gpu


def test_the_numbers_of_the_recipe_fill_the_file():
    recipe = recipe_of(
        batch_size=40, micro_batch_size=5, max_grad_norm=0.25, learning_rate=0.5, weight_decay=0.0
    )
    answer = filled(load_settings(DS_CONFIGS / "zero2.json"), recipe, world_size=2)
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    assert [answer[key] for key in sizes] == [40, 5, 4, 0.25]
    assert (
        answer["expert_parallel"] | {"autoep_size": 2, "top_k": 2, "enabled": True}
        == answer["expert_parallel"]
    )
    assert answer["optimizer"]["type"] == "AdamW" and answer["optimizer"]["params"]["lr"] == 0.5


def test_sgd_gets_its_own_parameters():
    answer = filled(
        STAGE_2, recipe_of(optimizer="sgd", momentum=0.5, learning_rate=0.1, weight_decay=0.2)
    )
    assert answer["optimizer"] == {
        "type": "SGD",
        "params": {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2},
    }


def test_an_uneven_batch_is_rounded_up_for_deepspeed():
    # 10 posts on 4 ranks are 3 posts for the busiest rank.
    answer = filled(STAGE_2, recipe_of(batch_size=10), world_size=4)
    assert (answer["train_micro_batch_size_per_gpu"], answer["gradient_accumulation_steps"]) == (
        3,
        1,
    )
    assert answer["train_batch_size"] == 12


@pytest.mark.parametrize(
    ("batch_size", "micro", "world_size", "expected"),
    [(96, "auto", 2, (48, 1)), (1024, "auto", 2, (128, 4)), (96, 200, 2, (48, 1)), (96, 40, 2, (40, 2)),
     (1, "auto", 4, (1, 1))],
)  # fmt: skip
def test_posts_per_forward_pass_and_accumulation(batch_size, micro, world_size, expected):
    recipe = recipe_of(batch_size=batch_size, micro_batch_size=micro)
    layout = plan_layout(recipe, STAGE_2, world_size=world_size, gpu=False)
    assert (layout.micro_batch_size, layout.accumulation) == expected


@pytest.mark.parametrize(
    ("experts", "world_size", "ep_size"),
    [(8, 1, 1), (8, 2, 2), (8, 4, 4), (8, 6, 2), (3, 4, 1), (6, 4, 2), (0, 4, 1)],
)
def test_auto_shares_the_experts_over_as_many_ranks_as_divide_both(experts, world_size, ep_size):
    assert (
        plan_layout(recipe_of(experts=experts), STAGE_2, world_size=world_size, gpu=False).ep_size
        == ep_size
    )


def test_the_ep_size_may_be_written_in_the_file_and_is_checked_there_too():
    settings = STAGE_2 | {"expert_parallel": {"autoep_size": 1}}
    assert filled(settings, world_size=2)["expert_parallel"]["autoep_size"] == 1
    settings = STAGE_2 | {"expert_parallel": {"autoep_size": 3}}
    assert "(3) must divide both the ranks (2)" in refusal(settings)
    settings = STAGE_2 | {"expert_parallel": {"autoep_size": 1}}
    assert refusal(settings, recipe_of(ep_size=2)).startswith(
        "expert_parallel.autoep_size is 1 in the DeepSpeed JSON"
    )


def test_without_experts_there_is_no_expert_parallelism():
    answer = filled(load_settings(DS_CONFIGS / "zero2.json"), recipe_of(experts=0))
    assert answer["expert_parallel"] == {"enabled": False}


def test_a_number_that_clashes_with_the_recipe_is_refused():
    assert refusal(STAGE_2 | {"train_batch_size": 7}) == (
        'train_batch_size is 7 in the DeepSpeed JSON and 32 by the recipe and the ranks; write "auto" in the JSON, '
        "or make the two agree."
    )
    assert filled(STAGE_2 | {"train_batch_size": 32})["train_batch_size"] == 32
    assert "gradient_clipping is 0.5 in the DeepSpeed JSON and auto by the recipe" in refusal(
        STAGE_2 | {"gradient_clipping": 0.5}
    )
    assert filled(STAGE_2 | {"gradient_clipping": "auto"})["gradient_clipping"] == 0.0
    assert "expert_parallel.top_k is 3" in refusal(STAGE_2 | {"expert_parallel": {"top_k": 3}})


OWNED = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "bf16",
    "elasticity": "--resume",
}
FIXED = {
    "enabled": "false",
    "moe_layer_pattern": '"mine"',
    "score_apply": '"pre"',
    "expert_w3": '"up"',
}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
     'zero_optimization.reduce_bucket_size is "auto" in the DeepSpeed JSON, but nothing fills it; write a value.'),
    *((STAGE_2 | {section: {}}, f"{section} must not be in the DeepSpeed JSON: .*{instead}")
      for section, instead in OWNED.items()),
    *(({"zero_optimization": {"stage": stage}},
       rf"zero_optimization.stage \({stage}\) must be 1, 2 or 3: stage 0 clips wrongly with experts.")
      for stage in (0, 4, "auto", None)),
    ({}, r"zero_optimization.stage \(0\) must be 1, 2 or 3"),
    *((STAGE_2 | {"expert_parallel": {key: json.loads(value)}},
       f"expert_parallel.{key} is {value} in the DeepSpeed JSON, but comoe's experts") for key, value in FIXED.items()),
]  # fmt: skip
"""Settings, and the beginning of the message."""


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_what_nothing_fills_or_our_experts_cannot_follow_is_refused(settings, message):
    assert re.match(message, refusal(settings))
    assert refusal(STAGE_2, recipe_of(ep_size=4), world_size=6) == (
        "parallel.ep_size (4) must divide both the ranks (6) and model.moe.num_experts (8); set it to one of [1, 2]."
    )


def test_precision_can_be_forced_from_the_file():
    settings = STAGE_2 | {"bf16": {"enabled": True}}
    assert plan_layout(recipe_of(), settings, world_size=1, gpu=False).bf16
    answer = filled(settings, world_size=1)
    assert answer["bf16"] == {"enabled": True}
    assert answer["data_types"] == {"grad_accum_dtype": "fp32"}
    settings = STAGE_2 | {"bf16": {"enabled": False}}
    assert not plan_layout(recipe_of(), settings, world_size=1, gpu=True).bf16


AUTO: dict[str, Any] = {"bf16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("settings", "gpu", "begun", "word", "native", "bf16", "reason"),
    [({}, False, None, "", [True, True], True, "the CPU multiplies bfloat16 natively"),
     (AUTO, False, None, "", [True, True], True, "the CPU multiplies bfloat16 natively"),
     # Ranks on two machines, one of which cannot.
     (AUTO, False, None, "", [True, False], False, "the CPU does not multiply"),
     (AUTO, False, None, "0", [True, True], False, "COMOE_BF16=0"),
     (AUTO, False, None, "1", [False], True, "COMOE_BF16=1"),
     (AUTO, True, None, "0", [False], True, "GPU"),
     # A run keeps its precision wherever it goes on.
     (AUTO, False, False, "1", [True], False, "as the run was begun"),
     (AUTO, True, False, "", [True], False, "as the run was begun"),
     (AUTO, False, True, "0", [False], True, "as the run was begun"),
     # Unless the file says otherwise.
     ({"bf16": {"enabled": True}}, False, False, "0", [False], True, "bf16.enabled in the DeepSpeed JSON")],
)  # fmt: skip
def test_auto_precision_asks_the_run_then_the_device(
    monkeypatch, settings, gpu, begun, word, native, bf16, reason
):
    monkeypatch.setenv("COMOE_BF16", word)
    monkeypatch.setattr(ds_config, "multiplies_bf16", lambda: native[0])
    # The variable of this rank alone decides for all.
    others = [("", able) for able in native[1:]]
    monkeypatch.setattr(ds_config, "all_gather_objects", lambda value: [value, *others])
    layout = plan_layout(
        recipe_of(), STAGE_2 | settings, world_size=2, gpu=gpu, begun_in_bf16=begun
    )
    assert layout.bf16 is bf16 and reason in layout.precision
    assert layout.precision.startswith("bf16 with float32 master weights" if bf16 else "float32")


def test_an_unknown_word_for_the_precision_is_refused(monkeypatch):
    monkeypatch.setenv("COMOE_BF16", "yes")
    assert refusal(STAGE_2).startswith("the environment variable COMOE_BF16 is 'yes'; set it to")


@pytest.mark.parametrize(
    ("name", "gpu", "fused"),
    [("zero2", False, True), ("zero3", False, True), ("zero2", True, False), ("zero2_offload", True, True)],
)  # fmt: skip
def test_adam_is_fused_where_its_state_is_in_main_memory(name, gpu, fused):
    answer = filled(load_settings(DS_CONFIGS / f"{name}.json"), gpu=gpu)
    assert answer["optimizer"]["params"].get("fused", False) is fused
    sgd = filled(load_settings(DS_CONFIGS / f"{name}.json"), recipe_of(optimizer="sgd"), gpu=gpu)
    assert "fused" not in sgd["optimizer"]["params"]


def test_the_file_as_read_is_left_as_it_is():
    settings = load_settings(DS_CONFIGS / "zero3.json")
    before = json.dumps(settings)
    filled(settings)
    assert json.dumps(settings) == before


def test_a_missing_file_names_the_ready_ones(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"--deepspeed .*none.json: no such file; give a path, or the name of a ready one",
    ):
        load_settings(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [('{\n "bf16": \n', "bad.json, line 3: Expecting value; the file must be one JSON object."),
     ("[1]", "bad.json: the file must be one JSON object, not a list."),
     ('{"bf16": true}', "bad.json: bf16 is True; it must be an object"),
     ('{"zero_optimization": 2}', "bad.json: zero_optimization is 2; it must be an object")],
)  # fmt: skip
def test_a_file_that_is_no_object_is_refused_with_its_place(tmp_path, content, said):
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_settings(tmp_path / "bad.json")
    assert said in str(caught.value)


OFF_BY_ONE = {
    "a key of the top": ({"zero_optimisation": {}}, "no key zero_optimisation; did you mean zero_optimization?"),
    "a key of a section": (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        "no key zero_optimization.overlap_com; did you mean zero_optimization.overlap_comm?",
    ),
    "a key of an inner section": (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "did you mean zero_optimization.offload_optimizer.device?",
    ),
    "nothing like it": ({"qqq": 1}, "has no key qqq; leave it out."),
    "text for a boolean": ({"bf16": {"enabled": "false"}}, 'is "false"; it must be "auto", true or false.'),
    "a number for a boolean": ({"bf16": {"enabled": 0}}, "bf16.enabled is 0; it must be"),
    "text for a number": ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, 'is "5e8"; it must be a whole number'),
    "a boolean for a number": ({"train_batch_size": True}, "train_batch_size is true; it must be"),
    "a fraction": ({"train_batch_size": 1.5}, "train_batch_size is 1.5; it must be"),
    "below 0": ({"gradient_clipping": -1}, "gradient_clipping is -1; it must be"),
    "a stage": ({"zero_optimization": {"stage": 0}}, "stage is 0; it must be 1, 2 or 3"),
    "a stage that is true": ({"zero_optimization": {"stage": True}}, "stage is true; it must be 1, 2 or 3"),
    "a disk": ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 'a disk, "nvme", is not supported'),
    "another precision of sums": ({"data_types": {"grad_accum_dtype": "bf16"}}, 'it must be "fp32"'),
    "a function of no gate": ({"expert_parallel": {"score_func": "relu"}}, 'must be "sigmoid" or "softmax"'),
}  # fmt: skip


def put(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def read(content: Any, folder: Path) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_settings(file)


@pytest.mark.parametrize("what", OFF_BY_ONE)
def test_what_is_misspelt_or_of_another_type_is_refused(what: str, tmp_path: Path) -> None:
    settings, said = OFF_BY_ONE[what]
    with pytest.raises(ValueError) as caught:
        read(settings, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'ds.json'}: ") and said in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"enabled": True}, True, 1, "auto", None])
@pytest.mark.parametrize("path", [*SET, *REFUSED])
def test_what_comoe_sets_or_cannot_do_is_refused_with_a_sentence(
    path: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        read(put(path, value), tmp_path)
    sentence = (SET | REFUSED)[path]
    assert f"{path} must not be in the DeepSpeed JSON: {sentence}" in str(caught.value)
    assert sentence[-1] in ".)" and len(sentence) > 10


def test_every_key_that_deepspeed_knows_is_on_one_list_and_every_list_has_keys_of_it() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    known = {*_REMOVED_TOP_LEVEL_CONFIG_KEYS}
    known |= {f"zero_optimization.{key}" for key in zero | set(_REMOVED_ZERO_CONFIG_KEYS)}
    offload = DeepSpeedZeroOffloadOptimizerConfig.model_fields
    known |= {f"zero_optimization.offload_optimizer.{key}" for key in offload}
    lists = [set(SECTIONS), set(PASSED), set(SET), set(REFUSED)]
    assert not {path for path in known if not any(path in some for some in lists)}
    assert sum(map(len, lists)) == len(set().union(*lists))


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"bf16": {"enabled": true}, "bf16": {}}', "the key bf16 is there twice; keep one"),
     ('{"bf16": {"enabled": true, "enabled": false}}', "the key enabled is there twice"),
     ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
     ("[" * 5000, "the file must be one JSON object")],
)  # fmt: skip
def test_json_that_can_be_read_in_two_ways_is_refused(
    content: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read(content, tmp_path)


def test_the_file_of_a_run_that_was_begun_is_taken_as_it_is(tmp_path: Path) -> None:
    old = {"steps_per_print": 10, "bf16": {"enabled": "false"}, "unknown": 1}
    (tmp_path / "deepspeed.json").write_text(json.dumps(old))
    assert load_settings(tmp_path / "deepspeed.json", saved=True) == old


@pytest.mark.parametrize(
    ("asked", "gate", "fine"),
    [
        ("sigmoid", "sigmoid", True),
        ("softmax", "softmax", True),
        (None, "softmax", True),
        ("sigmoid", "softmax", False),
    ],
)
def test_a_score_function_against_the_gate_is_refused(
    asked: str | None, gate: str, fine: bool
) -> None:
    recipe = recipe_of()
    recipe.model.moe.gate = gate
    settings = {"expert_parallel": {"score_func": asked} if asked else {}}
    if fine:
        check_gate(settings, recipe)
        return
    with pytest.raises(
        ValueError, match=r"but model.moe.gate \(softmax\) scores the experts; leave"
    ):
        check_gate(settings, recipe)
    recipe.model.moe.num_experts = 0
    check_gate(settings, recipe)


def test_a_layout_is_a_plain_record():
    layout = plan_layout(recipe_of(batch_size=8), STAGE_2, world_size=2, gpu=False)
    assert layout == Layout(
        world_size=2, ep_size=2, stage=2, micro_batch_size=4, accumulation=1, bf16=False
    )


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_an_old_gpu_trains_in_float32_without_grouped_products_and_says_why(
    capability, bf16, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
    layout = plan_layout(recipe_of(), ZERO_2, world_size=2, gpu=True)
    settings = fill_settings(ZERO_2, recipe_of(), layout, gpu=True)
    assert layout.bf16 == settings["bf16"]["enabled"] == bf16
    assert settings["expert_parallel"]["use_grouped_mm"] == bf16
    if bf16:
        return
    reason = "Tesla has compute capability 7.5, bfloat16 needs 8.0"
    assert layout.precision == f"float32: {reason}"
    with pytest.raises(
        ValueError, match=f"is true in the DeepSpeed JSON, but {reason}; write false in"
    ):
        plan_layout(recipe_of(), ZERO_2 | {"bf16": {"enabled": True}}, world_size=2, gpu=True)
    with pytest.raises(ValueError, match=f"it was begun in bf16, but {reason}"):
        plan_layout(recipe_of(), ZERO_2, world_size=2, gpu=True, begun_in_bf16=True)
