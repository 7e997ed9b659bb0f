"""Kinds of tasks: reading cells, losses against float64 references, answers, scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.kinds.generation import GeneratedText
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.kinds.tagging import PHRASE_TAGS, tag_spans
from comoe.tasks.task import Task
from comoe.types import IGNORED, ModelOutput
from tests.helpers_decoder import batch_of_labels

LABELS = ("negative", "neutral", "positive")
TAGS = ("O", "B-PER", "I-PER")

TASKS = {
    "single_label": Task("mood", "single_label", LABELS, "macro_f1"),
    "multi_label": Task("emotions", "multi_label", LABELS, "macro_f1"),
    "regression": Task("intensity", "regression", (), "pearson", label_mean=40.0, label_std=2.5),
    "tags": Task("names", "tags", TAGS, "span_f1"),
    "phrases": Task("opinion", "phrases", PHRASE_TAGS, "span_f1"),
    "label_words": Task(
        "polarity", "label_words", LABELS, "macro_f1", prompt="{text}", label_words=LABELS
    ),
    "text": Task("aspect", "text", (), "token_f1", prompt="{text}"),
}
CELLS = {
    "single_label": [0, None, 2, 1, 2],
    "multi_label": [(0, 2), (), None, (1,), (0, 1, 2)],
    "regression": [0.5, -3.0, None, 4.0, 0.0],
    "tags": [
        [IGNORED, 1, 2, IGNORED],
        None,
        [IGNORED, 0],
        [IGNORED, 0, IGNORED, 1],
        [IGNORED, IGNORED],
    ],  # fmt: skip
}
CELLS["phrases"] = CELLS["tags"]
CELLS["label_words"] = CELLS["single_label"]
CELLS["text"] = [(4, "battery life"), None, (2, "\U0001f50b 电池"), (1, "x"), (3, "battery life")]
WEIGHTED = [name for name, kind in KINDS.items() if kind.min_labels]
SCORED = sorted(name for name, kind in KINDS.items() if kind.predicts)


def task_of(kind: str, *, weighted: bool = False) -> Task:
    """A task, on wish with uneven class weights and smoothing."""
    smoothing = 0.0 if KINDS[kind].mode == "decoder" else 0.2
    return (
        replace(TASKS[kind], class_weights=(0.5, 1.0, 3.0), label_smoothing=smoothing)
        if weighted
        else TASKS[kind]
    )


def targets_of(kind: str) -> Tensor:
    cells = CELLS[kind]
    if kind == "text":
        cells = [None if cell is None else cell[0] for cell in cells]
    return KINDS[kind].collate(cells, labels=TASKS[kind].labels, length=4)


def logits_of(kind: str, *, seed: int = 0) -> Tensor:
    """Random logits, (5, Y), for tags (5, 4, Y), for text (5, 2)."""
    shape = (5, 4) if KINDS[kind].mode == "tokens" else (5,)
    width = 2 if kind == "text" else KINDS[kind].num_outputs(TASKS[kind].labels)
    return 3 * torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))


def shown(logits: Sequence[Tensor]) -> list[PostOutput]:
    """Rows of whatever label."""
    return [PostOutput(row, z.numpy(), np.zeros(len(z))) for row, z in enumerate(logits)]


def outputs_of(kind: str) -> list[PostOutput]:
    """The five rows; of texts each post has generated "abc" or a part of it."""
    logits, targets = logits_of(kind), targets_of(kind)
    if kind == "text":
        return [
            PostOutput(row, GeneratedText(*z.tolist(), "abc"[:row]), cell)
            for row, (z, cell) in enumerate(zip(logits, CELLS[kind], strict=True))
        ]
    return [
        PostOutput(row, z.numpy(), target.numpy())
        for row, (z, target) in enumerate(zip(logits, targets, strict=True))
    ]


# Reading cells


NUMBERED, TRUTH, SEPARATED = ("1", "2", "5"), ("false", "true"), ("anger, rage", "joy")
PAIR = [
    "negative,positive", "positive; negative", "0|2", ["positive", 0], np.array(["negative", "positive"]),
]  # fmt: skip
PARSED = [
    # A label is found by name or id, however it is spelt.
    *(
        ("single_label", value, LABELS, 2)
        for value in ("positive", " positive ", "2", 2, 2.0, "2.0")
    ),
    *(("single_label", value, LABELS, 2) for value in (np.int64(2), np.float64(2.0))),
    # A number is a name where labels are numbers.
    *(("single_label", value, NUMBERED, 0) for value in ("1", 1, 1.0, "1.0", np.float32(1.0))),
    ("single_label", "us", ("US", "us"), 1),
    ("single_label", True, TRUTH, 1),
    *(("multi_label", value, LABELS, (0, 2)) for value in PAIR),
    ("multi_label", [], LABELS, ()),  # no label is a label too, and not missing
    ("multi_label", "anger, rage", SEPARATED, (0,)),
    ("regression", "-1.5", (), -1.5),
    ("regression", 3, (), 3.0),
    ("regression", " 2e-1 ", (), 0.2),
    ("regression", np.float32(0.5), (), 0.5),
    ("tags", "O B-PER I-PER", TAGS, [0, 1, 2]),
    ("tags", ["B-PER", None, 0], TAGS, [1, IGNORED, 0]),
]
REFUSED = [
    ("single_label", 0, NUMBERED, "'0' is not a label"),  # it is not taken for an id
    *(
        ("single_label", value, LABELS, "is not a label.*one of: negative, neutral, positive")
        for value in (3, "-1", "3", 1.5)
    ),
    ("single_label", "Positive", LABELS, "'Positive' is not a label.*did you mean positive?"),
    ("multi_label", ["positve"], LABELS, "'positve' is not a label.*did you mean positive?"),
    ("single_label", ["positive"], LABELS, "kind: multi_label"),
    (
        "multi_label",
        [0, 1, 0],
        LABELS,
        "names a label twice",
    ),  # zeros and ones per label are no ids
    *(
        ("regression", value, (), "is not a finite number")
        for value in ("nan", "inf", math.inf, "1_000", "1,5", "high", True, [1.0])
    ),
    ("tags", 7, TAGS, "is not a list of tags"),
]


@pytest.mark.parametrize(("kind", "value", "labels", "expected"), PARSED)
def test_a_cell_is_parsed(kind, value, labels, expected):
    assert KINDS[kind].parse(value, labels) == expected


@pytest.mark.parametrize(("kind", "value", "labels", "message"), REFUSED)
def test_a_bad_cell_is_refused(kind, value, labels, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind].parse(value, labels)


def test_a_kind_that_is_not_scored_predicts_nothing_unless_it_says_so():
    class Quiet(type(KINDS["single_label"])):
        scored = False

    class Shown(Quiet):
        predicts = True

    assert not KINDS["unlabelled"].predicts and not Quiet.predicts
    assert Shown.predicts and not Shown.scored
    assert KINDS["masked_words"].scored and not KINDS["masked_words"].predicts


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("value", [None, "", "  ", math.nan, np.float64("nan")])
def test_an_empty_cell_is_missing(kind, value):
    assert KINDS[kind].parse(value, TASKS[kind].labels) is None


def test_labels_are_found_in_natural_order():
    for kind, cells, labels in (
        ("single_label", ["10", 2, None, 1.0, "2", ""], ("1", "2", "10")),
        ("single_label", ["topic 11", "topic 9", "art"], ("art", "topic 9", "topic 11")),
        ("single_label", [True, False, None], TRUTH),
        ("multi_label", ["joy, anger", ["fear"], [], None], ("anger", "fear", "joy")),
        ("tags", [["B-PER", "O"], None, "I-PER B-LOC"], ("O", "B-LOC", "B-PER", "I-PER")),
        ("regression", [1.0, "2"], ()),
    ):
        assert KINDS[kind].discover(cells) == labels


# Targets


def test_targets_have_the_documented_shape_and_mark_what_is_missing():
    assert targets_of("single_label").tolist() == [0, IGNORED, 2, 1, 2]
    multi = targets_of("multi_label")
    assert multi.dtype == torch.float32
    assert multi[0].tolist() == [1, 0, 1]
    assert multi[1].tolist() == [0, 0, 0]
    assert multi[2].isnan().all()
    numbers = targets_of("regression")
    assert numbers.dtype == torch.float32 and numbers.shape == (5,) and numbers[2].isnan()
    tags = targets_of("tags")
    assert tags.dtype == torch.int64 and tags.shape == (5, 4)
    assert tags[2].tolist() == [IGNORED, 0, IGNORED, IGNORED] and tags[1].tolist() == [IGNORED] * 4


@pytest.mark.parametrize("kind", SCORED)
def test_gold_gives_the_labels_back_in_words(kind):
    expected = {
        "single_label": ["negative", None, "positive", "neutral", "positive"],
        "multi_label": [["negative", "positive"], [], None, ["neutral"], list(LABELS)],
        "regression": [0.5, -3.0, None, 4.0, 0.0],
        "tags": [["B-PER", "I-PER"], None, ["O"], ["O", "B-PER"], None],
        "phrases": [["B-phrase", "I-phrase"], None, ["O"], ["O", "B-phrase"], None],
        "label_words": ["negative", None, "positive", "neutral", "positive"],
        "text": ["battery life", None, "\U0001f50b 电池", "x", "battery life"],
    }
    targets = [output.target for output in outputs_of(kind)]
    assert KINDS[kind].gold(targets, TASKS[kind]) == expected[kind]


# Losses


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def class_reference(row: list[float], target: int, task: Task) -> tuple[float, float]:
    """Loss and unit of one target, in Python's float64."""
    weights, smoothing = task.class_weights or [1.0] * len(row), task.label_smoothing
    negative = [-value for value in log_softmax(row)]
    smooth = sum(weight * value for weight, value in zip(weights, negative, strict=True)) / len(row)
    return (1 - smoothing) * weights[target] * negative[target] + smoothing * smooth, weights[
        target
    ]


