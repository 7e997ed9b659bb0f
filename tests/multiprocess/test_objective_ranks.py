"""The objective over real ranks with uneven rows equals one process on the joined batch."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from comoe.config.recipe import LossConfig
from comoe.distributed import sum_over_ranks, world_size
from comoe.losses.objective import count_units, unit_scale
from comoe.types import IGNORED
from tests.helpers_model import TASKS, moe_config, random_batch, take, tiny_objective
from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess


ROWS = list(range(12))
# Seven rows against five; one post alone on its rank, which has no pair there.
CASES = [(route_by, cut) for route_by in ("token", "task", "authors") for cut in (7, 11)]
# Rows that are read together, none of them on two ranks; the last one alone.
BAGS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4])
READING = [
    replace(task, reads={"topic": "author", "heat": "neighbors"}.get(task.name, "post"))
    for task in TASKS
]


def all_cases():
    """Every case in one start of the ranks."""
    dist.init_process_group("gloo")
    return [loss_and_gradients([ROWS[:cut], ROWS[cut:]], route_by) for route_by, cut in CASES]


def loss_and_gradients(shares, route_by):
    """This rank's step on its share of one batch; every number averaged over ranks, as ZeRO does."""
    terms = LossConfig(balance_weight=0.1, z_weight=0.1, task_separation_weight=0.1)
    authors, tasks = route_by == "authors", READING if route_by == "authors" else TASKS
    moe = moe_config(route_by="token" if authors else route_by)
    objective = tiny_objective(moe, tasks=tasks, loss=terms)
    rank = dist.get_rank() if len(shares) > 1 else 0
    whole = random_batch(rows=12)
    # Rows with different labels: else every task has the same tokens, and so the same gates.
    whole.labels["mood"][::3], whole.labels["topic"][1::2], whole.labels["heat"][2:9] = (
        IGNORED,
        IGNORED,
        float("nan"),
    )
    if authors:
        whole = replace(whole, bags_B=BAGS)
        whole.labels["topic"][~whole.leads_B()] = IGNORED
        whole.labels["heat"][~whole.leads_B()] = float("nan")
    batch = whole.take(torch.tensor(shares[rank])) if authors else take(whole, shares[rank])
    units = sum_over_ranks(count_units(batch, tasks))
    step = objective(
        replace(batch, unit_scale_T=unit_scale(units, world_size=world_size(), accumulation=1))
    )
    step.loss.backward()
    numbers = {"loss": step.loss.detach(), **step.terms}
    numbers |= {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    return {name: (sum_over_ranks(value) / world_size()).numpy() for name, value in numbers.items()}


def test_two_uneven_ranks_equal_one_process_on_the_joined_batch():
    ranks = run_ranks("tests.multiprocess.test_objective_ranks:all_cases", 2)
    for case, *answers in zip(CASES, *ranks, strict=True):
        joined = loss_and_gradients([ROWS], case[0])
        for answer in answers:
            assert list(answer) == list(joined)
            for name, expected in joined.items():
                scale = max(abs(expected).max(), 1e-3)
                assert abs(answer[name] - expected).max() < 1e-5 * scale + 1e-8, (case, name)
        assert joined["contrastive"] > 0
        assert 0 < joined["task_separation"] < 1
        assert joined["model.projection.weight"].any()
