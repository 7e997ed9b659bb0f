"""Soft labels of posts: rows and words, joined, taken, averaged; and the batches made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_data import wordpiece_tokenizer

from comoe.data.collator import Collator
from comoe.data.soft_labels import SoftLabels, mean_of, preferred
from comoe.data.tokens.split import with_soft_labels
from tests.unit.data.test_collator import TASKS, posts_of, tokenized

ROWS = [np.array([[0.25, 0.75]]), None, np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])]


def shown(soft: SoftLabels) -> list[list | None]:
    return [None if (rows := soft.rows(i)) is None else rows.tolist() for i in range(len(soft))]


def test_rows_come_back_from_any_choice_of_posts():
    soft, wanted = (
        SoftLabels.from_rows(ROWS, width=2),
        [r if r is None else r.tolist() for r in ROWS],
    )
    assert shown(soft) == wanted and soft.present.tolist() == [True, False, True]
    assert [soft.has(i) for i in range(3)] == [True, False, True]
    assert shown(soft.take(np.array([2, 2, 1, 0]))) == [wanted[i] for i in (2, 2, 1, 0)]
    assert shown(SoftLabels.join([soft, soft.take(np.array([1]))])) == [*wanted, None]
    assert shown(soft.permuted([1, 0]))[0] == [[0.75, 0.25]]
    empty = SoftLabels.from_rows([None, None], width=2)
    assert shown(empty) == [None, None] and shown(empty.take(np.array([1]))) == [None]


def test_teachers_are_averaged_where_they_know_the_post_and_the_word():
    one = SoftLabels.from_rows(ROWS, width=2)
    other = SoftLabels.from_rows([None, np.array([[0.5, 0.5]]), np.array([[0.0, 1.0]])], width=2)
    assert shown(mean_of([one, other])) == [[[0.25, 0.75]], [[0.5, 0.5]], [[0.5, 0.5]]]
    assert mean_of([one]) is one
    assert shown(preferred(other, one)) == [[[0.25, 0.75]], [[0.5, 0.5]], [[0.0, 1.0]]]


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_a_soft_label_makes_a_row_and_words_find_their_first_pieces(route_by: str):
    tokenizer = wordpiece_tokenizer(["one", "two", "three", "four", "rome", "@user"])
    words = [None, ["one", "xyz", "two"], None]
    split = tokenized(posts_of(["one", "one xyz two", "two"], words=words, mood=[1, None, None]))
    mood = SoftLabels.from_rows([None, np.array([[0.1, 0.9]]), np.array([[0.6, 0.4]])], width=2)
    # The teacher has seen two of the three words.
    names = SoftLabels.from_rows([None, np.array([[0.2, 0.8], [0.3, 0.7]]), None], width=2)
    split = with_soft_labels(split, {"mood": mood, "names": names})
    batch = Collator(tokenizer, TASKS, route_by=route_by)(split, np.array([0, 1, 2]))
    served = list(zip(batch.row_ids_B.tolist(), batch.task_ids_B.tolist(), strict=True))
    if route_by == "token":
        assert served == [(0, -1), (1, -1), (2, -1)]
    else:
        assert served == [(0, 0), (1, 0), (1, 3), (2, 0)]
    assert set(batch.soft_labels) == {"mood", "names"}
    found = {
        served[row]: value.tolist()
        for row, value in enumerate(batch.soft_labels["mood"])
        if not value.isnan().any()
    }
    first = -1 if route_by == "token" else 0
    assert found == {(1, first): pytest.approx([0.1, 0.9]), (2, first): pytest.approx([0.6, 0.4])}
    row = served.index((1, -1 if route_by == "token" else 3))
    at = batch.soft_labels["names"][row]
    present = ~at.isnan().any(dim=-1)
    starts = batch.word_starts_BL[row].nonzero()[:, 0].tolist()
    assert present.nonzero()[:, 0].tolist() == starts[:2] and len(starts) == 3
    torch.testing.assert_close(at[starts[:2]], torch.tensor([[0.2, 0.8], [0.3, 0.7]]))
    assert batch.take(torch.tensor([row])).soft_labels["names"].shape[0] == 1
