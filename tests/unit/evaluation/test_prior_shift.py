"""Probabilities under another mix of labels: by hand in float64, the mix found again, and what it gains."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from comoe.evaluation.calibration import label_mix
from comoe.evaluation.prior_shift import adapted, completed, estimated
from comoe.experiments.shifted_mix import shifted
from comoe.inference.options import PredictOptions
from comoe.inference.predict_adapted import predict_adapted
from comoe.inference.prior import apply_rates, choose_adapted, find_rates, read_rates
from comoe.reporting.predictions import read_corpus
from tests.helpers_export import tiny_predictor
from tests.helpers_model import HEAT, MOOD, SIGNS, WORDS

PRIOR = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[0.0, 1.5], [1.5, 0.0], [-1.0, -1.0]])


def world(rates, count, seed):
    """Posts of a known Gaussian world, their labels, and their probabilities under the prior by Bayes' rule."""
    draw = np.random.default_rng(seed)
    gold_N = draw.choice(3, size=count, p=rates)
    points_N2 = MEANS[gold_N] + draw.normal(size=(count, 2))
    density_NY = np.exp(-0.5 * ((points_N2[:, None] - MEANS) ** 2).sum(-1))
    joint_NY = density_NY * PRIOR
    return gold_N, density_NY, joint_NY / joint_NY.sum(1, keepdims=True)


def test_adapted_scores_are_those_of_bayes_rule_under_the_new_mix():
    rates = np.array([0.1, 0.2, 0.7])
    _, density_NY, scores_NY = world(rates, 500, seed=0)
    expected_NY = density_NY * rates
    expected_NY /= expected_NY.sum(1, keepdims=True)
    np.testing.assert_allclose(
        adapted(scores_NY, PRIOR, rates, exclusive=True), expected_NY, atol=1e-12
    )
    # Independent labels: each a world of two.
    both_NY = np.array([[0.9, 0.2], [0.0, 1.0]])
    found_NY = adapted(both_NY, np.array([0.5, 0.1]), np.array([0.2, 0.1]), exclusive=False)
    by_hand = 0.9 * 0.4 / (0.9 * 0.4 + 0.1 * 1.6)
    np.testing.assert_allclose(found_NY, [[by_hand, 0.2], [0.0, 1.0]], atol=1e-15)


def saerens(scores_NY, prior_Y):
    """The published loop, one post at a time."""
    rates_Y = prior_Y.copy()
    for _ in range(2000):
        posts = []
        for row_Y in scores_NY:
            weighted = [p * r / o for p, r, o in zip(row_Y, rates_Y, prior_Y, strict=True)]
            posts.append([value / sum(weighted) for value in weighted])
        new_Y = np.mean(posts, axis=0)
        if np.abs(new_Y - rates_Y).max() < 1e-7:
            return new_Y
        rates_Y = new_Y
    return rates_Y


def test_the_mix_is_found_again_and_decisions_gain():
    rates = np.array([0.1, 0.15, 0.75])
    gold_N, _, scores_NY = world(rates, 4000, seed=1)
    found_Y = estimated(lambda: np.array_split(scores_NY, 7), PRIOR, exclusive=True)
    np.testing.assert_allclose(found_Y, rates, atol=0.02)
    few_NY = scores_NY[:60]
    np.testing.assert_allclose(
        estimated(lambda: [few_NY], PRIOR, exclusive=True), saerens(few_NY, PRIOR), atol=1e-6
    )
    plain = (scores_NY.argmax(1) == gold_N).mean()
    better = (adapted(scores_NY, PRIOR, found_Y, exclusive=True).argmax(1) == gold_N).mean()
    assert better > plain + 0.03
    # Labels for themselves, of which the second does not move.
    one_NY = np.stack([scores_NY[:, 2], np.full(4000, 0.4)], axis=1)
    found_Y = estimated(lambda: [one_NY], np.array([0.2, 0.4]), exclusive=False)
    np.testing.assert_allclose(found_Y, [0.75, 0.4], atol=0.02)
    np.testing.assert_array_equal(estimated(lambda: [], PRIOR, exclusive=True), PRIOR)


