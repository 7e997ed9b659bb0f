"""Loading encoders: what is read, and what is refused in which words."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
)

from comoe.config.recipe import ModelConfig
from comoe.models.encoders.attach import attach_experts
from comoe.models.encoders.build import (
    build_encoder,
    build_encoder_from_config,
    build_encoder_shape,
)
from comoe.models.encoders.families import FAMILIES, layers_of
from comoe.models.moe.block import ContextHolder
from tests.helpers_model import CAUSAL, HF_CONFIGS, SEQ2SEQ, VARIANTS, WIDTH, moe_config, tiny_model


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    AutoModel.from_config(HF_CONFIGS["bert"]).save_pretrained(folder)
    return folder


def test_a_saved_encoder_loads_without_pooler_and_with_its_weights(saved_bert):
    encoder = build_encoder(ModelConfig(encoder=str(saved_bert)))
    saved = load_file(saved_bert / "model.safetensors")
    kept = {name: value for name, value in saved.items() if not name.startswith("pooler.")}
    assert encoder.pooler is None and len(kept) == len(saved) - 2
    torch.testing.assert_close(dict(encoder.named_parameters()), kept, atol=0, rtol=0)


# What the hub holds: weights that were saved with the head they were pre-trained with.
PRETRAINED = dict.fromkeys(HF_CONFIGS | VARIANTS, AutoModelForMaskedLM) | {
    "electra": AutoModelForPreTraining
}
PRETRAINED |= dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM)
PRETRAINED |= dict.fromkeys(CAUSAL, AutoModelForCausalLM)


@pytest.mark.parametrize("family", PRETRAINED)
def test_an_encoder_saved_with_its_pre_training_head_loads_all_its_weights(tmp_path, family):
    torch.manual_seed(3)
    whole = PRETRAINED[family].from_config((HF_CONFIGS | VARIANTS)[family])
    whole.save_pretrained(tmp_path)
    encoder = build_encoder(ModelConfig(encoder=str(tmp_path)))
    base = whole.get_encoder() if family in SEQ2SEQ else whole.base_model
    torch.testing.assert_close(
        dict(encoder.named_parameters()), dict(base.named_parameters()), atol=0, rtol=0
    )
    assert not any(name.startswith("pooler") for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_dropout_reaches_every_family(family):
    encoder = build_encoder_from_config(HF_CONFIGS[family].to_dict(), dropout=0.25)
    drops = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
    drops |= {
        layer.dropout
        for layer in layers_of(encoder)
        if isinstance(getattr(layer, "dropout", None), float)
    }
    # Llama and its like drop out nothing but attention.
    without = {*CAUSAL} - {"gpt2"}
    assert drops == (set() if family in without else {0.25})
    if family in without:
        assert layers_of(encoder)[0].self_attn.attention_dropout == 0.25
    (block,) = attach_experts(encoder, moe_config(layers=[1]), ContextHolder())
    # Layers that drop out the sum of feed-forward and block would do it twice.
    assert block.dropout.p == (0.0 if family in {*SEQ2SEQ, *without} else 0.25)


def test_dropout_sets_every_dropout_of_encoder_blocks_and_heads(saved_bert):
    encoder = build_encoder(ModelConfig(encoder=str(saved_bert), dropout=0.25))
    assert encoder.config.attention_probs_dropout_prob == 0.25
    for model, dropout in ((encoder, 0.25), (tiny_model(dropout=0.0), 0.0)):
        drops = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert drops == {dropout}


BAD_NAMES = {
    "./nowhere": "model.encoder .* is not a folder with an encoder.*smoke:encoder",
    "/nowhere/at/all": "model.encoder .* is not a folder with an encoder.*smoke:encoder",
    "some/folder/inside": "model.encoder .* is not a folder with an encoder.*smoke:encoder",
    "tests": "config.json is missing",  # a folder that is there
    "no-such-owner/no-such-encoder": "model.encoder .*no-such-encoder. could not be loaded.*kit:minilm",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_without_an_encoder_is_refused_with_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(ValueError, match=BAD_NAMES[name]):
        build_encoder(ModelConfig(encoder=name))


BAD_FILES = [
    ("config.json", lambda whole: b"{", "model.encoder .* could not be loaded"),
    ("config.json", lambda whole: b"{}", "model.encoder .* could not be loaded"),
    ("model.safetensors", lambda whole: whole[:500], "model.encoder .* could not be loaded"),
    ("model.safetensors", lambda whole: b"<html>404</html>", "model.encoder .* could not be loaded"),
    ("config.json", lambda whole: json.dumps(json.loads(whole) | {"num_hidden_layers": 4}).encode(),
     r"has no weights for encoder.layer.3.*\(16 in all\)"),
    ("config.json", lambda whole: b'{"model_type": "opt"}', "model_type is 'opt'.*one of: bert, roberta"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), BAD_FILES)
def test_broken_or_foreign_encoder_files_are_refused(tmp_path, saved_bert, name, damage, message):
    for file in ("config.json", "model.safetensors"):
        content = (saved_bert / file).read_bytes()
        (tmp_path / file).write_bytes(damage(content) if file == name else content)
    with pytest.raises(ValueError, match=message):
        build_encoder(ModelConfig(encoder=str(tmp_path)))


def saved_in(folder, family):
    torch.manual_seed(3)
    AutoModel.from_config((HF_CONFIGS | VARIANTS)[family]).save_pretrained(folder)
    return str(folder)


ALIKE = [name for name in HF_CONFIGS | VARIANTS if FAMILIES[name.split()[0]].alike]
BY_OPTION = {"keep_layers": 2, "random_width": WIDTH}


@pytest.mark.parametrize("family", ALIKE)
def test_kept_layers_are_those_of_the_whole_encoder_and_an_export_builds_them_again(
    tmp_path, family
):
    name = saved_in(tmp_path, family)
    whole, some = (build_encoder(ModelConfig(encoder=name, keep_layers=n)) for n in (None, 2))
    states = [whole.state_dict(), some.state_dict()]
    path = FAMILIES[family.split()[0]].layers
    for key, value in states[1].items():
        if key.startswith(path):
            number, _, rest = key.removeprefix(f"{path}.").partition(".")
            key = f"{path}.{[0, 2][int(number)]}.{rest}"
        assert torch.equal(value, states[0][key]), key
    # All that is not a layer stays, such as MPNet's shared table of relative positions.
    assert {key for key in states[0] if not key.startswith(path)} <= set(states[1])
    again = build_encoder_from_config(some.config.to_dict())
    again.load_state_dict(states[1])
    shape = build_encoder_shape(ModelConfig(encoder=name, keep_layers=2))
    assert [p.shape for p in shape.parameters()] == [p.shape for p in some.parameters()]
    ids = torch.arange(7, 16)[None]
    with torch.no_grad():
        outputs = [model.eval()(ids).last_hidden_state for model in (some, again)]
    torch.testing.assert_close(*outputs, atol=0, rtol=0)


@pytest.mark.parametrize("family", ALIKE)
def test_a_random_width_keeps_depth_and_head_width_and_learns_everywhere(tmp_path, family):
    config = ModelConfig(encoder=saved_in(tmp_path, family), random_width=8, keep_layers="top-1")
    encoder, shape = build_encoder(config), build_encoder_shape(config)
    found = encoder.config
    assert (found.hidden_size, found.num_attention_heads, len(layers_of(encoder))) == (8, 1, 1)
    assert getattr(found, FAMILIES[found.model_type].feed_forward[0]) == 12
    assert [p.shape for p in shape.parameters()] == [p.shape for p in encoder.parameters()]
    encoder(torch.arange(7, 16)[None]).last_hidden_state.square().sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


@pytest.mark.parametrize("option", BY_OPTION)
@pytest.mark.parametrize("family", sorted({*HF_CONFIGS} - {*ALIKE}))
def test_layers_and_width_of_families_whose_layers_differ_cannot_be_chosen(
    tmp_path, family, option
):
    config = ModelConfig(encoder=saved_in(tmp_path, family), **{option: BY_OPTION[option]})
    for build in (build_encoder, build_encoder_shape):
        with pytest.raises(ValueError, match=f"model.{option} .*{family}"):
            build(config)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [("keep_layers", 4, "at most 3"), ("keep_layers", "top-4", "at most 3"), ("random_width", 12, "multiple of 8")],
)  # fmt: skip
def test_layers_and_widths_that_do_not_fit_are_refused(saved_bert, option, value, rule):
    with pytest.raises(ValueError, match=f"model.{option} .*{rule}"):
        build_encoder(ModelConfig(encoder=str(saved_bert), **{option: value}))
