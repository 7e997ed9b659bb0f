"""Models of two sides, CLIP and SigLIP: their text half as the encoder, their vision half as the tower."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, CLIPConfig, SiglipConfig

from comoe.config.recipe import ImageTextConfig, ModelConfig, VisionConfig
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder, build_encoder_from_config
from comoe.models.encoders.families import layers_of
from comoe.models.vision.tower import image_side
from tests.helpers_model import HALVES, TASKS, TEXT_HALF, moe_config, random_batch, take, tiny_model
from tests.helpers_vision import SEEING, seeing_batch, seeing_model, with_pictures

WHOLE = {
    "clip": CLIPConfig(text_config=TEXT_HALF, vision_config=SEEING, projection_dim=8),
    "siglip": SiglipConfig(text_config=TEXT_HALF | {"projection_size": 12}, vision_config=SEEING),
}
BOTH = ImageTextConfig()


@pytest.fixture(params=WHOLE)
def saved(request, tmp_path):
    torch.manual_seed(3)
    whole = AutoModel.from_config(WHOLE[request.param]).eval()
    whole.save_pretrained(tmp_path)
    return whole, str(tmp_path)


def both_halves(folder, **vision):
    return ModelConfig(
        encoder=folder,
        dropout=0.0,
        projection_width=8,
        moe=moe_config(output_init=0.0),
        vision=VisionConfig(tower=folder, **vision),
    )


def test_both_halves_of_one_model_are_encoder_and_tower_with_the_librarys_states(saved):
    whole, folder = saved
    config = both_halves(folder)
    model = build_model(config, TASKS).double().eval()
    whole.double()
    batch = seeing_batch(pictures=range(6))
    batch = replace(batch, pixels_I3HW=batch.pixels_I3HW.double())
    states = model.encode(model._texts(batch), None).states_BLM
    expected = whole.text_model(batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
    torch.testing.assert_close(states, expected.last_hidden_state, atol=1e-12, rtol=0)
    tokens = model.tower(batch.pixels_I3HW)
    seen = whole.vision_model(batch.pixels_I3HW).last_hidden_state
    torch.testing.assert_close(tokens, seen, atol=1e-12, rtol=0)
    assert image_side(config) == folder
    assert image_side(replace(config, vision=VisionConfig())) is None
    shape = build_model(config, TASKS, shape=True)
    assert {n: w.shape for n, w in shape.named_parameters()} == {
        n: w.shape for n, w in model.named_parameters()
    }


def test_an_export_builds_both_halves_again_from_their_configurations(saved):
    _, folder = saved
    config = both_halves(folder, fusion="gated")
    trained = build_model(config, TASKS, image_text=BOTH).eval()
    rebuilt = build_model(
        config,
        TASKS,
        encoder_config=trained.encoder.config.to_dict(),
        tower_config=trained.tower.inner.config.to_dict(),
    ).eval()
    weights = trained.state_dict()
    rebuilt.load_state_dict({n: w for n, w in weights.items() if not n.startswith("image_text.")})
    found, expected = rebuilt(seeing_batch()).logits, trained(seeing_batch()).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", HALVES)
def test_experts_join_every_layer_and_every_parameter_learns(family):
    model = seeing_model("attention", family=family, train_tower=True, image_text=BOTH)
    output = model(seeing_batch())
    assert len(output.routings) == 3
    sides = output.image_text
    parts = [*output.logits.values(), *output.embeddings.values(), sides.match_logits_I2]
    parts += [sides.text_embeddings_IP.pow(3), sides.image_embeddings_IP.pow(3)]
    sum(part.square().sum() for part in parts).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    start, bare = (
        tiny_model(moe_config(output_init=0.0), family=family),
        tiny_model(moe_config(num_experts=0), family=family),
    )
    bare.load_state_dict(start.state_dict(), strict=False)
    batch = random_batch()
    texts = start._texts(batch)
    states = [model.eval().encode(texts, None).states_BLM for model in (start, bare)]
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)
    lora = tiny_model(moe_config(form="lora", expert_width=4), family=family)
    assert all(weight.numel() for weight in lora.parameters()) and lora(batch).routings


@pytest.mark.parametrize("family", HALVES)
def test_a_prediction_depends_neither_on_other_posts_nor_on_padding(family):
    model = seeing_model("concat", family=family).eval()
    batch = seeing_batch(pictures=(0, 2))
    together = model(batch).logits["mood"]
    for row in range(4):
        length = int(batch.attention_mask_BL[row].sum())
        one = take(batch, [row])
        ids, mask = one.input_ids_BL[:, :length], one.attention_mask_BL[:, :length]
        one = replace(one, input_ids_BL=ids, attention_mask_BL=mask)
        alone = model(with_pictures(one, [0] if row in (0, 2) else [])).logits["mood"]
        torch.testing.assert_close(alone, together[[row]], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", HALVES)
def test_dropout_and_kept_layers_reach_a_text_half(family, saved):
    encoder = build_encoder_from_config(HALVES[family].to_dict(), dropout=0.25)
    assert {layer.self_attn.dropout for layer in layers_of(encoder)} == {0.25}
    short = build_encoder(ModelConfig(encoder=saved[1], keep_layers="top-2"))
    kept = saved[0].text_model.encoder.layers[-1].mlp.fc1.weight
    assert len(layers_of(short)) == 2 == short.config.num_hidden_layers
    assert torch.equal(layers_of(short)[-1].mlp.fc1.weight, kept)


@pytest.mark.parametrize("family", HALVES)
def test_image_tokens_among_the_words_are_refused(family):
    with pytest.raises(ValueError, match="reads word ids alone; choose concat, attention or gated"):
        seeing_model("tokens", family=family)
