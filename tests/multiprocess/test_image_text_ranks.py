"""Image-text losses over real ranks, with unequal, few and no pictures, equal those of one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from comoe.config.recipe import ImageTextConfig
from comoe.distributed import sum_over_ranks, world_size
from comoe.losses.image_text import ITCLoss, ITMLoss, contrast, draw_texts, gather_pairs
from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess

ROWS = 10
PICTURED = (0, 1, 3, 4, 6, 7, 9)
SHARES = {
    1: [[list(range(ROWS))]],
    2: [[[0, 2, 4, 6, 8], [9, 7, 5, 3, 1]], [[2, 5, 8], [0, 1, 3, 4, 6, 7, 9]]],
    3: [[[0, 1], [2, 5, 8], [3, 4, 6, 7, 9]]],
}
"""World size -> layouts: the rows of each rank. Rows 2, 5 and 8 have no picture."""
MODELS = {"gated": {}, "tokens": {}, "attention": {"route_by": "task"}, "vilt": {}}


def share_of(rows):
    """A rank's batch, as short as its longest text allows."""
    from tests.helpers_model import take
    from tests.helpers_vision import seeing_batch, with_pictures

    batch = take(seeing_batch(rows=ROWS, pictures=()), rows)
    longest = int(batch.attention_mask_BL.sum(dim=1).max())
    batch = replace(
        batch,
        input_ids_BL=batch.input_ids_BL[:, :longest],
        attention_mask_BL=batch.attention_mask_BL[:, :longest],
        labels={},
    )
    return with_pictures(
        batch, [number for number, row in enumerate(rows) if row in PICTURED], step=5
    )


def losses_and_gradients(rows, fusion, options):
    """This rank's terms; every number averaged over ranks, as ZeRO does."""
    from tests.helpers_model import moe_config
    from tests.helpers_vision import seeing_model

    config = ImageTextConfig(itm_weight=0.5, separate_passes=True)
    model = seeing_model(
        fusion, image_text=config, train_tower=True, moe=moe_config(**options)
    ).double()
    itm = ITMLoss(config, seed=7)
    itc = ITCLoss(config).double()
    batch = share_of(rows)
    output = model(replace(batch, pixels_I3HW=batch.pixels_I3HW.double()))
    total, terms = itm(output, batch)
    value, more = itc(output, batch)
    total, terms = total + value, terms | more
    total.backward()
    numbers = {name: value.double() for name, value in terms.items()}
    numbers |= {
        name: weight.grad
        for module in (model, itc)
        for name, weight in module.named_parameters()
        if weight.grad is not None and not name.startswith(("heads", "projection"))
    }
    averaged = {
        name: (sum_over_ranks(value) / world_size()).numpy() for name, value in numbers.items()
    }
    sides = output.image_text
    pairs = gather_pairs(sides, batch)
    chosen_I = draw_texts(pairs, None, step=5, seed=7)
    posts_G = pairs.everyone.posts_N
    mine = [
        (int(post), int(posts_G[text]) if text >= 0 else -1)
        for post, text in zip(pairs.own.posts_N, chosen_I, strict=True)
    ]
    return averaged, [pair for pair in mine if pair[0] >= 0]


def contrast_and_gradients(rows):
    """The contrast of float64 rows, blank ones too, against autograd of the formula over all rows."""
    from tests.unit.losses.test_image_text import dense, pairs_of, unit

    shares, rank = rows, dist.get_rank() if dist.is_initialized() else 0
    posts = torch.tensor([5, 5, -1, 8, 9, 11, -1, 12, 3, 4])
    whole = [
        unit(ROWS, seed=1),
        unit(ROWS, seed=2),
        torch.tensor([1.5], dtype=torch.float64, requires_grad=True),
    ]
    expected_value = dense(*whole, pairs_of(posts.tolist()))
    expected = torch.autograd.grad(expected_value, whole)
    own = [whole[0][shares[rank]].detach(), whole[1][shares[rank]].detach(), whole[2].detach()]
    own = [number.requires_grad_() for number in own]
    pairs = pairs_of(posts[shares[rank]].tolist())
    sizes = [len(share) for share in shares]
    everyone = pairs_of(posts[[row for share in shares for row in share]].tolist()).own
    pairs = pairs._replace(everyone=everyone, sizes=sizes, offset=sum(sizes[:rank]))
    value = contrast(*own, pairs)
    found = torch.autograd.grad(value, own)
    # ZeRO averages over ranks; a row's gradient is on its rank alone.
    wrong = [abs(float(sum_over_ranks(value)) / world_size() - float(expected_value.detach()))]
    for one, other in zip(found[:2], expected[:2], strict=True):
        wrong.append(
            float((one / world_size() - other[shares[rank]]).abs().max()) if len(one) else 0.0
        )
    wrong.append(float((sum_over_ranks(found[2]) / world_size() - expected[2]).abs().max()))
    return max(wrong)


def everything(layouts):
    """All layouts in one start of the processes."""
    if len(layouts[0]) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if len(layouts[0]) > 1 else 0
    found = []
    for shares in layouts:
        models = {
            fusion: losses_and_gradients(shares[rank], fusion, options)
            for fusion, options in MODELS.items()
        }
        found.append((models, contrast_and_gradients(shares)))
    return found


@pytest.fixture(scope="module")
def in_one_process():
    return everything(SHARES[1])[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequal_few_and_no_pictures_equal_one_process(ranks, in_one_process):
    answers = run_ranks(
        "tests.multiprocess.test_image_text_ranks:everything", ranks, layouts=SHARES[ranks]
    )
    expected, wrong = in_one_process
    assert wrong < 1e-12
    for layout in range(len(SHARES[ranks])):
        for fusion, (numbers, choices) in expected.items():
            replaced = []
            for answer in answers:
                models, wrong = answer[layout]
                assert wrong < 1e-12
                found, mine = models[fusion]
                replaced += mine
                assert list(found) == list(numbers)
                for name, value in numbers.items():
                    scale = max(abs(value).max(), 1e-3)
                    assert abs(found[name] - value).max() < 1e-5 * scale, (
                        ranks,
                        layout,
                        fusion,
                        name,
                    )
            # The same text takes the place of the same post's, wherever both are.
            assert sorted(replaced) == sorted(choices)
            assert {post for post, _ in choices} == set(PICTURED)
            assert any(text >= 0 for _, text in choices)
