"""The tiled closed form against float64 autograd of the formula as it is written."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from comoe.losses.contrastive import closed_form
from comoe.losses.contrastive.closed_form import AnchorSums, ClosedForm, TaskRows, hidden_pairs


def unit_rows(count, width=6, *, seed=0, dtype=torch.float64):
    rows = torch.randn(
        count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return F.normalize(rows, dim=1).to(dtype)


def dense(z, past, weights, rivals, scale):
    """The mean over anchors of L_i, with full matrices; weights and rivals are (G, G + Q)."""
    s = scale * z @ torch.cat([z, past]).T
    weights = weights * rivals
    anchors = weights.sum(1) > 0
    lse = s.masked_fill(~rivals, -torch.inf)[anchors].logsumexp(1)
    attraction = ((weights * s).sum(1) / weights.sum(1).clamp_min(1e-300))[anchors]
    return (lse - attraction).sum() / max(int(anchors.sum()), 1)


def difference(width, a, b):
    return torch.exp(-(a - b.T).abs() / width)


def ranks(
    z, keys, cuts, *, scale, affinity=None, past=None, past_keys=None, pairs=((), ()), moments=True
):
    """Value and gradients of every rank's share, each rank seeing all rows: what ContrastiveLoss does with gathers."""
    past = z.new_zeros(0, z.shape[1]) if past is None else past
    all_keys = keys if past_keys is None else torch.cat([keys, past_keys])
    different, groups = torch.unique(all_keys, dim=0, return_inverse=True)
    bounds = [0, *cuts, len(z)]
    comparisons = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        mine = [
            (row - start, column) for row, column in zip(*pairs, strict=True) if start <= row < stop
        ]
        hidden = torch.tensor(mine, dtype=torch.int64).reshape(-1, 2).T
        rows = TaskRows(
            torch.cat([z, past]), len(z), start, stop - start, groups, different, affinity, *hidden
        )
        comparisons.append(AnchorSums(rows, scale=scale, moments=moments))
    reciprocals = torch.cat([comparison.reciprocals() for comparison in comparisons])
    factor = 1 / (reciprocals[:, 1] > 0).sum().clamp_min(1).double()
    value, gradient, slope = 0.0, [], 0.0
    for comparison in comparisons:
        own = comparison.rows.own_NP.clone().requires_grad_()
        scale_leaf = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        share = ClosedForm.apply(own, scale_leaf, comparison, reciprocals, factor)
        share.backward()
        value, slope = value + share.detach(), slope + scale_leaf.grad
        gradient.append(own.grad)
    return value, torch.cat(gradient), slope


def reference(z, keys, *, scale, affinity, past=None, past_keys=None, pairs=((), ())):
    z = z.double().requires_grad_()
    past = z.new_zeros(0, z.shape[1]) if past is None else past.double()
    all_keys = (keys if past_keys is None else torch.cat([keys, past_keys])).double()
    rivals = ~torch.eye(len(z), len(all_keys), dtype=torch.bool)
    rivals[list(pairs[0]), list(pairs[1])] = False
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    value = dense(z, past, affinity(keys.double(), all_keys), rivals, scale)
    value.backward()
    return value.detach(), z.grad, scale.grad


def same(a, b):
    return (a[:, None] == b).all(-1).double()


LABELS = torch.tensor([0, 1, 0, 1, 2, 0, 0, 1, 1, 0, 3, 0.0], dtype=torch.float64)[:, None]
NUMBERS = torch.tensor([0.1, 2, -1, 0.1, 5, 0.3, 0, -4, 1, 1, 30, 0.2], dtype=torch.float64)[
    :, None
]
PAST = dict(past=unit_rows(5, seed=7), pairs=((0, 3, 3, 11), (12, 14, 16, 13)))
COPIES = ((0, 5, 0, 9, 5, 9, 3, 7), (5, 0, 9, 0, 9, 5, 7, 3))
COPIES_OF_NUMBERS = ((4, 10, 8, 9), (10, 4, 9, 8))
TWICE_FAR = NUMBERS.index_fill(0, torch.tensor([4]), 30.0)
CASES = {
    "labels": dict(keys=LABELS),
    "numbers": dict(keys=NUMBERS, affinity=partial(difference, 0.5)),
    "labels and a queue": dict(keys=LABELS, past_keys=LABELS[[0, 5, 3, 9, 3]], **PAST),
    "numbers and a queue": dict(
        keys=NUMBERS, affinity=partial(difference, 0.5), past_keys=NUMBERS[[0, 11, 3, 9, 3]], **PAST
    ),
    "labels and copies": dict(keys=LABELS, pairs=COPIES),
    # 30 is far from all others: rows 4 and 10 have positives of next to no weight alone, and no other of their key.
    "numbers and copies": dict(
        keys=TWICE_FAR, affinity=partial(difference, 0.5), pairs=COPIES_OF_NUMBERS
    ),
    "numbers, copies and a queue": dict(
        keys=TWICE_FAR,
        affinity=partial(difference, 0.5),
        past=unit_rows(4, seed=7),
        past_keys=TWICE_FAR[[4, 0, 8, 4]],
        pairs=tuple(
            a + b
            for a, b in zip(COPIES_OF_NUMBERS, ((4, 10, 4, 10), (12, 12, 15, 15)), strict=True)
        ),
    ),
}


