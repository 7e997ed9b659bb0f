"""A tokenizer that lost its files, or that another model's replaced, is told before anything is trained on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_export import export_tiny
from transformers import AutoTokenizer, ByT5Tokenizer

from comoe.data.tokens.vocabulary import embedding_problem, load_tokenizer, tokenizer_problem
from comoe.inference.exported import load_exported
from comoe.starter.tiny_models import build_smoke_bart, build_smoke_encoder, build_smoke_t5

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def delete(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def rewrite(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


def without_words(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: vocabulary[word] for word in WORDS if word in vocabulary}


def shouting(content: dict) -> None:
    content["model"]["vocab"] = {
        word.upper(): number for word, number in content["model"]["vocab"].items()
    }


def too_long(content: dict) -> None:
    content["model"]["vocab"]["surplus"] = 10**6


SPOILED = {
    "no tokenizer file at all": (
        delete("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"), "no vocabulary",
    ),
    "the vocabulary is gone, its settings are there": (delete("tokenizer.json", "vocab.txt"), "no vocabulary"),
    "a vocabulary of special tokens": (rewrite(without_words), "knows no words"),
    "upper-case words under rules that lower them": (rewrite(shouting), "does not know .* words of its own"),
    "another model's, of more words": (rewrite(too_long), "has id 1000000 .'surplus'., but .* rows"),
    "half a file": (lambda folder: (folder / "tokenizer.json").write_text('{"mod'), "tokenizer .*(read|loaded)"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_an_export_without_its_words_is_not_loaded(what, tmp_path):
    export_tiny(tmp_path)
    folder, (spoil, message) = tmp_path / "export", SPOILED[what]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_exported(folder, verify=False)


@pytest.mark.parametrize("what", [name for name in SPOILED if "another model's" not in name])
def test_an_encoder_without_its_words_is_not_trained(what, tmp_path):
    build_smoke_encoder(tmp_path)
    spoil, message = SPOILED[what]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=rf"model.encoder \(.*\): .*{message}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("build", [build_smoke_encoder, build_smoke_t5, build_smoke_bart])
def test_a_sound_tokenizer_has_nothing_wrong(build, tmp_path):
    build(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    hf_config = type("Config", (), json.loads((tmp_path / "config.json").read_text()))
    assert embedding_problem(tokenizer, hf_config) == ""
    hf_config.vocab_size = max(tokenizer.get_vocab().values())
    assert "is that of another model" in embedding_problem(tokenizer, hf_config)


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path):
    (tokenizer := ByT5Tokenizer()).save_pretrained(tmp_path)
    assert tokenizer_problem(tokenizer, tmp_path) == ""


def test_the_files_that_the_library_itself_reads_are_enough(tmp_path):
    build_smoke_encoder(tmp_path / "whole")
    words = AutoTokenizer.from_pretrained(tmp_path / "whole").get_vocab()
    (folder := tmp_path / "words").mkdir()
    shutil.copy(tmp_path / "whole/config.json", folder)
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    assert load_tokenizer(str(folder)).get_vocab() == words
