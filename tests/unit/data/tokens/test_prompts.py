"""Prompts, answers and words of labels as an encoder-decoder is given them; what recipes say of them."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from comoe.config.load import recipe_from_dict, recipe_to_dict
from comoe.config.recipe import DataConfig, NormalizeConfig, TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.report import DataReport
from comoe.data.sampling.mixing import balanced_classes
from comoe.data.tokens.prompts import Wording, check_end_token, detokenize, label_tokens
from comoe.data.tokens.split import report_cuts, tokenize_split
from comoe.tasks.task import Task, build_task
from tests.helpers_data import recipe_of, wordpiece_tokenizer, write_jsonl
from tests.helpers_decoder import ASPECT, POLARITY, TASKS, decoder_tokenizer, posts_of

KNOWN = tuple("aspect of: polarity of in: ? great terrible battery 😀 电池 @user".split())
TOKENIZER = decoder_tokenizer(KNOWN)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: the blank is part of a piece, pieces of uneven length."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, "▁the", "▁of", "ing", "▁aspect", "er", "lo", "ve", "▁I", ":"]
    vocab = dict.fromkeys([*("<pad>", "</s>", "<unk>"), *pieces])
    scores = [(piece, -1.0 if len(piece) > 1 else -6.0) for piece in vocab]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


class Slow:
    """A tokenizer in pure Python: the same ids, no places of tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.is_fast = inner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *texts: Any, **options: Any) -> dict[str, Any]:
        return {"input_ids": self.inner(*texts, **options)["input_ids"]}


def prompts_of(
    tokenizer: Any, texts: list[str], *, prompt: str, max_length: int, pairs: Any = None
) -> list[list[int]]:
    wording = Wording(tokenizer, max_length=max_length, normalize=None)
    posts = posts_of(texts, {}, pairs=pairs)
    found = wording.prompts(
        posts, replace(ASPECT, prompt=prompt), asked=np.ones(len(texts), dtype=bool)
    )
    return [found[row].tolist() for row in range(len(texts))]


# Prompts


def test_a_prompt_is_the_template_around_the_cleaned_post_with_an_end_token():
    posts = posts_of(["thanks @ann 😀", "电池"], {"aspect": ["a", "b"]}, pairs=["the @bob", None])
    wording = Wording(TOKENIZER, max_length=64, normalize=NormalizeConfig())
    found = wording.prompts(posts, POLARITY, asked=np.array([True, False]))
    social = TOKENIZER.decode(found[0])
    assert social.startswith("polarity of the @user in: thanks @user ")
    assert social.endswith(" ? </s>")
    assert "ann" not in social and len(found[1]) == 0 and not found.truncated.any()
    plain = Wording(TOKENIZER, max_length=64, normalize=None).prompts(
        posts, POLARITY, asked=np.array([True, False])
    )
    assert TOKENIZER.decode(plain[0]) == "polarity of the @bob in: thanks @ann 😀 ? </s>"


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: TOKENIZER, metaspace_tokenizer, lambda: decoder_tokenizer(KNOWN, start=True)]
)
def test_a_long_post_loses_its_end_and_the_template_nothing(make, slow):
    tokenizer, draw = make(), random.Random(3)
    words = ["battery", "love", "the", "I", "screen", "ing", "of", "x"]
    texts = [" ".join(draw.choices(words, k=count)) for count in (1, 3, 9, 30, 200)]
    whole = prompts_of(tokenizer, texts, prompt="aspect of: {text} ?", max_length=10**6)
    before = len(tokenizer("aspect of: ")["input_ids"]) - 1
    for limit in (16, 17, 23, 40):
        made = prompts_of(
            Slow(tokenizer) if slow else tokenizer,
            texts,
            prompt="aspect of: {text} ?",
            max_length=limit,
        )
        for text, ids, full in zip(texts, made, whole, strict=True):
            if len(full) <= limit:
                assert ids == full
                continue
            # Cut within a word, its rest may be other tokens than before: a few fewer fit.
            assert limit - (8 if slow else 3) <= len(ids) <= limit, (limit, text)
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            assert shown.startswith("aspect of: ")
            assert shown.endswith("?")
            assert ids[-1] == tokenizer.eos_token_id
            kept = shown.removeprefix("aspect of: ").removesuffix("?").strip()
            assert text.startswith(kept) and ids[:before] == full[:before]


