"""Probabilities under another mix of labels: by hand in float64, the mix found again, and what it gains."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest

from comoe.evaluation.calibration import RULES, Calibrator, label_mix, with_calibration
from comoe.evaluation.evaluate import compute_metrics
from comoe.evaluation.prior_shift import adapted, completed, estimated, fit_prior
from comoe.experiments.shifted_mix import shifted
from comoe.inference import predict_adapted
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.prior import (
    apply_rates,
    choose_adapted,
    find_rates,
    moved_thresholds,
    read_rates,
)
from comoe.reporting.predictions import read_corpus
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
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


def two(rate, count, seed, trained, sharp):
    """Labels and logits of a world of two Gaussians, by a model of posts of the share ``trained``."""
    draw = np.random.default_rng(seed)
    gold_N = (draw.random(count) < rate).astype(int)
    odds_N = 1.6 * (draw.normal(size=count) + np.where(gold_N, 0.8, -0.8))
    odds_N = sharp * (odds_N + np.log(trained / (1 - trained)))
    return gold_N, np.stack([0 * odds_N, odds_N], axis=1)


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
@pytest.mark.parametrize("trained, sharp", [(0.1, 1.0), (0.5, 1.0), (0.5, 2.5)])
@pytest.mark.parametrize("temperatures", [True, False])
def test_scores_of_weighed_classes_are_adapted_as_rightly_as_calibrated_ones(
    kind, trained, sharp, temperatures
):
    """Validation posts with a share of 0.1, read by a model of balanced classes; the mix moves to 0.5."""
    exclusive = kind == "single_label"

    def shaped(gold_N, logits_N2):
        return (gold_N, logits_N2) if exclusive else (gold_N[:, None], logits_N2[:, 1:])

    task = Task("t", kind, ("no", "yes") if exclusive else ("yes",), "macro_f1")
    gold, logits = shaped(*two(0.1, 8000, 0, trained, sharp))
    calibrator = Calibrator([task], temperatures=temperatures, thresholds=False)
    outputs = [PostOutput(row, z, g) for row, (z, g) in enumerate(zip(logits, gold, strict=True))]
    calibrator.take("validation", compute_metrics({"t": outputs}, [task]))
    (task,) = with_calibration([task], json.loads(json.dumps(calibrator.report())))
    assert task.score_prior[-1] == pytest.approx(trained, abs=0.03)

    def scores_of(logits_NY):
        return RULES[kind].probabilities(logits_NY / (task.temperature or 1.0))

    prior_Y, settings = (
        np.array(task.score_prior),
        {"exclusive": exclusive, "power": task.score_power},
    )
    for rate in (0.1, 0.5):
        truth_N2 = RULES["single_label"].probabilities(two(rate, 8000, 1, rate, 1.0)[1])
        scores_NY = scores_of(shaped(*two(rate, 8000, 1, trained, sharp))[1])
        found_Y = estimated(lambda scores_NY=scores_NY: [scores_NY], prior_Y, **settings)
        assert found_Y[-1] == pytest.approx(rate, abs=0.02)
        rates_Y = np.array([1 - rate, rate][-len(prior_Y) :])
        right_NY = adapted(scores_NY, prior_Y, rates_Y, **settings)
        assert np.abs(right_NY[:, -1] - truth_N2[:, 1]).mean() < 0.015
    # The validation posts themselves stay where they are, and so do decisions by thresholds.
    scores_NY = scores_of(logits)
    same_Y = estimated(lambda: [scores_NY], prior_Y, **settings)
    np.testing.assert_allclose(same_Y, task.prior, atol=5e-4)
    task = replace(task, thresholds=(0.3,))
    np.testing.assert_array_equal(
        task.rules.decided(
            adapted(scores_NY, prior_Y, np.array(task.prior), **settings), moved_thresholds(task)
        ),
        task.rules.decided(scores_NY, task),
    )


def test_labels_without_a_mistake_or_a_post_have_a_finite_mix():
    gold_N = np.array([0, 1] * 20)
    logits_N3 = np.where(np.eye(3)[gold_N], 50.0, -50.0)
    prior_Y, power = fit_prior(logits_N3, gold_N, RULES["single_label"].probabilities)
    assert (prior_Y > 0).all() and prior_Y.sum() == pytest.approx(1) and 0.08 < power < 12
    assert prior_Y[0] == pytest.approx(prior_Y[1], rel=1e-3)


MIXED = replace(MOOD, prior=(0.5, 0.3, 0.2), score_prior=(0.5, 0.3, 0.2), thresholds=None)
BOTH = replace(SIGNS, prior=(0.5, 0.1), score_prior=(0.5, 0.1))


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
        # An export of a version that took the shares of the validation posts for the scores' mix.
        (["mood.good=0.4"], [replace(MIXED, score_prior=None)], "train and export with this comoe"),
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
    own = tmp_path / ".out.unadapted.jsonl"
    own.write_text("the user's own")
    (tmp_path / "in.csv").write_text(
        "id,text\n" + "".join(f"{n},{t}\n" for n, t in enumerate(texts))
    )
    rates = {"assume_rates": ["mood.good=0.9"]} if how == "assumed" else {"adapt_prior": "em"}
    options = PredictOptions(format=format, tasks=["mood"], **rates)
    done = predict_file(predictor, tmp_path / "in.csv", tmp_path / "out", options)
    assert str(done).startswith(f"{len(texts)} posts predicted in {tmp_path / 'out'}")
    assert own.read_text() == "the user's own"
    assert {path.name for path in tmp_path.iterdir()} == {own.name, "in.csv", "out"}
    assert "mood adapted to rates that were" in capsys.readouterr().err

    if format == "tweeteval":  # A line for every post: an empty one is read as a lone user name.
        texts = [text if text.strip() else "@user" for text in texts]
    plain = predictor(texts, tasks=["mood"])
    scores_NY = np.array([list(one["mood"]["scores"].values()) for one in plain if "mood" in one])
    prior_Y = np.array([0.5, 0.3, 0.2])
    rates_Y = np.array([0.0625, 0.0375, 0.9])
    if how == "em":
        rates_Y = estimated(lambda: [scores_NY], prior_Y, exclusive=True)
    expected_NY = adapted(scores_NY, prior_Y, rates_Y, exclusive=True)
    written = (tmp_path / "out").read_text()
    told = Counter(MOOD.labels[y] for y in expected_NY.argmax(1))
    assert done.record()["labels"] == {"mood": told}
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


def test_a_label_that_is_called_prior_keeps_its_column(tmp_path):
    task = replace(MIXED, labels=("prior", "prior_", "good"))
    model = tiny_predictor(tmp_path, tasks=(task,))
    (tmp_path / "in.txt").write_text("good day\nbad rain\nthe sun\n")
    target = tmp_path / "out.csv"
    predict_file(model, tmp_path / "in.txt", target, PredictOptions(format="csv"))
    assert read_corpus(target).tasks["mood"].labels == task.labels
    options = PredictOptions(format="csv", adapt_prior="em")
    predict_file(model, tmp_path / "in.txt", target, options)
    head, *cells = csv.reader(target.read_text().splitlines())
    assert len(set(head)) == len(head) and head.count("mood/prior__") == 1
    for row in (dict(zip(head, some, strict=True)) for some in cells):
        assert row["mood/prior__"] == "em"
        assert sum(float(row[f"mood/{label}"]) for label in task.labels) == pytest.approx(1)
    with pytest.raises(ValueError, match="a report estimates the mix itself"):
        read_corpus(target)


def test_options_that_do_not_go_together_are_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match="--explain gradients explains labels as the model gives"):
        PredictOptions(explain="gradients", adapt_prior="em")
    with pytest.raises(ValueError, match="--adapt-prior.*em"):
        PredictOptions(adapt_prior="en")
    (tmp_path / "in.txt").write_text("good day\n")
    with pytest.raises(ValueError, match="heat gives a post no probability"):
        options = PredictOptions(tasks=["heat"], adapt_prior="em")
        predict_file(predictor, tmp_path / "in.txt", tmp_path / "out", options)
    rates = {"assume_rates": ["mood.good=0.5"], "adapt_prior": "em"}
    with pytest.raises(ValueError, match="--adapt-prior: each of these tasks has its rates from"):
        options = PredictOptions(tasks=["mood"], **rates)
        predict_file(predictor, tmp_path / "in.txt", tmp_path / "out", options)


EM = PredictOptions(tasks=["mood"], adapt_prior="em")


def test_a_stop_behind_the_last_post_is_resumed_without_a_prediction(
    predictor, tmp_path, monkeypatch
):
    source, target = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("good day\nbad rain\nthe sun\n" * 500)
    expected = tmp_path / "expected"
    predict_file(predictor, source, expected, EM)

    def stopped(lines, tasks):
        next(iter(lines))
        # Meanwhile nobody else writes this output.
        with pytest.raises(ValueError, match="is in use by process"):
            predict_file(predictor, source, target, EM)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(predict_adapted, "find_rates", stopped)
        predict_file(predictor, source, target, EM)
    assert not target.exists()
    with monkeypatch.context() as patched:
        patched.setattr(type(predictor), "__call__", None)
        done = predict_file(predictor, source, target, replace(EM, resume=True))
    assert done.resumed_at == done.counts.posts == 1500
    assert target.read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "out", "expected"}


def test_posts_none_of_which_can_be_predicted_are_written_with_their_errors(predictor, tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n1, \n2, \n")
    with pytest.raises(ValueError, match=f"none of the 2 posts .* see {tmp_path / 'out'};"):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out", EM)
    assert (tmp_path / "out").read_text().count('"error"') == 2


@pytest.mark.parametrize("output", ["pipe", "folder", "file.parquet", "file.gz"])
def test_posts_wait_where_nobody_else_reads_them(predictor, tmp_path, monkeypatch, output):
    shared, target = tmp_path / "shared", tmp_path / "places" / output
    shared.mkdir()
    target.parent.mkdir()
    (tmp_path / "in.txt").write_text("good day\nbad rain\n")
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    modes = []

    def look(lines, tasks):
        modes.extend(path.stat().st_mode & 0o777 for path in shared.iterdir())
        return find_rates(lines, tasks)

    monkeypatch.setattr(predict_adapted, "find_rates", look)
    format = "parquet" if output in ("folder", "file.parquet") else "jsonl"
    read = {
        "pipe": lambda: reader.communicate()[0].decode().splitlines(),
        "folder": lambda: pyarrow.parquet.read_table(target).to_pylist(),
        "file.parquet": lambda: pyarrow.parquet.read_table(target).to_pylist(),
        "file.gz": lambda: gzip.decompress(target.read_bytes()).splitlines(),
    }[output]
    if output == "pipe":
        os.mkfifo(target)
        reader = subprocess.Popen(["cat", target], stdout=subprocess.PIPE)
    predict_file(predictor, tmp_path / "in.txt", target, replace(EM, format=format))
    assert len(read()) == 2
    assert modes == ([0o700] if output == "pipe" else [])
    assert not list(shared.iterdir())
    assert [path.name for path in target.parent.iterdir()] == [output]


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
