"""Posts longer than the model reads: cut, set aside, or read in windows; and the precision of products."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_export import MOOD, SIGNS, tiny_predictor

from comoe import distributed
from comoe.inference.forward import choose_precision
from comoe.inference.long_posts import LongPosts, Part, bounds, merge
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor
from comoe.tasks.kinds.base import PostOutput

LONG = "good day , the sunny paris ! bad rain and @ann http://x.yz so good a b c d e f g h".split()
"""More words than the 16 tokens that the tiny model reads."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("sizes", "room", "overlap", "wanted"),
    [
        ([1] * 5, 9, 2, [(0, 5)]),
        ([1] * 7, 3, 0, [(0, 3), (3, 6), (6, 7)]),
        ([1] * 7, 3, 1, [(0, 3), (2, 5), (4, 7)]),
        ([2, 2, 3, 1], 4, 1, [(0, 2), (2, 4)]),
        ([2, 1, 1, 1, 3], 4, 2, [(0, 3), (1, 4), (2, 4), (3, 5)]),
        ([9, 1, 9], 4, 2, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_hold_all_words_and_share_as_many_tokens_as_asked(sizes, room, overlap, wanted):
    assert bounds(sizes, room=room, overlap=overlap) == wanted


def test_a_word_has_the_logits_of_the_window_in_which_it_stands_farthest_from_an_edge():
    parts = [Part(0, 0, 4), Part(0, 2, 6)]
    outputs = [PostOutput(i, np.full((4, 1), float(i), np.float32), None) for i in range(2)]
    merged, read = merge(parts, outputs, LongPosts(), per_word=True)
    assert read == list(range(6)) and merged[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def windows_of(predictor: Predictor, texts: list[str], **options: object) -> list[list[dict]]:
    """The predictions of each text's windows, read as posts of their own."""
    asked: list[str] = []
    read = type(predictor.collator).encode_texts

    class Spy:
        def __getattr__(self, name):
            return getattr(predictor.collator, name)

        def __call__(self, *arguments):
            return predictor.collator(*arguments)

        def encode_texts(self, texts, *more, **named):
            asked.append(list(texts))
            return read(predictor.collator, texts, *more, **named)

    spied = Predictor(predictor.exported, Spy(), predictor.device).with_long("windows", **options)
    spied(texts, tasks=["mood"])
    return [predictor(some, tasks=["mood", "heat", "signs"]) for some in asked[1:]]


@pytest.mark.parametrize("scores", ["mean", "max"])
def test_scores_are_those_of_the_merged_logits_of_the_windows(scores, predictor):
    text = " ".join(LONG * 2)
    (parts,) = windows_of(predictor, [text], scores=scores)
    assert len(parts) > 2 and not any("truncated" in part for part in parts)
    short, found = predictor.with_long("windows", scores=scores)(["good day", text])
    assert found["windows"] == len(parts) and "windows" not in short
    assert "truncated" not in found and predictor([text])[0]["truncated"]
    merged = {"mean": np.mean, "max": np.max}[scores]
    p_WY = np.array([list(part["mood"]["scores"].values()) for part in parts], dtype=np.float64)
    if scores == "mean":  # a softmax does not know a sum that its logits share
        e_Y = np.exp(np.log(p_WY).mean(axis=0))
        assert list(found["mood"]["scores"].values()) == pytest.approx(e_Y / e_Y.sum(), abs=1e-5)
    assert found["mood"]["label"] == MOOD.labels[np.argmax(list(found["mood"]["scores"].values()))]
    value = merged([part["heat"]["value"] for part in parts])
    assert found["heat"]["value"] == pytest.approx(value, abs=1e-5)
    p_WY = np.array([list(part["signs"]["scores"].values()) for part in parts], dtype=np.float64)
    logits_Y = merged(np.log(p_WY / (1 - p_WY)), axis=0)
    wanted = dict(zip(SIGNS.labels, 1 / (1 + np.exp(-logits_Y)), strict=True))
    assert found["signs"]["scores"] == pytest.approx(wanted, abs=1e-5)


def test_every_word_keeps_its_place_and_spans_go_over_windows(predictor):
    long = predictor.with_long("windows", overlap=3)
    plain, given, pair = long(
        [" ".join(LONG), "", " ".join(LONG)],
        words=[None, LONG, None],
        pairs=[None, "sun", "a " * 40],
    )
    assert plain["words"]["words"] == given["words"]["words"] == LONG
    for row in (plain, given):
        tags = row["words"]["tags"]
        assert len(tags) == len(row["words"]["scores"]) == len(LONG)
        for span in row["words"]["spans"]:
            assert span["text"] == " ".join(LONG[span["start"] : span["end"]])
    assert given["windows"] > plain["windows"] - 2  # the second text takes its room
    # A second text that leaves no room for windows: as it is without them.
    assert pair["truncated"] and "windows" not in pair and "mood" in pair
    with pytest.raises(ValueError, match="in windows cannot be explained"):
        long([" ".join(LONG)], explain=True)


def test_long_posts_are_set_aside_or_told_in_file_and_summary(predictor, tmp_path):
    texts = ["good day", " ".join(LONG), "bad"]
    source, target = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for mode, counted in (("cut", "truncated"), ("windows", "windows"), ("error", "set_aside")):
        summary = predict_file(predictor.with_long(mode), source, target, PredictOptions())
        counts = summary.record()
        rows = [json.loads(line) for line in target.open()]
        key = {"error": "error"}.get(mode, counted)
        assert [key in row for row in rows] == [False, True, False]
        if mode == "error":
            assert "more than the 16 tokens" in rows[1]["error"] and "mood" not in rows[1]
            counts["set_aside"] = sum(counts["set_aside"].values())
        predict_file(
            predictor.with_long(mode), source, tmp_path / "out.csv", PredictOptions(format="csv")
        )
        table = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
        remarks = {"cut": ["truncated"], "windows": ["truncated", "windows"], "error": []}[mode]
        assert list(table[0])[list(table[0]).index("error") + 1 :] == remarks
        for name in remarks:
            assert [row[name] for row in table] == [str(row.get(name, "")).lower() for row in rows]
        predict_file(
            predictor.with_long(mode), source, tmp_path / "a.html", PredictOptions(format="html")
        )
        page = (tmp_path / "a.html").read_text()
        assert page.count("cut to the model's length") == (mode == "cut")
        assert page.count(f"read in {rows[1].get('windows')} windows") == (mode == "windows")
        told = {name: counts[name] for name in ("truncated", "windows")} | {
            counted: counts[counted]
        }
        assert told.pop(counted) == 1 and not any(told.values())
    most = predictor.exported.data_config.max_length
    for options, message in (
        ({"mode": "window"}, "--long.*did you mean windows"),
        ({"mode": "windows", "scores": "median"}, "--long-scores"),
        ({"mode": "windows", "overlap": -1}, "--long-overlap is -1"),
        ({"mode": "cut", "overlap": 3}, "--long-overlap 3 is of windows; give --long windows"),
        ({"mode": "windows", "overlap": most}, f"is {most}; it must be below the {most} tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.with_long(**options)


def test_the_precision_is_what_the_device_is_good_at(predictor, monkeypatch):
    gpu, cpu = SimpleNamespace(type="cuda"), torch.device("cpu")
    for lacks, device, name, wanted in (
        ("", cpu, "auto", torch.float32),
        ("", cpu, "bfloat16", torch.bfloat16),
        ("", gpu, "auto", torch.bfloat16),
        ("it is old", gpu, "auto", torch.float16),
        ("it is old", gpu, "float32", torch.float32),
    ):
        monkeypatch.setattr(distributed, "gpu_lacks_bf16", lambda lacks=lacks: lacks)
        assert choose_precision(name, device) == wanted
    for name, message in (("float16", "is for GPUs"), ("bf16", "bf16 is not a --precision")):
        with pytest.raises(ValueError, match=message):
            choose_precision(name, cpu)
    half = Predictor(predictor.exported, predictor.collator, cpu, torch.bfloat16)
    exact, rounded = (
        one(["good day", "bad rain"])[0]["mood"]["scores"] for one in (predictor, half)
    )
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != exact
