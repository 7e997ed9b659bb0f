"""The tiny encoder-decoders, and the generated posts that they learn from."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from comoe.config.recipe import ModelConfig
from comoe.data.images.pixels import load_image_processor
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.models.encoders.build import build_encoder
from comoe.models.vision.tower import image_side
from comoe.starter.implied_posts import (
    ASPECTS,
    OPINIONS,
    PAIRS,
    build_implied_posts,
    plan_implied_posts,
)
from comoe.starter.synthetic_text import GENERATORS, generate, vocabulary
from comoe.starter.tiny_models import (
    build_smoke_bart,
    build_smoke_encoder,
    build_smoke_t5,
    build_smoke_vilt,
)

DECODERS = ("t5", "bart")
BUILDS = {
    "t5": build_smoke_t5, "bart": build_smoke_bart, "bert": build_smoke_encoder, "vilt": build_smoke_vilt,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in BUILDS}
    for name, build in BUILDS.items():
        build(found[name])
    return found


@pytest.mark.parametrize("name", BUILDS)
def test_a_tiny_model_is_the_same_each_time_and_leaves_random_numbers_alone(
    name, folders, tmp_path
):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    BUILDS[name](tmp_path)
    assert torch.equal(torch.rand(3), expected)
    first, second = (
        (folder / "model.safetensors").read_bytes() for folder in (folders[name], tmp_path)
    )
    assert first == second and len(first) < 2_000_000


def test_a_tiny_vilt_reads_text_and_drawn_images_by_itself(folders):
    folder = str(folders["vilt"])
    config = ModelConfig(encoder=folder)
    assert image_side(config) == folder and load_image_processor(folder).shape == (3, 48, 48)
    encoder = build_encoder(config)
    assert encoder.pooler is None and encoder.config.hidden_size == 64
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(str(folders["bert"])).get_vocab()


@pytest.mark.parametrize("name", DECODERS)
def test_a_tiny_decoder_loads_with_tied_words_and_its_own_signs(name, folders):
    model, found = AutoModelForSeq2SeqLM.from_pretrained(folders[name], output_loading_info=True)
    assert not any(found.values())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer, config = load_tokenizer(str(folders[name])), model.config
    for special in ("pad_token_id", "eos_token_id"):
        assert getattr(tokenizer, special) == getattr(config, special)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer("a soup")["input_ids"][-1] == config.eos_token_id


@pytest.mark.parametrize("name", BUILDS)
def test_a_tiny_models_tokenizer_reads_every_generated_post_and_gives_readable_text_back(
    name, folders
):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    posts = [post for data_set in GENERATORS for post in generate(data_set, count=50, seed=9)]
    texts = [str(post["text"]) if "text" in post else " ".join(post["words"]) for post in posts]
    if name not in DECODERS:
        assert len(tokenizer) == len(vocabulary())
        assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)
        return
    for text in [*texts, *(str(post["text"]) for post in plan_implied_posts(count=200, seed=9))]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert not any(piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids))
    for answer in ("staff slow", "long battery", "unheard of words"):
        assert tokenizer.decode(tokenizer(answer)["input_ids"], skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", DECODERS)
def test_a_second_text_stands_behind_an_end_token(name, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("soup", "bread")["input_ids"])
    expected = {"t5": "soup </s> bread </s>", "bart": "<s> soup </s> </s> bread </s>"}
    assert " ".join(tokens) == expected[name]


def test_neither_aspect_nor_opinion_alone_tells_anything_of_the_polarity():
    posts = plan_implied_posts(count=400, seed=3)
    for column in ("aspect", "opinion", "target"):
        counts = Counter((post[column], post["polarity"]) for post in posts)
        for value in {value for value, _ in counts}:
            positive, negative = counts[value, "positive"], counts[value, "negative"]
            assert positive == negative or column == "target"
    both = {(post["aspect"], post["opinion"]): post["polarity"] for post in posts}
    assert all(both[post["aspect"], post["opinion"]] == post["polarity"] for post in posts)
    assert len(both) == 20
    assert both["battery", "long"] == "positive" and both["wait", "long"] == "negative"


def test_an_implicit_post_names_neither_aspect_nor_opinion_and_no_word_stands_for_two():
    for post in plan_implied_posts(count=200, seed=4):
        words = set(str(post["text"]).split())
        assert ({post["aspect"], post["opinion"]} <= words) != post["implicit"]
        assert post["target"] in words
    cues = [
        cue
        for table in (ASPECTS, OPINIONS)
        for name, cues in table.items()
        for cue in (name, *cues)
    ]
    assert len(set(cues)) == len(cues)
    assert {name for pair in PAIRS for name in pair} == set(OPINIONS)
    assert {name for pair in PAIRS.values() for name in pair} == set(ASPECTS)


def test_wrong_guesses_are_unsure_and_right_ones_sure():
    posts = plan_implied_posts(count=1000, seed=5)
    for column in ("aspect", "opinion"):
        right = [post[f"guessed_{column}"] == post[column] for post in posts]
        assert 0.35 < sum(right) / len(right) < 0.45
        for post, is_right in zip(posts, right, strict=True):
            assert (post[f"guessed_{column}_confidence"] >= 0.8) == is_right
            assert 0.05 <= post[f"guessed_{column}_confidence"] <= 1


def test_the_files_of_implied_posts_share_no_post(tmp_path):
    build_implied_posts(tmp_path, counts={"train": 60, "validation": 20, "test": 20})
    files = [
        (tmp_path / "implied" / f"{split}.jsonl").read_text("utf-8")
        for split in ("train", "validation", "test")
    ]
    rows = [[json.loads(line) for line in content.splitlines()] for content in files]
    assert [len(part) for part in rows] == [60, 20, 20]
    assert len({row["text"] for part in rows for row in part}) == 100
    assert rows[0] == plan_implied_posts(count=60, seed=0)
    assert all(row["guessed_aspect"] == row["aspect"] for part in rows[1:] for row in part)
