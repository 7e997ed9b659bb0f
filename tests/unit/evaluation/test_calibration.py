"""Temperatures, calibration errors and thresholds, against values from the head and from other ways of computing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_export import TASKS, tiny_predictor, tiny_recipe

from comoe.evaluation.calibration import (
    RULES,
    Calibrator,
    crossed,
    ece_of,
    evidence,
    expected_calibration_error,
    fit_temperature,
    parts_of,
    reliability_bins,
    with_calibration,
)
from comoe.evaluation.evaluate import Evaluation, compute_metrics
from comoe.evaluation.tables import calibration_lines, calibration_sentences
from comoe.evaluation.thresholds import (
    FEWEST,
    best_threshold,
    choose_for_labels,
    choose_for_two_classes,
    f1,
)
from comoe.inference.exported import load_exported
from comoe.inference.model_card import model_card
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.task import Task
from comoe.types import IGNORED

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1")
TOPIC = Task("topic", "single_label", ("a", "b", "c"), "accuracy")
SIGNS = Task("signs", "multi_label", ("x", "y"), "macro_f1")
HEAT = Task("heat", "regression", (), "pearson")
TAGS = Task("tags", "tags", ("O", "B-p"), "span_f1")


def outputs_of(logits: np.ndarray, gold: np.ndarray) -> list[PostOutput]:
    return [
        PostOutput(row, z, g)
        for row, (z, g) in enumerate(zip(logits.astype(np.float32), gold, strict=True))
    ]


def frequencies(logit: float) -> tuple[np.ndarray, np.ndarray]:
    """Eight posts of which six are as the model says: right at log(3), whatever logit it gives them."""
    return np.tile([0.0, logit], (8, 1)), np.array([1] * 6 + [0] * 2)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 7.0])
def test_the_temperature_is_the_factor_by_which_logits_are_too_large(factor):
    logits_NY, gold_N = frequencies(factor * math.log(3.0))
    single, multi = (RULES[kind].nll for kind in ("single_label", "multi_label"))
    assert fit_temperature(logits_NY, gold_N, single) == pytest.approx(factor, rel=1e-5)
    gold_NY = np.stack([gold_N, gold_N], axis=1)
    found = fit_temperature(logits_NY[:, [1, 1]], gold_NY, multi)
    assert found == pytest.approx(factor, rel=1e-5)


def test_the_optimum_has_no_slope_scales_with_the_logits_and_does_not_depend_on_the_order():
    draw = np.random.default_rng(1)
    logits_NY, gold_N = draw.normal(size=(300, 4)), draw.integers(4, size=300)
    logits_NY[np.arange(300), gold_N] += 1.0
    nll = RULES["single_label"].nll
    found = fit_temperature(logits_NY, gold_N, nll)
    beta = torch.tensor(1.0 / found, dtype=torch.float64, requires_grad=True)
    scaled, gold = torch.from_numpy(logits_NY) * beta, torch.from_numpy(gold_N)
    loss = torch.nn.functional.cross_entropy(scaled, gold)
    loss.backward()
    assert abs(beta.grad.item()) < 1e-6
    assert loss.item() == pytest.approx(nll(logits_NY / found, gold_N), rel=1e-12)
    assert fit_temperature(3.0 * logits_NY, gold_N, nll) == pytest.approx(3.0 * found, rel=1e-5)
    order = np.random.default_rng(5).permutation(300)
    assert fit_temperature(logits_NY[order], gold_N[order], nll) == pytest.approx(found, rel=1e-6)
    errors = [ece_of({"t": outputs_of(logits_NY[rows], gold_N[rows])}, [replace(TOPIC, name="t")])
              for rows in (np.arange(300), order)]  # fmt: skip
    assert errors[0]["t"] == pytest.approx(errors[1]["t"], rel=1e-9)
    # A model that is always right gets the coldest temperature and not zero.
    gold_N = np.array([0, 1] * 10)
    right = np.where(np.arange(2) == gold_N[:, None], 1.0, 0.0)
    assert fit_temperature(right, gold_N, nll) == pytest.approx(0.1, rel=1e-3)
    # Broken logits are not fitted.
    right[3, 1] = math.nan
    assert evidence(outputs_of(right, gold_N), MOOD) is None


def test_the_calibration_error_is_the_one_from_the_head():
    # Bins of 1/15: 0.9 and 0.92 are in the fourteenth, of which one came true; 0.6 is in the ninth,
    # its upper end.
    sure, true = np.array([0.9, 0.92, 0.6, 0.6]), np.array([True, False, True, True])
    expected = (2 * abs(0.91 - 0.5) + 2 * abs(0.6 - 1.0)) / 4
    assert expected_calibration_error([(sure, true)]) == pytest.approx(expected)
    both = expected_calibration_error([(sure, true), (sure[2:], true[2:])])
    assert both == pytest.approx((expected + 0.4) / 2)
    counts, sums, hits = reliability_bins([(sure, true)])
    assert (counts[13], counts[8], counts.sum()) == (2, 2, 4)
    assert (hits[13], sums[8]) == (1.0, pytest.approx(1.2))
    assert expected_calibration_error([(np.array([0.0, 1.0]), np.array([0, 1]))]) == 0.0
    # What is compared: the likeliest class, and every label by itself.
    scores = np.array([[0.7, 0.3], [0.4, 0.6]])
    ((sure, true),) = RULES["single_label"].pairs(scores, np.array([0, 0]))
    assert sure.tolist() == [0.7, 0.6] and true.tolist() == [True, False]
    first, second = RULES["multi_label"].pairs(scores, np.array([[1, 0], [1, 1]]))
    assert (first[0].tolist(), second[1].tolist()) == ([0.7, 0.4], [0, 1])


def test_the_best_threshold_is_the_one_from_the_head():
    scores, gold = np.array([0.1, 0.2, 0.3, 0.4, 0.9]), np.array([0, 0, 1, 1, 1])
    assert best_threshold(scores, gold, f1) == pytest.approx(0.25)
    # 0.5 gives 1.0 already, and so do many: the nearest to 0.5 stays.
    assert best_threshold(np.array([0.1, 0.9]), np.array([0, 1]), f1) == 0.5
    # Among many posts that below the few that have the label is found.
    scores = np.linspace(0.0, 0.4, 5000)
    gold = (scores > 0.39).astype(np.int64)
    assert f1(gold, (scores >= best_threshold(scores, gold, f1)).astype(np.int64)) == 1.0


def skewed(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Scores with the label a third as high as they should be."""
    draw = np.random.default_rng(0)
    gold = (draw.random(count) < 0.3).astype(np.int64)
    return np.clip(0.1 + 0.2 * gold + 0.03 * draw.normal(size=count), 0.01, 0.99), gold


