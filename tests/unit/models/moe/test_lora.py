"""LoRA experts against the formulas in float64, in every family; what trains, what stays, what an export keeps."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from comoe.config.recipe import ModelConfig
from comoe.evaluation.experts_off import CONDITIONS, OFF
from comoe.inference.adapters import export_adapters
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.inference.merged import checkpoint_merged, export_merged
from comoe.models.moe.lora import LoraLinear, adapters_of
from comoe.train.memory_plan import count_parameters
from comoe.train.start_from import start_from_export
from tests.helpers_export import tiny_recipe, tiny_tokenizer
from tests.helpers_model import (
    CAUSAL,
    HF_CONFIGS,
    TASKS,
    VARIANTS,
    gradients,
    moe_config,
    random_batch,
    tiny_model,
    without_gradient,
)
from tests.helpers_seq2seq import POLARITY

PAPER = dict(
    form="lora", num_experts=4, top_k=4, rank=4, alpha=8.0, route_by="task", gate_scope="model",
    targets="all", balance="none", gate_scale=1.0,
)  # fmt: skip
MAPS = {"deberta-v2": 4, "modernbert": 4, "gpt2": 4}
"""Linear maps of a layer that get experts, where they are not six."""


def logits_of(model, batch):
    with torch.no_grad():
        return model(batch).logits


def states_of(model, batch):
    """The encoder's last states, float64: logits are float32."""
    with torch.no_grad():
        return model.encode(model._texts(batch), None).states_BLM


def merged(model, task: int):
    """The formulas: every map's weight with the mean of its experts under the task's one gate."""
    gate = model.moe_layers()[0]
    e_task = model.task_embedding.weight[task].double()
    s = torch.sigmoid(gate.task_projection.weight.double() @ e_task)
    g = s / s.sum()
    for one in adapters_of(model):
        A, B = one.lora_A.double().view(4, 4, -1), one.lora_B.double().view(-1, 4, 4)
        update = sum(g[e] * (8.0 / 4) * B[:, e] @ A[e] for e in range(4))
        # GPT-2 has its weights the other way round.
        one.inner.weight.data += update if isinstance(one.inner, torch.nn.Linear) else update.T


@pytest.mark.parametrize("family", [*HF_CONFIGS, "deberta-v2 with a convolution"])
def test_the_published_experts_equal_a_few_lines_of_float64(family):
    model = tiny_model(moe_config(**PAPER), family=family).double().eval()
    batch = random_batch()
    # Rows 0 and 1 read one text, for two tasks.
    batch.input_ids_BL[1], batch.attention_mask_BL[1] = (
        batch.input_ids_BL[0], batch.attention_mask_BL[0],
    )  # fmt: skip
    batch = replace(batch, task_ids_B=torch.tensor([0, 1, 2, 2, 3, 4]))
    shared = replace(batch, text_numbers_B=torch.tensor([0, 0, 2, 3, 4, 5]))
    found = states_of(model, batch)
    assert len(model.moe_layers()) == 1
    assert len(adapters_of(model)) >= 3 * MAPS.get(family.split()[0], 6)
    real = batch.attention_mask_BL.bool()
    torch.testing.assert_close(states_of(model, shared)[real], found[real], rtol=0, atol=1e-12)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(len(TASKS)):
        model.load_state_dict(weights)
        merged(model, number)
        mine = real * (batch.task_ids_B == number)[:, None]
        with CONDITIONS[OFF](model):
            expected = states_of(model, batch)
        torch.testing.assert_close(found[mine], expected[mine], rtol=0, atol=1e-10)
        assert (found - expected)[real & ~mine].abs().max() > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [
    dict(route_by="token", gate_scope="layer", top_k=2), dict(route_by="both", top_k=1, gate="softmax"),
    dict(route_by="token", top_k=3, targets="attention", layers=[1, 2], cooperation_threshold=0.4),
    dict(route_by="task", task_prior=1.5, targets="feed_forward", gate_scope="layer"),
])  # fmt: skip
def test_each_map_adds_its_weighted_experts_on_real_tokens(options, recompute):
    model = tiny_model(moe_config(form="lora", rank=3, alpha=5.0, **options), recompute=recompute)
    model = model.double().train()
    batch, seen = random_batch(), []
    for one in adapters_of(model):
        one.register_forward_hook(lambda m, x, y: seen.append((m, x[0].detach(), y.detach())))
    output = model(batch)
    routings = {
        block.layer: routing
        for block, routing in zip(model.moe_layers(), output.routings, strict=True)
    }
    mask_N, places = batch.attention_mask_BL.flatten().bool(), {"attention": 4, "feed_forward": 2}
    layers = len(options["layers"]) if "layers" in options else 3
    assert len(seen) == layers * places.get(options.get("targets"), 6)
    assert len(routings) == (layers if options.get("gate_scope") == "layer" else 1)
    for one, x, y in seen:
        routing = routings[one.layer]
        expected = one.inner(x).flatten(0, 1)
        for e in range(4):
            A, B = one.lora_A[3 * e : 3 * e + 3], one.lora_B[:, 3 * e : 3 * e + 3]
            g_S = (routing.weights_Sk * (routing.indices_Sk == e)).sum(dim=1)
            update = 5.0 / 3 * (x.flatten(0, 1)[mask_N] @ A.T @ B.T) * g_S[:, None]
            expected[mask_N] = expected[mask_N] + update
        torch.testing.assert_close(y.flatten(0, 1), expected, rtol=0, atol=1e-10)
    seen.clear()
    logits = sum(value.square().sum() for value in output.logits.values())
    (logits + sum(value.sum() for value in output.embeddings.values())).backward()
    assert without_gradient(model) == []
    parts = {name.split(".")[-1] for name in gradients(model) if name.startswith("encoder")}
    assert parts - {"weight", "bias"} == {"lora_A", "lora_B"}
    assert not any("inner" in name for name in gradients(model))


