"""ONNX files of exports: the logits of PyTorch for every family, the same predictions, and what is refused."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_export import (
    MOOD,
    TASKS,
    TOPIC,
    WORDS,
    assert_same,
    export_tiny,
)
from helpers_model import HF_CONFIGS, VARIANTS, moe_config, tiny_encoder
from helpers_start import LOAD, PREDICT, heavy_modules, predict_words

from comoe.commands.main import main
from comoe.config.recipe import ModelConfig
from comoe.data.posts import unlabelled_posts
from comoe.data.seen_posts import SEEN, write_seen
from comoe.inference.export_config import WEIGHTS
from comoe.inference.exported import load_exported
from comoe.inference.predictor import Predictor
from comoe.models.build import build_model
from comoe.models.encoders.families import family_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from comoe.inference import onnx_export, onnx_model  # noqa: E402
from comoe.inference.onnx_model import ONNX, OnnxModel  # noqa: E402

POSTS = ["good day @user", "", "the sun is bad", "rain", "a b c d e f g h i j k l m n o p q r s t"]

GATES = {
    "softmax, one expert, shared, by token and task": moe_config(
        gate="softmax", top_k=1, shared_width=8, route_by="both", task_prior=1.5
    ),
    "low rank": moe_config(form="lora"),
    "threshold, by task, own experts": moe_config(
        cooperation_threshold=0.5, route_by="task", task_prior="own"
    ),
}


SHARING = {
    "own layers, mixed layers, attention between tasks": dict(
        own_layers=1, pooling="layers", task_attention_width=4
    ),
    "first token": dict(pooling="first"),
}


COPIES = {
    "xlm-roberta": ["roberta"], "camembert": ["roberta"], "mt5": ["t5", "umt5"], "qwen2": ["llama", "qwen3"],
}  # fmt: skip
"""Family -> others with the same code in the library. The cases of ``GATES`` are BERTs."""
TRACED = [*(HF_CONFIGS.keys() - COPIES - {"bert", "deberta-v2"}), "deberta-v2 with a convolution"]


def code_of(family: str) -> set[str]:
    """Lines of a family's own passes; names of classes without that of the family."""
    encoder = tiny_encoder(family)
    prefix = type(encoder.config).__name__.removesuffix("Config")
    kinds = {type(module) for module in encoder.modules()}
    lines: set[str] = set()
    for kind in kinds:
        if kind.__module__.startswith("transformers.models."):
            source = textwrap.dedent(inspect.getsource(kind)).replace(prefix, "")
            for made in ast.parse(source).body[0].body:
                if isinstance(made, ast.FunctionDef) and made.name != "__init__":
                    body = made.body[ast.get_docstring(made) is not None :]
                    lines.update("\n".join(map(ast.unparse, body)).split("\n"))
    return lines


@pytest.mark.parametrize("family", COPIES)
def test_families_that_are_not_traced_have_the_code_of_some_that_are(family):
    own, others = code_of(family), [code_of(other) for other in COPIES[family]]
    assert len(own) > 20 and own <= set().union(*others)


def one_of_each_layer(family: str) -> dict:
    """Tracing takes long: one layer; two where the configuration lists kinds, or where the first one does more."""
    config = (HF_CONFIGS | VARIANTS)[family]
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    count = len(kinds) or 1 + family.startswith(("t5", "umt5", "deberta"))
    return (
        config.to_dict()
        | {family_of(config.model_type).num_layers[0]: count}
        | ({"layer_types": kinds} if kinds else {})
    )


