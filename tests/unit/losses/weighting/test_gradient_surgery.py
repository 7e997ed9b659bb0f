"""Combining conflicting gradients: by inner products alone the same as by the gradients themselves."""

import itertools

import numpy as np
import pytest

from comoe.losses.weighting.gradient_surgery import cagrad, pcgrad


def random_gradients(seed: int, count: int, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) * np.exp(rng.normal(size=(count, 1)))


def pcgrad_of_vectors(gradients_KX: np.ndarray, step: int) -> np.ndarray:
    """Algorithm 1 of the paper, on the gradients themselves."""
    rng, total = np.random.default_rng(step), 0.0
    for own, gradient in enumerate(gradients_KX):
        left = gradient.copy()
        for other in rng.permutation(len(gradients_KX)):
            if other != own and left @ gradients_KX[other] < 0:
                left -= (
                    left
                    @ gradients_KX[other]
                    / (gradients_KX[other] @ gradients_KX[other])
                    * gradients_KX[other]
                )
        total = total + left
    return total


@pytest.mark.parametrize("seed", range(8))
def test_pcgrad_by_inner_products_equals_pcgrad_by_vectors(seed):
    gradients = random_gradients(seed, 2 + seed % 5)
    factors = pcgrad(gradients @ gradients.T, step=seed)
    np.testing.assert_allclose(
        factors @ gradients, pcgrad_of_vectors(gradients, seed), rtol=1e-12, atol=1e-12
    )


def test_pcgrad_of_two_gradients_by_hand():
    # g1 = (1, 0), g2 = (-1, 1): g1 keeps (1, 0) + (-1, 1)/2, g2 keeps (0, 1).
    gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(pcgrad(gradients @ gradients.T, step=3), [2.0, 1.5])
    np.testing.assert_allclose(pcgrad(gradients @ gradients.T, step=3) @ gradients, [0.5, 1.5])


def test_pcgrad_leaves_gradients_that_agree_and_gradients_of_nothing_alone():
    assert pcgrad(
        np.array([[1.0, 0.2, 0.0], [0.2, 3.0, 0.0], [0.0, 0.0, 0.0]]), step=0
    ).tolist() == [1.0, 1.0, 1.0]


def test_the_order_of_pcgrad_is_drawn_by_the_step():
    gradients = random_gradients(4, 6, width=3)
    found = [tuple(pcgrad(gradients @ gradients.T, step=step)) for step in (0, 1, 2, 3, 0)]
    assert found[0] == found[4] and len(set(found)) > 1


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_solves_the_problem_that_the_paper_begins_with(seed):
    """It maximizes the smallest g_i . d over all d with |d - g0| <= c |g0|; no direction of many is better."""
    gradients, strength = random_gradients(seed, 2 + seed), 0.5
    count, mean = len(gradients), gradients.mean(axis=0)
    direction = cagrad(gradients @ gradients.T, strength=strength) @ gradients / count
    radius = strength * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) == pytest.approx(radius, rel=1e-6)
    reached = (gradients @ direction).min()
    away = np.random.default_rng(seed).normal(size=(20000, gradients.shape[1]))
    near = np.concatenate([away, direction - mean + 0.05 * radius * away])
    tried = mean + radius * near / np.linalg.norm(near, axis=1, keepdims=True)
    assert reached >= (tried @ gradients.T).min(axis=1).max() - 1e-9
    assert reached > (gradients @ mean).min()


def test_cagrad_of_two_gradients_by_hand():
    # Equally long and at right angles, both are worst off alike: d = g0 (1 + c), for the sum twice
    # that.
    np.testing.assert_allclose(cagrad(np.eye(2), strength=0.5), [1.5, 1.5], rtol=1e-6)
    # One far longer: the short one is worst off, the whole step goes its way. |g0| = sqrt(100 +
    # 1)/2, divided by |g2|.
    np.testing.assert_allclose(
        cagrad(np.diag([100.0, 1.0]), strength=0.2),
        [1.0, 1.0 + 2 * 0.2 * np.sqrt(101) / 2],
        rtol=1e-4,
    )


def test_cagrad_without_strength_or_gradients_is_the_plain_sum():
    for gram, strength in [(np.eye(3), 0.0), (np.zeros((3, 3)), 0.5), (np.eye(1), 0.5)]:
        assert cagrad(gram, strength=strength).tolist() == [1.0] * len(gram)


def test_gradients_that_cancel_out_give_finite_factors():
    for gram, strength in itertools.product([np.array([[1.0, -1.0], [-1.0, 1.0]])], (0.1, 0.9)):
        assert np.isfinite(cagrad(gram, strength=strength)).all()
        assert np.isfinite(pcgrad(gram, step=0)).all()


def test_cagrad_does_not_jump_with_the_last_digits():
    """Two layouts of one run differ in them."""
    for seed in range(20):
        gradients = random_gradients(seed, 4, width=30)
        gram = gradients @ gradients.T
        noise = 1 + 1e-7 * np.random.default_rng(seed).normal(size=gram.shape)
        moved = cagrad(gram * (noise + noise.T) / 2, strength=0.5)
        np.testing.assert_allclose(moved, cagrad(gram, strength=0.5), rtol=1e-5)