@pytest.mark.parametrize(
    ("prompt", "limit", "text", "pair", "made"),
    [("{{of:}} {text}", 32, "battery", None, "{of:} battery </s>"),  # doubled braces are meant as such
     # Where the post stands twice both are shortened alike; a second text is cut last.
     ("{text} ? {text}", 18, "battery of " * 20, None, " ? ".join([" ".join(["battery of"] * 4)] * 2) + " </s>"),
     ("polarity of {pair} in: {text} ?", 12, "great " * 30, "battery " * 30,
      f"polarity of {'battery ' * 7}in: ? </s>")],
)  # fmt: skip
def test_prompts_are_filled_and_shortened(prompt, limit, text, pair, made):
    options = {"prompt": prompt, "max_length": limit, "pairs": None if pair is None else [pair]}
    (ids,) = prompts_of(TOKENIZER, [text], **options)
    assert TOKENIZER.decode(ids) == made and len(ids) <= limit


def test_a_post_without_places_of_its_own_still_gets_shorter():
    # No blank between template and post: they share their only token.
    tokenizer = decoder_tokenizer(["abc" + "x" * 40])
    (ids,) = prompts_of(tokenizer, ["x" * 40 + " of" * 30], prompt="abc{text}", max_length=20)
    assert len(ids) <= 20 and tokenizer.decode(ids, skip_special_tokens=True).startswith("abc")


def test_a_template_that_is_too_long_by_itself_is_refused():
    with pytest.raises(
        ValueError, match=r"tasks.aspect.prompt takes 4 tokens by itself, of data.max_length \(4\)"
    ):
        prompts_of(TOKENIZER, ["x"], prompt="aspect of {text} ?", max_length=4)


# Answers


@pytest.mark.parametrize(("start", "before"), [(False, []), (True, ["<s>"])])
def test_answers_are_tokenised_with_their_end_token_and_long_ones_keep_it(start, before):
    tokenizer = decoder_tokenizer(KNOWN, start=start)
    found = Wording(tokenizer, max_length=9, normalize=None).targets(
        ["battery 😀", None, "great " * 9], ASPECT
    )
    shown = [tokenizer.convert_ids_to_tokens(found[row].tolist()) for row in range(3)]
    assert shown[0] == [*before, "battery", "😀", "</s>"] and shown[1] == []
    assert shown[2] == [*before, *["great"] * (5 - len(before)), "</s>"]
    assert found.truncated.tolist() == [False, False, True]


def test_cut_answers_and_posts_are_counted_in_the_report(tmp_path):
    rows = [{"text": "great " * 40, "label": "battery " * 9}, {"text": "of", "label": "in: ?"}]
    write_jsonl(tmp_path / "train.jsonl", rows * 2)
    write_jsonl(tmp_path / "validation.jsonl", rows)
    corpus = load_corpus(
        recipe_of(tmp_path, aspect=TaskConfig(path=".", kind="text", prompt="of: {text}"))
    )
    assert corpus.tasks[0].metric == "token_f1"
    assert corpus.report.labels["aspect"]["train"] == {"labelled": 4}
    task = replace(corpus.tasks[0], max_answer_length=6)
    config = DataConfig(max_length=20, cache=False)
    splits = {
        name: tokenize_split(s, TOKENIZER, tasks=(task,), config=config)
        for name, s in corpus.splits.items()
    }
    report_cuts(splits, corpus.report)
    assert {"train: 2 posts cut to data.max_length", "train: 2 targets cut to tasks.aspect.max_answer_length",
            "validation: 1 targets cut to tasks.aspect.max_answer_length"} <= set(corpus.report.lines())  # fmt: skip
    assert (
        "train: 2 of 4 prompts of task aspect lost part of {text} (data.max_length)"
        in corpus.report.lines()
    )
    assert not any("almost fills" in warning for warning in corpus.report.warnings)
    # "of:" and the end token.
    for length, warned in ((10, False), (9, True)):
        config = replace(config, max_length=length)
        short = tokenize_split(corpus.splits["train"], TOKENIZER, tasks=(task,), config=config)
        report_cuts({"train": short}, report := DataReport())
        warning = f"warning: tasks.aspect.prompt almost fills data.max_length (tokens left for the post: {length - 2})"
        assert any(line.startswith(warning) for line in report.lines()) == warned
    # What it is measured against stays whole.
    assert splits["validation"].posts.labels["aspect"][0] == ("battery " * 9).strip()