def test_a_threshold_is_kept_where_it_gains_and_left_where_it_does_not():
    scores, gold = skewed()
    folds = parts_of(np.arange(len(gold)), 5)
    chosen = choose_for_two_classes(scores, gold, folds_N=folds, task=MOOD)
    assert 0.1 < chosen.thresholds[0] < 0.3 and chosen.at_half < 0.5 < 0.95 < chosen.held_out
    noise = np.random.default_rng(3).random(len(gold))
    sure = choose_for_two_classes(noise * 0.02 + 0.9 * gold, gold, folds_N=folds, task=MOOD)
    assert sure.thresholds is None
    # A label that hardly occurs keeps one half.
    for positives in (None, 0, FEWEST - 1):
        other = gold if positives is None else (np.arange(len(gold)) < positives).astype(np.int64)
        both = choose_for_labels(
            np.stack([scores, noise if positives is None else scores], axis=1),
            np.stack([gold, other], axis=1), folds_N=folds, task=SIGNS,
        )  # fmt: skip
        assert 0.1 < both.thresholds[0] < 0.3
        assert positives is None or both.thresholds[1] == 0.5


def test_thresholds_are_dropped_where_the_main_metric_would_fall():
    # By F1 the first label gains from saying yes to everybody; by rows that are right as a whole it
    # loses.
    draw = np.random.default_rng(2)
    gold = (draw.random((200, 1)) < 0.4).astype(np.int64)
    scores = np.clip(0.3 + 0.02 * gold + 0.05 * draw.normal(size=(200, 1)), 0, 1)
    folds = parts_of(np.arange(200), 5)
    for task, kept in ((replace(SIGNS, metric="accuracy"), False), (SIGNS, True)):
        found = choose_for_labels(scores, gold, folds_N=folds, task=task)
        assert (found.thresholds is not None) == kept