def single_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    pairs = [
        class_reference(row, cell, task)
        for row, cell in zip(logits.double().tolist(), CELLS["single_label"], strict=True)
        if cell is not None
    ]
    return sum(loss for loss, _ in pairs), sum(unit for _, unit in pairs)


def tags_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    pairs = [
        class_reference(logits[row, place].double().tolist(), tag, task)
        for row, cell in enumerate(CELLS["tags"])
        for place, tag in enumerate(cell or [])
        if tag != IGNORED
    ]
    return sum(loss for loss, _ in pairs), sum(unit for _, unit in pairs)


def multi_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    weights, total, rows = task.class_weights or [1.0] * 3, 0.0, 0
    for row, cell in zip(logits.double().tolist(), CELLS["multi_label"], strict=True):
        if cell is None:
            continue
        rows += 1
        for label, value in enumerate(row):
            target = (1 - task.label_smoothing) * (label in cell) + task.label_smoothing / 2
            yes = 1 / (1 + math.exp(-value))
            loss = -target * math.log(yes) - (1 - target) * math.log(1 - yes)
            total += weights[label] / sum(weights) * loss
    return total, rows


def regression_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    cells = CELLS["regression"]
    errors = [
        (value - (cell - task.label_mean) / task.label_std) ** 2
        for (value,), cell in zip(logits.double().tolist(), cells, strict=True)
        if cell is not None
    ]
    return sum(errors), len(errors)


