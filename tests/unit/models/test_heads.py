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