def test_at_the_start_the_model_is_the_pre_trained_one_and_only_what_is_new_trains():
    model = tiny_model(moe_config(**PAPER, output_init=0.0)).eval()
    bare, batch = tiny_model(moe_config(num_experts=0)).eval(), random_batch()
    bare.load_state_dict(
        {n: v for n, v in model.state_dict().items() if "inner" not in n}, strict=False
    )
    bare.encoder.load_state_dict(
        {n.replace("inner.", ""): v for n, v in model.encoder.state_dict().items()}, strict=False
    )
    expected = logits_of(bare, batch)
    for name, logits in logits_of(model, batch).items():
        assert torch.equal(logits, expected[name])
    counts = count_parameters(model, top_k=4)
    # 3 layers, 4 maps of 16 x 16, one of 16 x 24 and one of 24 x 16, rank 16 in all.
    assert counts["experts"] == 3 * 16 * (4 * 32 + 2 * 40)
    assert counts["active"] == counts["total"]
    assert all(part.dropout.p == 0 for part in adapters_of(model))
    own = tiny_model(moe_config(**PAPER), dropout=None)
    assert {part.dropout.p for part in adapters_of(own)} == {0.1}
    assert isinstance(own.encoder.encoder.layer[0].intermediate.dense, LoraLinear)
    assert own.encoder.encoder.layer[0].intermediate.dense.weight.shape == (24, 16)


def test_an_export_keeps_them_and_a_run_starts_from_it(tmp_path):
    recipe, batch = tiny_recipe(), random_batch()
    recipe.model = ModelConfig(
        encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe_config(**PAPER)
    )
    model = tiny_model(recipe.model.moe, seed=3).eval()
    export_model(
        tmp_path / "export", state_dict=model.state_dict(), recipe=recipe, tasks=TASKS,
        backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v")),
    )  # fmt: skip
    expected = logits_of(model, batch)
    assert "4 experts (4 per token, sigmoid gate, routed by task) of rank 4 in the linear maps" in (
        tmp_path / "export" / "README.md"
    ).read_text(encoding="utf-8")

    def started(**moe):
        fresh = tiny_model(moe_config(**PAPER | moe), seed=5).eval()
        config = ModelConfig(start_from=str(tmp_path / "export"), moe=moe_config(**PAPER | moe))
        start_from_export(config, fresh)
        return fresh

    for found in (load_exported(tmp_path / "export").model, started()):
        for name, logits in logits_of(found, batch).items():
            torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-6)
    others = (dict(targets="attention"), dict(layers=[1]), dict(gate="softmax"))
    for moe in (dict(rank=2), dict(form="beside"), *others):
        with pytest.raises(ValueError, match="LoRA experts, which stay in their linear maps"):
            started(**moe)


