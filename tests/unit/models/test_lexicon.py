"""Numbers of words beside their embeddings, and as what the last states learn to predict."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.config.load import recipe_from_dict
from comoe.config.recipe import ContrastiveConfig, LexiconConfig, LossConfig, ModelConfig
from comoe.config.validate import validate
from comoe.losses.objective import Objective, count_units
from comoe.models.build import build_model
from comoe.models.lexicon import add_lexicon
from comoe.tasks.lexicon import Lexicon
from comoe.types import LEXICON
from tests.helpers_model import (
    HALVES,
    HF_CONFIGS,
    MOOD,
    TASKS,
    VARIANTS,
    cut,
    moe_config,
    random_batch,
    scaled,
)

WORDS = Lexicon({"good": [2.0, 0.5], "bad": [-1.0, 0.0], "fine": [0.5, -2.0]})
FAMILIES = HF_CONFIGS | VARIANTS | HALVES


def model_of(family="bert", *, lexicon=WORDS, tasks=TASKS, plain=False, input=True, **options):
    torch.manual_seed(0)
    config = ModelConfig(
        dropout=0.0, projection_width=8, lexicon=LexiconConfig(path="own.csv", input=input),
        **{"moe": moe_config()} | options,
    )  # fmt: skip
    if lexicon is None:
        config.lexicon.path = None
    encoder = FAMILIES[family].to_dict()
    return build_model(config, tasks, encoder_config=encoder, plain=plain, lexicon=lexicon)


def told(batch, seed=1):
    """The batch with entries of ``WORDS`` at random real tokens, some of two pieces."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.input_ids_BL.shape
    entries = torch.randint(0, 4, shape, generator=generator) * batch.attention_mask_BL
    starts = (entries > 0) & torch.cat(
        [torch.ones(shape[0], 1, dtype=torch.bool), entries[:, 1:] != entries[:, :-1]], dim=1
    )
    numbers = torch.from_numpy(WORDS.features)[entries]
    return replace(batch, lexicon_BLK=numbers, lexicon_starts_BL=starts)


def told_weight(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = model.lexicon.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_nothing_changes_and_then_it_is_as_if_each_token_had_its_own_embedding(family):
    batch, bare, model = told(random_batch()), model_of(family, lexicon=None), model_of(family)
    other = dict(model.state_dict())
    weight = other.pop("lexicon.weight")
    assert not weight.any() and weight.shape[1] == WORDS.width + 1
    assert all(torch.equal(other[name], value) for name, value in bare.state_dict().items())
    for name, logits in bare.eval()(batch).logits.items():
        assert torch.equal(model.eval()(batch).logits[name], logits)
    # The reference in float64: a table of words with a row of its own for each token of the batch,
    # to which the numbers were added beforehand.
    told_weight(model).double()
    bare.double()
    found = model(batch).logits
    table = bare.encoder.get_input_embeddings()
    own = table.weight.detach()[batch.input_ids_BL]
    scale = table(batch.input_ids_BL).detach() / own  # some families scale the words they look up
    scale = torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))
    added = batch.lexicon_BLK.double() @ model.lexicon.weight.detach().T
    handle = table.register_forward_hook(lambda *_: own * scale + added)
    try:
        expected = bare(batch).logits
    finally:
        handle.remove()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-9, rtol=1e-9)
    assert any((found[name] - bare(batch).logits[name]).abs().max() > 1e-4 for name in found)


@pytest.mark.parametrize("options", [{"moe": moe_config(route_by="both")}, {"own_layers": 1}])
def test_rows_of_a_post_that_are_read_once_have_its_numbers(options):
    model = told_weight(model_of(**options)).eval()
    batch = told(random_batch(rows=3))
    # Each text for two tasks.
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    many = replace(batch.take(rows), task_ids_B=torch.arange(6) % len(TASKS))
    numbered = replace(many, text_numbers_B=rows)
    for name, logits in model(many).logits.items():
        torch.testing.assert_close(model(numbered).logits[name], logits)
    bare = replace(numbered, lexicon_BLK=torch.zeros_like(numbered.lexicon_BLK))
    assert (model(bare).logits["mood"] - model(numbered).logits["mood"]).abs().max() > 1e-4


