"""Many damaged images among good ones: the run ends well, and says of each what is wrong with it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from comoe.data.images.check import HowToCheck, check_images
from tests.end_to_end.commands import LEAN, Terminal, read_lines, train_in_ranks
from tests.helpers_images import LIMITS, encoded, noise, place_damaged, unusual

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

TURNS = 5
GOOD = 100
RECIPE = {
    "run": {"name": "damaged"},
    "model": {
        "encoder": "smoke:encoder",
        "vision": {"tower": "smoke:vision", "train_tower": True},
        "moe": {"num_experts": 4, "expert_width": 16},
    },
    "data": {
        "max_length": 16,
        "max_image_bytes": LIMITS.max_bytes,
        "max_image_pixels": LIMITS.max_pixels,
        "validation_fraction": 0.2,
    },
    "tasks": {"mood": {"path": "posts.jsonl", "image": "photo"}},
    "train": {"max_steps": 6, "batch_size": 64, "log_every": 2, "eval_every": 6},
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    found = tmp_path / "data"
    found.mkdir()
    (found / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return found


def test_a_run_with_many_damaged_images_ends_well_and_names_each(terminal, folder, home):
    damaged = [entry for turn in range(TURNS) for entry in place_damaged(folder, turn)]
    count = len(damaged)
    assert count > 150
    good = {
        f"good{number}.png": encoded(noise(number), "PNG") for number in range(GOOD)
    } | unusual()
    for name, data in good.items():
        (folder / name).write_bytes(data)
    photos = [*(cell for cell, _, _ in damaged), *good, *[None] * 20]
    rows = [
        {"text": f"nice {n}", "label": ("good", "bad")[n % 2], "photo": photo}
        for n, photo in enumerate(photos)
    ]
    posts = folder / "posts.jsonl"
    write_lines(posts, rows)
    # These were good when they were looked at; size and time still say so, and training finds out.
    lines = list(range(1, len(rows) + 1))
    check_images(
        photos,
        file=str(posts),
        lines=lines,
        column="photo",
        root=folder,
        how=HowToCheck(LIMITS, home / "pictures"),
    )
    late = [folder / f"good{number}.png" for number in range(4)]
    for path in late:
        before = path.stat()
        path.write_bytes(b"?" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    runs = folder.parent / "runs"
    words = [*LEAN, f"run.output_dir={runs}"]
    said = train_in_ranks(1, home, words, config=folder / "recipe.yaml", settings="zero2")
    assert f"set aside: {count} rows" in said and "  image: too many pixels: 20" in said
    listed = {row["line"]: row for row in read_lines(runs / "damaged" / "set_aside.jsonl")}
    assert sorted(listed) == list(range(1, count + 1))
    for line, (cell, reason, words) in enumerate(damaged, start=1):
        row = listed[line]
        assert (row["reason"], words in row["rule"]) == (f"image: {reason}", True), (cell, row)
        assert row["file"] == str(posts) and not row["kept"]
    results = json.loads((runs / "damaged" / "results.json").read_text(encoding="utf-8"))
    assert sum(results["data"]["posts"]["posts"].values()) == GOOD + len(unusual()) + 20
    events = [
        line
        for line in read_lines(runs / "damaged" / "metrics.jsonl")
        if line.get("event") == "pictures_lost"
    ]
    lost = {picture for event in events for picture in event["pictures"]}
    assert lost == set(map(str, late)), "each went on as a post without picture"
    _predict(terminal, folder, runs / "damaged" / "export")


def _predict(terminal: Terminal, folder: Path, export: Path) -> None:
    photos = ["good9.png", "turn0/bomb.png", None, "../outside0.png", "turn0/missing.png"]
    write_lines(folder / "ask.jsonl", [{"text": "nice day", "photo": photo} for photo in photos])
    asked = [
        "--model",
        export,
        "--input",
        folder / "ask.jsonl",
        "--output",
        folder / "answers.jsonl",
    ]
    done = terminal.here("launch/predict.py", *asked, "--image-column", "photo")
    assert done.code == 0, done.said
    assert re.search("5 posts predicted .*; 3 of them without their bad image", done.err)
    answers = read_lines(folder / "answers.jsonl")
    errors = [answer.get("image_error") for answer in answers]
    assert errors[0] is None and errors[2] is None
    assert "3,000,000,000 pixels" in errors[1]
    assert "leads out" in errors[3]
    assert "is not there" in errors[4]
    alone = answers[2]["mood"]["scores"]["good"]
    assert all(
        answers[n]["mood"]["scores"]["good"] == pytest.approx(alone, abs=1e-6) for n in (1, 3, 4)
    )
    assert answers[0]["mood"]["scores"]["good"] != pytest.approx(alone, abs=1e-6)
