"""Exports of a model that reads a lexicon: the same predictions without its file, on every path, or a clear refusal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.config.load import save_recipe
from comoe.config.recipe import LexiconConfig
from comoe.inference import onnx_export
from comoe.inference.adapters import gates_of_tasks
from comoe.inference.checkpoint_folder import write_manifest
from comoe.inference.export import Backbone, export_checkpoint, export_model
from comoe.inference.export_config import read_export_config
from comoe.inference.exported import load_exported
from comoe.inference.predictor import Predictor
from comoe.models.build import build_model
from comoe.models.encoders.bert import BertEncoder
from comoe.tasks.lexicon import FILE, Lexicon
from comoe.train.run_folder import check_same_lexicon
from comoe.train.start_from import start_from_export
from tests.helpers_export import MOOD, WORDS, make, make_run, tiny_recipe, tiny_tokenizer
from tests.helpers_model import HF_CONFIGS

LEXICON = Lexicon({"good": [2.0, 0.5], "bad": [-1.0, 0.0], "sunny": [0.5, -2.0], ":)": [1.0, 1.0]})
TEXTS = ["good sunny day", "the bad rain", "ann :) paris", "the user"]
TASKS = (MOOD, WORDS)


def recipe_of(path="some/where/own.csv", *, input=True):
    recipe = tiny_recipe(tasks=TASKS)
    return replace(
        recipe, model=replace(recipe.model, lexicon=LexiconConfig(path=path, input=input))
    )


def model_of(recipe, lexicon=LEXICON):
    torch.manual_seed(0)
    model = build_model(
        recipe.model, TASKS, encoder_config=HF_CONFIGS["bert"].to_dict(), lexicon=lexicon
    )
    if model.lexicon is not None:
        torch.nn.init.normal_(model.lexicon.weight)
    return model.eval()


def export_of(folder, *, input=True, lexicon=LEXICON):
    recipe = recipe_of(input=input)
    model = model_of(recipe, lexicon)
    backbone = Backbone(
        HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(folder / "vocabulary"), lexicon=lexicon
    )
    export_model(
        folder / "export",
        state_dict=model.state_dict(), recipe=recipe, tasks=TASKS, backbone=backbone,
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of the export, the model that was exported)."""
    folder = tmp_path_factory.mktemp("lexicon")
    return folder / "export", export_of(folder)


def logits_of(export, model=None, **options):
    """Logits of ``TEXTS`` of an export, or of a model with the export's collator."""
    loaded = load_exported(export, **options)
    split = loaded.collator().encode_texts(TEXTS, config=loaded.data_config)
    batch = loaded.collator()(split, np.arange(len(TEXTS)))
    with torch.inference_mode():
        return batch, (model or loaded.model)(batch).logits


@pytest.mark.parametrize("plain", [False, True])
def test_an_export_predicts_what_the_model_did(exported, plain):
    export, model = exported
    batch, expected = logits_of(export, model)
    assert batch.lexicon_starts_BL.sum(1).tolist() == [2, 1, 1, 0]
    assert (load_exported(export).config["model"]["lexicon"]) == {"path": "own.csv", "input": True}
    found = load_exported(export, plain=plain)
    assert isinstance(found.model.encoder, BertEncoder) is plain
    for name, logits in logits_of(export, plain=plain)[1].items():
        torch.testing.assert_close(logits, expected[name], atol=1e-6, rtol=0)
    none = replace(batch, lexicon_BLK=torch.zeros_like(batch.lexicon_BLK))
    differences = (model(none).logits["mood"] - expected["mood"]).abs().amax(dim=1)
    assert (differences[:3] > 1e-3).all() and differences[3] < 1e-6


def test_onnx_has_the_numbers_as_an_input(exported, tmp_path):
    export, _ = exported
    onnx_export.add_onnx(export, tmp_path / "both")
    texts = Predictor.from_pretrained(export, device="cpu")(TEXTS)
    arrays = Predictor.from_pretrained(tmp_path / "both", backend="onnx", threads=1)(TEXTS)
    for one, other in zip(texts, arrays, strict=True):
        assert one["mood"]["label"] == other["mood"]["label"]
        assert one["mood"]["scores"] == pytest.approx(other["mood"]["scores"], abs=1e-5)
    _, logits = logits_of(tmp_path / "both", backend="onnx", threads=1)
    for name, expected in logits_of(export)[1].items():
        real = logits_of(export)[0].attention_mask_BL.bool() if expected.ndim == 3 else slice(None)
        torch.testing.assert_close(logits[name][real], expected[real], atol=1e-5, rtol=0)


