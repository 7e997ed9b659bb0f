"""``launch/compare.py`` and ``launch/ablate.py`` on the smoke recipe: runs, goes on, reports, removes experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.commands import SMOKE, Terminal

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]


def words(output: Path, arms: str, *more: str) -> list[str]:
    command = [sys.executable, "launch/compare.py", "--config", SMOKE, "--arms", arms, "--output", str(output)]
    return [*command, "--seeds", "0", "--resamples", "20", "train.max_steps=6", "train.eval_every=6", *more]


def test_arms_are_run_compared_and_added_to(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "compare"
    done = terminal.run(*words(output, "dense,sigmoid", "--remove-experts", "sigmoid", "--removal-posts", "20"))
    assert done.code == 0, done.said
    runs = output / "runs"
    results = {arm: json.loads((runs / f"{arm}-s0/results.json").read_text()) for arm in ("dense", "sigmoid")}
    # One dense block of the active width: the same work per token as k experts, without a router.
    routers = results["sigmoid"]["parameters"]["active"] - results["dense"]["parameters"]["active"]
    assert 0 < routers < 0.01 * results["dense"]["parameters"]["active"]
    assert results["sigmoid"]["parameters"]["experts"] > results["dense"]["parameters"]["experts"]
    summary = json.loads((output / "summary.json").read_text())
    for arm in ("dense", "sigmoid"):
        gold = results[arm]["metrics"]["test"]["stance"]["macro_f1"]
        assert summary[arm]["stance"]["macro_f1"]["mean"] == gold
        assert (runs / f"{arm}-s0/export").is_dir() and not (runs / f"{arm}-s0/checkpoints").exists()
    rest = json.loads((output / "comparison.json").read_text())
    difference = rest["arms"]["sigmoid"]["against_baseline"]["mean"]
    means = [rest["arms"][arm]["mean"]["mean"] for arm in ("dense", "sigmoid")]
    assert difference["mean"] == pytest.approx(means[1] - means[0], abs=1e-6)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    removal = rest["arms"]["sigmoid"]["removal"]["sigmoid-s0"]
    experts = json.loads((runs / "sigmoid-s0/export/config.json").read_text())["model"]["moe"]["num_experts"]
    assert [len(row) for row in removal["loss_rise"]] == [experts] * len(removal["layers"])
    assert "| sigmoid | 1 |" in done.out and (output / "plots/removal.png").stat().st_size > 4000

    more = terminal.run(*words(output, "dense,sigmoid,no_experts"))
    assert more.code == 0 and "3 runs, 2 of them done" in more.out, more.said
    assert "| no_experts | 1 |" in (output / "table.md").read_text()

    shown = terminal.python("launch/ablate.py", "--run", str(runs / "sigmoid-s0"), "--limit", "20")
    assert shown.code == 0 and f"{removal['posts']} posts; with all experts" in shown.out, shown.said
    bare = terminal.python("launch/ablate.py", "--run", str(runs / "no_experts-s0"))
    assert bare.code == 2 and "was trained without experts" in bare.err


def test_a_wrong_comparison_is_refused_before_anything_runs(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "compare"
    for more, message in (
        (("--against", "sofmax"), "did you mean softmax"),
        (("--remove-experts", "paper"), "paper is not"),
        (("run.name=x",), "--seeds and --output set it"),
        (("--ranks", "0"), "--ranks is 0; it must be at least 1"),
        (("--removal-posts", "0"), "--removal-posts is 0; it must be at least 1"),
    ):
        done = terminal.run(*words(output, "dense,softmax", *more))
        assert done.code == 2 and message in done.err, done.said
    assert not output.exists()