def test_generated_ids_become_texts():
    texts = ["battery 😀", "", "电池"]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    ids = torch.full((3, 6), -1)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    assert detokenize(ids, TOKENIZER) == texts
    assert detokenize(torch.zeros(2, 0, dtype=torch.int64), TOKENIZER) == ["", ""]


# Words of labels


@pytest.mark.parametrize(
    ("words", "match"),
    [(("great", "坏"), r"tasks.polarity.label_words: the tokenizer of .* has no token for '坏' \(label good\)"),
     (("great 坏", "great 好"), "'great 坏' and 'great 好' are the same tokens")],
)  # fmt: skip
def test_words_that_the_tokenizer_cannot_tell_apart_are_refused(words, match):
    with pytest.raises(ValueError, match=match):
        label_tokens(TOKENIZER, replace(POLARITY, label_words=words))


@pytest.mark.parametrize("tokenizer", [wordpiece_tokenizer(), decoder_tokenizer(KNOWN, end=False)])
def test_a_tokenizer_without_end_token_is_refused(tokenizer):
    with pytest.raises(
        ValueError,
        match="tasks.aspect is of kind text, whose targets need an end token.*T5 or BART",
    ):
        check_end_token(tokenizer, ASPECT)


# The cache


def test_prompts_and_answers_are_read_back_from_the_cache_and_made_anew_when_anything_changes(
    tmp_path,
):
    labels = {"aspect": ["battery", None], "polarity": [1, 0]}
    posts = posts_of(["great battery", "of"], labels, pairs=["a", "b"])

    def made(**changes: Any) -> tuple[Any, int]:
        tasks, config = (TASKS[0], replace(ASPECT, **changes), POLARITY), DataConfig(max_length=32)
        split = tokenize_split(posts, TOKENIZER, tasks=tasks, config=config, cache_dir=tmp_path)
        return split, len(list(tmp_path.iterdir()))

    (first, count), (again, same) = made(), made()
    assert count == same == 4  # heads, two prompts, one answer
    for name in ("input_ids", "offsets", "truncated"):
        for kind in ("prompts", "targets"):
            for task, lists in getattr(first, kind).items():
                other = getattr(again, kind)[task]
                assert np.array_equal(getattr(lists, name), getattr(other, name))
    assert made(prompt="of: {text}")[1] == 5
    assert made(max_answer_length=5)[1] == 6


# What a recipe says


def task_of(**options: Any) -> Task:
    config = TaskConfig(**{"path": "x", "kind": "text", "prompt": "of: {text}"} | options)
    labels = [] if config.kind == "text" else ["bad", "good"]
    return build_task("t", config, labels=labels, label_counts={})


