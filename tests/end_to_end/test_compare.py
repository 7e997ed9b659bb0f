"""``launch/compare.py`` and ``launch/ablate.py`` on the smoke recipe: tasks alone and together, experts removed."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.commands import LEAN, SMOKE

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]


SMALL = (*LEAN, "tasks.topic=null", "tasks.strength=null", "tasks.aspects=null", "tasks.mentions=null",
         "data.limit_eval=30", "data.limit_per_task=96", "train.max_steps=null", "train.epochs=1",
         "train.batch_size=48")  # fmt: skip
"""Two tasks, one epoch of two steps each."""


def words(output: Path, arms: str, *more: str) -> list[str]:
    command = ["launch/compare.py", "--config", SMOKE, "--arms", arms]
    command += ["--output", str(output), "--seeds", "0", "--resamples", "20"]
    return [*command, *SMALL, *more]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_arms_are_run_compared_and_added_to(terminal, tmp_path):
    output, names = tmp_path / "compare", ("recipe", "single.mood")
    claim = ("--claim", "multi > single.mood on mood/macro_f1")
    first = terminal.python(*words(output, "multi"))
    assert first.code == 0 and "1 runs, 0 of them done" in first.out, first.said
    measured = ("--affinity-posts", "16", "--remove-experts", "multi", "--removal-posts", "20")
    done = terminal.here(*words(output, "single.mood,multi", *measured, *claim))
    assert done.code == 0 and "2 runs, 1 of them done" in done.out, done.said
    results = {run: read(output / f"runs/{run}-s0/results.json") for run in names}
    # As many passes over each task's posts, so as many posts in all.
    assert [results[run]["posts"] for run in names] == [192, 96]
    scored = [list(results[run]["metrics"]["test"]) for run in names]
    assert scored == [["mood", "stance"], ["mood"]]
    assert not any((output / f"runs/{run}-s0/checkpoints").exists() for run in names)
    summary, rest = read(output / "summary.json"), read(output / "comparison.json")
    for arm, run in (("multi", "recipe"), ("single.mood", "single.mood")):
        score = summary[arm]["mood"]["macro_f1"]["mean"]
        assert score == results[run]["metrics"]["test"]["mood"]["macro_f1"]
        total = rest["arms"][arm]["costs"]["parameters_total"]["mean"]
        assert total == results[run]["parameters"]["total"]
    assert rest["claim"]["text"] == claim[1] and rest["claim"]["runs_before"] == 1
    assert rest["claim"]["difference"]["p"] <= 1
    assert rest["arms"]["multi"]["against_baseline"]["mood"]["p"] <= 1
    cosine = rest["gradient_cosine"]["multi"]
    assert cosine["tasks"] == ["mood", "stance"]
    assert -1 <= cosine["mean"][0][1] == cosine["mean"][1][0] <= 1
    removal = rest["arms"]["multi"]["removal"]["recipe-s0"]
    moe = read(output / "runs/recipe-s0/export/config.json")["model"]["moe"]
    rows = [len(row) for row in removal["loss_rise"]]
    assert rows == [moe["num_experts"]] * len(removal["layers"])
    table = (output / "table.md").read_text()
    assert "| multi | 1 |" in done.out and "## Gains over single.mood" in table
    for name in ("gains", "gradients", "removal", "quality"):
        assert (output / f"plots/{name}.png").stat().st_size > 4000

    shown = terminal.here("launch/ablate.py", "--run", output / "runs/recipe-s0", "--limit", "20")
    assert shown.code == 0, shown.said
    assert f"{removal['posts']} posts; with all experts" in shown.out


def test_a_wrong_comparison_is_refused_before_anything_runs(terminal, tmp_path):
    output = tmp_path / "compare"
    done = terminal.here(*words(output, "single,softmax", "--against", "sofmax"))
    assert done.code == 2 and "did you mean softmax" in done.err, done.said
    assert not output.exists()