def test_the_mix_of_the_validation_posts_has_no_zero():
    np.testing.assert_allclose(label_mix(np.array([0, 0, 2]), 3), [2.5 / 4.5, 0.5 / 4.5, 1.5 / 4.5])
    np.testing.assert_allclose(label_mix(np.array([[1, 0], [1, 0]]), 2), [2.5 / 3, 0.5 / 3])


def test_rates_that_are_not_given_share_the_rest():
    labels = ("a", "b", "c")
    np.testing.assert_allclose(
        completed({"c": 0.6}, labels, PRIOR, exclusive=True), [0.25, 0.15, 0.6]
    )
    np.testing.assert_allclose(
        completed({"c": 0.6}, labels, PRIOR, exclusive=False), [0.5, 0.3, 0.6]
    )


MIXED = replace(MOOD, prior=(0.5, 0.3, 0.2), thresholds=None)
BOTH = replace(SIGNS, prior=(0.5, 0.1))


def test_predictions_are_decided_anew_and_say_so():
    posts = [
        {"mood": {"label": "bad", "scores": {"bad": 0.5, "so-so": 0.3, "good": 0.2}}},
        {"signs": {"labels": ["joy"], "scores": {"joy": 0.6, "fear": 0.2}}, "heat": {"value": 1.0}},
        {"error": "the text is empty"},
    ]
    rates = read_rates(["mood.good=0.6", "signs.joy=0.2"], [MIXED, BOTH, HEAT])
    first, second, third = apply_rates(posts, rates)
    assert first["mood"]["label"] == "good" and first["mood"]["prior"] == "assumed"
    assert first["mood"]["scores"]["good"] == pytest.approx(0.6)
    assert second["signs"]["labels"] == [] and second["signs"]["scores"]["fear"] == pytest.approx(
        0.2
    )
    assert second["heat"] == {"value": 1.0} and third == posts[2]
    assert "good 0.6000 (validation 0.2000)" in str(rates[0])
    (found, _) = find_rates(posts * 3, choose_adapted([MIXED, HEAT, BOTH]))
    assert found.how == "em" and found.rates_Y.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "words, tasks, rule",
    [
        (["mood=0.4"], [MIXED], "must be TASK.LABEL=RATE"),
        (["mod.good=0.4"], [MIXED], "must be TASK.LABEL=RATE.*mood"),
        (["mood.god=0.4"], [MIXED], "is 'god'.*did you mean good"),
        (["mood.good=x"], [MIXED], "'x' is no number"),
        (["mood.good=1"], [MIXED], "the rate of good is 1.0; it must be between 0 and 1"),
        (["mood.good=nan"], [MIXED], "must be between 0 and 1"),
        (["mood.good=0.4", "mood.good=0.5"], [MIXED], "has a rate already"),
        (["mood.good=0.6", "mood.bad=0.5"], [MIXED], "sum to 1.1; nothing is left"),
        (
            ["mood.good=0.6", "mood.bad=0.3", "mood.so-so=0.3"],
            [MIXED],
            "sum to 1.2; they must sum to 1",
        ),
        (["heat.x=0.4"], [HEAT], "heat is a regression task"),
        (["words.O=0.4"], [WORDS], "words is a tags task"),
        (["mood.good=0.4"], [MOOD], "does not know the mix"),
    ],
)
def test_rates_that_make_no_sense_are_refused(words, tasks, rule):
    with pytest.raises(ValueError, match=rule):
        read_rates(words, tasks)


@pytest.mark.parametrize(
    "tasks, rule", [([HEAT, WORDS], "heat, words gives a post no"), ([MOOD], "does not know")]
)
def test_adaptation_without_anything_to_adapt_is_refused(tasks, rule):
    with pytest.raises(ValueError, match=rule):
        choose_adapted(tasks)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("prior"), tasks=(MIXED, BOTH, HEAT))


