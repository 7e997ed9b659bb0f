"""Image-text losses in one process: values by hand, gradients, who replaces whom, and that no task sees any of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comoe.config.recipe import ImageTextConfig
from comoe.losses.contrastive import closed_form
from comoe.losses.image_text import (
    AllPairs,
    ITCLoss,
    ITMLoss,
    Pairs,
    contrast,
    draw_texts,
    drawn,
    gather_pairs,
    text_keys,
)
from tests.helpers_model import take
from tests.helpers_vision import FUSED, seeing_batch, seeing_model, with_pictures

BOTH = ImageTextConfig()


def pairs_of(posts, keys=None, tasks=None) -> AllPairs:
    posts = torch.tensor(posts)
    keys = posts if keys is None else torch.tensor(keys)
    own = Pairs(posts, torch.full_like(posts, -1) if tasks is None else torch.tensor(tasks), keys)
    return AllPairs(own, own, 0, [len(posts)], 9)


def dense(image, text, log_scale, pairs):
    """The formula as it is written, for autograd."""
    scale = log_scale.exp().clamp_max(100.0)
    similar = scale * image @ text.T
    real = pairs.own.posts_N >= 0
    counts = pairs.own.negatives(pairs.own) | torch.eye(len(image), dtype=torch.bool)
    own = similar.diagonal()
    rows = similar.masked_fill(~counts, -torch.inf).logsumexp(1)
    columns = similar.masked_fill(~counts, -torch.inf).logsumexp(0)
    return ((rows + columns - 2 * own) * real).sum() / (2 * max(int(real.sum()), 1))


def unit(rows, width=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=1).to(dtype).requires_grad_()


def itm_loss(**options):
    config = replace(BOTH, **options)
    return ITMLoss(config, seed=7)


CASES = {
    "all different": pairs_of(range(7)),
    "a blank one": pairs_of([4, -1, 2, 9, 0]),
    "two rows of a post": pairs_of([4, 4, 2, 9, 2]),
    "posts of one text": pairs_of([1, 2, 3, 4], keys=[5, 5, 6, 7]),
    "one pair": pairs_of([3]),
    "only a blank one": pairs_of([-1]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("log_scale", [1.3, math.log(100.0) + 0.5])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_contrasts_gradient_is_that_of_the_written_formula(case, log_scale, dtype, close):
    pairs = CASES[case]
    numbers = [unit(len(pairs.own.posts_N), seed=seed) for seed in (1, 2)]
    numbers.append(torch.tensor([log_scale], dtype=torch.float64, requires_grad=True))
    expected_value = dense(*numbers, pairs)
    expected = torch.autograd.grad(3 * expected_value, numbers)
    same = [number.detach().to(dtype).requires_grad_() for number in numbers]
    value = contrast(*same, pairs)
    found = torch.autograd.grad(3 * value, same)
    scale = max(1.0, math.exp(min(log_scale, math.log(100))))
    assert float(value.detach()) == pytest.approx(float(expected_value.detach()), abs=close * scale)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == dtype and (one - other).abs().max() < close * scale
    if log_scale < math.log(100):
        assert abs(found[2] - expected[2]) < close * scale


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        self.bytes = max(
            [self.bytes] + [t.nbytes for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        )
        return found


@pytest.mark.parametrize("tile_bytes", [1, 5 * 2 * 200 * 8])
def test_tiles_change_nothing_and_no_tensor_grows_with_the_square_of_the_pictures(
    tile_bytes, monkeypatch
):
    pairs = pairs_of([*range(100), *range(98), -1, 7], keys=[number // 2 for number in range(200)])
    numbers = [
        unit(200, seed=1),
        unit(200, seed=2),
        torch.tensor([2.0], dtype=torch.float64, requires_grad=True),
    ]
    images, texts = (rows.detach() for rows in numbers[:2])

    def everything():
        value = contrast(*numbers, pairs)
        chosen = draw_texts(pairs, lambda rows: images[rows] @ texts.T, step=1, seed=1)
        return value, torch.autograd.grad(value, numbers), chosen

    whole = everything()
    monkeypatch.setitem(closed_form.TILE_BYTES, "cpu", tile_bytes)
    with Largest() as largest:
        tiled = everything()
    torch.testing.assert_close(tiled, whole, atol=1e-13, rtol=1e-12)
    # (G, 2 P) of the gather, or a tile of one row at least.
    assert largest.bytes <= max(200 * 16 * 8, 2 * 200 * 8, tile_bytes)


def test_above_its_limit_the_temperature_only_takes_a_gradient_that_leads_back():
    high = torch.tensor([math.log(100.0) + 0.1], dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(range(4))
    perfect = torch.eye(4, dtype=torch.float64)
    wrong = perfect.roll(1, dims=0)
    (closer,) = torch.autograd.grad(contrast(perfect, perfect * 0.9, high, pairs), high)
    (back,) = torch.autograd.grad(contrast(perfect, wrong, high, pairs), high)
    assert closer == 0 and back > 1


def test_bfloat16_rows_are_compared_in_float32():
    exact = [unit(6, seed=seed) for seed in (1, 2)]
    rounded = [rows.detach().bfloat16() for rows in exact]
    value = contrast(*rounded, torch.tensor([1.0]), pairs_of(range(6)))
    same = [rows.double() for rows in rounded]
    expected = contrast(*same, torch.tensor([1.0]).double(), pairs_of(range(6)))
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(expected), abs=1e-6)


def test_the_contrast_learns_its_temperature_and_both_projections():
    model = seeing_model(image_text=BOTH)
    loss = ITCLoss(BOTH)
    value, terms = loss(model(seeing_batch()), seeing_batch())
    value.backward()
    assert terms["itc_temperature"] == pytest.approx(0.07) and terms["itc"] == value
    assert loss.log_scale.grad.any() and model.image_text.text.weight.grad.any()
    assert model.image_text.image.weight.grad.any() and model.fusion.image.linear.weight.grad.any()


def test_text_keys_tell_texts_apart_and_do_not_see_padding():
    batch = seeing_batch()
    longer = replace(
        batch,
        input_ids_BL=torch.nn.functional.pad(batch.input_ids_BL, (0, 5), value=1),
        attention_mask_BL=torch.nn.functional.pad(batch.attention_mask_BL, (0, 5)),
    )
    assert torch.equal(text_keys(batch), text_keys(longer))
    assert len(set(text_keys(batch).tolist())) == 6
    swapped = batch.input_ids_BL.clone()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    changed = text_keys(replace(batch, input_ids_BL=swapped)) != text_keys(batch)
    assert changed.tolist() == [bool(swapped[0, 1] != swapped[0, 2])] + [False] * 5


def test_draws_are_even_and_repeat():
    numbers = drawn(1, 2, torch.arange(20000))
    assert torch.equal(numbers, drawn(1, 2, torch.arange(20000))) and len(numbers.unique()) > 19990
    assert 0 < numbers.min() < 1e-3 and 0.999 < numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=10, min=0, max=1)
    assert (counts - 2000).abs().max() < 200
    assert (
        abs(torch.corrcoef(torch.stack([numbers, drawn(1, 3, torch.arange(20000))]))[0, 1]) < 0.03
    )


@pytest.mark.parametrize("hard", [False, True])
def test_no_pair_gets_its_own_text_or_one_that_says_the_same(hard):
    posts = [3, 3, 8, 9, -1, 20, 21, 22]
    pairs = pairs_of(posts, keys=[1, 1, 2, 2, 0, 5, 6, 7], tasks=[0, 1, 0, 0, 0, 0, 0, 0])
    similarity = (torch.eye(8) * 50).__getitem__ if hard else None
    replaced = 0
    for step in range(200):
        chosen = draw_texts(pairs, similarity, step=step, seed=1)
        assert torch.equal(chosen, draw_texts(pairs, similarity, step=step, seed=1))
        taken = (chosen >= 0).nonzero()[:, 0]
        assert pairs.own.negatives(pairs.own)[taken, chosen[taken]].all() and chosen[4] == -1
        replaced += len(taken)
    assert 0.45 < replaced / (200 * 7) < 0.55


def test_a_picture_without_any_other_text_keeps_its_own():
    for posts, keys in (([5], [1]), ([5, 5], [1, 1]), ([5, 6], [1, 1]), ([5, -1], [1, 2])):
        assert all(
            (draw_texts(pairs_of(posts, keys), None, step=s, seed=1) == -1).all() for s in range(20)
        )


def test_hard_negatives_are_drawn_in_proportion_to_the_exponential_of_their_similarity():
    pairs = pairs_of(range(4))
    similarity = torch.tensor([0.0, 0.0, 1.0, 2.0]).expand(4, 4).__getitem__
    counts = torch.zeros(4)
    for step in range(6000):
        chosen = int(draw_texts(pairs, similarity, step=step, seed=1, share=1.0)[0])
        counts[chosen] += 1
    expected = torch.tensor([1.0, math.e, math.e**2])
    torch.testing.assert_close(counts[1:] / 6000, expected / expected.sum(), atol=0.02, rtol=0)
    assert counts[0] == 0


@pytest.mark.parametrize("fusion", FUSED)
def test_matching_is_the_mean_over_pictures_of_the_question_asked_once_each(fusion):
    model = seeing_model(fusion, image_text=BOTH).eval()
    batch = replace(seeing_batch(), step=3)
    output = model(batch)
    sides = output.image_text
    value, terms = itm_loss(negatives="random")(output, batch)
    chosen = draw_texts(gather_pairs(sides, batch), None, step=3, seed=7)
    assert 0 < int((chosen >= 0).sum()) < 4
    logits = []
    for picture, text in enumerate(chosen.tolist()):
        row = int(sides.rows_I[text if text >= 0 else picture])
        alone = with_pictures(take(batch, [row]), [0])
        alone = replace(alone, pixels_I3HW=batch.pixels_I3HW[[picture]])
        logits.append(model(alone).image_text.match_logits_I2)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), (chosen < 0).long())
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    right = (torch.cat(logits).argmax(dim=1) == (chosen < 0)).float().mean()
    assert terms["itm"] == value and float(terms["itm_accuracy"]) == pytest.approx(float(right))


@pytest.mark.parametrize("fusion", FUSED)
def test_the_tasks_see_nothing_of_the_replaced_pairs(fusion):
    """Neither their logits, nor their dropout in the next pass, nor the loads of the experts."""

    def two_steps(match):
        model = seeing_model(fusion, image_text=BOTH, dropout=0.3, seed=4).train()
        torch.manual_seed(1)
        answers = []
        for step in range(2):
            batch = replace(seeing_batch(), step=step)
            output = model(batch)
            if match:
                itm_loss()(output, batch)
            answers += [*output.logits.values(), *[routing.counts_E for routing in output.routings]]
        return answers

    torch.testing.assert_close(two_steps(True), two_steps(False), atol=0, rtol=0)


@pytest.mark.parametrize("fusion", FUSED)
@pytest.mark.parametrize("pictures", [(0, 2, 3, 5), (1,), ()])
def test_every_parameter_gets_a_gradient_of_both_losses_however_many_pictures(fusion, pictures):
    model = seeing_model(fusion, image_text=BOTH, train_tower=True)
    batch = seeing_batch(pictures=pictures)
    output = model(batch)
    total = sum(
        value.square().sum() for value in [*output.logits.values(), *output.embeddings.values()]
    )
    total = total + itm_loss()(output, batch)[0]
    if output.image_text.text_embeddings_IP is not None:
        total = total + ITCLoss(BOTH)(output, batch)[0]
    total.backward()
    assert total.isfinite()
    assert [
        name for name, w in model.named_parameters() if w.requires_grad and w.grad is None
    ] == []
    assert bool(model.image_text.match.weight.grad.any()) == bool(pictures)
