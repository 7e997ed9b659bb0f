"""Vision towers: what loads, what is refused in which words, and what a frozen one keeps."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from comoe.config.recipe import ModelConfig, VisionConfig
from comoe.models.vision.tower import (
    Tower,
    build_tower,
    build_tower_from_config,
    expected_tokens,
    image_side,
)
from tests.helpers_model import HF_CONFIGS
from tests.helpers_vision import SIDE, TOWERS, VILT, save_tower, tower_config


def pictures(number=3):
    return torch.randn(number, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", TOWERS)
def test_a_saved_tower_loads_reads_pictures_and_is_rebuilt_from_its_config(tmp_path, kind):
    tower = build_tower(VisionConfig(tower=str(save_tower(tmp_path, kind))))
    assert tower.inner.config.model_type == tower_config(kind)["model_type"]
    tokens = tower(pictures())
    assert tokens.shape[0] == 3
    assert tokens.shape[2] == tower.width == 12
    assert tokens.dtype == torch.float32
    torch.manual_seed(3)
    whole = AutoModel.from_config(TOWERS[kind]).eval()
    expected = getattr(whole, "vision_model", whole)(pixel_values=pictures()).last_hidden_state
    expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-5)
    again = build_tower_from_config(
        json.loads(json.dumps(tower.inner.config.to_dict(), default=str))
    )
    again.load_state_dict(tower.state_dict(), strict=True)
    assert torch.equal(again(pictures()), tokens)


@pytest.mark.parametrize("kind", TOWERS)
def test_image_tokens_are_known_before_a_run_for_models_of_patches(kind):
    tower = build_tower_from_config(tower_config(kind))
    tokens, expected = tower(pictures(1)).shape[1], expected_tokens(tower.inner.config)
    # One class token, or none, or one more for distillation.
    assert (
        abs(expected - tokens) <= 1 if kind not in ("resnet", "convnext", "swin") else expected == 0
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_every_parameter_of_a_trained_tower_gets_a_gradient(kind):
    tower = build_tower_from_config(tower_config(kind), train=True)
    tower(pictures()).square().sum().backward()
    assert [
        name
        for name, weight in tower.named_parameters()
        if weight.requires_grad and weight.grad is None
    ] == []
    assert not any(
        weight.requires_grad for name, weight in tower.named_parameters() if "mask_token" in name
    )


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_frozen_tower_keeps_no_graph_and_draws_no_dropout_in_training(kind):
    config = tower_config(kind)
    config |= {"hidden_dropout_prob": 0.5} if "hidden_dropout_prob" in config else {}
    tower = build_tower_from_config(config).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    first, second = tower(pictures()), tower(pictures())
    assert torch.equal(first, second) and not first.requires_grad
    torch.testing.assert_close(tower.state_dict(), before, atol=0, rtol=0)


def test_one_picture_never_changes_what_a_trained_convolutional_tower_says_of_another():
    tower = build_tower_from_config(tower_config("resnet"), train=True).train()
    torch.testing.assert_close(tower(pictures())[:1], tower(pictures()[:1]), atol=1e-5, rtol=1e-5)


def test_a_trained_tower_draws_dropout_in_training_only():
    tower = build_tower_from_config(tower_config("vit") | {"hidden_dropout_prob": 0.5}, train=True)
    assert not torch.equal(tower.train()(pictures()), tower(pictures()))
    assert torch.equal(tower.eval()(pictures()), tower(pictures()))


def test_a_tower_saved_as_a_classifier_loads_its_weights(tmp_path):
    torch.manual_seed(3)
    whole = AutoModelForImageClassification.from_config(TOWERS["vit"])
    whole.save_pretrained(tmp_path)
    tower = build_tower(VisionConfig(tower=str(tmp_path)))
    torch.testing.assert_close(tower.inner.state_dict(), whole.vit.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_bfloat16_weights_take_float32_pixels_and_keep_float32_statistics(kind):
    tower = build_tower_from_config(tower_config(kind))
    expected = tower(pictures())
    for weight in tower.parameters():  # as the engine does: buffers stay as they are
        weight.data = weight.data.bfloat16()
    found = tower(pictures())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_what_is_no_whole_vision_model_is_refused(tmp_path):
    AutoModel.from_config(HF_CONFIGS["bert"]).save_pretrained(tmp_path / "bert")
    (tmp_path / "other").mkdir()
    save_tower(tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    for name, message in (
        (str(tmp_path / "bert"), " is a model of type bert, which reads no images"),
        (str(tmp_path / "other"), r" \(.*\) has no weights for"),
        ("./nowhere", r" \(.*\) is not a folder with a vision model"),
        ("~/no/tower", r" \(.*\) is not a folder with a vision model"),
    ):
        with pytest.raises(ValueError, match=f"model.vision.tower{message}"):
            build_tower(VisionConfig(tower=name))


def test_the_processor_is_that_of_the_tower_or_of_the_one_stream(tmp_path):
    VILT.save_pretrained(tmp_path / "vilt")
    HF_CONFIGS["bert"].save_pretrained(tmp_path / "bert")
    vilt, bert = str(tmp_path / "vilt"), str(tmp_path / "bert")
    assert image_side(ModelConfig(encoder=bert)) is None
    assert image_side(ModelConfig(encoder=bert, vision=VisionConfig(tower="t"))) == "t"
    assert image_side(ModelConfig(encoder=vilt)) == vilt
    with pytest.raises(ValueError, match="model.vision.tower .* has nothing to do"):
        image_side(ModelConfig(encoder=vilt, vision=VisionConfig(tower="t")))


def test_a_tower_is_a_module_whose_mode_follows_only_where_it_is_trained():
    inner = nn.Module()
    inner.config, inner.dropout = TOWERS["vit"], nn.Dropout(0.5)
    assert not Tower(inner).train().inner.training
    assert Tower(inner, train=True).train().inner.training