def test_the_linear_map_alone_learns_too_below_a_frozen_encoder():
    model = model_of(train_layers="none", tasks=(MOOD,), moe=moe_config(num_experts=0))
    model(told(random_batch(tasks=(MOOD,)))).logits["mood"].square().sum().backward()
    assert model.lexicon.weight.grad.abs().max() > 0
    assert model.encoder.get_input_embeddings().weight.grad is None


def objective_of(weight, **options):
    model = model_of(**options)
    loss = LossConfig(lexicon_weight=weight, contrastive=ContrastiveConfig(weight=0.0))
    return Objective(model, model.tasks, loss, moe_config())


@pytest.mark.parametrize("input", [True, False])
def test_the_regression_is_the_mean_squared_error_of_words_at_their_first_pieces(input):
    objective, batch = objective_of(0.7, input=input).double(), scaled(told(random_batch()))
    assert (objective.model.lexicon is None) == (not input)
    step, plain = objective(batch), objective_of(0.0, input=input).double()
    plain.model.load_state_dict(objective.model.state_dict())
    states = step.output.sharing.shared_BLM.detach().numpy()
    head = objective.terms["lexicon"].loss.head
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    errors = []
    for row, column in batch.lexicon_starts_BL.nonzero().tolist():
        predicted = [float(weight[k] @ states[row, column] + bias[k]) for k in range(2)]
        numbers = batch.lexicon_BLK[row, column, :2].tolist()
        errors += [(p - n) ** 2 for p, n in zip(predicted, numbers, strict=True)]
    assert len(errors) == 2 * int(batch.lexicon_starts_BL.sum()) > 8
    np.testing.assert_allclose(float(step.terms["lexicon"]), np.mean(errors), rtol=1e-6)
    total = float(plain(batch).loss.detach()) + 0.7 * np.mean(errors)
    np.testing.assert_allclose(float(step.loss.detach()), total, rtol=1e-6)
    assert "lexicon" not in plain(batch).terms and not plain.losses
    step.loss.backward()
    assert objective.model.encoder.get_input_embeddings().weight.grad.abs().max() > 0
    # Not a part of what predicts.
    assert not any("head.weight" in name for name in objective.model.state_dict())


def test_the_regression_counts_alike_however_the_batch_is_cut():
    objective, batch = objective_of(1.0), told(random_batch())
    batch.lexicon_starts_BL[3] = False  # a micro-batch without such a word
    parts = [objective(part) for part in cut(batch, [[0, 1, 2], [3], [4, 5]])]
    whole = objective(scaled(batch))
    torch.testing.assert_close(sum(part.loss for part in parts) / 3, whole.loss)
    assert parts[1].terms["lexicon"] == 0 and whole.terms["lexicon"] > 0
    assert count_units(batch, TASKS)[LEXICON] == batch.lexicon_starts_BL.sum()
    none = scaled(replace(batch, lexicon_starts_BL=torch.zeros_like(batch.lexicon_starts_BL)))
    step = objective(none)
    step.loss.backward()
    head = objective.terms["lexicon"].loss.head
    assert step.terms["lexicon"] == 0 and not head.weight.grad.any()
    assert count_units(random_batch(), TASKS)[LEXICON] == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"loss": {"lexicon_weight": 0.1}}, "loss.lexicon_weight is 0.1; give model.lexicon.path"),
     ({"model": {"lexicon": {"path": "a.csv", "input": False}}},
      "model.lexicon.input is false, so nothing reads a.csv"),
     ({"model": {"lexicon": {"path": "a.csv"}}, "tasks": {"mood": {"path": "x", "kind": "text", "prompt": "{text}"}}},
      "model.lexicon.path is a.csv, but a decoder predicts mood")],
)  # fmt: skip
def test_what_goes_against_the_rules_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        validate(recipe_from_dict({"tasks": {"mood": {"path": "x"}}} | changes))


def test_an_encoder_that_reads_images_among_the_words_is_refused():
    class InEncoder:
        in_encoder = True

    model = model_of(lexicon=None)
    del model.fusion
    model.fusion = InEncoder()
    with pytest.raises(ValueError, match=r"model.lexicon.input .* choose fusion concat"):
        add_lexicon(model, WORDS, as_input=True)
    add_lexicon(model, WORDS, as_input=False)
    assert (model.word_numbers, model.lexicon) == (2, None)
