"""Tasks that a decoder answers: what their cells, targets, losses and answers are."""

import math

import numpy as np
import pytest
import torch

from comoe.experiments.compare.statistics import measured, read_predictions, resampled, same_posts
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.kinds.generation import GeneratedText
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.task import Task
from comoe.train.monitor.log_window import LogWindow
from comoe.train.parallel.engine import StepReport
from comoe.types import IGNORED, ModelOutput, StepOutput, labelled_rows
from tests.helpers_decoder import batch_of_labels

TEXT, WORDS = KINDS["text"], KINDS["label_words"]
ASPECT = Task("aspect", "text", (), "token_f1", prompt="{text}")
MOOD = Task(
    "mood",
    "label_words",
    ("bad", "good"),
    "macro_f1",
    prompt="{text}",
    label_words=("terrible", "great"),
)


@pytest.mark.parametrize(
    ("cell", "text"),
    [(" battery life ", "battery life"), (["battery", "", None, "screen "], "battery, screen"),
     (np.array(["a", "b"]), "a, b"), (4.0, "4"), (True, "true"), ("1.0", "1.0"), ([], None), ([" "], None),
     ("half \ud800 pair", "half \ufffd pair")],
)  # fmt: skip
def test_a_text_is_a_cell_as_it_is_written_and_a_list_is_joined(cell, text):
    assert TEXT.parse(cell, ()) == text


@pytest.mark.parametrize(
    ("cell", "match"), [({"a": 1}, "is no text"), ("a\x00b", "NUL character"), ([["a"]], "text")]
)
def test_a_cell_that_is_no_text_is_refused(cell, match):
    with pytest.raises(ValueError, match=match):
        TEXT.parse(cell, ())


def test_targets_are_numbers_of_tokens_and_rows_without_a_text_are_ignored():
    targets = TEXT.collate([3, None, 1], labels=(), length=9)
    assert targets.tolist() == [3, IGNORED, 1]
    assert TEXT.labelled(targets).tolist() == [True, False, True]
    labelled = labelled_rows(batch_of_labels({"aspect": targets}), ["aspect"])
    assert labelled[:, 0].tolist() == [True, False, True]
    assert TEXT.collate([None], labels=(), length=0).tolist() == [IGNORED]


@pytest.mark.parametrize("text", ["\U0010ffff电池\U0001f468‍\U0001f469 ñ", ""])
def test_a_generated_text_is_shown_with_its_probability(text):
    output = PostOutput(0, GeneratedText(-1.0, math.log(0.25), text), None)
    assert TEXT.decode([output], ASPECT) == [{"answer": text, "probability": pytest.approx(0.25)}]


def test_a_row_weighs_by_its_confidence_and_only_the_gold_label_is_read():
    logits = torch.tensor([[-1.0, -9.0], [-2.0, -3.0], [-5.0, -7.0]], requires_grad=True)
    targets, weights = torch.tensor([0, 1, IGNORED]), torch.tensor([0.5, 1.0, 1.0])
    loss = WORDS.loss(logits, targets, MOOD, weights)
    assert loss.item() == pytest.approx(0.5 * 1.0 + 3.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-0.5, 0.0], [0.0, -1.0], [0.0, 0.0]]
    own = torch.tensor([[-4.0], [-6.0]])
    texts = TEXT.collate([2, 3], labels=(), length=0)
    assert TEXT.loss(own, texts, ASPECT, torch.tensor([0.25, 1.0])).item() == pytest.approx(7.0)
    assert TEXT.normalizer(texts, ASPECT).item() == 5.0


def test_scored_words_become_shares_that_sum_to_1():
    logits = torch.tensor([[math.log(0.02), math.log(0.06)]])
    outputs = [PostOutput(0, logits[0].numpy(), np.int64(1))]
    (answer,) = WORDS.decode(outputs, MOOD)
    assert answer == {
        "label": "good",
        "scores": {"bad": pytest.approx(0.25), "good": pytest.approx(0.75)},
    }
    gold, scores = WORDS.gold_and_scores(outputs, MOOD)
    assert scores.tolist() == [[pytest.approx(0.25), pytest.approx(0.75)]]
    assert WORDS.confusion(gold, scores, MOOD).tolist() == [[0, 0], [0, 1]]


def test_texts_are_scored_beside_the_commonest_one():
    gold = ["screen", "battery life", "battery life", "keyboard"]
    found = TEXT.score(gold, ["Screen!", "battery", "the battery life", "mouse"], ASPECT)
    assert found == pytest.approx(
        {
            "token_f1": (1 + 2 / 3 + 1 + 0) / 4,
            "exact_match": 0.5,
            "rouge_l": (1 + 2 / 3 + 1 + 0) / 4,
            "majority/token_f1": 0.5,
        }
    )
    assert TEXT.confusion(gold, gold, ASPECT) is None


def test_written_predictions_are_compared_by_their_texts():
    rows = [{"gold": "screen", "answer": "the screen"}, {"gold": "a b", "answer": "b"}]
    gold, predicted = TEXT.compared(rows, ASPECT)
    assert TEXT.measure(gold, predicted, ASPECT) == pytest.approx((1 + 1) / 2)
    assert TEXT.measure(gold, predicted, ASPECT) == TEXT.score(gold, predicted, ASPECT)["token_f1"]


def test_runs_are_compared_over_resampled_posts():
    predictions = [
        {"row": row, "gold": gold, "answer": answer}
        for row, (gold, answer) in enumerate(
            [("a b", "a b"), ("c", "d"), (None, "x"), ("e f", "f")]
        )
    ]
    found = read_predictions(predictions, ASPECT)
    assert measured({"aspect": found}, [ASPECT])["aspect"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    (drawn,) = resampled([{"aspect": found}], [ASPECT], resamples=200)["aspect"]
    assert drawn.min() == 0 and drawn.max() == 1 and drawn.mean() == pytest.approx(5 / 9, abs=0.1)
    other = read_predictions([row | {"answer": "z"} for row in predictions], ASPECT)
    assert same_posts(found, other)
    assert not same_posts(
        found, read_predictions([row | {"gold": "z"} for row in predictions], ASPECT)
    )


def test_a_decoder_that_is_told_the_answer_has_no_training_metric():
    tasks = (Task("heat", "regression", (), "pearson"), ASPECT, MOOD)
    batch = batch_of_labels({
        "heat": torch.tensor([0.0, 1.0, 2.0]), "mood": torch.tensor([0, 1, 1]),
        "aspect": TEXT.collate([1, 1, None], labels=(), length=0),
    })  # fmt: skip
    logits = {
        "heat": torch.tensor([[0.0], [2.0], [4.0]]),
        "aspect": torch.zeros(3, 1),
        "mood": torch.zeros(3, 2),
    }
    output = StepOutput(torch.tensor(0.0), {}, ModelOutput(logits, {}, {}, (), torch.arange(3)))
    report = StepReport(torch.tensor(0.0), {}, [output], grad_norm=None, skipped=False)
    assert LogWindow(tasks)._metrics(report, [batch]) == {"heat": {"pearson": pytest.approx(1.0)}}
