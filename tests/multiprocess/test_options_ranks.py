"""Options that meet in one run: parts by text, two balanced tasks, a parent as second segment, negatives of all tasks;
then a run that starts from its export. Cut short and resumed, exported, and on two ranks as on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import read_lines
from tests.helpers_data import write_jsonl
from tests.multiprocess.sittings import lines_of, sit, sit_twice

pytestmark = pytest.mark.multiprocess

STOPPED_AT = 4
LEAN = (
    "tasks.aspects=null", "tasks.mentions=null", "tasks.stance=null", "tasks.strength=null", "run.histograms=false",
    "run.plots=false", "train.measure_experts=false", "train.batch_size=16", "train.max_steps=8", "train.eval_every=4",
    "train.save_every=2", "model.dropout=0.1",
)  # fmt: skip
MET = (
    *LEAN, *(f"tasks.{task}.{option}" for task in ("mood", "topic")
             for option in ("path=posts.jsonl", "balanced_sampling=true", "context=parent")),
    "data.stratify=none", "data.test_fraction=0.2", "loss.contrastive.weight=0.5", "loss.contrastive.negatives=all",
    "loss.contrastive.views=2",
)  # fmt: skip
MOODS, TOPICS = ("negative", "neutral", "positive"), ("food", "music", "sport", "travel")


def write_posts(folder: Path) -> Path:
    """Posts whose mood their parent tells; one in four has no topic."""
    rows = [
        {"text": f"what {TOPICS[i % 4]} it was {i}", "parent": f"so {MOODS[i % 3]}", "mood": MOODS[i % 3]}
        | ({"topic": TOPICS[i % 4]} if i % 4 or i % 8 else {})
        for i in range(200)
    ]  # fmt: skip
    write_jsonl(folder / "posts.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    names = ("whole", "cut", "one", "two", "started", "started cut")
    found = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in names}
    root = f"data.root={write_posts(tmp_path_factory.mktemp('data'))}"
    met = [*MET, root]
    sit(found["whole"], overrides=met)
    sit_twice(found["cut"], overrides=met, stop_at=STOPPED_AT)
    for name, ranks in (("one", 1), ("two", 2)):
        sit(found[name], ranks=ranks, overrides=[*met, "model.dropout=0"], float32=True)
    export = f"model.start_from={found['whole']}/smoke/export"
    started = [*met, "tasks.topic=null", "loss.contrastive.negatives=task", export]
    sit(found["started"], overrides=started)
    sit_twice(found["started cut"], overrides=started, stop_at=STOPPED_AT)
    return found


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smoke/results.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize("name", ["whole", "started"])
def test_a_resumed_run_equals_one_in_one_sitting_and_so_does_its_export(name, runs):
    whole, cut = runs[name], runs["cut" if name == "whole" else f"{name} cut"]
    assert lines_of(cut) == lines_of(whole) and metrics_of(cut) == metrics_of(whole)
    texts, parents = ["what food it was"] * 3, [f"so {mood}" for mood in MOODS]
    one, other = (
        Predictor.from_pretrained(folder / "smoke/export", device="cpu")(texts, pairs=parents)
        for folder in (whole, cut)
    )
    assert one == other and len({tuple(row["mood"]["scores"].values()) for row in one}) == 3


def test_the_export_predicts_what_the_run_has_evaluated(runs):
    told = read_lines(runs["one"] / "smoke/predictions/test/mood.jsonl")
    assert 20 < len(told) < 60
    texts = [row["text"] for row in told]
    parents = [f"so {MOODS[int(text.split()[-1]) % 3]}" for text in texts]
    predictor = Predictor.from_pretrained(runs["one"] / "smoke/export", device="cpu")
    for row, one in zip(told, predictor(texts, pairs=parents), strict=True):
        assert one["mood"]["scores"] == pytest.approx(row["scores"], abs=1e-5)


def test_a_run_that_starts_from_an_export_has_its_parts_and_begins_where_that_ended(runs):
    first, after = (
        next(line for line in lines_of(runs[name]) if line["split"] == "train")
        for name in ("whole", "started")
    )
    assert after["tasks"]["mood"]["loss"] < first["tasks"]["mood"]["loss"] - 0.1
    # Without one of the tasks the same posts are held out: their texts decide.
    sizes = [
        {split: found["mood"]["n"] for split, found in metrics_of(runs[name]).items()}
        for name in ("whole", "started")
    ]
    assert sizes[0] == sizes[1] and set(sizes[0]) == {"validation", "test"}


def test_two_ranks_have_the_losses_of_one(runs):
    one, two = (
        [line for line in lines_of(runs[name]) if line["split"] == "train"]
        for name in ("one", "two")
    )
    assert len(one) == 8 and all(line["contrastive"] > 0 for line in one)
    for name in ("loss", "contrastive"):
        np.testing.assert_allclose(
            [line[name] for line in two], [line[name] for line in one], rtol=1e-4
        )
