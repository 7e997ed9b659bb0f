"""Mixtures of layers, layers of the tasks' own, attention between tasks: by hand, and where they stay out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from comoe.config.recipe import ContrastiveConfig, LossConfig, ModelConfig
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.inference.predictor import Predictor
from comoe.losses.objective import Objective
from comoe.models.encoder_io import TaskRows
from comoe.models.encoders.families import layers_of
from comoe.models.heads import TaskAttention, TaskHead
from comoe.models.pooling import FirstPooling, LayerMixture
from comoe.train.memory_plan import count_parameters
from comoe.train.parallel.setup import parameter_group
from comoe.train.start_from import start_from_export
from tests.helpers_export import assert_same, tiny_recipe, tiny_tokenizer
from tests.helpers_model import (
    HF_CONFIGS,
    MOOD,
    SIGNS,
    TASKS,
    TOPIC,
    WIDTH,
    WORDS,
    moe_config,
    random_batch,
    scaled,
    tiny_encoder,
    tiny_model,
)

OFF = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
ALL = {"own_layers": 2, "pooling": "layers", "task_attention_width": 4}
NONE = moe_config(num_experts=0)


def awake(model, seed=3):
    """Own layers that differ, an attention that adds something, mixtures of uneven shares."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".copies." in name and weight.ndim > 1:
            weight.data += 0.2 * torch.randn_like(weight)
        if name.endswith(("task_attention.output.weight", "mixture.weights")):
            torch.nn.init.normal_(weight)
    return model


def shared_texts(*, tasks=TASKS):
    """Three texts in seven rows for five tasks, not sorted, and without the numbers of the texts."""
    texts = [0, 0, 1, 2, 2, 2, 1]
    batch = random_batch(rows=3, tasks=tasks).take(torch.tensor(texts))
    tasks_B = torch.tensor([0, 1, 2, 0, 3, 4, 4])
    return replace(batch, task_ids_B=tasks_B, row_ids_B=torch.tensor(texts))


# A mixture of all layers.


def test_the_mixture_is_gamma_times_the_mean_by_softmax():
    torch.manual_seed(0)
    mixture, states = LayerMixture(3).double(), torch.randn(3, 2, 4, 5).double()
    torch.testing.assert_close(mixture(tuple(states)), states.mean(dim=0))
    torch.nn.init.normal_(mixture.weights)
    torch.nn.init.constant_(mixture.scale, 1.7)
    powers = [math.exp(weight) for weight in mixture.weights.tolist()]
    expected = sum(1.7 * p / sum(powers) * state for p, state in zip(powers, states, strict=True))
    torch.testing.assert_close(mixture(tuple(states)), expected)
    assert torch.autograd.gradcheck(lambda *given: mixture(given), tuple(states.requires_grad_()))
    mixed = mixture.bfloat16()(tuple(states.bfloat16()))
    assert mixed.dtype == torch.bfloat16


# Of t5, llama and modernbert a last norm follows the last layer, of gpt2 too; bert's embeddings
# have a norm of their own.
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2", "modernbert", "deberta-v2"])
def test_heads_read_the_states_of_embeddings_and_layers_as_the_library_gives_them(family):
    model = awake(tiny_model(NONE, family=family, pooling="layers")).double().eval()
    encoder, batch = tiny_encoder(family).double().eval(), random_batch()
    plain = {name: value for name, value in model.state_dict().items() if name[:8] == "encoder."}
    encoder.load_state_dict({name.removeprefix("encoder."): v for name, v in plain.items()})
    given = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL}
    states = encoder(**given, output_hidden_states=True).hidden_states
    output = model(batch)
    for head, task in zip(model.heads, TASKS, strict=True):
        shares = torch.softmax(head.mixture.weights, dim=0) * head.mixture.scale
        mixed = torch.einsum("k,kblm->blm", shares, torch.stack(states))
        if task.mode == "pooled":
            scores = (mixed @ head.pooling.query).masked_fill(batch.attention_mask_BL == 0, -1e9)
            # Pooled in float32.
            mixed = torch.einsum("bl,blm->bm", torch.softmax(scores, dim=1), mixed)
        expected = mixed @ head.output.weight.T + head.output.bias
        real = batch.attention_mask_BL.bool() if task.mode == "tokens" else slice(None)
        found = output.logits[task.name].double()
        torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=1e-5)


