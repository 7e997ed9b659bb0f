"""Explanations: whole words, signs, completeness, and the experts that a forward pass used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.inference.explain import STEPS, _Row, check_explained, method_of
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.tasks.task import Task
from comoe.types import Batch
from tests.helpers_export import assert_same, tiny_predictor
from tests.helpers_model import HF_CONFIGS, MOOD, moe_config, random_batch, tiny_model
from tests.helpers_vision import FUSED, seeing_model, with_pictures

POST = "the sunny day :) @ann good"


@pytest.fixture(scope="module", params=["token", "both"])
def predictor(request, tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp(request.param), route_by=request.param)


def by_hand(predictor, task: Task, target: int, steps: int = 64) -> np.ndarray:
    """Integrated gradients of each token in float64 by the middle rule, with the post's own experts."""
    model = predictor.exported.model.double()
    try:
        split = predictor._forward.encode(
            predictor._read([POST], None, None, None, None, [task]), [None], [task]
        )
        batch = predictor.collator(split, np.array([0]))
        number = predictor.exported.tasks.index(task)
        row = task.rules.serves(batch.task_ids_B, number).nonzero()[0, 0]
        batch = batch.take(row[None])
        table = model.encoder.get_input_embeddings()
        word_ids_L = split.rows(np.array([0]))[0].word_ids
        masked_1L = torch.where(
            torch.from_numpy(word_ids_L >= 0),
            predictor.exported.tokenizer.mask_token_id,
            batch.input_ids_BL,
        )
        start, end = table(masked_1L).detach(), table(batch.input_ids_BL).detach()
        with torch.no_grad():
            selected = model(batch).selected
        total = torch.zeros_like(end)
        for step in range(steps):
            point = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
            hook = table.register_forward_hook(lambda module, given, output, point=point: point)
            logits_Y = model(batch, selected).logits[task.name][0] / (task.temperature or 1)
            hook.remove()
            probabilities = logits_Y.softmax(0)
            odds = probabilities[target].log() - (1 - probabilities[target]).log()
            total += torch.autograd.grad(odds, point)[0] / steps
        return ((total * (end - start)).sum(-1)[0]).numpy(), word_ids_L
    finally:
        predictor.exported.model.float()


def test_gradients_are_those_of_a_float64_integral_summed_per_word(predictor):
    task = next(task for task in predictor.tasks if task.rules.exclusive)
    (found,) = predictor.explain([POST], method="gradients", tasks=[task.name])
    (entry,) = found[task.name]["gradients"]
    target = task.labels.index(found[task.name]["label"])
    values_L, word_ids_L = by_hand(predictor, task, target)
    words = [sum(values_L[word_ids_L == word]) for word in range(word_ids_L.max() + 1)]
    assert [word for word, _ in entry["words"]][:3] == ["the", "sunny", "day"]
    scale = np.abs(words).max()
    np.testing.assert_allclose([value for _, value in entry["words"]], words, atol=1e-2 * scale)
    score = found[task.name]["scores"][entry["label"]]
    assert entry["to"] == pytest.approx(np.log(score / (1 - score)), abs=1e-3)


def test_gradients_explain_every_pooled_kind_and_leave_the_prediction_as_it_was(predictor):
    texts = [POST, "rain", " "]
    found = predictor.explain(texts, method="gradients", batch_size=2)
    plain = predictor(texts)
    for one, other in zip(found, plain, strict=True):
        for task in predictor.tasks:
            if task.name not in one:
                assert one["error"] == "the text is empty"
                continue
            entries = one[task.name].pop("gradients", [])
            assert bool(entries) == (task.mode == "pooled")
            labels = other[task.name].get("labels") or [other[task.name].get("label")]
            if "labels" in other[task.name] and not other[task.name]["labels"]:
                scores = other[task.name]["scores"]
                labels = [max(scores, key=scores.get)]
            assert [entry.get("label") for entry in entries] == labels[: len(entries)]
            for entry in entries:
                total = sum(value for _, value in entry["words"])
                change = entry["to"] - entry["from"]
                assert total == pytest.approx(change + entry["delta"], abs=1e-5)
                assert abs(entry["delta"]) <= 0.02 * max(1, abs(change)) + 1e-6
                assert "converged" not in entry and entry["steps"] in STEPS
            if "value" in other[task.name]:
                assert entries[0]["to"] == pytest.approx(other[task.name]["value"], abs=1e-4)
    assert_same(found, plain)


