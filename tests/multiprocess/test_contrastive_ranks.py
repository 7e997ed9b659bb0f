"""The contrastive loss on real ranks: value, gradient, temperature and queue are those of one process."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from comoe.distributed import gather_detached, sum_over_ranks, world_size
from tests.helpers_contrastive import MOOD, WIDTH, call, loss_of, random_rows
from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess

ROWS = 13
CASES: dict[str, dict] = {
    "all": {},
    "learned, with a queue": {"learn_temperature": True, "queue_size": 30, "queue_warmup": 1},
    "views and all negatives": {
        "views": 2,
        "negatives": "all",
        "learn_temperature": True,
        "queue_size": 30,
    },
    "float32": {"learn_temperature": True, "queue_size": 30, "queue_warmup": 1},
    "at the floor": {"learn_temperature": True, "temperature": 0.01},
    "above the floor": {"learn_temperature": True, "temperature": 0.01 * math.exp(1e-6)},
}
LOG_SCALES = {"at the floor": 4.7}
"""Case -> what the tasks have learned so far."""
NEAR = ("at the floor", "above the floor")
"""Cases in which the posts of one task are near each other, so that some want it colder."""
CLOSE = {"float32": 1e-5}
"""Case -> how near the numbers must be to those of one process in float64."""


def splits_for(ranks: int) -> list[list[int]]:
    """Where 13 rows are cut: evenly, unevenly, and with ranks that have none."""
    even = [round(ROWS * rank / ranks) for rank in range(1, ranks)]
    return [even, [1] * (ranks - 1), [ROWS] * (ranks - 1), [0] * (ranks - 1)]


def near_rows(rows):
    """Rows of ``mood`` at small angles: the first ones nearer to those of their label, the last ones not."""
    towards = 0.7 * F.one_hot(rows["label/mood"].clamp_min(0), WIDTH).double()
    towards[ROWS // 2 :] = 0
    return rows | {"z/mood": F.normalize(3 + towards + 0.02 * rows["z/mood"], dim=1)}


def steps(cuts, case, *, dtype=torch.float64):
    """Two steps on this rank's part; the means over ranks, the gradient of its rows, the queue, and its own slopes."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    bounds = [0, *cuts, ROWS]
    loss = loss_of(gather=gather_detached, ranks=None, **CASES[case])
    slope = loss.scales.log_scales_T
    if case in LOG_SCALES:
        torch.nn.init.constant_(slope, LOG_SCALES[case])
    found = []
    for step in range(2):
        rows = random_rows(ROWS, seed=step, first_post=5 * step)
        # The unlabelled posts live at the end only: one rank has them all.
        rows["label/plain"][: ROWS - 3] = -100
        rows = near_rows(rows) if case in NEAR else rows
        double = [name for name, value in rows.items() if value.dtype == torch.float64]
        rows |= {name: rows[name].to(dtype) for name in double}
        part = slice(*bounds[rank : rank + 2])
        loss.begin_step()
        share, terms, leaves = call(loss, {name: value[part] for name, value in rows.items()})
        share.backward()
        numbers = {"value": share, **terms}
        found.append({name: float(sum_over_ranks(n)) / world_size() for name, n in numbers.items()})
        gradients = {
            name: leaf.grad / world_size() for name, leaf in leaves.items() if leaf.grad is not None
        }
        found[-1] |= {name: value.numpy() for name, value in gradients.items()}
    if slope is not None:
        found.append({"slope": (sum_over_ranks(slope.grad) / world_size()).numpy()})
    queue = {} if loss.queue is None else loss.queue.state_dict()
    state = {name: value.numpy() for name, value in queue.items()}
    return found, state, None if slope is None else slope.grad.tolist()


def all_cases(ranks: int):
    """Every case and every split in one start of the ranks."""
    if ranks > 1:
        dist.init_process_group("gloo")
    types = {"float32": torch.float32}
    return {
        (case, tuple(cuts)): steps(cuts, case, dtype=types.get(case, torch.float64))
        for case in CASES
        for cuts in splits_for(ranks)
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_split_over_ranks_equals_one_process(ranks):
    answers = run_ranks("tests.multiprocess.test_contrastive_ranks:all_cases", ranks, ranks=ranks)
    for name in CASES:
        expected, queue, _ = steps([], name)
        for cuts in splits_for(ranks):
            found = [answer[name, tuple(cuts)] for answer in answers]
            bounds = [0, *cuts, ROWS]
            for rank, (records, state, _) in enumerate(found):
                part = slice(*bounds[rank : rank + 2])
                for got, want in zip(records, expected, strict=True):
                    assert list(got) == list(want)
                    for key, value in want.items():
                        value = value[part] if key.startswith(("z/", "view/")) else value
                        scale = max(1.0, np.abs(value).max(initial=0))
                        wrong = np.abs(got[key] - value).max(initial=0) / scale
                        assert wrong < CLOSE.get(name, 1e-12), (name, cuts, rank, key, wrong)
                assert state.keys() == queue.keys()
                for key, value in state.items():
                    assert (value == found[0][1][key]).all(), "the queue is the same on every rank"
            if name == "at the floor":
                # Just above the floor the first of two ranks wants it colder, and so does their
                # sum. At the floor it stays where it is for all, but not for the tasks that want it
                # warmer.
                wishes = [answer["above the floor", tuple(cuts)][2][0] for answer in answers]
                assert sum(wishes) < 0 and (cuts != [ROWS // 2] or wishes[1] > 0)
                assert expected[-1]["slope"][0] == 0 and (expected[-1]["slope"][1:] > 0).all()
            if queue:
                assert (found[0][1]["added_T"] == queue["added_T"]).all()


def test_a_task_of_one_rank_alone_is_not_diluted():
    """Weight W and the mean over W ranks cancel: the term is the mean over that rank's anchors."""
    rows = random_rows(ROWS, tasks=(MOOD,))
    single, double = (
        float(call(loss_of((MOOD,), ranks=ranks), rows)[0].detach()) for ranks in (1, 2)
    )
    assert double == pytest.approx(2 * single)
