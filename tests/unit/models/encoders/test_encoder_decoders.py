"""Encoder-decoders from folder to export: what is tied, what is kept of a folder's settings, shapes without weights."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_export import tiny_recipe, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, BertModel, T5Config

from comoe.config.load import recipe_from_dict
from comoe.config.recipe import ModelConfig, MoeConfig
from comoe.data.tokens.split import TokenizedSplit
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.losses.build import build_objective
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder, build_encoder_shape
from comoe.models.encoders.families import layers_of
from comoe.train.memory_plan import _row_tokens, count_parameters, plan_run
from comoe.train.parallel.ds_config import Layout
from tests.helpers_model import HF_CONFIGS, SEQ2SEQ, T5_LIKE, TASKS, moe_config, random_batch
from tests.helpers_seq2seq import DECODED, MIXED, POLARITY, decoder_batch, decoder_model
from tests.helpers_vision import TOWERS

FLAN = T5Config(**T5_LIKE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
WHOLE = SEQ2SEQ | {"flan": FLAN}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each family, as published: tied tensors once; a Flan-T5's output layer is its own."""
    place = tmp_path_factory.mktemp("whole")
    for name, config in WHOLE.items():
        torch.manual_seed(3)
        model = AutoModelForSeq2SeqLM.from_config(config)
        if name == "flan":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 16))
        model.save_pretrained(place / name)
    (place / "flan/config.json").write_text(
        json.dumps(FLAN.to_dict() | {"tie_word_embeddings": False})
    )
    return place


def family_of(name):
    return "t5" if name == "flan" else name


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_loads_with_its_weights_and_ties_what_was_tied(folders, name):
    found = build_encoder(ModelConfig(encoder=str(folders / name)), generates=True)
    expected = AutoModelForSeq2SeqLM.from_pretrained(folders / name).state_dict()
    torch.testing.assert_close(found.state_dict(), expected, atol=0, rtol=0)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) is (name != "flan")
    assert len(layers_of(found)) == 5
    alone = build_encoder(ModelConfig(encoder=str(folders / name)))
    assert len(layers_of(alone)) == 3 and not any("decoder" in name for name in alone.state_dict())


def exported(folder, folders, name, tasks, **model_options):
    """A model, its export, and the tensors that it holds."""
    recipe = tiny_recipe(tasks=tasks)
    recipe.model = replace(recipe.model, encoder=str(folders / name), **model_options)
    torch.manual_seed(1)
    model = build_model(recipe.model, tasks, recompute=tasks is MIXED).eval()
    export_model(
        folder / "e",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=tasks,
        backbone=Backbone(
            json.loads(json.dumps(model.encoder.config.to_dict(), default=str)),
            tiny_tokenizer(folder / "v"),
        ),
    )
    return model, load_exported(folder / "e").model, load_file(folder / "e/model.safetensors")


def assert_alike(model, other, batch):
    expected = model(batch).logits
    for task, logits in other(batch).logits.items():
        torch.testing.assert_close(logits, expected[task], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["t5", "flan", "bart"])
def test_an_export_of_an_encoder_decoder_answers_alike_and_holds_each_tensor_once(
    tmp_path, folders, name
):
    model, loaded, weights = exported(tmp_path, folders, name, MIXED, private_width=8)
    tables = sum(value.shape == (60, 16) for value in weights.values())
    assert tables == (2 if name == "flan" else 1)
    assert_alike(model, loaded, decoder_batch(family=family_of(name)))
    assert loaded.encoder.config.comoe_answering == model.encoder.config.comoe_answering


@pytest.mark.parametrize("name", ["flan", "umt5", "bart", "mbart"])
def test_an_export_of_an_encoder_alone_holds_no_decoder_and_answers_alike(tmp_path, folders, name):
    model, loaded, weights = exported(tmp_path, folders, name, TASKS, moe=moe_config())
    assert not any("decoder" in key or "lm_head" in key for key in weights)
    assert loaded.decoder is None and len(loaded.moe_layers()) == 3
    assert_alike(model, loaded, random_batch())


def test_a_run_in_which_nothing_would_train_is_refused(folders):
    recipe = tiny_recipe(tasks=MIXED)
    frozen = {"encoder": str(folders / "t5"), "train_layers": "none"}
    recipe.model = replace(recipe.model, **frozen, moe=moe_config(num_experts=0))
    for shape in (False, True):
        with pytest.raises(
            ValueError,
            match=r"^model.train_layers \(none\) leaves nothing to train: .*private_width",
        ):
            build_objective(recipe, DECODED, shape=shape)
    assert build_objective(recipe, MIXED, shape=True).model.heads
    recipe.model = replace(recipe.model, private_width=4)
    build_objective(recipe, DECODED, shape=True)


