"""Drift: the classifier two-sample test against references, its size and power by simulation, and what is shown."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from comoe.commands import main
from comoe.reporting.drift import (
    FOLDS,
    LEAST_COMPARED,
    Embedder,
    area_interval,
    areas,
    discriminate,
    draw_sample,
    drift_of,
    told_by_embeddings,
)
from tests.helpers_export import MOOD, export_tiny, tiny_predictor


def numbered(start, count):
    return [f"post {number}" for number in range(start, start + count)]


def sample_of(old, new, *, width=4, shift=0.0, seed=0):
    """Texts that no side shares, with normal vectors, those of the new side shifted."""
    sample = draw_sample(numbered(0, old), numbered(10**6, new), seed=seed)
    vectors = np.random.default_rng(seed).standard_normal((len(sample.texts), width))
    vectors[sample.new_R, 0] += shift
    return vectors, sample


def test_areas_are_those_of_scikit_learn_ties_too():
    rng = np.random.default_rng(0)
    scores, sides = rng.integers(0, 6, (50, 7)).astype(float), rng.integers(0, 2, (50, 7))
    expected = [roc_auc_score(sides[:, place], scores[:, place]) for place in range(7)]
    np.testing.assert_allclose(areas(scores, sides.astype(float)), expected, atol=1e-12)


def test_the_discriminant_is_that_of_the_formula_on_folds_that_it_has_not_seen():
    """Fold by fold: the shrunk covariance of scikit-learn, inverted, times the difference of the means."""
    vectors, sample = sample_of(40, 40, shift=0.7)
    vectors[:, 1] = 100 * vectors[:, 1] + 5
    found = told_by_embeddings(vectors, sample, permutations=1)
    expected = []
    for fold in range(FOLDS):
        held = sample.folds_R == fold
        seen = vectors[~held]
        scaled = (seen - seen.mean(0)) / seen.std(0)
        shrunk = LedoitWolf(assume_centered=True).fit(scaled).covariance_
        side = sample.new_R[~held]
        difference = scaled[side].mean(0) - scaled[~side].mean(0)
        weights = np.linalg.inv(shrunk) @ difference
        scores = ((vectors[held] - seen.mean(0)) / seen.std(0)) @ weights
        expected.append(roc_auc_score(sample.new_R[held], scores))
    assert found["auc"] == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_fold_is_scored_without_its_own_sides():
    """Noise that is as wide as there are rows: fitted to all of them, a discriminant finds the sides in it."""
    found = []
    for seed in range(20):
        vectors, sample = sample_of(100, 100, width=200, seed=seed)
        found.append(told_by_embeddings(vectors, sample, permutations=1)["auc"])
    assert abs(np.mean(found) - 0.5) < 0.05


def test_the_interval_solves_the_equation_of_hanley_and_mcneil():
    for area, zeros, ones in (
        (0.5, 30, 40),
        (0.83, 20, 90),
        (0.97, 50, 50),
        (1.0, 20, 25),
        (0.0, 20, 25),
    ):
        mean = (zeros + ones) / 2 - 1
        for end, outer in zip(area_interval(area, zeros, ones), (0.0, 1.0), strict=True):
            if end == outer == area:
                continue
            first, second = end / (2 - end), 2 * end**2 / (1 + end)
            variance = end * (1 - end) + mean * (first - end**2) + mean * (second - end**2)
            variance /= zeros * ones
            assert abs(area - end) == pytest.approx(norm.ppf(0.975) * variance**0.5, rel=1e-6)
            assert (end < area) == (outer == 0.0)


@pytest.mark.parametrize("true", [0.5, 0.8, 0.97])
def test_the_interval_of_an_area_holds_the_true_one_in_95_of_100_draws(true):
    rng, zeros, ones, draws = np.random.default_rng(3), 40, 60, 2000
    sides = np.repeat([0.0, 1.0], [zeros, ones])[:, None].repeat(draws, axis=1)
    # Of two normals a distance of sqrt(2) z apart, the area is Phi(z).
    scores = rng.standard_normal((zeros + ones, draws)) + sides * 2**0.5 * norm.ppf(true)
    ends = [area_interval(area, zeros, ones) for area in areas(scores, sides)]
    assert 0.93 < np.mean([low <= true <= high for low, high in ends]) < 0.98


RUNS, LEVEL = 500, 0.05


@pytest.mark.parametrize("posts", ["one by one", "repeated"])
def test_posts_of_one_distribution_are_told_apart_in_5_of_100_simulations(posts):
    """The size of the test, with sides of 60 and 300 posts; of 39 permutations 0.05 is exact.

    Repeated: texts come as often as words do, a fifth of the posts from the ten commonest, so that a
    side has some of them many times and the sides share them.
    """
    rng, wrong = np.random.default_rng(4), 0
    share = 1 / np.arange(1, 5001) ** 0.7
    vectors = rng.standard_normal((10**6 if posts == "one by one" else 5000, 5)).astype(np.float32)
    for run in range(RUNS):
        if posts == "repeated":
            drawn = rng.choice(5000, 360, p=share / share.sum())
        else:
            drawn = rng.choice(10**6, 360, replace=False)
        old, new = np.split(np.char.mod("%d", drawn), [60])
        sample = draw_sample(old.tolist(), new.tolist(), seed=run)
        of_rows = vectors[np.array(sample.texts, dtype=int)]
        told = told_by_embeddings(of_rows, sample, permutations=39, seed=run)
        wrong += told["p_value"] <= LEVEL
    low, high = binom.interval(0.999, RUNS, LEVEL)
    assert low <= wrong <= high


def test_a_shift_is_found_and_the_larger_the_surer():
    areas_of = []
    for shift, least in ((0.5, 16), (1.0, 20), (2.0, 20)):
        found = []
        for seed in range(20):
            vectors, sample = sample_of(150, 1000, shift=shift, seed=seed)
            found.append(told_by_embeddings(vectors, sample, permutations=99, seed=seed))
        assert sum(one["p_value"] <= LEVEL for one in found) >= least
        areas_of.append(np.mean([one["auc"] for one in found]))
        # The best area for two normals: Phi(shift / sqrt(2)).
        assert areas_of[-1] == pytest.approx(norm.cdf(shift / 2**0.5), abs=0.03)
    assert areas_of == sorted(areas_of)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_interval_holds_the_area_of_the_fitted_classifiers_in_95_of_100_simulations(shift):
    """Their area for any number of posts: of normals as many standard deviations apart as their weights see."""
    held, runs = 0, 100
    for seed in range(runs):
        vectors, sample = sample_of(100, 100, width=12, shift=shift, seed=seed)
        found = told_by_embeddings(vectors, sample, permutations=49, seed=seed)
        true = []
        for fold in range(FOLDS):
            seen = sample.folds_R != fold
            side = sample.new_R[seen][:, None].astype(float)
            # A linear score: its weights are the scores of the axes, less that of the origin.
            points = np.vstack([np.zeros(12), np.eye(12)])
            scores = discriminate(vectors[seen], side, points)[:, 0]
            weights = scores[1:] - scores[0]
            true.append(norm.cdf(weights[0] * shift / np.linalg.norm(weights) / 2**0.5))
        held += found["low"] <= np.mean(true) <= found["high"]
    assert held >= binom.ppf(0.001, runs, 0.95)


def test_as_many_are_drawn_of_each_side_and_equal_texts_never_cross_folds():
    old = [f"Post {number}" for number in range(60)] + ["", "  ", "post  1"]
    new = [f"post {number}\n" for number in range(30, 500)] * 2
    sample = draw_sample(old, new)
    assert not {"", "  "} & set(sample.texts)
    keys = [" ".join(text.lower().split()) for text in sample.texts]
    for side in (False, True):
        mine = [key for key, new in zip(keys, sample.new_R, strict=True) if new == side]
        assert len(mine) == len(set(mine)) <= 61
    folds = {}
    for key, fold in zip(keys, sample.folds_R, strict=True):
        assert folds.setdefault(key, fold) == fold
    both = {key for key in keys if keys.count(key) == 2}
    assert both and sample.shared_R.tolist() == [key in both for key in keys]
    assert sample.whole and draw_sample(old[: LEAST_COMPARED - 1], new) is None
    assert draw_sample([], new) is None


def test_the_labeled_posts_themselves_are_not_told_from_themselves():
    texts = numbered(0, 100)
    sample = draw_sample(texts, texts[::-1])
    vectors = {text: np.random.default_rng(int(text[5:])).random(8) for text in texts}
    rows = np.stack([vectors[text] for text in sample.texts])
    found = told_by_embeddings(rows, sample, permutations=9)
    assert found["auc"] == pytest.approx(0.5, abs=1e-9) and found["p_value"] == 1.0
    assert draw_sample(texts, texts).shared_R.all()


def test_words_say_what_changed_in_english_and_chinese():
    rng = np.random.default_rng(0)

    def posts(words, count):
        return [f"{' '.join(rng.choice(words, 4))} {number}" for number in range(count)]

    old, new = ["good", "day", "sun", "rain"], ["good", "day", "flight", "gate"]
    found = drift_of(posts(old, 200), posts(new, 300), task="mood")["words"]
    assert found["auc"] > 0.9
    assert {"flight", "gate"} <= set(found["more"]) and {"sun", "rain"} <= set(found["less"])
    assert "good" not in found["more"] + found["less"]
    same = drift_of(posts(old, 200), posts(old, 300), task="mood")["words"]
    assert same["auc"] < 0.6 and same["more"] == same["less"] == []
    hidden = drift_of(posts(old, 200), posts(new, 300), task="mood", quoted=False)["words"]
    assert hidden["more"] == hidden["less"] == []
    signs = [["天", "气", "很", "好"], ["航", "班", "很", "晚"]]
    chinese = ["".join(rng.choice(some, 12)) for some in signs for _ in range(60)]
    found = drift_of(chinese[:60], chinese[60:], task="mood")["words"]
    assert found["auc"] > 0.9 and "航" in found["more"]
    # No word is in two posts.
    alone = [f"{chr(97 + number % 26)}{number:03d}" for number in range(60)]
    assert drift_of(alone[:30], alone[30:], task="mood")["words"] is None


def test_posts_without_an_embedding_are_left_out_and_too_few_tell_nothing():
    old, new = numbered(0, 50), numbered(100, 50)

    class Without:
        """Embeds the numbers that this one does not divide."""

        key = staticmethod(str)

        def __init__(self, number):
            self.number = number

        def __call__(self, texts, task):
            numbers = [int(text[5:]) for text in texts]
            return [np.array([each, 1.0]) if each % self.number else None for each in numbers]

    found = drift_of(old, new, task="mood", embed=Without(3))["embeddings"]
    assert (found["old"], found["new"]) == (33, 34) and found["auc"] > 0.95
    nothing = drift_of(old, new, task="mood", embed=Without(1))
    assert nothing["embeddings"] is None and nothing["words"]


def test_posts_that_the_model_reads_alike_are_one_text_and_never_cross_folds(tmp_path):
    """Retweets with other links and user names; without a model they are other texts."""
    predictor = tiny_predictor(tmp_path)
    copies = [
        f"RT @user{copy}: Post {number} https://t.co/{number}x{copy}"
        for number in range(200, 230)
        for copy in range(4)
    ]
    old, new = numbered(0, 120), [*copies, *numbered(300, 60)]
    sample = draw_sample(old, new, key=Embedder(predictor).key)
    copied = {text.split()[3] for text in sample.texts if text.startswith("RT")}
    assert sum(text.startswith("RT") for text in sample.texts) == len(copied) > 15
    apart = draw_sample(old, new)
    folds = {}
    for text, fold in zip(apart.texts, apart.folds_R, strict=True):
        if text.startswith("RT"):
            folds.setdefault(text.split()[3], set()).add(fold)
    assert max(map(len, folds.values())) > 1
    told = drift_of(old, new, task="mood", embed=Embedder(predictor))["embeddings"]
    assert told["new"] == sample.posts[1] < apart.posts[1]


@pytest.mark.parametrize("options", [{"route_by": "both"}, {"own_layers": 1}])
def test_a_text_is_embedded_once_as_its_task_reads_it(options, tmp_path):
    predictor, asked = tiny_predictor(tmp_path, **options), []
    # Layers of tasks begin alike.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in predictor.exported.model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)

    class Counted:
        def __getattr__(self, name):
            return getattr(predictor, name)

        def embed(self, texts, **more):
            asked.append((list(texts), more["task"]))
            return predictor.embed(texts, **more)

    embed = Embedder(Counted())
    rows = embed(["good day", " ", "good day"], "mood")
    expected = predictor.embed(["good day"], task="mood")[0]["embedding"]
    np.testing.assert_allclose(rows[0], expected, atol=1e-6)
    assert rows[1] is None and rows[2] is rows[0]
    embed(["good day", "the sun"], "mood")
    # The gate, or the last layer, is that of the task.
    (row,) = embed(["good day"], "topic")
    expected = predictor.embed(["good day"], task="topic")[0]["embedding"]
    np.testing.assert_allclose(row, expected, atol=1e-6)
    assert np.abs(row - rows[0]).max() > 1e-3
    assert asked == [(["good day", " "], "mood"), (["the sun"], "mood"), (["good day"], "topic")]
    with pytest.raises(ValueError, match="moo.*did you mean mood"):
        embed(["good day"], "moo")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_tiny(folder, tasks=(MOOD,))
    return folder / "export"


@pytest.mark.parametrize("kind", ["same", "other"])
def test_a_report_shows_drift_by_the_embeddings_of_a_model(kind, export, tmp_path):
    rng = np.random.default_rng(5)
    words = {
        "same": ["good", "day", "sun", "ann", "user"],
        "other": ["bad", "rain", "paris", "the"],
    }

    def line(kind, **more):
        label = MOOD.labels[0]
        scores = dict.fromkeys(MOOD.labels, 0.0) | {label: 1.0}
        return {
            "text": " ".join(rng.choice(words[kind], 6)),
            "mood": {"label": label, "scores": scores},
        }

    rows = [line(kind) for _ in range(150)]
    old = [line("same") for _ in range(120)]
    old = [{"text": one["text"], "gold": MOOD.labels[0], **one["mood"]} for one in old]
    (tmp_path / "validation").mkdir()
    for place, some in (("p.jsonl", rows), ("validation/mood.jsonl", old)):
        (tmp_path / place).write_text("".join(json.dumps(one) + "\n" for one in some))
    labeled = ["--labeled", str(tmp_path / "validation")]
    given = [str(tmp_path / "p.jsonl"), *labeled, "--json", str(tmp_path / "r.json")]
    main.main(["report", *given, "--model", str(export), "--device", "cpu"])
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    found, page = task["drift"]["embeddings"], (tmp_path / "p.html").read_text()
    assert found["permutations"] == 999 and 20 <= found["old"] <= 120 >= found["new"]
    assert found["low"] <= found["auc"] <= found["high"]
    if kind == "same":
        assert found["p_value"] > 0.05 and "does not tell these posts from" in page
        assert "of another kind than" not in page
    else:
        assert found["p_value"] == 0.001 and found["auc"] > 0.95
        assert "their embeddings tell them apart" in page and "p = 0.001 by 999 random" in page
        assert "Words of these posts: " in page and "rain" in task["drift"]["words"]["more"]
    main.main(["report", *given, "--examples", "0"])
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert "embeddings" not in task["drift"] and task["drift"]["words"]["more"] == []
    assert "Words of these posts" not in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    "words", ["--revision v2", "--device cpu", "--no-verify", "--plugins my_package.mine"]
)
def test_options_of_a_model_without_one_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.setenv("COMOE_PLUGINS", "")
    with pytest.raises(SystemExit, match=f"{words.split()[0]} is of --model, .*; name it"):
        main.main(["report", str(tmp_path / "p.jsonl"), *words.split()])


def test_a_model_without_labeled_posts_is_refused(export, tmp_path):
    with pytest.raises(SystemExit, match="--model compares the posts with labeled ones"):
        main.main(["report", str(tmp_path / "p.jsonl"), "--model", str(export)])
    given = ["--gold", "mood=gold", "--model", str(export), "--output", str(export / "config.json")]
    with pytest.raises(SystemExit, match="config.json is a file of the model"):
        main.main(["report", str(tmp_path / "p.jsonl"), *given])