def both(case, cuts, *, scale=10.0, dtype=torch.float64):
    options = dict(CASES[case])
    z, affinity = unit_rows(12, dtype=dtype), options.pop("affinity", None)
    cast = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    return ranks(z, cuts=cuts, scale=scale, affinity=affinity, **cast), reference(
        z, scale=scale, affinity=affinity or same, **options
    )


@pytest.mark.parametrize("cuts", [(), (6,), (0, 1, 8), (12,)])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_autograd_of_the_full_matrix(case, cuts):
    for got, expected in zip(*both(case, cuts), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_right_to_five_digits_at_every_temperature(case, scale):
    for got, expected in zip(*both(case, (5,), scale=scale, dtype=torch.float32), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [True, False])
def test_neither_tiles_nor_keeping_them_changes_anything(case, keep, monkeypatch):
    whole = both(case, (5,))[0]
    monkeypatch.setitem(closed_form.TILE_BYTES, "cpu", 9 * 8)
    if not keep:
        original = AnchorSums.__init__
        monkeypatch.setattr(
            AnchorSums, "__init__", lambda *a, **k: original(*a, **(k | {"keep_bytes": 0}))
        )
    for got, expected in zip(both(case, (5,))[0], whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=1e-12)


def test_tiles_cover_the_matrix_once_and_keep_to_their_bytes(monkeypatch):
    monkeypatch.setitem(closed_form.TILE_BYTES, "cpu", 400)
    seen = torch.zeros(23, 31)
    for rows, columns in closed_form._cuts(23, 31, 4, "cpu"):
        assert seen[rows, columns].numel() <= 100
        seen[rows, columns] += 1
    assert (seen == 1).all()
    monkeypatch.setitem(closed_form.TILE_BYTES, "cpu", 4 * 23 * 31)
    assert len(list(closed_form._cuts(23, 31, 4, "cpu"))) == 1
    assert list(closed_form._cuts(0, 31, 4, "cpu")) == []


def test_opposite_rows_at_the_coldest_temperature_stay_finite():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value, gradient, _ = ranks(z, LABELS[[0, 0]].float(), (), scale=100.0)
    assert value == 0.0 and gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("keys", [LABELS[:0], LABELS[:1], LABELS[[0, 1]], LABELS[[0, 1, 4, 10]]])
def test_rows_without_any_positive_give_zero_and_a_gradient_of_zero(keys):
    value, gradient, slope = ranks(unit_rows(len(keys)), keys, (), scale=10.0)
    assert value == 0.0 and slope == 0.0 and not gradient.any() and gradient.shape == (len(keys), 6)


def test_a_second_backward_pass_gives_the_same():
    none, (keys, groups) = (
        torch.zeros(0, dtype=torch.int64),
        torch.unique(LABELS, dim=0, return_inverse=True),
    )
    rows = TaskRows(unit_rows(12), 12, 0, 12, groups, keys, None, none, none)
    comparison = AnchorSums(rows, scale=10.0, moments=False)
    own = unit_rows(12).requires_grad_()
    value = ClosedForm.apply(
        own, torch.tensor(10.0), comparison, comparison.reciprocals(), torch.tensor(0.1)
    )
    value.backward(retain_graph=True)
    first = own.grad.clone()
    value.backward()
    torch.testing.assert_close(own.grad, 2 * first, atol=0, rtol=0)


def test_hidden_pairs_are_all_meetings_of_one_post():
    own, past = torch.tensor([5, 7, 5, 9]), torch.tensor([7, 5, 1, 5])
    meetings = torch.stack(hidden_pairs(own, past), dim=1).tolist()
    assert meetings == [[0, 1], [0, 3], [1, 0], [2, 1], [2, 3]]
    assert [len(found) for found in hidden_pairs(own[:0], past)] == [0, 0]
