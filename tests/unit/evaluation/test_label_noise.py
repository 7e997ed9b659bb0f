"""Confident learning against its definition written out post by post, and on labels that were spoiled on purpose."""

import numpy as np
import pytest

from comoe.evaluation.label_noise import confident_joint, estimate_label_noise, joint_of


def written_out(given, scores):
    """The confident joint and the estimated joint of Northcutt et al. 2021, with loops."""
    posts, width = scores.shape
    thresholds = []
    for label in range(width):
        own = [scores[i, label] for i in range(posts) if given[i] == label]
        thresholds.append(sum(own) / len(own) if own else float("inf"))
    counts = [[0] * width for _ in range(width)]
    for i in range(posts):
        sure = [label for label in range(width) if scores[i, label] >= thresholds[label]]
        if sure:
            counts[given[i]][max(sure, key=lambda label: scores[i, label])] += 1
    joint = [[0.0] * width for _ in range(width)]
    for a in range(width):
        of_a, total = sum(1 for label in given if label == a), sum(counts[a])
        for b in range(width):
            share = counts[a][b] / total if total else float(a == b)
            joint[a][b] = share * of_a / posts
    return np.array(counts), np.array(joint)


def spoiled(posts=4000, *, width=3, sharpness=3.0, seed=0):
    """Posts with known true labels, a model's probabilities for them, and given labels that are often wrong."""
    generator = np.random.default_rng(seed)
    true = generator.integers(0, width, posts)
    logits = generator.normal(size=(posts, width)) + sharpness * np.eye(width)[true]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # Of the posts that are 0 one in five is called 1, of those that are 2 one in ten is called 0.
    given = true.copy()
    draw = generator.random(posts)
    given[(true == 0) & (draw < 0.2)] = 1
    given[(true == 2) & (draw < 0.1)] = 0
    return true, given, scores


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [2, 4])
def test_the_joint_is_that_of_the_definition(width, seed):
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.ones(width), 50)
    # The last label is given to nobody.
    given = generator.integers(0, width - 1, 50)
    counts, joint = written_out(given, scores)
    np.testing.assert_array_equal(confident_joint(given, scores), counts)
    found = joint_of(confident_joint(given, scores), np.bincount(given, minlength=width))
    np.testing.assert_allclose(found, joint, atol=1e-12)
    assert found.sum() == pytest.approx(1)


def test_spoiled_labels_are_found_and_counted():
    true, given, scores = spoiled()
    found = estimate_label_noise(given, scores)
    wrong = given != true
    joint = np.zeros((3, 3))
    np.add.at(joint, (given, true), 1 / len(true))
    np.testing.assert_allclose(found.joint_YY, joint, atol=0.02)
    assert found.wrong == pytest.approx(wrong.mean(), abs=0.02)
    # Most of what it names is wrong, most of what is wrong it names, and the likely label is the true one.
    assert wrong[found.rows_S].mean() > 0.8
    assert len(found.rows_S) > 0.7 * wrong.sum()
    assert (found.likely_S == true[found.rows_S]).mean() > 0.8
    # The first ones are surer than the last ones, and none has the likeliest label.
    half = len(found.rows_S) // 2
    assert wrong[found.rows_S[:half]].mean() > wrong[found.rows_S[half:]].mean()
    assert (scores[found.rows_S].argmax(axis=1) != given[found.rows_S]).all()
    assert len(set(found.rows_S.tolist())) == len(found.rows_S)


def test_labels_that_a_model_agrees_with_are_not_suspicious():
    true, _, scores = spoiled(sharpness=12.0)
    found = estimate_label_noise(true, scores)
    assert found.wrong == pytest.approx(0, abs=1e-3) and len(found.rows_S) <= 4
    one = estimate_label_noise(np.array([1]), np.array([[0.9, 0.1]]))
    assert one.joint_YY.tolist() == [[0, 0], [0, 1]] and len(one.rows_S) == 0
