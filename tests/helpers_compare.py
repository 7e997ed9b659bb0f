"""Comparisons without training: a recipe of four tasks, arguments, and run folders as finished runs leave them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.config.recipe import TaskConfig
from comoe.experiments.runner import Experiment
from comoe.tasks.task import Task, build_task

ROOT = Path(__file__).parents[1]
MODEL = "model: {encoder: smoke:encoder, moe: {num_experts: 4, top_k: 2, expert_width: 24}}\n"
RECIPE = f"""{MODEL}tasks:
  mood: {{path: reviews, label: mood}}
  topic: {{path: reviews, label: topic}}
  stance: {{path: stance}}
  hint: {{path: hints, auxiliary: true}}
"""
TASKS = ("mood", "topic", "stance")


def experiment_of(
    tmp_path: Path, encoder: str, text: str = RECIPE, overrides: Sequence[str] = ()
) -> Experiment:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("smoke:encoder", encoder))
    return Experiment(recipe, ROOT / "ds_configs/zero2.json", tmp_path / "out", ranks=1,
                      overrides=tuple(overrides))  # fmt: skip


def arguments(experiment: Experiment, **changed: Any) -> Namespace:
    """The command line of ``launch/compare.py`` with defaults that suit a few fake runs."""
    given = {"config": experiment.config, "deepspeed": experiment.deepspeed, "output": experiment.output, "ranks": 1,
             "arms": "single,multi", "arm": [], "lexicon": None, "groups": [],
             "propose_groups": False, "seeds": "0", "against": None, "claim": None, "measure": None,
             "tune": [], "tune_by": None, "tune_seeds": None, "dry_run": False,
             "affinity": None, "affinity_posts": 8, "remove_experts": None, "removal_posts": 8, "metrics": None,
             "splits": None,
             "resamples": 9, "keep_checkpoints": False, "no_verify": False, "overrides": []}  # fmt: skip
    return Namespace(**given | changed)


def task_of(name: str) -> Task:
    config = TaskConfig(path="x", metric="accuracy", auxiliary=name == "hint")
    return build_task(name, config, labels=["bad", "good"], label_counts={})


POSTS = 60


def write_run(
    folder: Path,
    right: Mapping[str, int],
    *,
    seconds: float = 2.0,
    posts: int = POSTS,
    losses: Mapping[str, float] | None = None,
    kl: Mapping[str, float] | None = None,
) -> None:
    """A finished run that answers the first so many of each task's posts right; rows count through its data sets."""
    folder.mkdir(parents=True)
    tasks = [task_of(name) for name in right]
    (folder / "tasks.json").write_text(json.dumps([task.to_dict() for task in tasks]))
    data = {"posts": {name: {"train": 10, "test": posts} for name in right}}
    results = {"finished": True, "step": 5 * len(right), "seconds": seconds * len(right), "posts": 20 * len(right),
               "predicted_posts_per_second": 100.0, "peak_memory_bytes_per_rank": 2**20 * len(right), "data": data,
               "parameters": {"experts": 5, "active": 6, "total": 7},
               "metrics": {"test": {name: {"n": posts, "accuracy": hits / posts} for name, hits in right.items()}},
               "experts_off": {"mean": {"loss": 0.2, "metric": -0.1}},
               }  # fmt: skip
    if losses:
        results["metrics"]["validation"] = {
            name: {"n": posts, "loss": losses[name], "accuracy": hits / posts}
            | ({"teacher_kl": kl[name]} if kl and name in kl else {})
            for name, hits in right.items()
        }
    (folder / "export").mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text(
        '{"split": "train", "step": 2, "seconds": 1.0, "tokens_per_second": 10.0}\n'
    )
    (folder / "predictions/test").mkdir(parents=True)
    for number, (name, hits) in enumerate(right.items()):
        rows = [{"row": number * posts + row, "text": f"{name} {row % (posts - 3)}", "gold": "good",
                 "label": "good" if row < hits else "bad"} for row in range(posts)]  # fmt: skip
        (folder / f"predictions/test/{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
