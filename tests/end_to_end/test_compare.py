"""``launch/compare.py`` and ``launch/ablate.py`` on the smoke recipe: tasks alone and together, experts removed."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.commands import SMOKE

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]


SMALL = ("tasks.topic=null", "tasks.strength=null", "tasks.aspects=null", "tasks.mentions=null", "data.limit_eval=30",
         "data.limit_per_task=96", "train.max_steps=null", "train.epochs=1", "train.batch_size=48")  # fmt: skip
"""Two tasks, one epoch of two steps each."""


def words(output: Path, arms: str, *more: str) -> list[str]:
    command = [
        sys.executable,
        "launch/compare.py",
        "--config",
        SMOKE,
        "--arms",
        arms,
        "--output",
        str(output),
    ]
    return [*command, "--seeds", "0", "--resamples", "20", *SMALL, *more]


def test_arms_are_run_compared_and_added_to(terminal, tmp_path):
    output = tmp_path / "compare"
    claim = ("--claim", "multi > single.mood on mood/macro_f1")
    first = terminal.run(*words(output, "multi,single.mood", "--affinity-posts", "16", *claim))
    assert first.code == 0 and "2 runs, 0 of them done" in first.out, first.said
    claimed = json.loads((output / "comparison.json").read_text())["claim"]
    assert claimed["runs_before"] == 0 and claimed["difference"]["p"] <= 1
    assert f"**{claim[1]}** (named before the first run" in first.out
    removing = ("--remove-experts", "multi", "--removal-posts", "20", "--affinity-posts", "16")
    done = terminal.run(*words(output, "single,multi", *removing))
    assert done.code == 0 and "3 runs, 2 of them done" in done.out, done.said
    runs = output / "runs"
    results = {run: json.loads((runs / f"{run}-s0/results.json").read_text())
               for run in ("recipe", "single.mood", "single.stance")}  # fmt: skip
    # As many passes over each task's posts, so as many posts in all.
    assert [results[run]["posts"] for run in results] == [192, 96, 96]
    assert [list(results[run]["metrics"]["test"]) for run in results] == [
        ["mood", "stance"],
        ["mood"],
        ["stance"],
    ]
    summary = json.loads((output / "summary.json").read_text())
    for task in ("mood", "stance"):
        for arm, run in (("multi", "recipe"), ("single", f"single.{task}")):
            assert (
                summary[arm][task]["macro_f1"]["mean"]
                == results[run]["metrics"]["test"][task]["macro_f1"]
            )
    assert not any((runs / f"{run}-s0/checkpoints").exists() for run in results)
    rest = json.loads((output / "comparison.json").read_text())
    assert rest["claim"]["text"] == claim[1] and rest["claim"]["verdict"] == "not measured"
    costs = {
        arm: rest["arms"][arm]["costs"]["parameters_total"]["mean"] for arm in ("single", "multi")
    }
    assert costs["single"] == sum(
        results[f"single.{task}"]["parameters"]["total"] for task in ("mood", "stance")
    )
    gain = rest["arms"]["multi"]["against_baseline"]
    means = [rest["arms"][arm]["mean"]["mean"] for arm in ("single", "multi")]
    assert gain["mean"]["mean"] == pytest.approx(means[1] - means[0], abs=1e-6)
    assert gain["mood"]["p"] <= 1
    cosine = rest["gradient_cosine"]["multi"]
    assert cosine["tasks"] == ["mood", "stance"]
    assert -1 <= cosine["mean"][0][1] == cosine["mean"][1][0] <= 1
    removal = rest["arms"]["multi"]["removal"]["recipe-s0"]
    experts = json.loads((runs / "recipe-s0/export/config.json").read_text())["model"]["moe"][
        "num_experts"
    ]
    assert [len(row) for row in removal["loss_rise"]] == [experts] * len(removal["layers"])
    assert (
        "| multi | 1 |" in done.out and "## Gains over single" in (output / "table.md").read_text()
    )
    for name in ("gains", "gradients", "removal", "quality"):
        assert (output / f"plots/{name}.png").stat().st_size > 4000

    shown = terminal.python("launch/ablate.py", "--run", str(runs / "recipe-s0"), "--limit", "20")
    assert shown.code == 0 and f"{removal['posts']} posts; with all experts" in shown.out, (
        shown.said
    )


def test_a_wrong_comparison_is_refused_before_anything_runs(terminal, tmp_path):
    output = tmp_path / "compare"
    done = terminal.run(*words(output, "single,softmax", "--against", "sofmax"))
    assert done.code == 2 and "did you mean softmax" in done.err, done.said
    assert not output.exists()