def words_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    weights = task.class_weights or [1.0] * 3
    cells = [(row, cell) for row, cell in enumerate(CELLS["label_words"]) if cell is not None]
    loss = -sum(weights[cell] * float(logits[row, cell]) for row, cell in cells)
    return loss, sum(weights[cell] for _, cell in cells)


def text_reference(logits: Tensor, task: Task) -> tuple[float, float]:
    cells = [(row, cell) for row, cell in enumerate(CELLS["text"]) if cell is not None]
    return -sum(float(logits[row, 0]) for row, _ in cells), sum(count for _, (count, _) in cells)


REFERENCES: dict[str, Callable[[Tensor, Task], tuple[float, float]]] = {
    "single_label": single_reference,
    "multi_label": multi_reference,
    "regression": regression_reference,
    "tags": tags_reference,
    "phrases": tags_reference,
    "label_words": words_reference,
    "text": text_reference,
}


EVERY = [*((kind, False) for kind in SCORED), *((kind, True) for kind in WEIGHTED)]


@pytest.mark.parametrize(("kind", "weighted"), EVERY)
def test_loss_and_units_equal_a_float64_reference(kind, weighted):
    task, logits, targets = task_of(kind, weighted=weighted), logits_of(kind), targets_of(kind)
    loss, units = REFERENCES[kind](logits, task)
    assert KINDS[kind].loss(logits, targets, task).item() == pytest.approx(loss, rel=1e-6)
    assert KINDS[kind].normalizer(targets, task).item() == pytest.approx(units, rel=1e-12)


@pytest.mark.parametrize(("kind", "weighted"), EVERY)
def test_gradient_equals_differences_of_the_float64_reference(kind, weighted):
    task, logits = task_of(kind, weighted=weighted), logits_of(kind).requires_grad_()
    (gradient,) = torch.autograd.grad(KINDS[kind].loss(logits, targets_of(kind), task), logits)
    numeric = torch.zeros_like(gradient, dtype=torch.float64)
    for place in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits, dtype=torch.float64)
        step[place] = 1e-5
        above, below = (
            REFERENCES[kind](logits.detach().double() + sign * step, task)[0] for sign in (1, -1)
        )
        numeric[place] = (above - below) / 2e-5
    torch.testing.assert_close(gradient.double(), numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [[1, 2, 3, 4], [2], [0, 5], [3, 3]])
