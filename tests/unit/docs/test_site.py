"""The site builds without a warning, and a fault of a page is a warning."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def build(source: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", *options]
    return subprocess.run(
        [*command, "-c", str(ROOT / "docs"), str(source), str(output)],
        capture_output=True,
        text=True,
    )


def test_the_site_builds_without_a_warning(tmp_path):
    built = build(ROOT / "docs", tmp_path)
    assert built.returncode == 0, built.stderr
    options = (tmp_path / "options.html").read_text(encoding="utf-8")
    assert 'href="#train"' in options and "train.learning_rate" in options
    assert 'id="comoe.Predictor"' in (tmp_path / "api.html").read_text(encoding="utf-8")


FAULTS = {
    "broken": ("[there](nowhere.md)", "nowhere.md"),
    "anchor": ("[there](#lost)", "lost"),
    "other_anchor": ("[there](index.md#gone)", "gone"),
    "figure": ("![figure](figures/missing.png)", "missing.png"),
    "orphan": ("no link", "toctree"),
}
"""Page with a fault -> its text, and a word of the warning."""


def test_a_fault_of_a_page_fails_the_build(tmp_path):
    pages = {"good": "[there](index.md#index)"}
    pages |= {page: text for page, (text, _) in FAULTS.items()}
    listed = "\n".join(page for page in pages if page != "orphan")
    (tmp_path / "index.md").write_text(f"# Index\n\n```{{toctree}}\n{listed}\n```\n")
    for page, text in pages.items():
        (tmp_path / f"{page}.md").write_text(f"# {page.title()}\n\n{text}\n")
    faulty = build(tmp_path, tmp_path / "out", "-b", "dummy")
    assert faulty.returncode != 0 and not re.search(
        r"(good|index)\.md:?\d*: WARNING", faulty.stderr
    )
    for page, (_, word) in FAULTS.items():
        assert re.search(rf"{page}\.md.*WARNING.*{word}", faulty.stderr), faulty.stderr