def overconfident(count: int = 120, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(7)
    logits = draw.normal(size=(count, labels))
    gold = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return 4.0 * logits, gold


def as_evaluation(task: Task, logits: np.ndarray, gold: np.ndarray) -> Evaluation:
    return compute_metrics({task.name: outputs_of(logits, gold)}, [task])


def test_a_run_is_calibrated_on_validation_and_judged_on_test():
    logits, gold = overconfident(240)
    calibrator = Calibrator([TOPIC, HEAT], temperatures=True, thresholds=True)
    halves = [
        as_evaluation(TOPIC, logits[part], gold[part]) for part in (slice(0, 120), slice(120, 240))
    ]
    for evaluation in halves:
        evaluation.outputs["heat"] = []
    taken = [
        calibrator.take(split, found)
        for split, found in zip(("validation", "test"), halves, strict=True)
    ]
    task = calibrator.tasks[0]
    assert 3.0 < task.temperature < 6.0 and task.thresholds is None and calibrator.tasks[1] == HEAT
    report = calibrator.report()
    assert set(report) == {"topic"} and set(report["topic"]["ece"]) == {"validation", "test"}
    for split in ("validation", "test"):
        assert (
            report["topic"]["ece"][split]["after"] < 0.5 * report["topic"]["ece"][split]["before"]
        )
        assert report["topic"]["nll"][split]["after"] < report["topic"]["nll"][split]["before"]
    for before, after in zip(halves, taken, strict=True):
        assert before.metrics["topic"] == after.metrics["topic"]
        scores = [row["scores"] for row in after.predictions["topic"]]
        shown, said = (
            [row["label"] for row in found.predictions["topic"]] for found in (before, after)
        )
        assert shown == said
        assert max(scores[0].values()) < max(before.predictions["topic"][0]["scores"].values())
    assert (
        ece_of(halves[1].outputs, calibrator.tasks)["topic"]
        == report["topic"]["ece"]["test"]["after"]
    )
    assert json.loads(json.dumps(report)) == report


def test_the_validation_error_comes_from_the_temperature_of_the_other_half():
    logits, gold = overconfident(60)
    found = evidence(outputs_of(logits, gold), TOPIC)
    rule, logits = RULES["single_label"], logits.astype(np.float32).astype(np.float64)
    first = parts_of(found.posts_N, 2) == 0
    assert first.sum() == 30
    expected = logits[first] / fit_temperature(logits[~first], gold[~first], rule.nll)
    np.testing.assert_allclose(crossed(found, rule)[first], expected, rtol=1e-6)


def test_thresholds_decide_test_and_not_the_validation_that_chose_them():
    scores, gold = skewed()
    logits = np.stack([np.zeros_like(scores), np.log(scores / (1 - scores))], axis=1)
    calibrator = Calibrator([MOOD], temperatures=False, thresholds=True)
    seen = {
        split: calibrator.take(split, as_evaluation(MOOD, logits, gold))
        for split in ("validation", "test")
    }
    (task,), report = calibrator.tasks, calibrator.report()
    assert task.temperature is None and len(task.thresholds) == 1
    at_half = report["mood"]["decision"]["at_half"]
    assert seen["validation"].metrics["mood"]["macro_f1"] == at_half
    assert seen["test"].metrics["mood"]["macro_f1"] > 0.95
    decided = [row["label"] == "good" for row in seen["test"].predictions["mood"]]
    assert decided == (scores >= task.thresholds[0]).tolist()
    assert seen["test"].confusions["mood"][1, 1] == (gold & np.array(decided)).sum()
    assert report["mood"]["ece"]["test"]["after"] is None
    said = [*calibration_sentences(report), *calibration_lines(report)]
    assert "hresholds" in said[-1] and any("mood: thresholds chosen" in line for line in said)


def test_too_few_posts_or_none_leave_a_task_as_it_is():
    logits, gold = overconfident(19)
    calibrator = Calibrator([TOPIC, MOOD], temperatures=True, thresholds=True)
    evaluation = as_evaluation(TOPIC, logits, gold)
    evaluation.outputs["mood"] = []
    calibrator.take("validation", evaluation)
    assert calibrator.tasks == (TOPIC, MOOD)
    entry = calibrator.report()["topic"]
    assert entry["temperature"] is None
    assert entry["ece"]["validation"]["after"] is None
    assert "mood" not in entry
    assert calibration_lines({}) == []
    assert "topic" in "\n".join(calibration_lines(calibrator.report()))


def test_a_temperature_that_does_not_pay_on_other_posts_is_not_kept():
    # Logits of the right size: one half wants 1.1, the other 0.9, and each loses with what the
    # other wants.
    draw = np.random.default_rng(11)
    logits = 2.0 * draw.normal(size=(40, 3))
    gold = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    found = evidence(outputs_of(logits, gold), TOPIC)
    rule = RULES["single_label"]
    assert rule.nll(crossed(found, rule), gold) > rule.nll(found.logits_NY, gold)
    calibrator = Calibrator([TOPIC], temperatures=True, thresholds=True)
    calibrator.take("validation", as_evaluation(TOPIC, logits, gold))
    (fitted,) = calibrator.tasks
    assert fitted.temperature is None and fitted.thresholds is None


def test_only_words_with_a_tag_count_and_the_words_of_a_post_stay_together():
    answers = [
        PostOutput(4, np.array([[2.0, 0.0], [0.0, 9.0]], np.float32), np.array([0, IGNORED])),
        PostOutput(
            9, np.array([[1.0, 0.0], [0.0, 3.0], [5.0, 0.0]], np.float32), np.array([0, 1, 0])
        ),
    ]
    found = evidence(answers, TAGS)
    assert found.logits_NY.tolist() == [[2, 0], [1, 0], [0, 3], [5, 0]]
    assert found.gold.tolist() == [0, 0, 1, 0] and found.posts_N.tolist() == [4, 9, 9, 9]
    assert len(set(parts_of(found.posts_N, 2)[1:])) == 1
    assert RULES["tags"].thresholds(np.ones((4, 2)), found.gold, found.posts_N, TAGS) is None


def test_every_kind_with_probabilities_has_a_rule():
    assert set(KINDS) - set(RULES) == {"regression", "unlabelled", "text", "masked_words"}


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "tags"])
def test_answers_are_tempered_and_thresholds_decide(kind):
    rules, labels = KINDS[kind], ("a", "b")
    task = Task("t", kind, labels, rules.metrics[0], temperature=2.0)
    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    expected = torch.sigmoid(logits / 2) if kind == "multi_label" else torch.softmax(logits / 2, -1)
    if rules.mode == "tokens":
        outputs = [PostOutput(0, logits.numpy(), np.zeros(2))]
    else:
        outputs = outputs_of(logits.numpy(), np.zeros(2))
    rows = rules.decode(outputs, task)
    if rules.mode == "tokens":
        assert rows[0]["scores"] == pytest.approx(expected.max(-1).values.tolist())
        return
    found = [[row["scores"][label] for label in labels] for row in rows]
    torch.testing.assert_close(torch.tensor(found), expected)
    edges = (0.8,) if kind == "single_label" else (0.4, 0.8)
    shown = rules.decode(outputs, replace(task, thresholds=edges))
    # The sigmoid and the softmax of (0, 1) are 0.73 and 0.5; of (1.5, 0) 0.82 and 0.5.
    wanted = (
        [{"label": "a"}, {"label": "a"}]
        if kind == "single_label"
        else [{"labels": ["a"]}, {"labels": ["a"]}]
    )
    assert [{key: row[key] for key in wanted[0]} for row in shown] == wanted


