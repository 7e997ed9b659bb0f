"""Encoders of each family: loading, where blocks attach, and that nothing changes at step 0."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from comoe.models.encoder import FAMILIES, attach_blocks, build_encoder, chosen_layers, expert_width, longest_input
from comoe.models.moe import ContextHolder, RoutingContext
from comoe.schema import ModelConfig
from tests.helpers_model import HF_CONFIGS, WIDTH, moe_config, random_batch, tiny_encoder, tiny_model


def run(encoder, batch):
    return encoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state


def attached(family, config, *, seed=0):
    encoder, holder, batch = tiny_encoder(family, seed), ContextHolder(), random_batch()
    blocks = attach_blocks(encoder, config, holder)
    rows, columns = batch.attention_mask_BL.nonzero(as_tuple=True)
    holder.context = RoutingContext(rows * batch.attention_mask_BL.shape[1] + columns, rows)
    return encoder.eval(), blocks, batch


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    AutoModel.from_config(HF_CONFIGS["bert"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_step_zero_equals_the_bare_encoder(family):
    encoder, blocks, batch = attached(family, moe_config(output_init=0.0, shared_width=8))
    expected = run(tiny_encoder(family).eval(), batch)
    assert len(blocks) == 3
    torch.testing.assert_close(run(encoder, batch), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_trained_experts_change_the_answer_and_every_parameter_gets_a_gradient(family):
    encoder, _, batch = attached(family, moe_config())
    hidden = run(encoder, batch)
    assert (hidden - run(tiny_encoder(family).eval(), batch)).abs().max() > 1e-4
    hidden.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_block_sits_beside_the_feed_forward_under_the_residual_norm(family):
    encoder, (block,), batch = attached(family, moe_config(layers=[2]))
    seen = {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], update=output))
    hidden = run(encoder, batch)
    if family == "bert":
        layer = encoder.encoder.layer[2]
        feed_forward, norm = layer.output.inner.dense(layer.intermediate(seen["x"])), layer.output.inner.LayerNorm
    else:
        layer = encoder.transformer.layer[2]
        feed_forward, norm = layer.ffn.inner(seen["x"]), layer.output_layer_norm
    torch.testing.assert_close(hidden, norm(seen["x"] + feed_forward + seen["update"]))


def test_a_saved_encoder_loads_without_pooler_and_with_its_weights(saved_bert):
    encoder = build_encoder(ModelConfig(encoder=str(saved_bert)))
    saved = load_file(saved_bert / "model.safetensors")
    kept = {name: value for name, value in saved.items() if not name.startswith("pooler.")}
    assert encoder.pooler is None and len(kept) == len(saved) - 2
    torch.testing.assert_close(dict(encoder.named_parameters()), kept, atol=0, rtol=0)


def test_dropout_sets_every_dropout_of_encoder_blocks_and_heads(saved_bert):
    encoder = build_encoder(ModelConfig(encoder=str(saved_bert), dropout=0.25))
    drops = [module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert drops and set(drops) == {0.25} and encoder.config.attention_probs_dropout_prob == 0.25
    model = tiny_model(dropout=0.0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("alternate", 6, [1, 3, 5]),
        ("alternate", 3, [0, 2]),
        ("last_half", 6, [3, 4, 5]),
        ([2, 0], 3, [0, 2]),
    ],
)
def test_layers_are_chosen_by_word_or_number(layers, count, expected):
    assert chosen_layers(layers, count) == expected


@pytest.mark.parametrize("layers", [[3], [-1], [1, 1], []])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="model.moe.layers .* from 0 to 2"):
        chosen_layers(layers, 3)


def test_a_misspelt_choice_of_layers_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean alternate"):
        chosen_layers("alternat", 3)


def test_the_automatic_expert_width_is_a_quarter_and_at_least_sixteen():
    assert [expert_width(moe_config(), width) for width in (32, 384, 768)] == [16, 96, 192]
    assert expert_width(moe_config(expert_width=40), 768) == 40
    with pytest.raises(ValueError, match="model.moe.expert_width"):
        expert_width(moe_config(expert_width="wide"), 768)


def test_no_experts_leaves_the_encoder_as_it_is():
    encoder = tiny_encoder("bert")
    assert attach_blocks(encoder, moe_config(num_experts=0), ContextHolder()) == []
    assert not [name for name, _ in encoder.named_modules() if "block" in name]


def test_the_longest_input_leaves_out_positions_that_no_token_uses():
    assert longest_input(HF_CONFIGS["bert"]) == 512
    assert longest_input(HF_CONFIGS["roberta"]) == 510


def test_every_family_builds_with_and_without_its_pooler():
    assert all(tiny_encoder(family).config.hidden_size == WIDTH for family in HF_CONFIGS)
    assert set(HF_CONFIGS) <= set(FAMILIES)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "some/folder/inside"])
def test_a_missing_folder_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match="model.encoder .* is not a folder with an encoder.*smoke:encoder"):
        build_encoder(ModelConfig(encoder=name))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        build_encoder(ModelConfig(encoder=str(tmp_path)))


def test_an_unreachable_hub_name_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="model.encoder .no-such-owner/no-such-encoder. could not be loaded.*kit:minilm"
    ):
        build_encoder(ModelConfig(encoder="no-such-owner/no-such-encoder"))


def broken(folder, saved, *, config=None, weights=None):
    folder.joinpath("config.json").write_text(config or saved.joinpath("config.json").read_text())
    folder.joinpath("model.safetensors").write_bytes(weights or saved.joinpath("model.safetensors").read_bytes())
    return ModelConfig(encoder=str(folder))


def test_broken_encoder_files_are_refused(tmp_path, saved_bert):
    whole = saved_bert.joinpath("model.safetensors").read_bytes()
    for damage in ({"config": "{"}, {"config": "{}"}, {"weights": whole[:500]}, {"weights": b"<html>404</html>"}):
        with pytest.raises(ValueError, match="model.encoder .* could not be loaded"):
            build_encoder(broken(tmp_path, saved_bert, **damage))


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path, saved_bert):
    longer = json.loads(saved_bert.joinpath("config.json").read_text()) | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"has no weights for encoder.layer.3.*\(16 in all\)"):
        build_encoder(broken(tmp_path, saved_bert, config=json.dumps(longer)))


def test_an_encoder_of_another_family_is_refused_with_the_families(tmp_path, saved_bert):
    with pytest.raises(ValueError, match="model_type is 'gpt2'.*one of: bert, roberta"):
        build_encoder(broken(tmp_path, saved_bert, config='{"model_type": "gpt2"}'))
