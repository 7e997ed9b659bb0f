"""A run saved over one layout goes on over another as if nothing had happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import make_encoder

pytestmark = pytest.mark.multiprocess
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, list[float]]]:
    """Ranks -> stage -> six losses. Each world starts at the checkpoint that the one before left after its third."""
    encoder = make_encoder(tmp_path_factory.mktemp("encoder"))
    folder = str(tmp_path_factory.mktemp("checkpoints"))

    def go(ranks: int, **more: Any) -> dict[int, list[float]]:
        work = "tests.multiprocess.workers:save_and_go_on"
        return run_ranks(work, ranks, encoder=encoder, stages=STAGES, ep=ranks, folder=folder, **more)[0]

    return {2: go(2), 1: go(1, first=3, universal=True), 4: go(4, first=6, universal=True)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_moves_from_two_ranks_to_one_and_on_to_four(losses: Any, stage: int) -> None:
    np.testing.assert_allclose(losses[1][stage][:3], losses[2][stage][3:], rtol=1e-5)
    np.testing.assert_allclose(losses[4][stage][:3], losses[1][stage][3:], rtol=1e-5)


def test_the_losses_do_fall_so_that_equal_ones_mean_something(losses: Any) -> None:
    assert all(len(set(np.round(series, 3))) == 6 for by_stage in losses.values() for series in by_stage.values())