@pytest.mark.parametrize(("kind", "weighted"), EVERY)
def test_parts_of_the_rows_add_up_to_the_whole(kind, weighted, cut):
    rules, task = KINDS[kind], task_of(kind, weighted=weighted)
    logits, targets = logits_of(kind), targets_of(kind)
    parts = list(zip(logits.tensor_split(cut), targets.tensor_split(cut), strict=True))
    loss = sum(rules.loss(*part, task).item() for part in parts)
    assert loss == pytest.approx(rules.loss(logits, targets, task).item(), rel=1e-6)
    units = sum(rules.normalizer(part, task).item() for _, part in parts)
    assert units == rules.normalizer(targets, task).item()


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", SCORED)
def test_rows_without_a_label_lose_nothing_and_still_give_a_gradient(kind, rows, weighted):
    rules, task = KINDS[kind], task_of(kind, weighted=weighted and kind in WEIGHTED)
    logits = logits_of(kind)[:rows].requires_grad_()
    targets = rules.collate([None] * rows, labels=task.labels, length=4)
    loss = rules.loss(logits, targets, task)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert gradient.shape == logits.shape and not gradient.any() and gradient.isfinite().all()
    assert rules.normalizer(targets, task).item() == 0.0
    assert rules.normalizer(targets, task).dtype == torch.float64
    assert not rules.labelled(targets).any()


@pytest.mark.parametrize("kind", SCORED)
def test_half_precision_logits_are_summed_in_float32(kind):
    logits, targets, task = logits_of(kind).bfloat16(), targets_of(kind), TASKS[kind]
    loss = KINDS[kind].loss(logits, targets, task)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(REFERENCES[kind](logits, task)[0], rel=1e-6)


# Answers


def test_one_label_is_decoded_with_the_probability_of_each():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    (answer,) = KINDS["single_label"].decode(shown(logits), TASKS["single_label"])
    assert answer["label"] == "positive"
    assert answer["scores"] == pytest.approx(
        {"negative": 1 / 8, "neutral": 2 / 8, "positive": 5 / 8}
    )


def test_label_sets_are_decoded_at_one_half():
    logits = torch.tensor([[0.0, -0.1, math.log(3.0)], [-1.0, -1.0, -1.0]])
    first, second = KINDS["multi_label"].decode(shown(logits), TASKS["multi_label"])
    assert first["labels"] == ["negative", "positive"]
    assert first["scores"]["positive"] == pytest.approx(0.75)
    assert second["labels"] == []


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (40.0, 2.5), (-0.3, 0.01)])
def test_a_number_is_decoded_and_scored_in_the_unit_of_the_labels(mean, std):
    task = replace(TASKS["regression"], label_mean=mean, label_std=std)
    outputs = [
        PostOutput(row, np.float32([z]), np.float32(gold))
        for row, (z, gold) in enumerate([(-1.5, 1.0), (2.0, math.nan), (0.5, 3.0)])
    ]
    expected = [z * std + mean for z in (-1.5, 2.0, 0.5)]
    found = [answer["value"] for answer in KINDS["regression"].decode(outputs, task)]
    assert found == (expected if (mean, std) == (0.0, 1.0) else pytest.approx(expected, rel=1e-6))
    gold, scores = KINDS["regression"].gold_and_scores(outputs, task)
    assert gold.tolist() == [1.0, 3.0] and scores.tolist() == [found[0], found[2]]