def test_an_export_keeps_temperatures_and_thresholds_and_an_old_one_has_none(tmp_path):
    edges = {
        "mood": None,
        "signs": (0.2,) * len(next(task for task in TASKS if task.kind == "multi_label").labels),
    }
    tasks = tuple(
        task
        if task.kind == "regression"
        else replace(task, temperature=4.0, thresholds=edges.get(task.name))
        for task in TASKS
    )
    (tmp_path / "plain").mkdir()
    (tmp_path / "fitted").mkdir()
    plain, fitted = (
        tiny_predictor(tmp_path / "plain"),
        tiny_predictor(tmp_path / "fitted", tasks=tasks),
    )
    assert load_exported(tmp_path / "fitted" / "export").tasks == tasks
    before, after = (model(["a good day"], tasks=["mood", "signs"])[0] for model in (plain, fitted))
    assert before["mood"]["label"] == after["mood"]["label"]
    for label, score in before["signs"]["scores"].items():
        logit = math.log(score / (1 - score))
        assert after["signs"]["scores"][label] == pytest.approx(
            1 / (1 + math.exp(-logit / 4.0)), rel=1e-5
        )
        assert (label in after["signs"]["labels"]) == (after["signs"]["scores"][label] >= 0.2)
    assert (
        "are calibrated on posts like the training data"
        in (tmp_path / "fitted/export/README.md").read_text()
    )
    config = json.loads((tmp_path / "plain/export/config.json").read_text())
    for task in config["tasks"]:
        del task["temperature"], task["thresholds"]
    (tmp_path / "plain/export/config.json").write_text(json.dumps(config))
    (tmp_path / "plain/export/manifest.json").unlink()
    assert load_exported(tmp_path / "plain/export").tasks == TASKS


