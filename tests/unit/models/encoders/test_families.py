"""Families: where blocks attach, that nothing changes at step 0, and which layers train."""

from dataclasses import replace

import pytest
import torch

from comoe.models.encoders.attach import attach_experts
from comoe.models.encoders.build import build_encoder_from_config
from comoe.models.encoders.families import (
    FAMILIES,
    chosen_layers,
    expert_width,
    freeze_encoder,
    kept_layers,
    layers_of,
    longest_input,
    reads_segments,
)
from comoe.models.moe.block import ContextHolder, RoutingContext
from comoe.train.parallel.setup import parameter_group
from comoe.types import Batch
from tests.helpers_model import (
    HALVES,
    HF_CONFIGS,
    VARIANTS,
    WIDTH,
    moe_config,
    random_batch,
    tiny_encoder,
    tiny_model,
)

ALL_CONFIGS = HF_CONFIGS | VARIANTS


def run(encoder, batch):
    return encoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state


def attached(family, config, *, seed=0):
    encoder, holder, batch = tiny_encoder(family, seed), ContextHolder(), random_batch()
    blocks = attach_experts(encoder, config, holder)
    rows, columns = batch.attention_mask_BL.nonzero(as_tuple=True)
    holder.context = RoutingContext(rows * batch.attention_mask_BL.shape[1] + columns, rows)
    return encoder.eval(), blocks, batch


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_step_zero_equals_the_bare_encoder(family):
    encoder, blocks, batch = attached(family, moe_config(output_init=0.0, shared_width=8))
    expected = run(tiny_encoder(family).eval(), batch)
    assert len(blocks) == 3
    torch.testing.assert_close(run(encoder, batch), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_trained_experts_change_the_answer_and_every_parameter_gets_a_gradient(family):
    encoder, _, batch = attached(family, moe_config())
    hidden = run(encoder, batch)
    assert (hidden - run(tiny_encoder(family).eval(), batch)).abs().max() > 1e-4
    hidden.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert", "modernbert"])
def test_the_block_sits_beside_the_feed_forward_before_the_residual_sum(family):
    encoder, (block,), batch = attached(family, moe_config(layers=[2]))
    seen = {}
    block.register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0], update=output)
    )
    layer = layers_of(encoder)[2]
    layer.register_forward_pre_hook(lambda module, inputs: seen.update(before=inputs[0]))
    hidden = run(encoder, batch)
    if family in ("bert", "deberta-v2"):
        feed_forward, norm = (
            layer.output.inner.dense(layer.intermediate(seen["x"])),
            layer.output.inner.LayerNorm,
        )
        expected = norm(seen["x"] + feed_forward + seen["update"])
    elif family == "distilbert":
        expected = layer.output_layer_norm(seen["x"] + layer.ffn.inner(seen["x"]) + seen["update"])
    else:
        # Pre-norm: the residual is the state before the norm, and a last norm follows the layers.
        bare = tiny_encoder(family).eval()
        layers_of(bare)[2].register_forward_hook(
            lambda module, inputs, output: seen.update(plain=output)
        )
        run(bare, batch)
        expected = encoder.final_norm(seen["plain"] + seen["update"])
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [("all", 3, [0, 1, 2]), ("alternate", 6, [1, 3, 5]), ("alternate", 3, [0, 2]), ("last_half", 6, [3, 4, 5]),
     ("top-1", 3, [2]), ("top-3", 3, [0, 1, 2]), ([2, 0], 3, [0, 2])],
)  # fmt: skip
def test_layers_are_chosen_by_word_or_number(layers, count, expected):
    assert chosen_layers(layers, count) == expected


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="model.moe.layers .* from 0 to 2"):
        chosen_layers([0, 3], 3)
    with pytest.raises(ValueError, match="model.moe.layers .* top-3 at most"):
        chosen_layers("top-4", 3)
    with pytest.raises(ValueError, match="model.train_layers .*1 to 3"):
        freeze_encoder(tiny_encoder("bert"), 4)