@pytest.mark.parametrize("options", [{}, dict(gate_scope="layer", top_k=2, layers=[1, 2])])
def test_adapters_of_a_task_are_one_lora_with_the_same_numbers(tmp_path, options):
    recipe, batch = tiny_recipe(), random_batch()
    recipe.model = ModelConfig(
        encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe_config(**PAPER | options)
    )
    model = tiny_model(recipe.model.moe, seed=3).eval()
    export_model(
        tmp_path / "export", state_dict=model.state_dict(), recipe=recipe, tasks=TASKS,
        backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v")),
    )  # fmt: skip
    export_adapters(tmp_path / "adapters", load_exported(tmp_path / "export"))
    expected, real = states_of(model, batch), batch.attention_mask_BL.bool()
    bare = {
        name.replace("inner.", ""): value
        for name, value in model.encoder.state_dict().items()
        if "lora_" not in name and "block." not in name
    }
    for number, task in enumerate(TASKS):
        config = json.loads((tmp_path / "adapters" / task.name / "adapter_config.json").read_text())
        weights = load_file(tmp_path / "adapters" / task.name / "adapter_model.safetensors")
        assert config["base_model_name_or_path"] == "some/encoder"
        assert len(weights) == 2 * len(config["target_modules"])
        plain = tiny_model(moe_config(num_experts=0)).eval()
        plain.encoder.load_state_dict(bare)
        for name in config["target_modules"]:
            A, B = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert len(A) == config["r"] == 16
            update = config["lora_alpha"] / config["r"] * B @ A
            plain.encoder.get_submodule(name).weight.data += update
        mine = real & (batch.task_ids_B == number)[:, None]
        torch.testing.assert_close(states_of(plain, batch)[mine], expected[mine], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not an empty folder"):
        export_adapters(tmp_path / "adapters", load_exported(tmp_path / "export"))
    for moe, message in (
        (dict(route_by="both"), "from token to token"),
        (dict(form="beside"), "no LoRA experts"),
    ):
        other = replace(
            load_exported(tmp_path / "export"), model=tiny_model(moe_config(**PAPER | moe))
        )
        config = replace(other.model_config, moe=moe_config(**PAPER | moe))
        with pytest.raises(ValueError, match=message):
            export_adapters(tmp_path / "other", replace(other, model_config=config))
    other = load_exported(tmp_path / "export")
    trained = replace(other, model_config=replace(other.model_config, train_layers="all"))
    with pytest.raises(ValueError, match="more than LoRA experts and heads was trained"):
        export_adapters(tmp_path / "other", trained)
    own = replace(other, model_config=replace(other.model_config, own_layers=1))
    with pytest.raises(ValueError, match="model.own_layers.*are added to the pre-trained model"):
        export_adapters(tmp_path / "other", own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merged_folders_are_plain_models_with_the_same_numbers(tmp_path, family):
    generates = family in CAUSAL
    tasks = (TASKS[0], POLARITY) if generates else TASKS
    recipe = tiny_recipe(tasks=tasks)
    recipe.model = ModelConfig(
        encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe_config(**PAPER)
    )
    model = tiny_model(recipe.model.moe, tasks=tasks, family=family, seed=3).eval()
    tokenizer = tiny_tokenizer(tmp_path / "v")
    export_model(
        tmp_path / "export", state_dict=model.state_dict(), recipe=recipe, tasks=tasks,
        backbone=Backbone(json.loads(json.dumps(model.encoder.config.to_dict(), default=str)), tokenizer),
    )  # fmt: skip
    checkpoint_merged(tmp_path / "export", tmp_path / "merged")
    batch = random_batch(tasks=TASKS)
    real = batch.attention_mask_BL.bool()
    for number, task in enumerate(tasks):
        batch = replace(batch, task_ids_B=torch.full_like(batch.task_ids_B, number))
        with torch.no_grad():
            states = model.encode(model._texts(batch), None).states_BLM
            auto = AutoModelForCausalLM if generates else AutoModel
            plain = auto.from_pretrained(tmp_path / "merged" / task.name).eval()
            inputs = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL}
            found = plain(**inputs)[0]
            expected = model.encoder.get_output_embeddings()(states) if generates else states
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
        again = AutoTokenizer.from_pretrained(tmp_path / "merged" / task.name)
        assert again("a b")["input_ids"] == tokenizer("a b")["input_ids"]
        assert not {name for name in plain.state_dict() if "lora_" in name or "inner" in name}


def test_what_no_plain_model_can_say_is_not_merged(tmp_path):
    exported = SimpleNamespace(tasks=TASKS, config={"encoder": HF_CONFIGS["bert"].to_dict()})
    for options, more, message in (
        (dict(PAPER, route_by="both"), {}, "differ from token to token.*without --merged"),
        (dict(form="beside"), {}, "no LoRA experts.*without --merged"),
        (PAPER, dict(private_width=4), "private_width is not 0"),
        (PAPER, dict(own_layers=1), "own_layers is not 0"),
        (PAPER, dict(family="t5"), "the encoder of a t5 alone"),
    ):
        exported.model = tiny_model(moe_config(**options), **more)
        exported.model_config = ModelConfig(moe=moe_config(**options))
        with pytest.raises(ValueError, match=message):
            export_merged(tmp_path / "new", exported)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export_merged(tmp_path / "full", exported)


def test_a_run_of_lora_experts_starts_from_an_export_without_experts(tmp_path):
    recipe = tiny_recipe()
    recipe.model = ModelConfig(
        encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe_config(num_experts=0)
    )
    model = tiny_model(recipe.model.moe, seed=3).eval()
    export_model(
        tmp_path / "export", state_dict=model.state_dict(), recipe=recipe, tasks=TASKS,
        backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v")),
    )  # fmt: skip
    moe = moe_config(**PAPER, output_init=0.0)
    fresh = tiny_model(moe, seed=5).eval()
    start_from_export(ModelConfig(start_from=str(tmp_path / "export"), moe=moe), fresh)
    expected = logits_of(model, random_batch())
    for name, logits in logits_of(fresh, random_batch()).items():
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-6)


def test_the_variants_of_a_family_have_experts_too():
    for family in VARIANTS:
        model = tiny_model(moe_config(**PAPER), family=family)
        assert len(adapters_of(model)) == 3 * MAPS.get(family.split()[0], 6)