def test_only_the_signs_that_begin_and_end_an_answer_are_kept_of_how_a_folder_generates(
    tmp_path, folders
):
    config = ModelConfig(encoder=str(folders / "bart"))
    plain = build_encoder(config, generates=True).generation_config.to_dict()
    settings = folders / "bart/generation_config.json"
    before = settings.read_text()
    odd = {
        "num_beams": 7,
        "no_repeat_ngram_size": 1,
        "min_length": 9,
        "temperature": 3.0,
        "do_sample": True,
    }
    settings.write_text(json.dumps(json.loads(before) | odd))
    assert build_encoder(config, generates=True).generation_config.to_dict() == plain
    settings.write_text(json.dumps(json.loads(before) | {"forced_bos_token_id": 9}))
    assert build_encoder(config, generates=True).generation_config.forced_bos_token_id == 9
    settings.write_text(before)


def changed_copy(folder, place, **config):
    """An encoder-decoder of another folder with other settings."""
    place.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(settings))
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return build_encoder(ModelConfig(encoder=str(place)), generates=True)


def test_a_t5_begins_with_padding_and_an_mbart_must_say_how_it_begins(tmp_path, folders):
    t5 = changed_copy(folders / "t5", tmp_path / "t5", decoder_start_token_id=None)
    assert t5.generation_config.decoder_start_token_id == 0
    refusal = r"model.encoder .*mbart. does not say its decoder_start_token_id.*config"
    with pytest.raises(ValueError, match=refusal):
        changed_copy(folders / "mbart", tmp_path / "mbart", decoder_start_token_id=None)
    # Layers are never dropped at random.
    dropping = {"encoder_layerdrop": 0.9, "decoder_layerdrop": 0.9}
    bart = changed_copy(folders / "bart", tmp_path / "bart", **dropping)
    assert bart.model.encoder.layerdrop == bart.model.decoder.layerdrop == 0.0


def test_an_encoder_without_a_decoder_is_refused_for_tasks_that_want_one(tmp_path):
    BertModel(HF_CONFIGS["bert"]).save_pretrained(tmp_path)
    for build in (build_encoder, build_encoder_shape):
        with pytest.raises(
            ValueError,
            match=r"^model.encoder .* is a bert, which has no decoder.*t5, .*single_label",
        ):
            build(ModelConfig(encoder=str(tmp_path)), generates=True)