def test_layers_under_a_gate_that_reads_tasks_and_of_weighed_inputs_are_mixed_per_row():
    from tests.unit.models.test_fan_out import batches

    options = {
        "pooling": "layers",
        "tasks": (replace(MOOD, confidence_strategy="input"), *TASKS[1:]),
    }
    for more in ({}, options):
        model = awake(
            tiny_model(moe_config(route_by="both", layers=[2]), **({"pooling": "layers"} | more))
        )
        one, other = (model.eval()(batch) for batch in batches())
        torch.testing.assert_close(other.logits, one.logits, atol=1e-6, rtol=1e-5)


def test_the_first_token_alone_is_pooled_and_explains():
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    pooled, weights = FirstPooling(4)(hidden, mask)
    assert torch.equal(pooled, hidden[:, 0]) and weights.tolist() == [[1.0, 0, 0, 0, 0]] * 2
    assert TaskHead(MOOD, 4, dropout=0.0, pooling="first").mixture is None


# Layers of the tasks' own.


def test_rows_go_through_the_copy_of_their_task_and_come_back_in_order():
    rows = TaskRows.of(torch.tensor([2, 0, 2, 3, 0]), 4)
    # Task 1 has no row; the first one runs in vain.
    assert [part.tolist() for part in rows.of_task] == [[1, 4], [0], [0, 2], [3]]
    parts = [(10.0 * n + part, None, part) for n, part in enumerate(rows.of_task)]
    found, nothing, numbers = rows.together(parts)
    assert found.tolist() == [20, 1, 22, 33, 4] and nothing is None
    assert numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama", "modernbert", "deberta-v2"])
def test_copies_that_are_alike_are_the_layer_itself(family):
    batch = shared_texts()
    plain, own = tiny_model(NONE, family=family), tiny_model(NONE, family=family, own_layers=2)
    for name, logits in plain(batch).logits.items():
        torch.testing.assert_close(own(batch).logits[name], logits, atol=1e-6, rtol=0)


def test_each_row_has_the_layers_of_its_task_and_the_shared_ones_run_once_per_text():
    model, batch = awake(tiny_model(NONE, **ALL)).eval(), shared_texts()
    numbered = replace(batch, text_numbers_B=batch.row_ids_B)
    seen: list[list[int]] = [[] for _ in layers_of(model.encoder)]
    for layer, rows in zip(layers_of(model.encoder), seen, strict=True):
        layer.register_forward_hook(
            lambda module, inputs, output, rows=rows: rows.append(len(output))
        )
    found = model(numbered).logits
    assert seen == [[3], [7], [7]]
    for row, task in enumerate(batch.task_ids_B.tolist()):
        # A model in which all tasks have the layers of this one.
        alone = tiny_model(NONE, **{**ALL, "own_layers": 0}).eval()
        state = model.state_dict()
        kept = {name.replace(f".copies.{task}.", "."): value for name, value in state.items()}
        alone.load_state_dict({name: kept[name] for name in alone.state_dict()})
        for name, logits in alone(batch.take(torch.tensor([row]))).logits.items():
            torch.testing.assert_close(found[name][[row]], logits, atol=1e-5, rtol=1e-5)


def test_the_distance_of_own_layers_and_its_gradient_are_those_of_all_pairs():
    model = awake(tiny_model(NONE, tasks=(MOOD, TOPIC, WORDS), own_layers=2)).double()
    total = torch.zeros((), dtype=torch.float64)
    for layer in model.own_layers:
        for same in zip(*(own.parameters() for own in layer.copies), strict=True):
            for a, b in ((0, 1), (0, 2), (1, 2)):
                total = total + (same[a] - same[b]).square().sum() / 2
    weights = [weight for layer in model.own_layers for weight in layer.parameters()]
    expected = torch.autograd.grad(total, weights)
    found = sum(layer.distance() for layer in model.own_layers)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(torch.autograd.grad(found, weights), expected)
    (pair,) = tiny_model(NONE, tasks=(MOOD, TOPIC), own_layers=1).own_layers
    pair.copies[1].load_state_dict({k: v + 0.5 for k, v in pair.copies[0].state_dict().items()})
    numbers = sum(weight.numel() for weight in pair.copies[0].parameters())
    assert pair.distance().item() == pytest.approx(0.25 * numbers)
    assert not tiny_model(NONE, tasks=(MOOD,), own_layers=1).own_layers[0].distance()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_term_adds_its_weight_times_the_distance_once_to_the_loss(recompute):
    def step(weight):
        loss = replace(OFF, soft_sharing_weight=weight, r_drop_weight=0.5)
        model = awake(tiny_model(moe_config(), recompute=recompute, **ALL))
        objective = Objective(model, TASKS, loss, moe_config())
        done = objective(scaled(shared_texts()))
        done.loss.backward()
        return done, {n: weight.grad for n, weight in model.named_parameters()}, model

    (tied, pulled, model), (free, plain, _) = step(0.3), step(0.0)
    distance = sum(layer.distance() for layer in model.own_layers)
    assert "soft_sharing" not in free.terms and free.output.sharing.distance is None
    torch.testing.assert_close(tied.terms["soft_sharing"], distance.detach())
    torch.testing.assert_close(tied.loss - free.loss, 0.3 * distance)
    own = {n: w for n, w in model.named_parameters() if ".copies." in n}
    slopes = torch.autograd.grad(0.3 * distance, own.values())
    for name, slope in zip(own, slopes, strict=True):
        torch.testing.assert_close(pulled[name] - plain[name], slope, atol=1e-4, rtol=1e-4)
    assert all(grad is not None for grad in plain.values())
    assert (
        Objective(tiny_model(), TASKS, replace(OFF, soft_sharing_weight=1.0), moe_config()).terms
        == {}
    )