@pytest.mark.parametrize(
    ("options", "match"),
    [({"label_smoothing": 0.1}, "tasks.t.label_smoothing has no meaning for a text task"),
     ({"class_weights": "balanced"}, "tasks.t.class_weights .balanced. has no meaning"),
     ({"metric": "accuracy"}, "tasks.t.metric is 'accuracy'.*one of: auto, token_f1, exact_match, rouge_l"),
     ({"kind": "label_words", "metric": "rouge_l"}, "tasks.t.metric is 'rouge_l'"),
     ({"kind": "label_words", "label_words": ["a"]}, r"has 1 entries \(a\) for 2 labels.*in their order: bad, good"),
     ({"kind": "label_words", "label_words": ["a", "a "]}, r"tasks.t.label_words \(a, a\) must all be different")],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        task_of(**options)


def test_a_task_has_what_the_decoder_needs_and_survives_json():
    options = {"prompt": "{text} of {pair}", "num_beams": 4, "max_answer_length": 9}
    written = task_of(**options, pair="target", class_weights="none")
    assert options == {name: getattr(written, name) for name in options}
    assert written.label_words == () and not written.contrastive
    words = [" terrible", "great"]
    scored = task_of(kind="label_words", label_words=words, class_weights=[1.0, 2.0])
    assert scored.label_words == ("terrible", "great") and scored.class_weights == (1.0, 2.0)
    assert task_of(kind="label_words").label_words == ("bad", "good")
    for task in (written, scored):
        assert Task.from_dict(task.to_dict()) == task


def test_text_with_labels_is_label_words_from_the_first_moment_on():
    task = {"path": "x", "kind": "text", "labels": ["bad", "good"], "prompt": "{text}"}
    recipe = recipe_from_dict({"tasks": {"t": task}})
    assert recipe.tasks["t"].kind == "label_words"
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert TaskConfig(kind="text").kind == "text"
    assert TaskConfig(kind="single_label", labels=["a"]).kind == "single_label"


def test_a_post_without_the_second_text_that_its_prompt_wants_is_a_bad_row(tmp_path):
    rows = [
        {"text": f"post {i}", "label": ["bad", "good"][i % 2], "target": "" if i == 2 else "t"}
        for i in range(6)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = {"path": ".", "labels": ["bad", "good"], "pair": "target"}
    asked = TaskConfig(**task, kind="label_words", prompt="{pair}: {text}")
    with pytest.raises(
        ValueError, match=r"train.jsonl:3: column target is empty, but tasks.t.prompt has \{"
    ) as caught:
        load_corpus(recipe_of(tmp_path, t=asked))
    assert "Found: ''" in str(caught.value) and "data.on_error=skip" in str(caught.value)
    recipe = recipe_of(tmp_path, t=asked, head=TaskConfig(**task))
    recipe.data.on_error = "skip"
    recipe.data.validation_fraction = 0.4
    corpus = load_corpus(recipe)
    assert len(corpus.report.set_aside) == 1 and sum(map(len, corpus.splits.values())) == 5
    # A prompt without it asks about all posts.
    assert not load_corpus(recipe_of(tmp_path, t=replace(asked, prompt="{text}"))).report.set_aside


def test_posts_can_be_drawn_by_labels_that_are_words_but_not_by_texts(tmp_path):
    rows = [{"text": f"post {i}", "label": ["bad", "good"][i % 3 == 0]} for i in range(12)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    asked = {"path": ".", "prompt": "{text}", "balanced_sampling": True}
    recipe = recipe_of(tmp_path, t=TaskConfig(**asked, kind="label_words"))
    corpus = load_corpus(recipe)
    train = corpus.splits["train"]
    classes = balanced_classes(train, corpus.tasks, recipe.tasks)
    assert classes[:, 0].tolist() == train.labels["t"]
    assert corpus.tasks[0].label_words == corpus.tasks[0].labels == ("bad", "good")
    with pytest.raises(ValueError, match=r"kind: single_label or label_words\), not text"):
        load_corpus(recipe_of(tmp_path, t=TaskConfig(**asked, kind="text")))


def test_a_column_of_label_ids_is_no_text(tmp_path):
    (tmp_path / "mood").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"mood/{split}_text.txt").write_text("one\ntwo\n")
        (tmp_path / f"mood/{split}_labels.txt").write_text("0\n1\n")
    (tmp_path / "mood/mapping.txt").write_text("0\tbad\n1\tgood\n")
    with pytest.raises(
        ValueError, match="holds ids of the labels bad, good; list them as tasks.t.labels"
    ):
        load_corpus(recipe_of(tmp_path, t=TaskConfig(path="mood", kind="text", prompt="{text}")))


def test_a_post_given_as_words_is_read_with_blanks_between():
    posts = posts_of(["battery great"], {"aspect": ["battery"]}, words=[["battery", "great"]])
    split = tokenize_split(posts, TOKENIZER, tasks=(ASPECT,), config=DataConfig(cache=False))
    assert TOKENIZER.decode(split.prompts["aspect"][0]) == "aspect of: battery great </s>"