def only_config(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def split_of(tasks):
    """Four posts of 4 to 7 tokens; prompts are two longer, answers three long."""
    lists = {task.name: SimpleNamespace(lengths=np.full(4, 3)) for task in tasks}
    prompts = {task.name: SimpleNamespace(lengths=np.arange(6, 10)) for task in tasks}
    tokens = SimpleNamespace(offsets=np.array([0, 4, 9, 15, 22]))
    labelled = np.ones((4, len(tasks)), dtype=bool)
    more = {"words_cut": 0, "prompts": prompts, "targets": lists}
    return TokenizedSplit(None, tokens, np.arange(6, 10), labelled, **more)


def plan_of(model):
    recipe = recipe_from_dict({"tasks": {"mood": {"path": "x"}}})
    live = {"stage3_max_live_parameters": 10, "stage3_max_reuse_distance": 10}
    zero = {"zero_optimization": {"stage": 3} | live}
    return plan_run(recipe, Layout(2, 2, 3, 6, 1, True), model, split_of(model.tasks), zero)


@pytest.mark.parametrize("name", [*WHOLE, "bert", "bert with a tower"])
def test_the_plan_from_a_configuration_alone_is_that_of_the_built_model(tmp_path, folders, name):
    family = name.split()[0]
    built, shape = ModelConfig(moe=moe_config(), train_layers=1), None
    if family == "bert":
        BertModel(HF_CONFIGS["bert"], add_pooling_layer=False).save_pretrained(tmp_path / "whole")
        built = replace(built, encoder=str(tmp_path / "whole"))
    else:
        built = replace(built, encoder=str(folders / name))
    if "tower" in name:
        from transformers import AutoModel

        AutoModel.from_config(TOWERS["vit"]).save_pretrained(tmp_path / "tower")
        built = replace(built, vision=replace(built.vision, tower=str(tmp_path / "tower")))
    source = tmp_path / "whole" if family == "bert" else folders / name
    config = json.loads((source / "config.json").read_text())
    tasks = TASKS if family == "bert" else MIXED
    shape = replace(built, encoder=only_config(tmp_path / "shape", config))
    model, hollow = build_model(built, tasks), build_model(shape, tasks, shape=True)
    assert {value.device.type for value in hollow.parameters()} == {"meta"}
    assert [(n, v.shape, v.requires_grad) for n, v in hollow.named_parameters()] == [
        (n, v.shape, v.requires_grad) for n, v in model.named_parameters()
    ]
    assert plan_of(hollow) == plan_of(model)
    assert count_parameters(hollow, top_k=2) == count_parameters(model, top_k=2)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("base", (768, 2048, 12, 12), 247_577_856), ("large", (1024, 2816, 24, 16), 783_150_080),
     ("xl", (2048, 5120, 24, 32), 2_849_757_184), ("xxl", (4096, 10240, 24, 64), 11_135_332_352)],
)  # fmt: skip
def test_a_flan_t5_of_any_size_is_planned_from_its_configuration(tmp_path, name, shape, parameters):
    width, ffn_width, layers, heads = shape
    config = T5Config(
        d_model=width, d_ff=ffn_width, num_layers=layers, num_heads=heads, d_kv=64, feed_forward_proj="gated-gelu",
        vocab_size=32128, decoder_start_token_id=0,
    ).to_dict() | {"tie_word_embeddings": False}  # fmt: skip
    place = only_config(tmp_path / name, config)
    bare = build_encoder_shape(ModelConfig(encoder=place), generates=True)
    assert sum(weight.numel() for weight in bare.parameters()) == parameters
    model = build_model(
        ModelConfig(encoder=place, moe=MoeConfig(layers="all")), [POLARITY], shape=True
    )
    counts = count_parameters(model, top_k=2)
    assert counts["experts"] == 2 * layers * 8 * 3 * width * (width // 4)
    parts = {part.name: part.device_bytes for part in plan_of(model).parts}
    # Twenty bytes a parameter, less the half-precision weights, over two ranks.
    assert parts["master copy (float32)"] == pytest.approx(2 * counts["total"], rel=1e-3)
    # Six posts; the longest label has two words, so about four tokens, and an end token.
    assert parts["logits of the vocabulary"] == 10 * 32128 * 6 * 5


def test_the_plan_counts_the_texts_of_an_author_that_are_read_each_as_long_as_the_longest():
    model = decoder_model(tasks=MIXED[:1], moe=moe_config())
    # An author with posts of 4 and 5 tokens, and one with posts of 6 and 7.
    authors = replace(split_of(MIXED[:1]), lengths=np.array([5, 7]), bounds=np.array([0, 2, 4]))
    for most, read in ((8, 12.0), (1, 6.0)):
        found = _row_tokens(model, authors, by_task=False, distilled=False, most=most)
        assert (found.encoder, found.texts) == (read, read)


def test_the_plan_counts_a_row_per_task_that_a_decoder_answers_and_what_it_reads_and_writes():
    model = decoder_model(moe=moe_config(layers=[0, 4]))
    row = _row_tokens(model, split_of(MIXED), by_task=False, distilled=False, most=8)
    # Heads' row: 5.5 tokens; three prompts of 7.5. Words of labels: at most two, so five tokens;
    # two texts of three.
    assert row == (5.5 + 3 * 7.5, 3 * 7.5, 5 + 3 + 3, 4.0, 5.5 + 3 * 7.5)
    assert _row_tokens(model, split_of(MIXED), by_task=True, distilled=False, most=8) == (
        2 * 5.5 + 3 * 7.5,
        3 * 7.5,
        11,
        5.0,
        5.5 + 3 * 7.5,  # below the blocks the two heads' rows are one text
    )
    parts = {part.name: part.device_bytes for part in plan_of(model).parts}
    tokens, written, read, width, expert = 6 * 28, 6 * 11, int(6 * 22.5), 16, 16
    layer, block = (
        (8 * width + 2 * 24) * 2 + 2 * width,
        width * (2 * 2 + 4 + 1) + 2 * (2 * width + 4 * expert) * 2,
    )
    encoder = tokens * (3 * layer + block + width * (3 * 2 + 4 * 2))
    look = written * (4 * width * 2 + width) + 2 * read * width * 2
    decoder = written * (2 * layer + block + width * 3 * 2) + 2 * look + read * width * 2
    assert parts["activations (rough)"] == encoder + decoder
    assert parts["logits of the vocabulary"] == 10 * 60 * written
