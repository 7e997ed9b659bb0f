"""A run that starts from an export: what it gets, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import ModelConfig
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.tasks.task import Task
from comoe.train.start_from import start_from_export
from tests.helpers_export import HF_CONFIGS, tiny_recipe, tiny_tokenizer
from tests.helpers_model import MOOD, SIGNS, TASKS, TOPIC, moe_config, random_batch, tiny_model

DENSE = dict(num_experts=1, top_k=1, balance="none", expert_width=12)
EXPERTS = dict(num_experts=6, top_k=2, expert_width=4, shared_width=4)


@pytest.fixture
def made(tmp_path):
    """(moe, **options of the model) -> a model and the folder of its export."""

    def make(moe, **options):
        recipe = tiny_recipe()
        recipe.model = ModelConfig(
            encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe, **options
        )
        model = tiny_model(moe, seed=3, **options).eval()
        export_model(
            tmp_path / "export",
            state_dict=model.state_dict(),
            recipe=recipe,
            tasks=TASKS,
            backbone=Backbone(
                HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "vocabulary")
            ),
        )
        return model, tmp_path / "export"

    return make


def started(folder, moe, *, tasks=TASKS, **options):
    """A model of another seed with the weights of an export, and what is printed."""
    model = tiny_model(moe, tasks=tasks, seed=5, **options).eval()
    return model, start_from_export(ModelConfig(start_from=str(folder), moe=moe), model)


@pytest.mark.parametrize("route_by", ["token", "both"])
def test_a_model_with_experts_predicts_what_the_dense_one_does(made, route_by):
    dense, folder = made(moe_config(**DENSE), private_width=4)
    model, lines = started(folder, moe_config(**EXPERTS, route_by=route_by), private_width=4)
    assert "tasks known there: mood, topic, heat, words, signs" in lines[0]
    batch = random_batch()
    for name, logits in dense(batch).logits.items():
        torch.testing.assert_close(model(batch).logits[name], logits, atol=1e-5, rtol=1e-5)
    assert load_exported(folder).model_config.start_from is None


def test_heads_go_by_the_name_of_their_task(made):
    dense, folder = made(moe_config(**DENSE), private_width=4)
    other = replace(SIGNS, labels=("joy", "anger"))
    tasks = (TOPIC, other, Task("new", "regression", (), "pearson"), MOOD)
    model, lines = started(folder, moe_config(**EXPERTS), tasks=tasks, private_width=4)
    fresh = tiny_model(moe_config(**EXPERTS), tasks=tasks, seed=5, private_width=4)
    assert lines[0].endswith("tasks known there: topic, mood")
    batch = random_batch()
    for name in ("topic", "mood"):
        expected = dense(batch).logits[name]
        torch.testing.assert_close(model(batch).logits[name], expected, atol=1e-5, rtol=1e-5)
    for number in (1, 2):
        now, then = (m.heads[number].state_dict() for m in (model, fresh))
        assert all(torch.equal(now[name], then[name]) for name in now)


@pytest.mark.parametrize("options", [{}, {"route_by": "both"}])
def test_the_same_experts_are_taken_as_they_are(made, options):
    _, folder = made(moe_config(**options))
    model, _ = started(folder, moe_config(**options))
    state = load_exported(folder).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_experts_beside_an_encoder_that_had_none_start_anew(made):
    plain, folder = made(moe_config(num_experts=0))
    model, _ = started(folder, moe_config(output_init=0.0))
    batch = random_batch()
    for name, logits in plain(batch).logits.items():
        torch.testing.assert_close(model(batch).logits[name], logits)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [(dict(), dict(layers=[1]), "2 layers have experts there and none here"),
     (dict(num_experts=4), dict(num_experts=2), "layer 0 has other experts there (4, top_k 2)"),
     (dict(), dict(gate_scale=1.0), "or another gate"),
     (DENSE, dict(num_experts=4, expert_width=8), "the dense block of model.start_from has 12")],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused(made, there, here, message):
    _, folder = made(moe_config(**there))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        started(folder, moe_config(**here))
    assert str(error.value).startswith(f"model.start_from ({folder}): ")


def test_another_encoder_or_no_export_is_refused(made, tmp_path):
    _, folder = made(moe_config(num_experts=0))
    with pytest.raises(ValueError, match="both runs need the same model.encoder"):
        started(folder, moe_config(**EXPERTS), family="distilbert")
    with pytest.raises(ValueError, match=r"model.start_from \(.*\): .* is not an export"):
        started(tmp_path, moe_config(**EXPERTS))
