"""Task heads: pooling over real tokens and the shapes of the answers."""

from dataclasses import replace

import pytest
import torch

from comoe.models.heads import TaskHead
from comoe.models.pooling import OVER_POSTS, AttentionPooling
from tests.helpers_model import HEAT, MOOD, SIGNS, TOPIC, WORDS, random_batch, tiny_model
from tests.unit.models.test_sharing import ALL, NONE, awake

HIDDEN = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def pooling():
    torch.manual_seed(0)
    layer = AttentionPooling(16)
    torch.nn.init.normal_(layer.query)
    return layer


def test_pooling_equals_a_reference_row_by_row():
    layer = pooling()
    pooled, attention = layer(HIDDEN, MASK)
    for row, count in enumerate((5, 2)):
        states = HIDDEN[row, :count].double()
        weights = torch.softmax(states @ layer.query.double(), dim=0)
        for found, wanted in ((attention[row, :count], weights), (pooled[row], weights @ states)):
            torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    assert not attention[1, 2:].any()
    changed = HIDDEN.clone()
    changed[1, 2:] = 100.0
    assert torch.equal(layer(changed, MASK)[0], pooled)


def test_the_kind_of_the_task_decides_the_shape():
    shapes = {MOOD: (2, 3), HEAT: (2, 1), SIGNS: (2, 2), WORDS: (2, 5, 2)}
    for task, shape in shapes.items():
        answer = TaskHead(task, 16, dropout=0.0)(HIDDEN, MASK)
        assert answer.logits.shape == shape
        assert (
            (answer.pooled_BM is None) == (answer.attention_BL is None) == (task.mode == "tokens")
        )


def test_dropout_acts_in_training_only_and_logits_are_float32_under_bfloat16():
    head = TaskHead(MOOD, 16, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(head(HIDDEN, MASK).logits, head(HIDDEN, MASK).logits)
    head.eval()
    assert torch.equal(head(HIDDEN, MASK).logits, head(HIDDEN, MASK).logits)
    answer = head.bfloat16()(HIDDEN.bfloat16(), MASK)
    assert answer.logits.dtype == answer.attention_BL.dtype == torch.float32
    assert answer.pooled_BM.dtype == torch.bfloat16


BAGS = torch.tensor([0, 0, 0, 1, 2, 2])
POOLED = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def over_posts(kind):
    torch.manual_seed(0)
    layer = OVER_POSTS[kind](16)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer, {name: value.double() for name, value in layer.named_parameters()}


def test_attention_over_the_posts_of_an_author_equals_a_reference_in_float64():
    layer, own = over_posts("author")
    mixed, weights = layer(POOLED, BAGS)
    for bag in range(3):
        rows = [row for row in range(6) if BAGS[row] == bag]
        states = POOLED[rows].double()
        hidden = torch.tanh(states @ own["hidden.weight"].T + own["hidden.bias"])
        shares = torch.softmax((hidden @ own["score.weight"].T)[:, 0], dim=0)
        torch.testing.assert_close(weights[rows].double(), shares, atol=1e-6, rtol=1e-5)
        for row in rows:
            torch.testing.assert_close(mixed[row].double(), shares @ states, atol=1e-6, rtol=1e-5)
    # An author with one post is read as that post, and the order of the others does not count.
    assert torch.equal(mixed[3], POOLED[3])
    turned = layer(POOLED[[2, 0, 1, 3, 5, 4]], BAGS)[0]
    torch.testing.assert_close(turned, mixed)


def test_attention_over_neighbors_equals_a_reference_in_float64():
    layer, own = over_posts("neighbors")
    mixed, weights = layer(POOLED, BAGS)

    def linear(name, values):
        return values @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0.0)

    for first, near in ((0, [1, 2]), (3, []), (4, [5])):
        post, states = POOLED[first].double(), POOLED[near].double()
        found = torch.zeros(16, dtype=torch.float64)
        if near:
            hidden = torch.tanh(linear("center", post) + linear("hidden", states))
            shares = torch.softmax(linear("score", hidden)[:, 0], dim=0)
            torch.testing.assert_close(weights[near].double(), shares, atol=1e-6, rtol=1e-5)
            found = shares @ states
        inner = torch.nn.functional.gelu(linear("mix", torch.cat([post, found])))
        wanted = post + linear("output", inner)
        for row in (first, *near):
            torch.testing.assert_close(mixed[row].double(), wanted, atol=1e-5, rtol=1e-5)
        assert weights[first] == 0
    fresh = OVER_POSTS["neighbors"](16)
    assert torch.equal(fresh(POOLED, BAGS)[0][[0, 3, 4]], POOLED[[0, 3, 4]])


def test_the_head_of_an_author_gives_all_rows_of_a_bag_the_same_and_learns():
    head = TaskHead(replace(MOOD, reads="author"), 16, dropout=0.0)
    found = head(HIDDEN, MASK, torch.tensor([0, 0]))
    assert torch.equal(found.logits[0], found.logits[1])
    torch.testing.assert_close(found.weights_B.sum(), torch.tensor(1.0))
    apart = head(HIDDEN, MASK)
    alone = head(HIDDEN[1:], MASK[1:])
    torch.testing.assert_close(apart.logits[1:], alone.logits)
    found.logits.square().sum().backward()
    assert all(weight.grad is not None for weight in head.parameters())
    assert head.over_posts.score.weight.grad.any()


@pytest.mark.parametrize("options", [ALL, ALL | {"own_layers": 0}, {"private_width": 4}])
def test_an_author_is_read_over_what_each_form_of_sharing_makes_of_single_posts(options):
    """Logits are linear in what the author's posts are pooled to, so they are the weighted mean of the posts' own."""
    tasks = (replace(MOOD, reads="author"), TOPIC, replace(SIGNS, reads="neighbors"), WORDS)
    model = awake(tiny_model(NONE, tasks=tasks, **options)).eval()
    torch.nn.init.normal_(model.heads[0].over_posts.score.weight)
    batch, bags = random_batch(rows=6, tasks=tasks), torch.tensor([0, 0, 0, 1, 2, 2])
    # Rows of a bag are for one task, where rows are.
    batch = replace(batch, task_ids_B=torch.tensor([0, 0, 0, 2, 1, 1]))
    alone, together = model(batch), model(replace(batch, bags_B=bags))
    for bag in range(3):
        rows = bags == bag
        weights = together.post_weights["mood"][rows]
        assert weights.sum().item() == pytest.approx(1) and (bag == 1 or weights.std() > 1e-3)
        wanted = (weights @ alone.logits["mood"][rows]).expand(int(rows.sum()), -1)
        torch.testing.assert_close(together.logits["mood"][rows], wanted, atol=1e-5, rtol=1e-5)
    for name in ("topic", "words"):
        assert torch.equal(together.logits[name], alone.logits[name])
    turned = batch.take(torch.tensor([2, 0, 1, 3, 4, 5]))
    found = model(replace(turned, bags_B=bags)).logits["mood"]
    torch.testing.assert_close(found, together.logits["mood"], atol=1e-5, rtol=1e-5)
