"""What is refused once posts and encoder are both known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModel, BertConfig

from comoe.config.load import load_recipe
from comoe.config.recipe import ModelConfig, Recipe
from comoe.train.read_data import read_posts, tokenize_posts
from comoe.train.start_model import build_model
from tests.helpers_model import BERT_LIKE, TASKS


class Tokens(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.lengths)


def test_posts_longer_than_the_position_table_are_refused_before_training(tmp_path):
    AutoModel.from_config(BertConfig(**BERT_LIKE, max_position_embeddings=20)).save_pretrained(
        tmp_path
    )
    recipe = Recipe(model=ModelConfig(encoder=str(tmp_path)))
    splits = {
        "train": Tokens(lengths=np.array([3, 20])),
        "test": Tokens(lengths=np.array([], dtype=np.int32)),
    }
    # The option may be larger than the table as long as no post is.
    vocabulary = {"[PAD]": 0, "last": BERT_LIKE["vocab_size"] - 1}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=None)
    collator = SimpleNamespace(tasks=TASKS, domains=None, tokenizer=tokenizer)
    assert build_model(recipe, splits, collator).model.moe_layers()
    splits["validation"] = Tokens(lengths=np.array([21]))
    refusal = r"data.max_length \(128\) lets posts of 21 tokens .* set data.max_length to 20"
    with pytest.raises(ValueError, match=refusal):
        build_model(recipe, splits, collator)
    vocabulary["one more"] = BERT_LIKE["vocab_size"]
    with pytest.raises(ValueError, match=r"model.encoder .*'one more'.* is that of another model"):
        build_model(recipe, splits, collator)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [(["train.max_steps=5"], r"first_steps \(5\) must be less than the 5 steps of the run; lower it"),
     (["tasks.mood.contrastive=false"], "first_steps is 5, but no task takes part")],
)  # fmt: skip
def test_a_contrastive_stage_that_leaves_or_has_nothing_to_learn_is_refused(
    tmp_path, overrides, refusal
):
    rows = [{"text": f"post {row}", "label": "ab"[row % 2]} for row in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "posts.jsonl").write_text(lines)
    (tmp_path / "recipe.yaml").write_text(
        "{tasks: {mood: {path: posts.jsonl}}, model: {encoder: smoke:encoder},"
        " loss: {contrastive: {first_steps: 5}}, train: {batch_size: 4}}"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    _, corpus = read_posts(recipe)
    note = "5 of 27 steps come first that learn from the contrastive loss alone"
    assert note in corpus.report.notes
    with pytest.raises(ValueError, match=refusal):
        read_posts(load_recipe(tmp_path / "recipe.yaml", overrides))


@pytest.mark.parametrize(("words", "count"), [("post,1\nnever,2\n", 16), ("never,2\n", 0)])
def test_it_is_said_how_often_posts_have_words_of_the_lexicon(tmp_path, monkeypatch, words, count):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))
    rows = [{"text": f"post {row}", "label": "ab"[row % 2]} for row in range(20)]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.csv").write_text(words)
    (tmp_path / "recipe.yaml").write_text(
        "{tasks: {mood: {path: posts.jsonl}}, model: {encoder: smoke:encoder, lexicon: {path: "
        f"{tmp_path / 'own.csv'}}}}}, data: {{cache: false, validation_fraction: 0.2}}}}"
    )
    recipe, corpus = read_posts(load_recipe(tmp_path / "recipe.yaml"))
    tokenize_posts(recipe, corpus)
    notes = [note for note in corpus.report.notes if note.startswith("lexicon")]
    assert len(notes) == 1 and notes[0].endswith(f"found in training posts: {count}")
    warned = any("no training post has a word of it" in line for line in corpus.report.warnings)
    assert warned == (count == 0)
