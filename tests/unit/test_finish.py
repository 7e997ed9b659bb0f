"""What the end of a run tells to type next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comoe.finish import print_results


@pytest.mark.parametrize(
    ("config", "posts"),
    [({"image_column": "photo"}, "posts.jsonl"), ({"image_column": None}, "posts.txt"), ({}, "posts.txt")],
)
def test_the_last_line_names_an_input_that_fits_the_model(
    config: dict, posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    print_results(tmp_path, [])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("predict ") and f"--input {posts} --output answers.jsonl" in last
