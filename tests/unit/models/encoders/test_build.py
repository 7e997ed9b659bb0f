"""Loading encoders: what is read, and what is refused in which words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
)

from comoe.config.recipe import ModelConfig
from comoe.models.encoders.build import build_encoder, build_encoder_from_config
from comoe.models.encoders.families import attach_blocks, layers_of
from comoe.models.moe.block import ContextHolder
from tests.helpers_model import HF_CONFIGS, SEQ2SEQ, VARIANTS, moe_config, tiny_model


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
    assert drops == {0.25}
    (block,) = attach_blocks(encoder, moe_config(layers=[1]), ContextHolder())
    # Layers that drop out the sum of feed-forward and block would do it twice.
    assert block.dropout.p == (0.0 if family in SEQ2SEQ else 0.25)


def test_dropout_sets_every_dropout_of_encoder_blocks_and_heads(saved_bert):
    encoder = build_encoder(ModelConfig(encoder=str(saved_bert), dropout=0.25))
    drops = [module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert drops and set(drops) == {0.25} and encoder.config.attention_probs_dropout_prob == 0.25
    model = tiny_model(dropout=0.0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "some/folder/inside"])
def test_a_missing_folder_is_refused_with_what_to_do(name):
    with pytest.raises(
        ValueError, match="model.encoder .* is not a folder with an encoder.*smoke:encoder"
    ):
        build_encoder(ModelConfig(encoder=name))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        build_encoder(ModelConfig(encoder=str(tmp_path)))


def test_an_unreachable_hub_name_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match="model.encoder .no-such-owner/no-such-encoder. could not be loaded.*kit:minilm",
    ):
        build_encoder(ModelConfig(encoder="no-such-owner/no-such-encoder"))


def broken(folder, saved, *, config=None, weights=None):
    folder.joinpath("config.json").write_text(config or saved.joinpath("config.json").read_text())
    folder.joinpath("model.safetensors").write_bytes(
        weights or saved.joinpath("model.safetensors").read_bytes()
    )
    return ModelConfig(encoder=str(folder))


def test_broken_encoder_files_are_refused(tmp_path, saved_bert):
    whole = saved_bert.joinpath("model.safetensors").read_bytes()
    for damage in (
        {"config": "{"},
        {"config": "{}"},
        {"weights": whole[:500]},
        {"weights": b"<html>404</html>"},
    ):
        with pytest.raises(ValueError, match="model.encoder .* could not be loaded"):
            build_encoder(broken(tmp_path, saved_bert, **damage))


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path, saved_bert):
    longer = json.loads(saved_bert.joinpath("config.json").read_text()) | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"has no weights for encoder.layer.3.*\(16 in all\)"):
        build_encoder(broken(tmp_path, saved_bert, config=json.dumps(longer)))


def test_an_encoder_of_another_family_is_refused_with_the_families(tmp_path, saved_bert):
    with pytest.raises(ValueError, match="model_type is 'gpt2'.*one of: bert, roberta"):
        build_encoder(broken(tmp_path, saved_bert, config='{"model_type": "gpt2"}'))