def test_experts_are_those_of_the_forward_pass(predictor):
    (found,) = predictor.explain([POST], method="experts", tasks=["mood", "words"])
    told = found["mood"]["experts"]
    assert told["layers"] == [block.layer for block in predictor.exported.model.moe_layers()]
    # "sunny" has two pieces, tokens 2 and 3.
    task = predictor.choose_tasks(["mood"])
    split = predictor._forward.encode(
        predictor._read([POST], None, None, None, None, task), [None], task
    )
    with torch.inference_mode():
        batch = predictor.collator(split, np.array([0]))
        row = task[0].rules.serves(batch.task_ids_B, 0).nonzero()[0, 0]
        output = predictor.exported.model(batch.take(row[None]))
    assert told["words"][1][0] == "sunny" and "experts" in found["words"]
    for routing, layer in zip(output.routings, told["words"][1][1], strict=True):
        gates = np.zeros(4)
        for token in (2, 3):
            for expert, gate in zip(
                routing.indices_Sk[token], routing.weights_Sk[token], strict=True
            ):
                gates[expert] += float(gate) / 2
        assert dict(layer) == {e: pytest.approx(g, abs=1e-5) for e, g in enumerate(gates) if g}
        assert [gate for _, gate in layer] == sorted((gate for _, gate in layer), reverse=True)


@pytest.mark.parametrize("family", sorted({*HF_CONFIGS} - {"bert"}))
def test_every_family_lets_its_word_embeddings_be_followed(family):
    model = tiny_model(tasks=(MOOD,), family=family).eval()
    ids_1L = torch.tensor([[5, 9, 12, 7, 6]])
    batch = Batch(
        ids_1L, torch.ones_like(ids_1L), None, ids_1L > 0, torch.tensor([-1]), torch.tensor([0]), {}
    )
    row = _Row(model, batch, MOOD)
    words = dict(enumerate("abc"))
    (entry,) = row.explained({"label": "good"}, np.array([-1, 0, 1, 2, -1]), words, blank=4)
    assert sum(value for _, value in entry["words"]) == pytest.approx(
        entry["to"] - entry["from"] + entry["delta"], abs=1e-5
    )
    assert "converged" not in entry and any(value for _, value in entry["words"])


@pytest.mark.parametrize(
    "method, tasks, rule",
    [
        (
            "gradients",
            ["words"],
            "gradients explains tasks with a head on the whole post; words has none",
        ),
        ("gradient", None, "gradient"),
        ("attention", ["words"], "attention explains tasks with a head on the whole post"),
    ],
)
def test_what_cannot_be_explained_is_refused(predictor, method, tasks, rule):
    with pytest.raises(ValueError, match=rule):
        predictor.explain([POST], method=method, tasks=tasks)


def test_a_missing_package_and_a_model_without_experts_are_one_sentence(tmp_path, monkeypatch):
    model = tiny_model(moe_config(num_experts=0), tasks=(MOOD,))
    with pytest.raises(ValueError, match="has no experts"):
        check_explained("experts", [MOOD], model)
    with_experts = tiny_predictor(tmp_path)
    monkeypatch.setattr(type(with_experts.exported.model), "moe_layers", lambda model: [])
    for refused, tasks, rule in (
        ("experts", ["mood"], "has no experts"),
        ("gradients", ["words"], "gradients explains tasks with"),
    ):
        with pytest.raises(ValueError, match=rule):
            with_experts([POST], tasks=tasks, explain=refused)
    monkeypatch.setattr("comoe.config.extras.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'captum, which is not installed: pip install "comoe\[explain\]"'
    ):
        method_of("gradients")


def test_the_page_is_whole_and_text_in_it_is_text(predictor, tmp_path):
    evil = '<script>alert(1)</script> good & "bad"'
    (tmp_path / "in.csv").write_text(f'id,text\n<b>,"{evil.replace(chr(34), chr(34) * 2)}"\n2,\n')
    for method in (False, "attention", "gradients", "experts"):
        options = PredictOptions(format="html", explain=method)
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.html", options)
        page = (tmp_path / "out.html").read_text()
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert (
            "&lt;b&gt;" in page
            and "the text is empty" in page
            and "http" not in page.split("<body")[1]
        )
        assert ("rgba" in page.split("</article>")[0].split("<article>")[1]) == (
            method in ("attention", "gradients")
        )
        assert ("<table>" in page) == (method == "experts")


@pytest.mark.parametrize("fusion", FUSED)
@pytest.mark.parametrize("pictured", [True, False])
def test_words_beside_an_image_are_explained_with_the_image_in_place(fusion, pictured):
    model = seeing_model(fusion, tasks=(MOOD,), route_image_tokens=fusion == "tokens").eval()
    batch = with_pictures(random_batch(rows=1, length=6, tasks=(MOOD,)), [0] if pictured else [])
    batch = replace(batch, task_ids_B=torch.tensor([-1]))
    word_ids_L = np.array([-1, 0, 1, 1, 2, -1])
    row = _Row(model, batch, MOOD)
    (entry,) = row.explained({"label": "good"}, word_ids_L, dict(enumerate("abc")), blank=4)
    with torch.no_grad():
        logits_Y = model(batch).logits["mood"][0].double()
    odds = logits_Y[2] - logits_Y[:2].logsumexp(0)
    assert entry["to"] == pytest.approx(float(odds), abs=1e-4)
    assert sum(value for _, value in entry["words"]) == pytest.approx(
        entry["to"] - entry["from"] + entry["delta"], abs=1e-5
    )
    assert "converged" not in entry
