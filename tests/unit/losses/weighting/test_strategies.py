"""Weightings: their values by hand, their optima, what they carry, and what they leave out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.config.recipe import LossConfig
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.tasks.task import Task
from tests.helpers_model import HEAT, MOOD, TOPIC

TASKS = (replace(MOOD, weight=0.5), replace(HEAT, weight=3.0))
THREE = (MOOD, HEAT, TOPIC)
BOTH = torch.tensor([True, True])
WITHOUT_HEAT = torch.tensor([True, False, True])
POSTS = torch.tensor([6.0, 1.0, 3.0])
GRAM = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 1.0, 0.2], [0.5, 0.2, 9.0]], dtype=torch.float64)


def make(name, tasks=THREE, **options):
    return WEIGHTINGS[name](tasks, LossConfig(weighting=name, **options))


def end(weighting, losses, present=None, gram=GRAM):
    present = torch.ones(len(losses), dtype=torch.bool) if present is None else present
    weighting.end_step(torch.tensor(losses, dtype=torch.float64), present, gram_TT=gram)


def weights_of(weighting, present=None):
    present = torch.tensor([True] * 3) if present is None else present
    return weighting(torch.ones(len(present)), present, gram_TT=GRAM, posts_T=POSTS)[1].tolist()


@pytest.mark.parametrize(("name", "weights"), [("equal", [1.0, 1.0]), ("static", [0.5, 3.0])])
def test_the_total_is_the_weighted_sum_and_the_gradient_the_weights(name, weights):
    losses = torch.tensor([2.0, 10.0], requires_grad=True)
    total, logged = make(name, TASKS)(losses, BOTH)
    assert total.item() == 2.0 * weights[0] + 10.0 * weights[1] and logged.tolist() == weights
    total.backward()
    assert losses.grad.tolist() == weights


@pytest.mark.parametrize(
    ("counts", "weights"),
    [([6.0, 1.0, 3.0], [1.8, 0.3, 0.9]), ([0.75, 0.125, 0.375], [1.8, 0.3, 0.9]),
     ([2.0, 0.0, 2.0], [1.5, 0.0, 1.5]), ([4.0, 4.0, 4.0], [1.0, 1.0, 1.0])],
)  # fmt: skip
def test_posts_weigh_a_task_by_its_share_of_the_labels(counts, weights):
    """Unlabelled posts have no loss to weigh."""
    tasks = (*THREE, Task("plain", "unlabelled", (), "none"))
    losses = torch.tensor([0.4, 2.0, 1.1, 0.0], dtype=torch.float64)
    posts, present = torch.tensor([*counts, 0.0]), torch.tensor([*counts, 0.0]) > 0
    total, logged = make("posts", tasks)(losses, present, posts_T=posts)
    assert logged.tolist() == pytest.approx([*weights, 0.0], rel=1e-12)
    assert total.item() == pytest.approx(float(np.dot(losses[:3], weights)), rel=1e-12)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_do_not_lose_precision_with_the_model(name):
    weighting = make(name, (replace(MOOD, weight=0.3), HEAT, TOPIC), weighting_window=1)
    if weighting.remembers:
        for losses in ([0.3, 0.7, 0.11], [0.2, 0.5, 0.13]):
            end(weighting, losses)
    expected = weights_of(weighting)
    assert weights_of(weighting.bfloat16()) == expected
    assert (
        weighting(torch.ones(3), torch.tensor([True] * 3), gram_TT=GRAM, posts_T=POSTS)[1].dtype
        == torch.float32
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_logged_weight_is_what_the_loss_is_multiplied_by(name):
    losses = torch.tensor([0.4, 2.0, 1.1], requires_grad=True)
    total, logged = make(name)(
        losses, torch.tensor([True] * 3), gram_TT=GRAM, posts_T=POSTS, step=4
    )
    total.backward()
    assert losses.grad.tolist() == logged.tolist() and not logged.requires_grad


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "posts"])
def test_an_absent_task_is_left_out_everywhere(name):
    """Two tasks and an absent one are, in number, gradient and what is carried, the two tasks."""
    pair, three = make(name, (MOOD, TOPIC), weighting_window=2), make(name, weighting_window=2)
    kept = [0, 2]
    for step in range(7):
        few = torch.tensor([0.3 + step, 1.7 / (step + 1)], requires_grad=True)
        many = torch.tensor([0.3 + step, 0.0, 1.7 / (step + 1)], requires_grad=True)
        gram = torch.zeros(3, 3, dtype=torch.float64)
        gram[0, 0], gram[2, 2], gram[0, 2], gram[2, 0] = 4.0, 9.0, -1.0 * step, -1.0 * step
        expected, weights = pair(few, BOTH, gram_TT=gram[kept][:, kept], step=step)
        found, more = three(many, WITHOUT_HEAT, gram_TT=gram, step=step)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(more[kept], weights)
        for weighting, total in ((pair, expected), (three, found)):
            weighting.zero_grad()
            total.backward()
        torch.testing.assert_close(many.grad[kept], few.grad)
        for own, other in zip(three.parameters(), pair.parameters(), strict=True):
            torch.testing.assert_close(own.grad[kept], other.grad)
            assert own.grad[1] == 0
        if pair.remembers:
            end(pair, few.tolist(), gram=gram[kept][:, kept])
            end(three, many.tolist(), WITHOUT_HEAT, gram=gram)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_step_without_any_task_is_harmless(name):
    weighting, nothing = make(name), torch.zeros(3, dtype=torch.bool)
    end(weighting, [1.0, 2.0, 3.0])
    before = weights_of(weighting)
    total, logged = weighting(
        torch.zeros(3), nothing, gram_TT=torch.zeros(3, 3).double(), posts_T=torch.zeros(3)
    )
    end(weighting, [0.0, 0.0, 0.0], nothing, gram=torch.zeros(3, 3).double())
    assert total.item() == 0 and logged.isfinite().all() and weights_of(weighting) == before


@pytest.mark.parametrize(
    ("name", "price"),
    [("uncertainty", lambda v: 0.5 * v), ("uncertainty_positive", lambda v: math.log1p(math.exp(v)))],
)  # fmt: skip
def test_uncertainty_by_hand_and_its_gradient_in_float64(name, price):
    weighting = make(name).double()
    with torch.no_grad():
        weighting.log_variances_T.copy_(torch.tensor([0.0, -1.0, 0.7], dtype=torch.float64))
    losses, v = [0.4, 2.0, 1.1], [0.0, -1.0, 0.7]
    total, logged = weighting(torch.tensor(losses, dtype=torch.float64), torch.tensor([True] * 3))
    expected = sum(
        0.5 * loss * math.exp(-own) + price(own) for loss, own in zip(losses, v, strict=True)
    )
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert logged.tolist() == pytest.approx([0.5 * math.exp(-own) for own in v], rel=1e-12)
    total.backward()
    slopes = [
        -0.5 * loss * math.exp(-own) + (price(own + 1e-6) - price(own - 1e-6)) / 2e-6
        for loss, own in zip(losses, v, strict=True)
    ]
    assert weighting.log_variances_T.grad.tolist() == pytest.approx(slopes, rel=1e-8)


def test_the_price_of_a_variance_counts_once_whatever_the_micro_steps():
    """Shares of two micro-steps: the mean of the totals is the total of the mean losses."""
    weighting = make("uncertainty_positive")
    shares, present = torch.tensor([[0.2, 3.0, 0.0], [0.8, 1.0, 2.0]]), torch.tensor([True] * 3)
    mean = torch.stack([weighting(share, present)[0] for share in shares]).mean()
    torch.testing.assert_close(mean, weighting(shares.mean(dim=0), present)[0])


def test_dynamic_average_by_hand():
    weighting = make("dynamic_average", weighting_window=2, weighting_temperature=0.5)
    for losses in ([1.0, 4.0, 2.0], [3.0, 4.0, 2.0], [1.0, 2.0, 2.0]):
        assert weights_of(weighting) == [1.0, 1.0, 1.0]
        end(weighting, losses)
    end(weighting, [1.0, 6.0, 1.0])
    # Means 2, 4, 2, then 1, 4, 1.5.
    shares = np.exp(np.array([1 / 2, 4 / 4, 1.5 / 2]) / 0.5)
    assert weights_of(weighting) == pytest.approx((3 * shares / shares.sum()).tolist(), rel=1e-6)
    shares[1] = 0
    assert weights_of(weighting, WITHOUT_HEAT) == pytest.approx(
        (2 * shares / shares.sum()).tolist(), rel=1e-6
    )


def test_dynamic_average_means_over_the_steps_that_have_a_task():
    weighting = make("dynamic_average", weighting_window=2)
    end(weighting, [1.0, 4.0, 2.0])
    for _ in range(3):
        end(weighting, [1.0, 0.0, 2.0], WITHOUT_HEAT)
    for _ in range(2):
        end(weighting, [1.0, 2.0, 2.0])
    # The window without it does not count: 2 after 4.
    shares = np.exp(np.array([1.0, 0.5, 1.0]) / 2)
    assert weights_of(weighting) == pytest.approx((3 * shares / shares.sum()).tolist(), rel=1e-6)


def test_gradnorm_by_hand():
    weighting = make("gradnorm", weighting_rate=0.1, gradnorm_alpha=2.0)
    end(weighting, [2.0, 4.0, 1.0])
    # Sizes 2, 1, 3; nothing has fallen yet, so all targets are 2: the first is there, the others
    # are not.
    moved = np.array([1.0, np.exp(0.1 * 1 / 2), np.exp(-0.1 * 3 / 2)])
    first = 3 * moved / moved.sum()
    assert weights_of(weighting) == pytest.approx(first.tolist(), rel=1e-6)
    end(weighting, [1.0, 4.0, 0.25])
    sizes, ratios = first * np.array([2.0, 1.0, 3.0]), np.array([0.5, 1.0, 0.25])
    targets = sizes.mean() * (ratios / ratios.mean()) ** 2
    moved = first * np.exp(-0.1 * sizes / sizes.mean() * np.sign(sizes - targets))
    assert weights_of(weighting) == pytest.approx((3 * moved / moved.sum()).tolist(), rel=1e-6)


def test_gradients_that_are_not_finite_leave_the_plain_sum_which_is_not_finite_either():
    # By hand: the gradients 2, 1 and 3 long; only the first two are at odds.
    assert weights_of(make("pcgrad")) == pytest.approx([1 + 1 / 4, 1 + 1 / 1, 1.0], rel=1e-6)
    gram, losses = GRAM.clone(), torch.tensor([1.0, torch.nan, 1.0])
    gram[1] = torch.nan
    for name in ("pcgrad", "cagrad"):
        total, weights = make(name)(losses, torch.tensor([True] * 3), gram_TT=gram)
        assert weights.tolist() == [1.0] * 3 and not total.isfinite()


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if make(name).remembers])
def test_what_is_carried_resumes_exactly_in_the_middle_of_a_window(name):
    series = [[1.0 / (step + 1), 2.0, 0.3 + 0.1 * step] for step in range(9)]
    whole, first, second = (make(name, weighting_window=2) for _ in range(3))
    for step, losses in enumerate(series):
        end(whole, losses)
        end(first if step < 5 else second, losses)
        if step == 4:
            saved = {key: value.clone() for key, value in first.state_dict().items()}
            assert saved and not any(value.is_floating_point() for value in saved.values())
            second.bfloat16().load_state_dict(saved)
    assert weights_of(second) == weights_of(whole) and len(set(weights_of(whole))) == 3


OPTIMA = {
    "uncertainty": lambda loss: loss,
    "uncertainty_positive": lambda loss: (loss + (loss**2 + 8 * loss) ** 0.5) / 4,
}


@pytest.mark.parametrize(("name", "optimum"), OPTIMA.items())
def test_the_learned_variance_reaches_the_known_optimum(name, optimum):
    weighting, losses = make(name), torch.tensor([0.05, 0.9, 6.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weighting(losses, torch.tensor([True] * 3))[0].backward()
        optimizer.step()
    variances = weighting.log_variances_T.detach().exp()
    torch.testing.assert_close(
        variances, torch.tensor([optimum(loss) for loss in losses.tolist()]), rtol=2e-3, atol=0
    )


def test_gradnorm_reaches_the_weights_that_make_gradients_as_long_as_they_are_to_be():
    """With alpha 0 and steady gradients: w_t proportional to 1 / |g_t|; with alpha 1 to r_t / |g_t|."""
    lengths, ratios = GRAM.diagonal().sqrt(), torch.tensor([0.5, 0.25, 1.0]).double()
    for alpha in (0.0, 1.0):
        weighting = make("gradnorm", weighting_rate=0.003, gradnorm_alpha=alpha)
        end(weighting, [1.0, 1.0, 1.0])
        for _ in range(1500):
            end(weighting, ratios.tolist())
        wanted = ratios**alpha / lengths
        assert weights_of(weighting) == pytest.approx(
            (3 * wanted / wanted.sum()).tolist(), rel=0.02
        )
