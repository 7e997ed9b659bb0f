"""Task heads: pooling over real tokens and the shapes of the answers."""

import torch

from comoe.models.heads import AttentionPooling, TaskHead
from tests.helpers_model import HEAT, MOOD, SIGNS, WORDS

HIDDEN = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def pooling():
    torch.manual_seed(0)
    layer = AttentionPooling(16)
    torch.nn.init.normal_(layer.query)
    return layer


def test_attention_sums_to_one_and_ignores_padding():
    pooled, attention = pooling()(HIDDEN, MASK)
    torch.testing.assert_close(attention.sum(1), torch.ones(2))
    assert not attention[1, 2:].any() and (attention[1, :2] > 0).all()
    changed = HIDDEN.clone()
    changed[1, 2:] = 100.0
    assert torch.equal(pooling()(changed, MASK)[0], pooled)


def test_pooling_equals_a_reference_row_by_row():
    layer = pooling()
    pooled, attention = layer(HIDDEN, MASK)
    for row, count in enumerate((5, 2)):
        weights = torch.softmax(HIDDEN[row, :count].double() @ layer.query.double(), dim=0)
        torch.testing.assert_close(attention[row, :count].double(), weights, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            pooled[row].double(), weights @ HIDDEN[row, :count].double(), atol=1e-6, rtol=1e-5
        )


def test_the_kind_of_the_task_decides_the_shape():
    shapes = {MOOD: (2, 3), HEAT: (2, 1), SIGNS: (2, 2), WORDS: (2, 5, 2)}
    for task, shape in shapes.items():
        answer = TaskHead(task, 16, dropout=0.0)(HIDDEN, MASK)
        assert answer.logits.shape == shape
        assert (
            (answer.pooled_BM is None) == (answer.attention_BL is None) == (task.mode == "tokens")
        )


def test_logits_and_attention_are_float32_under_bfloat16():
    head = TaskHead(MOOD, 16, dropout=0.0).bfloat16()
    answer = head(HIDDEN.bfloat16(), MASK)
    assert answer.logits.dtype == answer.attention_BL.dtype == torch.float32
    assert answer.pooled_BM.dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    head = TaskHead(MOOD, 16, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(head(HIDDEN, MASK).logits, head(HIDDEN, MASK).logits)
    head.eval()
    assert torch.equal(head(HIDDEN, MASK).logits, head(HIDDEN, MASK).logits)
