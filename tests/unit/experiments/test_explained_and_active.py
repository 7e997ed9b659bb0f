"""Deletion curves of a model that is known, and labeling loops on posts that are easy to tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from comoe.experiments import active, faithfulness
from comoe.inference.select import STRATEGIES


class Known:
    """P(good) is (1 + number of "good") / 10; gradients say so, attention says the opposite."""

    def __call__(self, texts, tasks):
        shares = [(1 + text.split().count("good")) / 10 for text in texts]
        return [{"mood": {"label": "good", "scores": {"good": s, "bad": 1 - s}}} for s in shares]

    def explain(self, texts, *, method, tasks):
        found = self(texts, tasks)
        for text, one in zip(texts, found, strict=True):
            weights = [[word, float(word == "good")] for word in text.split()]
            one["mood"]["gradients"] = [{"label": "good", "words": weights}]
            one["mood"]["attention"] = [[word, 1 - weight] for word, weight in weights]
            if text == "broken":
                one["error"] = one.pop("mood") and "broken"
        return found


def test_deletion_curves_of_a_known_model():
    # Ten words each, of which four are good; two posts that do not count.
    texts = [
        "good a good b c good d e good f",
        "a b good good c d e good good f",
        "too short",
        "broken",
    ]
    found = faithfulness.curves(Known(), texts, "mood")
    gradients = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(found["gradients"], [gradients] * 2)
    np.testing.assert_allclose(found["attention"], [[0.5] * 7 + [0.4, 0.3, 0.2]] * 2)
    told = faithfulness.summary(found)
    assert told["posts"] == 2 and told["areas"]["gradients"] == pytest.approx([1.5 / 9] * 3)
    mean, low, high = told["differences"]["gradients - random words"]
    assert low <= mean <= high < 0 < told["differences"]["attention - random words"][0]


def test_labeling_loops_end_with_as_many_labels_and_differ_by_seed_alone():
    draw = np.random.default_rng(0)
    gold_N = draw.integers(3, size=1100)
    vectors_NM = np.eye(8, dtype=np.float32)[gold_N] + 0.4 * draw.normal(size=(1100, 8))
    data = dict(
        pool_NM=vectors_NM[:900], gold_N=gold_N[:900], test_KM=vectors_NM[900:], test_K=gold_N[900:]
    )
    rows = []
    for strategy in STRATEGIES:
        for seed in (0, 1):
            scores = active.loop(**data, strategy=strategy, seed=seed, labels="abc")
            assert list(scores) == [200, 400, 800] and all(
                0.6 < one <= 1 for one in scores.values()
            )
            rows.append({"data": "d", "strategy": strategy, "seed": seed})
            rows[-1]["macro_f1"] = {str(size): value for size, value in scores.items()}
    again = active.loop(**data, strategy="diverse", seed=1, labels="abc")
    assert {str(size): value for size, value in again.items()} == next(
        row["macro_f1"] for row in rows if (row["strategy"], row["seed"]) == ("diverse", 1)
    )
    cell = active.summary(rows)["d"]["200"]
    by_hand = np.mean([row["macro_f1"]["200"] for row in rows if row["strategy"] == "margin"])
    random = np.mean([row["macro_f1"]["200"] for row in rows if row["strategy"] == "random"])
    assert cell["seeds"] == 2 and cell["mean"]["margin"]["mean"] == pytest.approx(by_hand)
    assert cell["gain"]["margin"]["mean"] == pytest.approx(by_hand - random)