def test_a_word_counts_with_its_numbers_in_integrated_gradients(exported):
    pytest.importorskip("captum")
    export, model = exported
    predictor = Predictor.from_pretrained(export, device="cpu")
    (prediction,) = predictor(["good sunny day"], explain="gradients")
    (label,) = prediction["mood"]["gradients"]
    shares = dict(label["words"])
    assert sum(shares.values()) == pytest.approx(label["to"] - label["from"] + label["delta"])
    assert abs(label["delta"]) < 0.02 * max(1, abs(label["to"] - label["from"]))
    # From: every word masked, and so without numbers.
    target = MOOD.labels.index(label["label"])
    loaded = load_exported(export)
    split = loaded.collator().encode_texts(["good sunny day"], config=loaded.data_config)
    batch = loaded.collator()(split, np.arange(1))
    ids = torch.where(batch.word_starts_BL | (batch.input_ids_BL == 10), 4, batch.input_ids_BL)
    masked = replace(batch, input_ids_BL=ids, lexicon_BLK=0 * batch.lexicon_BLK)
    # On the experts of the post itself.
    selected = loaded.model(batch).selected
    scores = loaded.model(masked, selected).logits["mood"][0].detach()
    others = [number for number in range(3) if number != target]
    assert label["from"] == pytest.approx(
        float(scores[target] - scores[others].logsumexp(0)), abs=1e-4
    )


def test_where_a_loss_alone_reads_the_lexicon_the_export_has_none(tmp_path):
    model = export_of(tmp_path, input=False)
    assert model.lexicon is None and not (tmp_path / "export" / FILE).exists()
    assert read_export_config(tmp_path / "export")["model"]["lexicon"]["path"] is None
    batch, logits = logits_of(tmp_path / "export")
    assert batch.lexicon_BLK is None
    torch.testing.assert_close(logits["mood"], model(batch).logits["mood"])


def test_an_export_without_its_lexicon_or_with_a_changed_one_is_refused(tmp_path):
    export_of(tmp_path)
    Lexicon({"good": [9.0, 9.0]}).save(tmp_path / "export")
    with pytest.raises(ValueError, match=r"lexicon.json"):
        load_exported(tmp_path / "export")
    (tmp_path / "export" / FILE).unlink()
    with pytest.raises(ValueError, match=r"reads a lexicon, but lexicon.json is missing"):
        load_exported(tmp_path / "export", verify=False)


def test_a_checkpoint_is_exported_with_the_lexicon_of_its_run(tmp_path):
    from safetensors.torch import save_file

    make_run(tmp_path, steps=(3,))
    recipe, other = recipe_of(), tmp_path / "checkpoints/step-00000003"
    save_recipe(recipe, tmp_path / "config.yaml")
    (tmp_path / "tasks.json").write_text(
        str([task.to_dict() for task in TASKS]).replace("'", '"').replace("None", "null")
        .replace("True", "true").replace("False", "false").replace("(", "[").replace(")", "]")
    )  # fmt: skip
    save_file(model_of(recipe).state_dict(), other / "weights" / "model.safetensors")
    write_manifest(make(other), step=3)
    LEXICON.save(tmp_path / "tokenizer")
    export_checkpoint(tmp_path, tmp_path / "out", which="last")
    assert Lexicon.load(tmp_path / "out").digest == LEXICON.digest
    _, found = logits_of(tmp_path / "out")
    assert torch.isfinite(found["mood"]).all()


def test_a_resume_with_another_lexicon_is_refused(tmp_path):
    make(tmp_path / "tokenizer")
    check_same_lexicon(tmp_path, None)
    with pytest.raises(ValueError, match=r"a lexicon of 4 words, but .* learned with no lexicon"):
        check_same_lexicon(tmp_path, LEXICON)
    LEXICON.save(tmp_path / "tokenizer")
    check_same_lexicon(tmp_path, Lexicon(LEXICON.numbers))
    for other in (None, Lexicon({**LEXICON.numbers, "bad": (-1.0, 0.1)})):
        with pytest.raises(ValueError, match=r"give the one that the run was begun with"):
            check_same_lexicon(tmp_path, other)


def test_a_run_that_starts_from_an_export_takes_the_map_of_the_same_lexicon_alone(exported):
    export, model = exported
    recipe = recipe_of()
    config = replace(recipe.model, start_from=str(export))
    same, other = (
        model_of(recipe, lexicon)
        for lexicon in (LEXICON, Lexicon({**LEXICON.numbers, "bad": (0.0, 0.0)}))
    )
    for one in (same, other):
        torch.nn.init.zeros_(one.lexicon.weight)
        start_from_export(config, one)
    assert torch.equal(same.lexicon.weight, model.lexicon.weight) and not other.lexicon.weight.any()


def test_plain_models_of_other_libraries_are_refused(exported):
    from comoe.inference.auto import ComoeModel

    export, _ = exported
    model = ComoeModel.from_pretrained(export)
    with pytest.raises(ValueError, match="a lexicon"):
        model(torch.ones(1, 3, dtype=torch.long))
    loaded = load_exported(export)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comoe.inference.adapters.adapters_of", lambda encoder: [1])
        with pytest.raises(ValueError, match=r"model.lexicon.input is true: .* do something else"):
            gates_of_tasks(loaded, "do something else")
