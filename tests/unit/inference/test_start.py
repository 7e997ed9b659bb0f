"""How a prediction starts: what its process imports, and that its quick parts give the bits of transformers'."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers_export import MOOD, TASKS, export_tiny
from helpers_start import LOAD, PREDICT, heavy_modules, predict_words

from comoe.data.tokens.json_tokenizer import JsonTokenizer
from comoe.inference.exported import load_exported
from comoe.inference.predictor import Predictor
from comoe.models.encoders.bert import BertEncoder


def test_a_prediction_imports_nothing_heavy_but_pytorch(tmp_path):
    export_tiny(tmp_path)
    words = predict_words(tmp_path / "export", tmp_path)
    assert heavy_modules(PREDICT, "", *words, folder=tmp_path) == []
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"text", *(task.name for task in TASKS)}] * 3


def test_a_server_imports_nothing_heavy_either(tmp_path):
    pytest.importorskip("prometheus_client")
    export_tiny(tmp_path)
    assert heavy_modules(LOAD, "", tmp_path / "export", "torch", folder=tmp_path) == []


POSTS = [
    "good day @user",
    "",
    "the sun is bad",
    "rain",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
]


@pytest.mark.parametrize("route_by", ["token", "task", "both"])
def test_predictions_have_the_bits_of_transformers(route_by, tmp_path):
    export_tiny(tmp_path, route_by=route_by, tasks=(replace(MOOD, temperature=1.7), *TASKS[1:]))
    quick = Predictor.from_pretrained(tmp_path / "export", device="cpu")
    assert isinstance(quick.exported.tokenizer, JsonTokenizer)
    assert isinstance(quick.exported.model.encoder, BertEncoder)
    exported = load_exported(tmp_path / "export")
    assert type(exported.tokenizer).__module__.startswith("transformers.")
    assert type(exported.model.encoder).__module__.startswith("transformers.")
    slow = Predictor(exported, exported.collator(), quick.device)
    pairs = [None, None, "the city", "sun", None]
    for options in (
        {},
        {"batch_size": 2},
        {"pairs": pairs},
        {"explain": True},
        {"explain": "experts"},
    ):
        assert quick(POSTS, **options) == slow(POSTS, **options)
    words = [post.split() or None for post in POSTS]
    assert quick(POSTS, words=words) == slow(POSTS, words=words)
    long = {"scores": "mean", "overlap": 2}
    assert quick.with_long("windows", **long)(POSTS) == slow.with_long("windows", **long)(POSTS)
    for one, other in zip(quick.embed(POSTS), slow.embed(POSTS), strict=True):
        assert one.keys() == other.keys()
        assert "embedding" not in one or (one["embedding"] == other["embedding"]).all()


def test_an_older_export_is_read_by_the_tokenizer_of_transformers(tmp_path):
    export_tiny(tmp_path)
    expected = Predictor.from_pretrained(tmp_path / "export", device="cpu")(POSTS)
    config = json.loads((tmp_path / "export/config.json").read_text())
    del config["tokenizer"]
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    older = Predictor.from_pretrained(tmp_path / "export", device="cpu", verify=False)
    assert not isinstance(older.exported.tokenizer, JsonTokenizer)
    assert older(POSTS) == expected


def test_a_weight_that_is_not_read_is_not_compared(tmp_path):
    export_tiny(tmp_path)
    folder = tmp_path / "export"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "model.onnx").write_bytes(b"12345")
    manifest["files"]["model.onnx"] = 5
    manifest["sha256"]["model.onnx"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_exported(folder)
    (folder / "model.onnx").write_bytes(b"123456")
    with pytest.raises(ValueError, match=r"model\.onnx has 6 bytes instead of 5"):
        load_exported(folder)
