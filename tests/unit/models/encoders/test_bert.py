"""Our own BERT: the bits of transformers', for every family that it stands for; other encoders are left alone."""

from __future__ import annotations

import pytest
import torch
from helpers_model import HF_CONFIGS, TASKS, VARIANTS, moe_config, random_batch, tiny_encoder
from torch import nn

from comoe.config.recipe import ModelConfig
from comoe.models.build import build_model
from comoe.models.encoders.bert import ACTIVATIONS, FROM_PADDING, BertEncoder, bert_config
from comoe.models.encoders.build import build_encoder_from_config
from comoe.types import Batch

SHAPES = {
    **{family: HF_CONFIGS[family].to_dict() for family in FROM_PADDING},
    "electra of one width": VARIANTS["electra of one width"].to_dict(),
    "roberta with segments": HF_CONFIGS["roberta"].to_dict() | {"type_vocab_size": 2},
    **{
        f"bert with {name}": HF_CONFIGS["bert"].to_dict() | {"hidden_act": name}
        for name in ACTIVATIONS
    },
}


def drawn(model: nn.Module) -> nn.Module:
    """The model with other norms and biases than those of the start, which hide what is lost."""
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return model.eval()


def texts(rows: int, length: int, *, pad: int, full: bool = False) -> dict[str, torch.Tensor]:
    """Inputs of an encoder; unless they are full, rows but the first have padding."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < (length if full else lengths[:, None])).long().expand(rows, -1)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [True, False])
def test_states_have_the_bits_of_the_librarys(shape, full):
    config = SHAPES[shape]
    expected = drawn(build_encoder_from_config(config))
    own = build_encoder_from_config(config, plain=True)
    assert isinstance(own, BertEncoder) and not isinstance(expected, BertEncoder)
    own.eval().load_state_dict(expected.state_dict())
    for rows, length in ((1, 1), (1, 9), (3, 7), (8, 33)):
        inputs = texts(rows, length, pad=config["pad_token_id"], full=full)
        if config["type_vocab_size"] > 1:
            inputs["token_type_ids"] = inputs["input_ids"] % 2
        with torch.inference_mode():
            found = own(**inputs).last_hidden_state
            assert torch.equal(found, expected(**inputs).last_hidden_state)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = own(**inputs).last_hidden_state
                assert torch.equal(found, expected(**inputs).last_hidden_state)


def test_gradients_and_dropout_are_the_librarys_too():
    config = HF_CONFIGS["bert"].to_dict()
    expected = drawn(build_encoder_from_config(config, dropout=0.3))
    own = build_encoder_from_config(config, dropout=0.3, plain=True)
    own.load_state_dict(expected.state_dict())
    inputs, states = texts(4, 9, pad=0), []
    for model in (own, expected):
        torch.manual_seed(0)
        states.append(model.train()(**inputs).last_hidden_state)
        states[-1].square().sum().backward()
    assert torch.equal(*states)
    theirs = dict(expected.named_parameters())
    for name, weight in own.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad)


MODELS = {
    "experts beside": moe_config(),
    "experts beside, routed by task": moe_config(route_by="task", layers="top-2"),
    "by token and task": moe_config(route_by="both", task_prior=1.5, layers="top-1"),
    "LoRA": moe_config(form="lora"),
    "LoRA by task": moe_config(form="lora", route_by="task", gate_scope="layer"),
    "none": moe_config(num_experts=0),
}


@pytest.mark.parametrize("moe", MODELS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra"])
def test_experts_attach_to_it_as_to_the_librarys(moe, family):
    config, encoder = ModelConfig(projection_width=8, moe=MODELS[moe]), HF_CONFIGS[family].to_dict()
    expected = drawn(build_model(config, TASKS, encoder_config=encoder))
    own = build_model(config, TASKS, encoder_config=encoder, plain=True).eval()
    own.load_state_dict(expected.state_dict())
    batch = random_batch(length=9)
    if config.moe.route_by != "token":  # two rows per text, which below the experts run once
        parts = [batch.take(torch.arange(3).repeat_interleave(2))] * 2
        ids, mask = (parts[0].input_ids_BL, parts[0].attention_mask_BL)
        numbers = torch.tensor([0, 0, 1, 1, 2, 2])
        tasks = torch.tensor([0, 1] * 3)
        batch = Batch(ids, mask, None, mask.bool(), tasks, numbers, text_numbers_B=numbers)
    with torch.inference_mode():
        found, wanted = own(batch), expected(batch)
        assert torch.equal(own.embed(batch), expected.embed(batch))
    for name in wanted.logits:
        assert torch.equal(found.logits[name], wanted.logits[name])
    for one, other in zip(found.routings, wanted.routings, strict=True):
        assert torch.equal(one.indices_Sk, other.indices_Sk)


@pytest.mark.parametrize("family", sorted(HF_CONFIGS.keys() - FROM_PADDING))
def test_another_family_is_the_librarys(family):
    assert bert_config(HF_CONFIGS[family].to_dict()) is None
    assert not isinstance(tiny_encoder(family), BertEncoder)


@pytest.mark.parametrize(
    "change",
    [
        {"is_decoder": True}, {"chunk_size_feed_forward": 2}, {"hidden_act": "silu"}, {"a_new_field": 1},
        {"position_embedding_type": "relative_key"}, {"num_attention_heads": 3}, {"num_attention_heads": 0},
        {"pad_token_id": None}, {"hidden_size": "16"}, {"num_hidden_layers": True}, {"hidden_size": None},
        {"hidden_act": ["gelu"]}, {"output_attentions": True}, {"vocab_size": 60.0}, {"model_type": []},
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_left_to_the_library(change):
    assert bert_config(HF_CONFIGS["bert"].to_dict()) is not None
    assert bert_config(HF_CONFIGS["bert"].to_dict() | change) is None


def test_a_field_that_is_missing_is_left_to_the_library():
    whole = HF_CONFIGS["roberta"].to_dict()
    for name in ("pad_token_id", "layer_norm_eps", "hidden_size"):
        assert bert_config({key: value for key, value in whole.items() if key != name}) is None
