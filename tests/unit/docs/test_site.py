"""The site builds without a warning, and a fault of a page is a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def build(source: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", *options]
    return subprocess.run(
        [*command, "-c", str(ROOT / "docs"), str(source), str(output)],
        capture_output=True,
        text=True,
    )


def test_the_site_builds_without_a_warning(tmp_path: Path):
    built = build(ROOT / "docs", tmp_path)
    assert built.returncode == 0, built.stderr
    options = (tmp_path / "options.html").read_text(encoding="utf-8")
    assert 'href="#train"' in options and "train.learning_rate" in options
    assert 'id="comoe.Predictor"' in (tmp_path / "api.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "fault, page",
    [
        ("a broken link", "[there](nowhere.md)"),
        ("a dead anchor", "[there](#nowhere)"),
        ("a dead anchor of another page", "[there](other.md#nowhere)"),
        ("a missing figure", "![figure](figures/nowhere.png)"),
        ("an orphan", "no link"),
        ("none", "no link"),
    ],
)
def test_a_fault_of_a_page_fails_the_build(fault: str, page: str, tmp_path: Path):
    others = "lonely" if fault != "an orphan" else "other"
    (tmp_path / "index.md").write_text(f"# Index\n\n```{{toctree}}\nother\n{others}\n```\n")
    (tmp_path / "other.md").write_text("# Other\n")
    (tmp_path / "lonely.md").write_text(f"# Lonely\n\n{page}\n")
    built = build(tmp_path, tmp_path / "out", "-b", "dummy")
    assert (built.returncode == 0) == (fault == "none"), built.stderr