def test_a_report_gives_tasks_back_what_was_fitted():
    fitted, nothing = (
        {"temperature": 2.0, "thresholds": [0.3, 0.5]},
        {"temperature": None, "thresholds": None},
    )
    report = {"signs": fitted, "mood": nothing}
    assert with_calibration([MOOD, SIGNS], json.loads(json.dumps(report))) == (
        MOOD, replace(SIGNS, temperature=2.0, thresholds=(0.3, 0.5)),
    )  # fmt: skip
    assert with_calibration([replace(MOOD, temperature=3.0)], None) == (MOOD,)


def test_the_card_tells_what_was_fitted(tmp_path):
    predictor = tiny_predictor(tmp_path)
    entry = {
        "temperature": 1.8, "thresholds": [0.3], "decision": {"metric": "macro_f1", "at_half": 0.5, "held_out": 0.6},
        "ece": {"validation": {"before": 0.2, "after": 0.1}, "test": {"before": 0.25, "after": 0.125}}, "nll": {},
    }  # fmt: skip
    results = {
        "metrics": {},
        "seconds": 60.0,
        "best_step": 3,
        "step": 3,
        "calibration": {"mood": entry},
    }
    card = model_card(
        "m", recipe=tiny_recipe(), tasks=TASKS, config=predictor.exported.config, results=results
    )
    assert "| mood | 1.80 | 0.30 | 0.200 -> 0.100 | 0.250 -> 0.125 |" in card
    assert "macro_f1 0.500 with 0.5, 0.600 on posts" in card