@pytest.mark.parametrize("case", [*sorted(TRACED), *GATES, *SHARING])
def test_logits_are_those_of_pytorch_whatever_the_shape(case, tmp_path, monkeypatch):
    torch.manual_seed(0)
    moe, more = GATES.get(case, moe_config(layers="top-1")), SHARING.get(case, {})
    config = ModelConfig(
        dropout=0.0, projection_width=8, moe=moe, private_width=8 * (case in GATES), **more
    )
    encoder = one_of_each_layer("bert" if case in GATES | SHARING else case)
    if config.own_layers:
        encoder["num_hidden_layers"] += 1
    model = build_model(config, (MOOD, WORDS, TOPIC), encoder_config=encoder).eval()
    for name, weight in model.named_parameters():
        # At the start norms do nothing, which hides a lost one, and copies are alike.
        if "norm" in name or ".copies." in name or "task_attention" in name or "mixture." in name:
            torch.nn.init.normal_(weight, std=0.5)
    batches = onnx_export.sample_batches(model, 16)
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
        embeddings = [model.embed(batch) for batch in batches]
    onnx_export.write_onnx(model, tmp_path / ONNX, batches[0], 16)
    found = OnnxModel(tmp_path / ONNX, threads=1)
    assert onnx_export.largest_difference(found, batches, expected) < onnx_export.CLOSE
    for batch, output, embedding in zip(batches, expected, embeddings, strict=True):
        torch.testing.assert_close(found.embed(batch), embedding, atol=1e-5, rtol=0)
        two = 2 * batch.input_ids_BL.shape[1]
        monkeypatch.setattr(onnx_model, "TOKENS", two)  # passes of two rows, some of them shorter
        attentions = found(batch).attentions
        assert attentions.keys() == output.attentions.keys()
        for name, attention in attentions.items():
            torch.testing.assert_close(attention, output.attentions[name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A calibrated export, with an ONNX file of float32, and one of 8 bits."""
    folder = tmp_path_factory.mktemp("onnx")
    tasks = (replace(MOOD, temperature=1.7), *TASKS[1:])
    export_tiny(folder, tasks=tasks)
    write_seen(folder / "export" / SEEN, unlabelled_posts(["a post"], tasks=[]))
    onnx_export.add_onnx(folder / "export", folder / "float32")
    assert (folder / "float32" / SEEN).read_bytes() == (folder / "export" / SEEN).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        # Traced once.
        traced = folder / "float32" / ONNX
        patch.setattr(onnx_export, "write_onnx", lambda _, path, *rest: shutil.copy(traced, path))
        onnx_export.add_onnx(folder / "export", folder / "int8", int8=True)
    return folder


def test_a_predictor_takes_either_backend_and_gives_the_same(exports):
    torch_s = Predictor.from_pretrained(exports / "export", device="cpu")
    onnx_s = Predictor.from_pretrained(exports / "float32", backend="onnx", threads=1)
    assert onnx_s.tasks == torch_s.tasks and onnx_s.tasks[0].temperature == 1.7
    for options in ({}, {"explain": True, "batch_size": 2}, {"tasks": ["words"]}):
        assert_same(onnx_s(POSTS, **options), torch_s(POSTS, **options))
    for one, other in zip(onnx_s.embed(POSTS), torch_s.embed(POSTS), strict=True):
        assert one.keys() == other.keys()
        assert "embedding" not in one or abs(one["embedding"] - other["embedding"]).max() < 1e-5
    # Both are in the manifest.
    files = json.loads((exports / "float32" / "manifest.json").read_text())["sha256"]
    assert {ONNX, "model.safetensors", "config.json"} <= files.keys()


def test_8_bits_are_close_small_and_keep_gates_and_heads_whole(exports):
    import onnx

    coarse = Predictor.from_pretrained(exports / "int8", backend="onnx", threads=1)
    fine = Predictor.from_pretrained(exports / "float32", backend="onnx", threads=1)
    assert coarse.exported.config["onnx"]["precision"] == "int8"
    scores = [[post["mood"]["scores"]["good"] for post in one(POSTS[2:])] for one in (coarse, fine)]
    assert max(abs(a - b) for a, b in zip(*scores, strict=True)) < 0.05
    graph = onnx.load(exports / "int8" / ONNX).graph
    constants = {one.name: one for one in graph.initializer}
    # What is left in float32: 5 heads, 4 pooling queries, 3 gates.
    whole = [
        constants[node.input[1]].dims for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants
    ]  # fmt: skip
    assert all(len(dims) == 1 or min(dims) <= 4 for dims in whole) and len(whole) == 5 + 4 + 3
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) >= 3 * 9


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_neither_threads_nor_a_pickle_change_a_digit(exports, precision):
    posts = [f"{text} {i % 7}" for i, text in enumerate(POSTS * 20)]
    found = []
    for threads in (1, 2, 3):
        one = Predictor.from_pretrained(exports / precision, backend="onnx", threads=threads)
        found.append(one(posts))
        assert one.exported.model.threads == threads
    again = pickle.loads(pickle.dumps(one))
    assert found[0] == found[1] == found[2] == again(posts)
    assert again.exported.model.threads == 3


@pytest.mark.parametrize(
    "change, rule",
    [
        (lambda folder: (folder / ONNX).unlink(), "has no model.onnx"),
        (lambda folder: (folder / ONNX).write_bytes(b"\x08\x07nonsense"), "bytes instead of"),
    ],
)
def test_a_missing_or_damaged_file_is_named(exports, tmp_path, change, rule):
    onnx_export.copy_export(exports / "float32", tmp_path / "export")
    change(tmp_path / "export")
    with pytest.raises(ValueError, match=rule):
        Predictor.from_pretrained(tmp_path / "export", backend="onnx")
    if (tmp_path / "export" / ONNX).exists():
        with pytest.raises(ValueError, match="model.onnx cannot be read"):
            Predictor.from_pretrained(tmp_path / "export", backend="onnx", verify=False)


def test_a_folder_without_the_weights_serves_its_own_backend(exports, tmp_path):
    folder = tmp_path / "export"
    onnx_export.copy_export(exports / "int8", folder)
    expected = Predictor.from_pretrained(folder, backend="onnx")(POSTS)
    (folder / WEIGHTS).unlink()
    for verify in (True, False):
        assert Predictor.from_pretrained(folder, backend="onnx", verify=verify)(POSTS) == expected
    with pytest.raises(ValueError, match="export: model.safetensors is missing; copy or export"):
        Predictor.from_pretrained(folder)
    with pytest.raises(ValueError, match="has no model.safetensors, .* take --backend onnx"):
        Predictor.from_pretrained(folder, verify=False)
    (folder / ONNX).unlink()
    with pytest.raises(ValueError, match="is not an export: model.safetensors missing"):
        Predictor.from_pretrained(folder, backend="onnx")


def test_what_is_no_single_graph_is_refused(exports, tmp_path):
    exported = load_exported(exports / "export")
    text = replace(MOOD, name="answer", kind="text", labels=(), metric="rouge_l")
    for found, rule in (
        (replace(exported, tasks=(text,)), "answer are answered by a decoder"),
        (replace(exported, image_processor=object()), "reads images"),
    ):
        with pytest.raises(ValueError, match=rule):
            onnx_export.check_exportable(found)
    with pytest.raises(ValueError, match="on the CPU"):
        Predictor.from_pretrained(exports / "float32", backend="onnx", device="cuda")
    for method in ("experts", "gradients"):
        with pytest.raises(ValueError, match="attention alone"):
            Predictor.from_pretrained(exports / "int8", backend="onnx").explain(
                ["a"], method=method
            )
    with pytest.raises(ValueError, match="backend"):
        Predictor.from_pretrained(exports / "float32", backend="onxx")


def test_the_commands_take_it(exports, tmp_path, capsys):
    (tmp_path / "posts.txt").write_text("good day\nbad rain\n")
    export = ["export", "--checkpoint", str(exports / "export"), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        main([*export, "--int8"])
    assert "--int8 wants --format onnx" in capsys.readouterr().err
    words = (
        f"--model {exports / 'int8'} --backend onnx --threads 1 --input {tmp_path / 'posts.txt'}"
    )
    main(["predict", *words.split(), "--output", str(tmp_path / "out.jsonl")])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_a_prediction_and_a_server_need_neither_pytorch_nor_transformers(exports, tmp_path):
    for more in (("--explain",), ("--long", "windows", "--batch-size", "2")):
        words = predict_words(exports / "float32", tmp_path, "--backend", "onnx", *more)
        assert heavy_modules(PREDICT, "torch", *words, folder=tmp_path) == []
        rows = (tmp_path / "found.jsonl").read_text().splitlines()
        assert [len(json.loads(row)) for row in rows] == [1 + len(TASKS)] * 3
    pytest.importorskip("prometheus_client")
    assert heavy_modules(LOAD, "torch", exports / "float32", "onnx", folder=tmp_path) == []


def test_arrays_give_what_tensors_give(exports):
    predictor = Predictor.from_pretrained(exports / "float32", backend="onnx", threads=1)
    split = predictor.collator.encode_texts(POSTS[2:], config=predictor.exported.data_config)
    split.labelled[:] = True
    indices, model = np.arange(len(POSTS[2:])), predictor.exported.model
    arrays = predictor.collator(split, indices, arrays=True)
    tensors = predictor.collator(split, indices)
    for name in onnx_export.INPUTS.values():
        if (array := getattr(arrays, name)) is not None:
            assert isinstance(array, np.ndarray) and (array == getattr(tensors, name).numpy()).all()
    found, expected = model(arrays), model(tensors)
    for part in ("logits", "attentions"):
        for name, tensor in getattr(expected, part).items():
            assert (getattr(found, part)[name] == tensor.numpy()).all()
    assert (model.embed(arrays) == model.embed(tensors).numpy()).all()


def test_plugins_decode_tensors_as_they_were_written_for(exports, monkeypatch):
    predictor = Predictor.from_pretrained(exports / "float32", backend="onnx", threads=1)
    config = dict(predictor.exported.config) | {"plugins": ["mine"]}
    other = replace(predictor, exported=replace(predictor.exported, config=config))
    seen = []
    outputs = type(MOOD.rules).outputs

    def spy(self, output, *rest, **more):
        seen.append(output)
        return outputs(self, output, *rest, **more)

    monkeypatch.setattr(type(MOOD.rules), "outputs", spy)
    assert_same(other(POSTS), predictor(POSTS))
    kinds = [type(found.logits[MOOD.name]) for found in seen if MOOD.name in found.logits]
    assert kinds[0] is torch.Tensor and kinds[-1] is np.ndarray


THREADS = """
import sys
from comoe.inference.onnx_model import usual_threads
alone = usual_threads()
assert "torch" not in sys.modules
import torch
assert alone == torch.get_num_threads() == usual_threads(), (alone, torch.get_num_threads())
"""


@pytest.mark.parametrize("told", ["1", "2", "", None])
def test_threads_are_those_that_pytorch_would_take(told):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {} if told is None else {"OMP_NUM_THREADS": told}
    subprocess.run([sys.executable, "-c", THREADS], check=True, env=environment)