def test_the_shared_states_are_those_below_the_tasks_own_layers():
    model = awake(tiny_model(NONE, own_layers=2))
    batch = replace(shared_texts(), text_numbers_B=shared_texts().row_ids_B)
    before = model(batch).sharing.shared_BLM
    awake(model, seed=4)
    torch.testing.assert_close(model(batch).sharing.shared_BLM, before)
    torch.testing.assert_close(before[0], before[1])


def test_experts_go_below_the_own_layers_and_these_train_in_a_frozen_encoder():
    model = tiny_model(moe_config(layers="last_half"), own_layers=1, train_layers="none")
    assert [block.layer for block in model.moe_layers()] == [1]
    names = [name for name, weight in model.encoder.named_parameters() if weight.requires_grad]
    assert names and all(".copies." in name or ".block." in name for name in names)
    lora = tiny_model(moe_config(form="lora", layers="all"), own_layers=1)
    assert not any(".copies." in name and "lora" in name for name in lora.state_dict())
    with pytest.raises(ValueError, match="must list different numbers from 0 to 1"):
        tiny_model(moe_config(layers=[2]), own_layers=1)
    with pytest.raises(
        ValueError, match=r"model.own_layers \(3\) must leave a layer .* to 2 or less"
    ):
        tiny_model(NONE, own_layers=3)


# Attention between tasks.


def test_the_attention_between_tasks_equals_a_reference_row_by_row():
    torch.manual_seed(0)
    attention, pooled = TaskAttention(3, 6, 4).double(), torch.randn(2, 3, 6).double()
    assert torch.equal(attention(pooled), pooled)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    named = dict(attention.named_parameters())
    for row, states in enumerate(pooled):
        found = []
        for state, task in zip(states, named["tasks_TM"], strict=True):
            centered = state - state.mean()
            unit = centered / (centered.square().mean() + 1e-5).sqrt()
            found.append(unit * named["norm.weight"] + named["norm.bias"] + task)
        q, k, v = (
            [named[f"{part}.weight"] @ x for x in found] for part in ("query", "key", "value")
        )
        for number, state in enumerate(states):
            powers = [math.exp(float(q[number] @ key) / 2) for key in k]
            seen = sum(power / sum(powers) * value for power, value in zip(powers, v, strict=True))
            expected = state + named["output.weight"] @ seen
            # The weights are computed in float32.
            torch.testing.assert_close(
                attention(pooled)[row, number], expected, atol=1e-6, rtol=1e-5
            )


def test_a_new_attention_changes_nothing_to_the_bit_and_a_learned_one_all_tasks_that_pool():
    batch = random_batch()
    plain, attending = tiny_model().eval(), tiny_model(task_attention_width=4).eval()
    before = plain(batch)
    for name, logits in before.logits.items():
        assert torch.equal(attending(batch).logits[name], logits)
    after = awake(attending)(batch)
    changed = [n for n, logits in before.logits.items() if not torch.equal(after.logits[n], logits)]
    assert changed == [task.name for task in TASKS if task.mode == "pooled"]
    assert not torch.equal(after.embeddings["mood"], before.embeddings["mood"])
    for tasks in ((MOOD,), (MOOD, WORDS), (WORDS,)):
        assert tiny_model(tasks=tasks, task_attention_width=4).task_attention is None


def test_the_probe_of_the_tasks_gradients_is_that_of_the_same_heads():
    model = awake(tiny_model(pooling="layers", task_attention_width=4, private_width=4))
    batch = random_batch()
    output = model(batch, probed=True)
    for name, logits in output.logits.items():
        torch.testing.assert_close(output.probe.logits[name], logits)
    for name, states in output.probe.states.items():
        (slope,) = torch.autograd.grad(output.probe.logits[name].sum(), states)
        assert slope.abs().sum() > 0


