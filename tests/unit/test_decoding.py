"""Tasks that a decoder answers: without experts all numbers are the library's own, with experts they stay consistent."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from comoe.objective import Objective, count_units, unit_scale
from comoe.protocols import IGNORED
from tests.helpers_decoder import (
    DECODED,
    END,
    MIXED,
    OFF,
    OPINION,
    POLARITY,
    REASON,
    decoder_batch,
    decoder_model,
    decoder_objective,
    filler,
    whole_model,
    words,
)
from tests.helpers_model import SEQ2SEQ, moe_config, scaled

NONE = moe_config(num_experts=0)
FAMILIES = sorted(SEQ2SEQ)


def library_loss(model, batch, rows):
    """The library's own teacher forcing, from the same labels; mBART's would take its start from the label's end."""
    labels = batch.answers_BD[rows]
    before = torch.full_like(labels, model.config.pad_token_id)
    before[:, 1:] = labels[:, :-1]
    before[:, 0] = model.config.comoe_answering["decoder_start_token_id"]
    before[before == IGNORED] = model.config.pad_token_id
    return model(
        input_ids=batch.input_ids_BL[rows], attention_mask=batch.attention_mask_BL[rows], decoder_input_ids=before,
        labels=labels,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_without_experts_the_loss_of_a_text_is_the_librarys_own(family):
    objective = decoder_objective(family, NONE, tasks=(OPINION,)).double()
    batch = scaled(decoder_batch(5, tasks=(OPINION,), family=family), (OPINION,))
    expected = library_loss(whole_model(family).double(), batch, torch.arange(5)).loss
    logits = objective.model(batch).logits["opinion"]
    assert logits.dtype == torch.float64 and logits.shape == (5, 1)
    units = batch.labels["opinion"][:, 0].sum()
    torch.testing.assert_close(-logits.sum() / units, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(objective(batch).terms["task/opinion"].double(), expected.detach(), atol=0, rtol=1e-6)
