"""Float32 experts and heads beside a frozen bf16 decoder, over ZeRO stages and ranks, resumed."""

from itertools import pairwise

import pytest
import torch

from tests.helpers_ranks import run_ranks
from tests.multiprocess.decoder_workers import SAVED_AFTER, make_models
from tests.multiprocess.test_decoder_layouts import off_in_losses

pytestmark = pytest.mark.multiprocess
STAGES = (1, 2, 3)
PRECISIONS = {(True, torch.float32), (False, torch.bfloat16)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    encoder = make_models(tmp_path_factory.mktemp("models"))["llama"]
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    work = "tests.multiprocess.decoder_workers:half"
    return [
        run_ranks(work, ranks, encoder=encoder, folder=folder, name=str(ranks), stages=STAGES)[0]
        for ranks in (1, 2)
    ]


def test_what_trains_is_float32_and_what_is_frozen_bf16_at_every_stage(found):
    for answers in found:
        assert [answer["precisions"] for answer in answers] == [PRECISIONS] * 3


def test_stages_and_ranks_agree(found):
    """The encoder's products are rounded to eight bits, and differently for other shares of the batch."""
    (first, *others), two = found
    for answer in others:
        assert answer["losses"] == pytest.approx(first["losses"], rel=1e-4)
    for answer in two:
        assert off_in_losses(answer["losses"], first["losses"]) < 5e-3
    for one, other in pairwise(two):
        for name, value in one["state"].items():
            torch.testing.assert_close(other["state"][name], value, rtol=0, atol=2e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(found):
    for answers in found:
        for answer in answers:
            assert answer["resumed"] == answer["losses"][SAVED_AFTER:]