def test_words_are_decoded_as_tags_and_spans():
    words = [torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]), torch.zeros(0, 3)]
    first, second = KINDS["tags"].decode(shown(words), TASKS["tags"])
    assert first["tags"] == ["B-PER", "I-PER", "O"]
    assert first["scores"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert second == {"tags": [], "scores": []}
    assert tag_spans(first["tags"], ["Ada", "Lovelace", "wrote"]) == [
        {"type": "PER", "start": 0, "end": 2, "text": "Ada Lovelace"}
    ]


@pytest.mark.parametrize("kind", SCORED)
def test_the_labelled_rows_of_a_batch_are_gold_and_scores_and_stack_as_they_were(kind):
    rules, task = KINDS[kind], TASKS[kind]
    logits, targets = logits_of(kind), targets_of(kind)
    starts = torch.ones(5, 4, dtype=torch.bool)
    batch = replace(batch_of_labels({task.name: targets}), word_starts_BL=starts)
    generated = {task.name: torch.arange(5)[:, None]} if kind == "text" else {}
    if kind == "text":
        texts = [None if cell is None else cell[1] for cell in CELLS["text"]]
        batch = replace(batch, texts={task.name: texts})
    output = ModelOutput({task.name: logits}, {}, {}, (), torch.arange(5), generated=generated)
    rows = [4, 1, 0]
    found = rules.outputs(
        output, batch, rows, task=task, detokenize=lambda ids: list(map(str, ids.tolist()))
    )
    assert [one.row for one in found] == rows
    if kind == "text":
        assert [one.logits.text for one in found] == ["[4]", "[1]", "[0]"]
        assert rules.gold([one.target for one in found], task) == [
            "battery life",
            None,
            "battery life",
        ]
    stacked = rules.stack(found, task)
    assert torch.equal(stacked[0], logits[rows][..., :1] if kind == "text" else logits[rows])
    assert torch.equal(stacked[1].nan_to_num(-1.0), targets[rows].nan_to_num(-1.0))
    gold, scores = rules.gold_and_scores(found, task)
    assert len(gold) == len(scores) == int(rules.labelled(targets[rows]).sum())


# Scores


def test_scores_of_one_label_hold_the_official_metric_and_its_baseline():
    task = replace(TASKS["single_label"], metric="macro_recall")
    gold, scores = np.array([2, 2, 2, 0]), np.eye(3)[[2, 2, 0, 0]]
    values = KINDS["single_label"].score(gold, scores, task)
    assert values["accuracy"] == 0.75
    assert values["macro_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["majority/macro_recall"] == pytest.approx((1 + 0) / 2)
    assert values["precision/negative"] == 0.5 and values["recall/positive"] == pytest.approx(2 / 3)
    assert values["f1/neutral"] == 0.0
    assert KINDS["single_label"].confusion(gold, scores, task).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [1, 0, 2],
    ]


def test_scores_of_numbers_have_the_error_of_the_mean_beside_them():
    gold, predicted = np.array([0.0, 2.0], dtype=np.float32), np.array([0.5, 1.5], dtype=np.float32)
    values = KINDS["regression"].score(gold, predicted, TASKS["regression"])
    assert values == pytest.approx(
        {"pearson": 1.0, "spearman": 1.0, "mae": 0.5, "majority/pearson": 0.0, "majority/mae": 1.0}
    )
    assert KINDS["regression"].confusion(gold, predicted, TASKS["regression"]) is None


def test_scores_of_label_sets_compare_with_the_labels_of_most_posts():
    task = replace(TASKS["multi_label"], metric="micro_f1")
    gold = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    values = KINDS["multi_label"].score(gold, gold * 0.9, task)
    assert values["micro_f1"] == values["sample_f1"] == values["accuracy"] == 1.0
    assert values["majority/micro_f1"] == pytest.approx(
        2 * 2 / (2 * 2 + 1 + 1)
    )  # "negative" for all: 2 right, 1 too many


def test_scores_of_tags_hold_spans_and_words_and_a_baseline_that_finds_nothing():
    gold = [np.array([1, 2, 0]), np.array([1])]
    scores = [np.eye(3)[[1, 2, 0]], np.eye(3)[[0]]]
    values = KINDS["tags"].score(gold, scores, TASKS["tags"])
    assert values["span_precision"] == 1.0 and values["span_recall"] == 0.5
    assert values["span_f1"] == pytest.approx(2 / 3) and values["majority/span_f1"] == 0.0
    assert values["accuracy"] == 0.75 and values["f1/B-PER"] == pytest.approx(2 / 3)
    assert KINDS["tags"].confusion(gold, scores, TASKS["tags"]).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]


@pytest.mark.parametrize("kind", SCORED)
def test_no_rows_give_the_same_keys_and_no_nan(kind):
    rules, task = KINDS[kind], TASKS[kind]
    full = rules.score(*rules.gold_and_scores(outputs_of(kind), task), task)
    empty = rules.score(*rules.gold_and_scores([], task), task)
    assert list(full) == list(empty)
    assert all(math.isfinite(value) for values in (full, empty) for value in values.values())
    assert all(type(value) is float for value in full.values())


@pytest.mark.parametrize("kind", SCORED)
def test_every_metric_of_a_kind_can_be_the_main_one(kind):
    rules = KINDS[kind]
    for metric in rules.metrics:
        labels = (
            ("none", "against", "favor")
            if metric == "mean_f1_against_favor"
            else TASKS[kind].labels
        )
        task = replace(TASKS[kind], labels=labels, metric=metric)
        values = rules.score(*rules.gold_and_scores(outputs_of(kind), task), task)
        assert metric in values and f"majority/{metric}" in values
