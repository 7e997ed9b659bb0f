"""Predictions: the same as the model's own, in the order of the input, none of them lost."""

import copy
import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers_export import MOOD, SIGNS, TOPIC, WORDS, assert_same, tiny_predictor

from comoe.inference.columns import read_columns
from comoe.tasks.labels import split_words

LONG = "the sun is bad, bad, bad and the rain is good @bob"
TEXTS = ["good day", LONG, "sunny", "ann in paris!", "a b c d e f"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("model"))


def test_every_kind_of_task_is_predicted_in_its_own_words(predictor):
    prediction = predictor(["ann in paris"])[0]
    assert prediction["text"] == "ann in paris"
    assert prediction["mood"]["label"] in MOOD.labels
    assert list(prediction["mood"]["scores"]) == list(MOOD.labels)
    assert sum(prediction["mood"]["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert set(prediction["signs"]["labels"]) <= set(SIGNS.labels)
    assert isinstance(prediction["heat"]["value"], float)
    assert prediction["words"]["words"] == ["ann", "in", "paris"]
    assert len(prediction["words"]["tags"]) == 3
    json.dumps(prediction, allow_nan=False)


@pytest.mark.parametrize("route_by", ["token", "task", "both"])
def test_the_prediction_is_that_of_the_model_on_the_same_tokens(tmp_path, route_by):
    predictor = tiny_predictor(tmp_path, route_by=route_by)
    predictions = predictor(TEXTS, tasks=["mood"])
    data = predictor.exported.data_config
    split = predictor.collator.encode_texts(TEXTS, config=data)
    batch = predictor.collator(split, np.arange(len(TEXTS)), all_tasks=True)
    logits = predictor.exported.model(batch).logits["mood"]
    rows = [row for row, task in enumerate(batch.task_ids_B.tolist()) if task in (-1, 0)]
    for prediction, scores in zip(predictions, logits[rows].softmax(-1), strict=True):
        torch.testing.assert_close(
            torch.tensor(list(prediction["mood"]["scores"].values())), scores, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("route_by", ["token", "task"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_neither_predictions_nor_their_order(tmp_path, route_by, batch_size):
    predictor = tiny_predictor(tmp_path, route_by=route_by)
    expected = [predictor([text], explain=True)[0] for text in TEXTS]
    assert_same(predictor(TEXTS, batch_size=batch_size, explain=True), expected)


def test_it_can_be_pickled_and_copied(predictor):
    expected = predictor(TEXTS)
    for again in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert again(TEXTS) == expected
        assert again.exported.tokenizer.decode([5]) == predictor.exported.tokenizer.decode([5])
    whole = pickle.loads(pickle.dumps(predictor))  # the tokenizer of transformers, once it was read
    assert whole(TEXTS) == expected


def test_threads_may_share_it(predictor):
    words = LONG.split()
    expected = [predictor([LONG], tasks=["mood"]), predictor([""], words=[words], tasks=["words"])]
    vector = predictor.embed([LONG])[0]["embedding"]

    def ask(number):
        if number % 4 == 3:
            return np.array_equal(predictor.embed([LONG])[0]["embedding"], vector)
        if number % 2:
            return predictor([""], words=[words], tasks=["words"]) == expected[1]
        # Another view of the same model takes turns with it.
        return predictor.with_long("cut")([LONG], tasks=["mood"]) == expected[0]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(80)))


def test_a_stream_without_end_is_read_window_by_window(predictor):
    posts = ["good day", {"words": ["ann", "in", "paris"]}, {"text": "bad", "pair": "rain"}, 7]
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield posts[number % 4]

    found = list(itertools.islice(predictor.stream(endless(), window=3, tasks=["mood"]), 5))
    assert len(read) == 6 and found[3]["error"] == "the text must be text, not int"
    texts, pairs = ["good day", "ann in paris", "bad", 7], [None, None, "rain", None]
    words = [None, ["ann", "in", "paris"], None, None]
    expected = predictor.predict(texts, pairs=pairs, words=words, tasks=["mood"])
    assert_same(found, [*expected, expected[0]])
    with pytest.raises(ValueError, match="txt is not a key of a post; did you mean text"):
        list(predictor.stream([{"txt": "good day"}]))
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        next(predictor.stream(posts, window=0))


def test_bad_texts_keep_their_place_and_say_why(predictor):
    predictions = predictor(["good", "", " \t\n", None, 7, "\x00", "bad"])
    assert [found.get("error") or "mood" in found for found in predictions] == [
        True, *["the text is empty"] * 2, "the text must be text, not NoneType", "the text must be text, not int",
        "the text is empty", True,
    ]  # fmt: skip
    assert predictions[4] == {"text": 7, "error": "the text must be text, not int"}
    assert "words" in predictor([""], words=[[" ", ""]])[0]["error"]


def test_no_texts_and_only_bad_texts_are_predicted_without_a_model_pass(predictor):
    assert predictor([]) == []
    assert predictor([""]) == [{"text": "", "error": "the text is empty"}]


def test_attention_weights_are_merged_to_words_and_sum_to_one(predictor):
    prediction = predictor(["sunny  Paris, xyz"], explain=True)[
        0
    ]  # xyz is unknown to the tokenizer
    for task in ("mood", "topic", "heat", "signs"):
        weights = prediction[task]["attention"]
        assert [word for word, _ in weights] == ["sunny", "Paris", ",", "xyz"]
        assert sum(weight for _, weight in weights) == pytest.approx(1, abs=1e-9)
        assert all(weight > 0 for _, weight in weights)
        assert 0 < prediction[task]["attention_elsewhere"] < 1
    assert "attention" not in prediction["words"]
    assert "attention" not in predictor(["sunny"])[0]["mood"]


def test_a_word_of_several_pieces_has_the_sum_of_their_weights(predictor):
    prediction = predictor(["sunny day"], tasks=["mood"], explain=True)[0]["mood"]
    batch = predictor.collator(predictor.collator.encode_texts(["sunny day"]), np.array([0]))
    weights = (
        predictor.exported.model(batch).attentions["mood"][0].tolist()
    )  # [CLS] sun ##ny day [SEP]
    inside = sum(weights[1:4])
    expected = [(weights[1] + weights[2]) / inside, weights[3] / inside]
    assert [weight for _, weight in prediction["attention"]] == pytest.approx(expected, abs=1e-6)
    assert prediction["attention_elsewhere"] == pytest.approx(weights[0] + weights[4], abs=1e-6)


def test_a_second_text_changes_the_prediction_and_has_no_words_of_its_own_in_the_explanation(
    predictor,
):
    alone, paired = (
        predictor(["good day"], pairs=[pair], explain=True)[0]["mood"]
        for pair in (None, "bad rain")
    )
    assert alone["scores"] != paired["scores"]
    assert [word for word, _ in paired["attention"]] == ["good", "day"]
    assert paired["attention_elsewhere"] > alone["attention_elsewhere"]


def test_spans_are_made_of_the_given_words(tmp_path):
    predictor = tiny_predictor(tmp_path, tasks=(WORDS,))
    with torch.no_grad():
        predictor.exported.model.heads[0].output.bias.copy_(torch.tensor([-9.0, 9.0]))
    prediction = predictor(["unused"], words=[["Ann", "saw", "Paris."]])[0]
    assert prediction["words"]["words"] == ["Ann", "saw", "Paris."]
    assert prediction["words"]["tags"] == ["B-PER"] * 3
    assert prediction["words"]["spans"][2] == {
        "type": "PER",
        "start": 2,
        "end": 3,
        "text": "Paris.",
    }


def test_plain_text_is_split_into_words_for_tags_only(predictor):
    mixed = predictor(["ann's day, paris"])[0]
    assert mixed["words"]["words"] == ["ann's", "day", ",", "paris"]
    assert_same(mixed["mood"], predictor(["ann's day, paris"], tasks=["mood"])[0]["mood"])


def test_a_task_that_shared_its_posts_with_one_of_words_reads_plain_text_cut_as_in_training(
    tmp_path,
):
    # Cleaned as a whole an entity becomes its character; cut, its letters are a word.
    text, cut = "ann &amp; sun", split_words("ann &amp; sun")
    apart, together = (
        tiny_predictor(tmp_path / "a"),
        tiny_predictor(tmp_path / "b", posts="same.jsonl"),
    )
    plain, words = apart([text])[0]["mood"], apart(["unread"], words=[cut])[0]["mood"]
    assert plain["scores"] != pytest.approx(words["scores"], abs=1e-5)
    assert_same(together([text])[0]["mood"], words)
    assert_same(together([text], tasks=["mood"])[0]["mood"], words)


def test_words_and_texts_may_be_mixed(predictor):
    predictions = predictor(["good day", "ignored"], words=[None, ["bad", "rain"]])
    assert_same(predictions[0]["mood"], predictor(["good day"])[0]["mood"])
    assert [prediction["words"]["words"] for prediction in predictions] == [
        ["good", "day"],
        ["bad", "rain"],
    ]


def test_split_words_keeps_links_users_hashtags_and_contractions():
    text = "@ann_b don't miss #sun2day at https://x.org/a?b=1 :) U.S. ok..."
    assert split_words(text) == [
        "@ann_b", "don't", "miss", "#sun2day", "at", "https://x.org/a?b=1", ":)", "U.S", ".", "ok", "...",
    ]  # fmt: skip


def test_a_post_that_was_cut_says_so(predictor):
    short, long = predictor(["good", "good " * 40])
    assert "truncated" not in short and long["truncated"] is True
    assert len(long["words"]["words"]) == 14  # 16 tokens less [CLS] and [SEP]


@pytest.mark.parametrize("route_by", ["token", "both"])
def test_only_the_given_tasks_are_predicted(tmp_path, route_by):
    predictor = tiny_predictor(tmp_path, route_by=route_by, tasks=(MOOD, TOPIC))
    everything, some = predictor(["good"])[0], predictor(["good"], tasks=["topic"])[0]
    assert set(everything) == {"text", "mood", "topic"} and set(some) == {"text", "topic"}
    assert_same(some["topic"], everything["topic"])


def test_a_task_named_twice_is_predicted_once(predictor):
    assert predictor.choose_tasks(["topic", "mood", "topic"]) == [TOPIC, MOOD]


def test_wrong_arguments_are_refused(predictor):
    with pytest.raises(ValueError, match=r"modo is not a task of this model; did you mean mood\?"):
        predictor(["good"], tasks=["modo"])
    with pytest.raises(ValueError, match="there are 1 texts and 2 pairs"):
        predictor(["good"], pairs=["a", "b"])


@pytest.mark.parametrize("route_by", ["token", "task"])
@pytest.mark.parametrize("tokens", [1, 20, 33, 100])
def test_a_limit_of_tokens_splits_the_passes_and_changes_no_prediction(
    tmp_path, monkeypatch, tokens, route_by
):
    predictor = tiny_predictor(tmp_path, route_by=route_by)
    shapes = []
    forward = predictor.exported.model.forward

    def watched(batch, *rest):
        posts = len(set(batch.row_ids_B.tolist()))
        shapes.append((posts, *batch.input_ids_BL.shape))
        assert shapes[-1][1] <= posts * predictor.collator.rows_per_post(predictor.tasks)
        return forward(batch, *rest)

    expected = predictor(TEXTS)
    monkeypatch.setattr(predictor.exported.model, "forward", watched)
    assert_same(predictor(TEXTS, batch_tokens=tokens), expected)
    assert all(posts == 1 or rows * length <= tokens for posts, rows, length in shapes)
    assert tokens > 1 or len(shapes) > len(TEXTS) - 1


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_an_embedding_is_the_mean_of_the_states_of_the_posts_own_tokens(tmp_path, route_by):
    predictor = tiny_predictor(tmp_path, route_by=route_by)
    model = predictor.exported.model
    found = predictor.embed(TEXTS, task="topic", batch_tokens=40)
    for text, one in zip(TEXTS, found, strict=True):
        split = predictor._forward.encode(read_columns([text], tasks=[TOPIC]), [None], [TOPIC])
        batch = predictor.collator(split, np.array([0]))
        states = model.encode(model._texts(batch), None).fused_BLM[0].double()
        mean = states[batch.attention_mask_BL[0] == 1].mean(dim=0)
        np.testing.assert_allclose(one["embedding"], (mean / mean.norm()).detach(), atol=1e-6)
    other = predictor.embed(TEXTS[:1], task="mood")[0]["embedding"]
    assert np.allclose(other, found[0]["embedding"], atol=1e-5) == (route_by == "token")


def test_posts_without_an_embedding_say_why(predictor):
    long, empty, good = predictor.embed([LONG * 3, " ", "good"])
    assert long.keys() == {"embedding", "truncated"}
    assert empty == {"error": "the text is empty"}
    assert good.keys() == {"embedding"} and good["embedding"].dtype == np.float32
    assert np.linalg.norm(good["embedding"]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="mod is not a task of this model.*mood"):
        predictor.embed(["good"], task="mod")
