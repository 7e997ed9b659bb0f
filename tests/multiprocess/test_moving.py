"""A run saved over one layout goes on over another as if nothing had happened."""

from typing import Any

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.workers import make_encoder

pytestmark = pytest.mark.multiprocess
# Name of a run -> ranks -> (ZeRO stage, EP size): saved on two ranks, on one, and on four.
RUNS = {
    "stays at ZeRO 1": {2: (1, 2), 1: (1, 1), 4: (1, 4)},
    "stays at ZeRO 2": {2: (2, 2), 1: (2, 1), 4: (2, 4)},
    "stays at ZeRO 3": {2: (3, 2), 1: (3, 1), 4: (3, 4)},
    "ZeRO 3, 1, 3": {2: (3, 2), 1: (1, 1), 4: (3, 4)},
    "ZeRO 2, 3, 2": {2: (2, 2), 1: (3, 1), 4: (2, 4)},
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[int, dict[str, list[float]]]:
    """Ranks -> run -> losses. Each world starts at the checkpoint that the one before left after its third."""
    encoder = make_encoder(tmp_path_factory.mktemp("encoder"))
    folder = str(tmp_path_factory.mktemp("checkpoints"))

    def go(ranks: int, **more: Any) -> dict[str, list[float]]:
        layouts = {name: layout[ranks] for name, layout in RUNS.items()}
        work = "tests.multiprocess.workers:save_and_go_on"
        return run_ranks(work, ranks, encoder=encoder, layouts=layouts, folder=folder, **more)[0]

    return {2: go(2), 1: go(1, first=3), 4: go(4, first=6, steps=2)}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_moves_from_two_ranks_to_one_and_on_to_four(losses, run):
    np.testing.assert_allclose(losses[1][run][:2], losses[2][run][3:], rtol=1e-5)
    np.testing.assert_allclose(losses[4][run], losses[1][run][3:], rtol=1e-5)


def test_the_losses_do_fall_so_that_equal_ones_mean_something(losses):
    assert all(
        len(set(np.round(series, 3))) == len(series)
        for by_run in losses.values()
        for series in by_run.values()
    )
