"""The contrastive loss on real ranks: value, gradient, temperature and queue are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from comoe.distributed import gather_detached, sum_over_ranks, world_size
from tests.helpers_contrastive import MOOD, call, loss_of, random_rows
from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess

ROWS = 13
CASES = {
    "all": {},
    "learned, with a queue": {"learn_temperature": True, "queue_size": 30, "queue_warmup": 1},
}


def splits_for(ranks: int) -> list[list[int]]:
    """Where 13 rows are cut: evenly, unevenly, and with ranks that have none."""
    even = [round(ROWS * rank / ranks) for rank in range(1, ranks)]
    return [even, [1] * (ranks - 1), [ROWS] * (ranks - 1), [0] * (ranks - 1)]


def steps(cuts, options):
    """Two steps on this rank's part; the means over ranks, the gradient of its rows, and the queue."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    bounds = [0, *cuts, ROWS]
    loss = loss_of(gather=gather_detached, world_size=world_size(), **options)
    found = []
    for step in range(2):
        rows = random_rows(ROWS, seed=step, first_post=5 * step)
        # The unlabelled posts live at the end only: one rank has them all.
        rows["label/plain"][: ROWS - 3] = -100
        part = slice(*bounds[rank : rank + 2])
        loss.begin_step()
        share, terms, leaves = call(loss, {name: value[part] for name, value in rows.items()})
        share.backward()
        numbers = {name: float(sum_over_ranks(value)) / world_size() for name, value in terms.items()}
        found.append({"value": float(sum_over_ranks(share)) / world_size(), **numbers})
        gradients = {name: leaf.grad / world_size() for name, leaf in leaves.items() if leaf.grad is not None}
        found[-1] |= {name: value.numpy() for name, value in gradients.items()}
    slope = loss.scales.log_scales_T
    if slope is not None:
        found.append({"slope": (sum_over_ranks(slope.grad) / world_size()).numpy()})
    state = {} if loss.queue is None else {name: v.numpy() for name, v in loss.queue.state_dict().items()}
    return found, state


def all_cases(ranks: int):
    """Every case and every split in one start of the ranks."""
    if ranks > 1:
        dist.init_process_group("gloo")
    return {(name, tuple(cuts)): steps(cuts, options) for name, options in CASES.items() for cuts in splits_for(ranks)}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_split_over_ranks_equals_one_process(ranks):
    answers = run_ranks("tests.multiprocess.test_contrastive_ranks:all_cases", ranks, ranks=ranks)
    for name, options in CASES.items():
        expected, queue = steps([], options)
        for cuts in splits_for(ranks):
            found = [answer[name, tuple(cuts)] for answer in answers]
            bounds = [0, *cuts, ROWS]
            for rank, (records, state) in enumerate(found):
                part = slice(*bounds[rank : rank + 2])
                for got, want in zip(records, expected, strict=True):
                    assert list(got) == list(want)
                    for key, value in want.items():
                        value = value[part] if key.startswith(("z/", "view/")) else value
                        assert np.abs(got[key] - value).max(initial=0) < 1e-12, (name, cuts, rank, key)
                assert state.keys() == queue.keys()
                for key, value in state.items():
                    assert (value == found[0][1][key]).all(), "the queue is the same on every rank"
            if queue:
                assert (found[0][1]["added_T"] == queue["added_T"]).all()


def test_a_task_of_one_rank_alone_is_not_diluted():
    """Weight W and the mean over W ranks cancel: the term is the mean over that rank's anchors."""
    rows = random_rows(ROWS, tasks=(MOOD,))
    single, double = (float(call(loss_of((MOOD,), world_size=ranks), rows)[0].detach()) for ranks in (1, 2))
    assert double == pytest.approx(2 * single)