@pytest.mark.parametrize("format", ["jsonl", "csv", "html", "tweeteval"])
@pytest.mark.parametrize("how", ["assumed", "em"])
def test_every_output_is_adapted_and_says_so(predictor, tmp_path, capsys, format, how):
    texts = ["good day", "bad rain", "the sun", " ", "good ann"] * 3
    (tmp_path / "in.csv").write_text(
        "id,text\n" + "".join(f"{n},{t}\n" for n, t in enumerate(texts))
    )
    rates = {"assume_rates": ["mood.good=0.9"]} if how == "assumed" else {"adapt_prior": "em"}
    if format == "tweeteval":
        texts = [text for text in texts if text.strip()]
        (tmp_path / "in.csv").write_text("text\n" + "".join(f"{t}\n" for t in texts))
    options = PredictOptions(format=format, tasks=["mood"], **rates)
    done = predict_adapted(predictor, tmp_path / "in.csv", tmp_path / "out", options)
    assert str(done).startswith(f"{len(texts)} posts predicted in {tmp_path / 'out'}")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "in.csv",
        "out",
    ]
    assert "mood adapted to rates that were" in capsys.readouterr().err

    plain = predictor(texts, tasks=["mood"])
    scores_NY = np.array([list(one["mood"]["scores"].values()) for one in plain if "mood" in one])
    prior_Y = np.array([0.5, 0.3, 0.2])
    rates_Y = np.array([0.0625, 0.0375, 0.9])
    if how == "em":
        rates_Y = estimated(lambda: [scores_NY], prior_Y, exclusive=True)
    expected_NY = adapted(scores_NY, prior_Y, rates_Y, exclusive=True)
    written = (tmp_path / "out").read_text()
    if format == "tweeteval":
        assert [int(line) for line in written.split()] == expected_NY.argmax(1).tolist()
    elif format == "html":
        assert written.count(f"adapted to another mix of labels ({how})") == len(expected_NY)
    else:
        if format == "jsonl":
            rows = [json.loads(line) for line in written.splitlines()]
            assert [row["id"] for row in rows] == [str(n) for n in range(15)]
            told = [row["mood"] for row in rows if "mood" in row]
            found_NY = [[one["scores"][label] for label in MOOD.labels] for one in told]
            assert {one["prior"] for one in told} == {how}
            assert [one["label"] for one in told] == [MOOD.labels[y] for y in expected_NY.argmax(1)]
        else:
            rows = [row for row in csv.DictReader(written.splitlines()) if not row["error"]]
            found_NY = [[float(row[f"mood/{label}"]) for label in MOOD.labels] for row in rows]
            assert {row["mood/prior"] for row in rows} == {how}
        np.testing.assert_allclose(found_NY, expected_NY, atol=1e-4)
        (tmp_path / "out").rename(tmp_path / f"out.{format}")
        with pytest.raises(ValueError, match="a report estimates the mix itself"):
            read_corpus(tmp_path / f"out.{format}")


def test_options_that_do_not_go_together_are_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match="--explain gradients explains labels as the model gives"):
        PredictOptions(explain="gradients", adapt_prior="em")
    with pytest.raises(ValueError, match="--adapt-prior.*em"):
        PredictOptions(adapt_prior="en")
    (tmp_path / "in.txt").write_text("good day\n")
    with pytest.raises(ValueError, match="heat gives a post no probability"):
        options = PredictOptions(tasks=["heat"], adapt_prior="em")
        predict_adapted(predictor, tmp_path / "in.txt", tmp_path / "out", options)


def test_drawn_mixes_gain_what_bayes_rule_promises():
    gold_N, _, scores_NY = world(PRIOR, 3000, seed=2)
    rows = [
        {"gold": MOOD.labels[y], "scores": dict(zip(MOOD.labels, row, strict=True))}
        for y, row in zip(gold_N, scores_NY.tolist(), strict=True)
    ]
    told = shifted(MIXED, rows)
    assert told["accuracy gain assumed"][1] > 0.01 and told["accuracy gain em"][1] > 0.01
    assert told["accuracy gain assumed"][0] >= told["accuracy gain em"][0] - 0.002
    assert told["rate error em"][2] < 0.06
