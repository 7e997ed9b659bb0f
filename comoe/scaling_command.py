"""The command line of ``launch/scale.py``: a scaling experiment, or the plan of a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from comoe.cluster_model import Cluster
from comoe.cluster_plan import plan_lines, shape_of_recipe
from comoe.config import load_recipe
from comoe.scaling import Experiment, Point, build_grid, plan_points, remember
from comoe.scaling_plots import write_plots
from comoe.scaling_runs import chosen_ranks, failure_file, leave_after, run_points
from comoe.scaling_table import row_of, write_hparams, write_tables


def scale_and_exit(
    given: argparse.Namespace,
    *,
    grid_fields: Sequence[str],
    plan_flags: Mapping[str, str | None],
    train_script: Path,
) -> NoReturn:
    """Do what was asked and leave, with the exit codes of ``leave_after``.

    Args:
        given: the command line.
        grid_fields: names of its lists.
        plan_flags: flags that only ``--plan`` reads -> value where they are not given.
        train_script: what runs one point.
    """

    def work() -> bool:
        settle_plan_flags(given, plan_flags)
        if given.plan:
            print_plan(given)
            return False
        return bool(scale(given, grid_fields=grid_fields, train_script=train_script))

    leave_after(work)


def settle_plan_flags(given: argparse.Namespace, plan_flags: Mapping[str, str | None]) -> None:
    """Fill in the flags of ``--plan``, in place.

    Raises:
        ValueError: one was given without ``--plan``, or ``--ranks`` with it: it would change nothing.
    """
    if given.plan and given.ranks is not None:
        raise ValueError(f"--ranks {given.ranks} changes nothing under --plan, which plans for --gpus; leave it out.")
    for flag, default in plan_flags.items():
        field = flag.replace("-", "_")
        value = getattr(given, field)
        if value is not None and not given.plan:
            raise ValueError(f"--{flag} {value} changes nothing without --plan; add --plan, or leave it out.")
        if value is None:
            setattr(given, field, default)


def scale(given: argparse.Namespace, *, grid_fields: Sequence[str], train_script: Path) -> list[Point]:
    """Run the experiment and write its report; the points that failed.

    Raises:
        ValueError: a wrong recipe, list, or output folder; nothing has been run then.
    """
    ranks = chosen_ranks(given.ranks)
    overrides = tuple(given.overrides)
    experiment = Experiment(
        given.config.resolve(), given.deepspeed.resolve(), given.output.resolve(), train_script, ranks, overrides
    )
    recipe = load_recipe(experiment.config, experiment.overrides)
    grid = build_grid(recipe, **{field: getattr(given, field) for field in grid_fields})
    points, left_out = plan_points(grid, experiment)
    for line in left_out:
        print(f"left out {line}")
    if any(point.runs_all for point in points):
        print(
            "note: where k is the number of experts, model.moe.balance=none and loss.balance_weight=0: all experts run"
        )
    if not points:
        raise ValueError("no combination of the grid is possible; the lines above say why.")
    remember(experiment)
    failed = run_points(experiment, points, report=partial(write_report, experiment), say=partial(print, flush=True))
    write_report(experiment, points)
    print(f"table   {given.output / 'table.md'}, table.csv")
    print(f"plots   {given.output / 'plots'}")
    print(f"watch   tensorboard --logdir {given.output}")
    return failed


def write_report(experiment: Experiment, points: Sequence[Point]) -> None:
    """Tables, plots and TensorBoard hparams of what is done so far."""
    rows = []
    for point in points:
        failure = failure_file(experiment, point)
        lines = failure.read_text(encoding="utf-8").splitlines() if failure.is_file() else []
        said = next((line for line in reversed(lines) if line.startswith("comoe:")), lines[-1] if lines else "")
        rows.append(row_of(point, experiment.runs / point.name, problem=said))
    write_tables(rows, experiment.output)
    write_plots(rows, experiment.output)
    write_hparams(rows, experiment.output)


def print_plan(given: argparse.Namespace) -> None:
    """Print the plan of the recipe's model on a cluster.

    Raises:
        ValueError: a wrong recipe, or a number that is none.
    """
    overrides = list(given.overrides)
    for field, key in _PLANNED.items():
        value = getattr(given, field)
        if value is not None and not key:
            raise ValueError(f"--plan takes no list of {field}: it does not change with them, or it recommends them.")
        if value is not None:
            overrides.append(f"{key}={value}")
    recipe = load_recipe(given.config, overrides)
    inside, _, outside = given.bandwidth.partition(",")
    cluster = Cluster(
        memory=_number("--gpu-memory", given.gpu_memory) * 1e9,
        per_node=int(_number("--gpus-per-node", given.gpus_per_node)),
        intra=_number("--bandwidth", inside) * 1e9,
        inter=_number("--bandwidth", outside) * 1e9,
        flops=_number("--flops", given.flops) * 1e12,
        read=_number("--memory-bandwidth", given.memory_bandwidth) * 1e9,
        efficiency=_number("--efficiency", given.efficiency),
    )
    lines = plan_lines(
        shape_of_recipe(recipe, given.encoder_shape),
        cluster,
        gpus=gpu_numbers(given.gpus),
        length=int(_number("--length", given.length)),
        batch=None if given.batch is None else int(_number("--batch", given.batch)),
        recompute=recipe.train.activation_checkpointing,
    )
    print("\n".join(lines))


def gpu_numbers(text: str) -> list[int]:
    """Numbers of GPUs from "8,64" or, by doubling, "1..4096".

    Raises:
        ValueError: anything else.
    """
    first, dots, last = text.partition("..")
    numbers = [int(_number("--gpus", part)) for part in ((first, last) if dots else text.split(","))]
    if not dots:
        return numbers
    low, high = numbers
    if low > high:
        raise ValueError(f"--gpus is {text!r}; the first number must be the smaller one.")
    return [low * 2**power for power in range((high // low).bit_length())]


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{flag} holds {text!r}, which must be a number above 0.")
    return value


_PLANNED = {
    "experts": "model.moe.num_experts",
    "top_k": "model.moe.top_k",
    "encoders": "model.encoder",
    "gates": "",
    "ep_sizes": "",
    "seeds": "",
}
"""Field of the grid -> the recipe's key that ``--plan`` reads it as."""