@pytest.mark.parametrize(
    ("kept", "count", "expected"),
    [(3, 6, [1, 3, 5]), (4, 12, [2, 5, 8, 11]), (2, 3, [0, 2]), (1, 6, [5]), (6, 6, [0, 1, 2, 3, 4, 5]),
     ("top-2", 6, [4, 5]), ("bottom-2", 6, [0, 1])],
)  # fmt: skip
def test_kept_layers_are_evenly_spaced_or_at_one_end(kept, count, expected):
    assert kept_layers(kept, count) == expected


def test_the_automatic_expert_width_is_a_quarter_and_no_experts_leave_the_encoder_as_it_is():
    assert [expert_width(moe_config(), width) for width in (32, 384, 768)] == [16, 96, 192]
    assert expert_width(moe_config(expert_width=40), 768) == 40
    encoder = tiny_encoder("bert")
    assert attach_experts(encoder, moe_config(num_experts=0), ContextHolder()) == []
    assert not [name for name, _ in encoder.named_modules() if "block" in name]
    model = tiny_model(moe_config(num_experts=0))
    assert model(random_batch()).routings == () and model.moe_layers() == []


def test_every_family_builds_with_and_without_its_pooler():
    assert all(tiny_encoder(family).config.hidden_size == WIDTH for family in HF_CONFIGS)
    # One of both sides needs pictures: tests/unit/models/vision/test_fusion.py.
    assert {*HF_CONFIGS, *HALVES} == {
        name for name, family in FAMILIES.items() if not family.single_stream
    }


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert"]
)
def test_the_longest_input_is_the_longest_that_runs(family):
    config = HF_CONFIGS[family].to_dict() | {"max_position_embeddings": 12}
    encoder = build_encoder_from_config(config, dropout=0.0)
    longest = longest_input(encoder.config)
    for length, fits in ((longest, True), (longest + 1, False)):
        ids = torch.full((1, length), 7)
        try:
            run(encoder, Batch(ids, torch.ones_like(ids), None, ids > 0, ids[:, 0], ids[:, 0]))
        except (IndexError, RuntimeError):
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_relative_positions_are_numbered_from_the_first_token(family):
    assert longest_input(HF_CONFIGS[family]) == HF_CONFIGS[family].max_position_embeddings


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_segments_are_passed_only_to_encoders_that_tell_them_apart(family):
    reading = {"bert", "electra", "electra of one width", "deberta-v2 with positions"}
    assert reads_segments(ALL_CONFIGS[family]) is (family in reading)
    segments = torch.arange(9).ge(4).long().expand(6, 9)
    batch, model = random_batch(), tiny_model(family=family).eval()
    # A tokenizer numbers the second text of a pair 1 also where the encoder has one segment.
    one, other = (
        model(replace(batch, token_type_ids_BL=t)).logits["mood"] for t in (segments, None)
    )
    assert torch.equal(one, other) is (family not in reading)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_a_frozen_encoder_keeps_its_experts_and_heads_in_training(family):
    whole, none = tiny_model(family=family), tiny_model(family=family, train_layers="none")
    assert trained(whole) == {name for name, _ in whole.named_parameters()}
    new = {name for name in trained(whole) if parameter_group(name) != "encoder"}
    assert trained(none) == new and len(new) < len(trained(whole))


@pytest.mark.parametrize("family", ALL_CONFIGS)
@pytest.mark.parametrize("count", [1, 3])
def test_the_last_layers_train_and_what_lies_below_does_not(family, count):
    model, none = (tiny_model(family=family, train_layers=layers) for layers in (count, "none"))
    path = FAMILIES[family.split()[0]].layers
    last = tuple(f"encoder.{path}.{number}." for number in range(3 - count, 3))
    after = tuple(f"encoder.{name}." for name in FAMILIES[family.split()[0]].after_layers)
    expected = {name for name, _ in model.named_parameters() if name.startswith(last + after)}
    assert trained(model) == expected | trained(none) and expected - trained(none)
    model(random_batch()).logits["mood"].square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {n for n in reached ^ trained(model) if n.startswith("encoder.")} == set()