# All of them.


def test_they_learn_at_the_rates_of_what_they_are_and_are_counted():
    model, plain = tiny_model(NONE, **ALL), tiny_model(NONE)
    groups = {name: parameter_group(name) for name, _ in model.named_parameters()}
    assert {g for n, g in groups.items() if ".copies." in n} == {"encoder"}
    assert {g for n, g in groups.items() if n.endswith("mixture.weights")} == {"router"}
    assert {g for n, g in groups.items() if "task_attention" in n or "mixture.scale" in n} == {
        "heads"
    }
    counts, before = count_parameters(model, top_k=2), count_parameters(plain, top_k=2)
    layer = 4 * WIDTH * (WIDTH + 1) + 2 * WIDTH * 24 + 24 + WIDTH + 4 * WIDTH
    attention = 4 * WIDTH * 4 + 4 * WIDTH + 2 * WIDTH
    behind = len(TASKS) * (4 + 1) + attention
    assert counts["total"] - before["total"] == (len(TASKS) - 1) * 2 * layer + behind
    assert counts["active"] - before["active"] == behind


def exported(folder, *, tasks=TASKS, **options):
    """A model that has learned something, and the folder of its export."""
    recipe, moe = tiny_recipe(tasks=tasks), moe_config(layers=[0])
    recipe.model = ModelConfig(
        encoder="some/encoder", dropout=0.0, projection_width=8, moe=moe, **options
    )
    model = awake(tiny_model(moe, tasks=tasks, **options)).eval()
    backbone = Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(folder / "vocabulary"))
    more = {"recipe": recipe, "tasks": tasks, "backbone": backbone}
    export_model(folder / "export", state_dict=model.state_dict(), **more)
    return model, folder / "export"


def test_an_export_predicts_as_the_model_and_an_older_one_is_read_without(tmp_path):
    model, folder = exported(tmp_path, **ALL)
    predictor = Predictor.from_pretrained(folder, device="cpu")
    batch = shared_texts()
    found = predictor.exported.model(batch).logits
    for name, logits in model(batch).logits.items():
        torch.testing.assert_close(found[name], logits, atol=1e-6, rtol=0)
    posts = ["good day", "the sun is bad", "rain"]
    whole = predictor(posts)
    # One row per task: a task asked for alone has the same layers.
    for task in ("mood", "words"):
        assert_same(
            [row[task] for row in predictor(posts, tasks=[task])], [row[task] for row in whole]
        )
    assert predictor.collator.rows_per_post(TASKS) == len(TASKS)
    exported(tmp_path / "old", own_layers=0)
    place = tmp_path / "old/export"
    config = json.loads((place / "config.json").read_text())
    for key in ("own_layers", "task_attention_width"):
        del config["model"][key]
    (place / "config.json").write_text(json.dumps(config))
    (place / "manifest.json").unlink()
    old = load_exported(place)
    assert old.model.own_layers == () and old.model.task_attention is None


def weights_of(model, number: int | None) -> dict[str, Tensor]:
    """Of the last layer, of a task's copy or the shared one."""
    layer = model.encoder.encoder.layer[2]
    return (layer if number is None else layer.copies[number]).state_dict()


def test_a_run_starts_from_shared_layers_and_from_own_ones_by_the_name_of_the_task(tmp_path):
    plain, there = exported(tmp_path / "plain")
    own, folder = exported(tmp_path / "own", own_layers=1, task_attention_width=4)
    tasks, moe = (TOPIC, replace(SIGNS, labels=("joy", "anger")), MOOD), moe_config(layers=[0])

    def started(folder, **options):
        model = tiny_model(moe, seed=5, **options)
        start_from_export(ModelConfig(start_from=str(folder), moe=moe), model)
        return model

    model = started(there, tasks=tasks, own_layers=1)
    for number in range(3):
        torch.testing.assert_close(weights_of(model, number), weights_of(plain, None))
    model = started(folder, tasks=tasks, own_layers=1)
    for number, theirs in ((0, 1), (2, 0)):
        torch.testing.assert_close(weights_of(model, number), weights_of(own, theirs))
    for name, value in weights_of(model, 1).items():
        mean = torch.stack([weights_of(own, n)[name] for n in range(len(TASKS))]).mean(dim=0)
        torch.testing.assert_close(value, mean)
    same = started(folder, own_layers=1, task_attention_width=4)
    named = (dict(model.task_attention.named_parameters()) for model in (same, own))
    torch.testing.assert_close(*named)
    with pytest.raises(
        ValueError, match="is not there; both runs need the same .*model.own_layers"
    ):
        started(folder)
