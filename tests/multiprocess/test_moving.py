"""A run saved over one layout goes on over another as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import make_encoder

pytestmark = pytest.mark.multiprocess
WORK = "tests.multiprocess.workers:save_and_go_on"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_moves_from_two_ranks_to_one_and_on_to_four(stage: int, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    folder = str(tmp_path / "checkpoints")
    # The uninterrupted run on two ranks goes to step 6, the moved one leaves it at 3; on one rank it saves at 6.
    two = run_ranks(WORK, 2, encoder=encoder, stage=stage, ep=2, folder=folder)[0]
    one = run_ranks(WORK, 1, encoder=encoder, stage=stage, ep=1, folder=folder, first=3, universal=True)[0]
    np.testing.assert_allclose(one[:3], two[3:], rtol=1e-5)
    four = run_ranks(WORK, 4, encoder=encoder, stage=stage, ep=4, folder=folder, first=6, universal=True)[0]
    np.testing.assert_allclose(four[:3], one[3:], rtol=1e-5)
