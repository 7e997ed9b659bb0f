"""Rows of a batch where a decoder predicts some tasks, and the path of its texts to scores and predictions."""

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from comoe.config.recipe import DataConfig, NormalizeConfig, Recipe, TaskConfig
from comoe.data.collator import Collator
from comoe.data.columns import Domains
from comoe.data.reading.inputs import choose_labels, pair_in_training
from comoe.data.reading.rows import RowReader
from comoe.data.soft_labels import SoftLabels
from comoe.data.tokens.split import TokenizedSplit, tokenize_split, with_soft_labels
from comoe.evaluation.calibration import Calibrator, ece_of
from comoe.evaluation.evaluate import check_chosen_metric, evaluate, mean_metric, metric_names
from comoe.inference.model_card import model_card
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor
from comoe.inference.score import DataChoice, score
from comoe.tasks.task import Task
from comoe.train.dry_run import sample_lines, seen_by_the_decoder
from comoe.types import IGNORED, Batch, ModelOutput
from tests.helpers_data import write_jsonl
from tests.helpers_decoder import ASPECT, MOOD, POLARITY, TASKS, decoder_tokenizer, posts_of

TOKENIZER = decoder_tokenizer(
    "aspect of: polarity of in: ? great terrible battery screen 😀 电池 post".split()
)
CONFIG = DataConfig(max_length=32, cache=False, normalize=NormalizeConfig(preset="none"))
TEXTS = ["post one", "post two is great", "post three", "post four 😀", "post five"]
LABELS = {
    # All three; mood alone; the decoder's alone; one of these; none at all.
    "mood": [0, 1, None, None, None],
    "aspect": ["battery 😀", None, "电池", None, None],
    "polarity": [1, None, 0, 0, None],
}
PAIRS = ["battery", None, "screen", "screen", "post"]


def split_of(*, tasks: tuple[Task, ...] = TASKS, **more: Any) -> TokenizedSplit:
    posts = posts_of(
        TEXTS, {task.name: LABELS[task.name] for task in tasks}, pairs=PAIRS, tasks=tasks, **more
    )
    return tokenize_split(posts, TOKENIZER, tasks=tasks, config=CONFIG)


def rows_of(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.row_ids_B.tolist(), batch.task_ids_B.tolist(), strict=True))


def shown(batch: Batch, row: int) -> str:
    return TOKENIZER.decode(batch.input_ids_BL[row][batch.attention_mask_BL[row].bool()])


# Rows


def test_by_token_a_post_has_one_row_for_the_heads_and_one_for_each_task_of_the_decoder():
    split = split_of()
    batch = Collator(TOKENIZER, TASKS)(split, np.arange(5), all_tasks=True)
    assert rows_of(batch) == [
        (0, -1), (0, 1), (0, 2), (1, -1), (2, 1), (2, 2), (3, 2), (4, -1), (4, 1), (4, 2),
    ]  # fmt: skip
    assert shown(batch, 0) == "post one </s> battery </s>"
    assert shown(batch, 1) == "aspect of: post one </s>"
    assert shown(batch, 2) == "polarity of battery in: post one ? </s>"
    assert batch.labels["mood"].tolist() == [0, *[IGNORED] * 2, 1, *[IGNORED] * 6]
    no = IGNORED
    assert batch.labels["polarity"].tolist() == [no, no, 1, no, no, 0, 0, no, no, no]
    assert batch.texts["aspect"] == [None, "battery 😀", None, None, "电池", *[None] * 5]
    # Target tokens, the end token one of them.
    assert batch.labels["aspect"][[1, 4]].tolist() == [3, 2]
    assert batch.token_type_ids_BL is None and not batch.word_starts_BL[batch.task_ids_B >= 0].any()
    assert batch.word_starts_BL[0].sum() == 2  # of the first text alone


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_the_most_rows_of_a_post_are_known_without_making_them(route_by):
    collator = Collator(TOKENIZER, TASKS, row_per_task=route_by != "token")
    for asked in (TASKS, TASKS[:1], TASKS[1:]):
        split = collator.encode_texts(TEXTS, pairs=PAIRS, config=CONFIG, asked=asked)
        split.labelled[:, [number for number, task in enumerate(TASKS) if task in asked]] = True
        posts = collator(split, np.arange(len(TEXTS))).row_ids_B.tolist()
        assert collator.rows_per_post(asked) == max(map(posts.count, posts))


@pytest.mark.parametrize("start", [False, True])
def test_answers_and_choices_are_the_tokens_of_the_right_words(start):
    tokenizer = decoder_tokenizer(["great", "terrible", "battery", "😀", "电池"], start=start)
    posts = posts_of(TEXTS, LABELS, pairs=PAIRS)
    split = tokenize_split(posts, tokenizer, tasks=TASKS, config=CONFIG)
    batch = Collator(tokenizer, TASKS)(split, np.array([0, 2, 4]))

    def words(row: torch.Tensor) -> list[str]:
        return tokenizer.convert_ids_to_tokens(row[row != IGNORED].tolist())

    before = ["<s>"] if start else []
    wanted = {(0, 1): ["battery", "😀"], (0, 2): ["great"], (2, 1): ["电池"], (2, 2): ["terrible"]}
    assert batch.target_ids_BD.dtype == torch.int64
    for pair, row in zip(rows_of(batch), batch.target_ids_BD, strict=True):
        assert words(row) == ([*before, *wanted[pair], "</s>"] if pair in wanted else [])
    assert list(batch.choices) == ["polarity"]
    choices = [words(row) for row in batch.choices["polarity"]]
    assert choices == [[*before, "terrible", "</s>"], [*before, "great", "</s>"]]


@pytest.mark.parametrize("route_by", ["task", "both"])
def test_by_task_every_row_has_its_one_task(route_by):
    split, collator = split_of(), Collator(TOKENIZER, TASKS, row_per_task=route_by != "token")
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (2, 2), (3, 2)]
    assert rows_of(collator(split, np.arange(5))) == expected
    # Prediction: heads predict all posts, the decoder those it has a label of and those
    # without any.
    batch = collator(split, np.array([1, 3, 4]), all_tasks=True)
    assert rows_of(batch) == [(1, 0), (3, 0), (3, 2), (4, 0), (4, 1), (4, 2)]
    assert batch.text_numbers_B.tolist() == [0, 1, 2, 3, 4, 5]  # a prompt is a text of its own
    assert shown(batch, 1) == "post four 😀 </s> screen </s>"
    assert shown(batch, 2) == "polarity of screen in: post four 😀 ? </s>"


def test_without_a_task_with_a_head_there_are_no_rows_for_heads_and_heads_alone_have_no_answers():
    tasks = (ASPECT, POLARITY)
    split = split_of(tasks=tasks)
    batch = Collator(TOKENIZER, tasks)(split, np.arange(5), all_tasks=True)
    # The second post has no label here and no second text, which one prompt wants.
    assert rows_of(batch) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 1), (4, 0), (4, 1)]
    assert len(split.tokens.input_ids) == 0
    batch = Collator(TOKENIZER, (MOOD,))(split_of(tasks=(MOOD,)), np.arange(2))
    assert batch.target_ids_BD is None and batch.choices == {}
    assert rows_of(batch) == [(0, -1), (1, -1)]


@pytest.mark.parametrize(("route_by", "task"), [("token", -1), ("task", 0)])
def test_a_rank_without_posts_has_one_row_that_wants_no_answer(route_by, task):
    batch = Collator(TOKENIZER, TASKS, row_per_task=route_by != "token")(
        split_of(), np.zeros(0, dtype=np.int64)
    )
    assert rows_of(batch) == [(-1, task)] and batch.target_ids_BD.tolist() == [[IGNORED]]
    assert batch.labels["aspect"].tolist() == batch.labels["polarity"].tolist() == [IGNORED]
    assert batch.texts["aspect"] == [None]


def test_rows_are_taken_with_their_answers():
    batch = Collator(TOKENIZER, TASKS)(split_of(), np.array([0]))
    part = batch.take(torch.tensor([2, 1]))
    assert torch.equal(part.target_ids_BD, batch.target_ids_BD[[2, 1]])
    assert torch.equal(part.labels["aspect"], batch.labels["aspect"][[2, 1]])
    assert part.texts["aspect"] == [None, "battery 😀"] and part.to("cpu").texts == part.texts
    assert torch.equal(part.choices["polarity"], batch.choices["polarity"])


def test_lengths_are_those_of_the_longest_row_of_a_post():
    split = split_of()
    batches = [
        Collator(TOKENIZER, TASKS)(split, np.array([post]), all_tasks=True) for post in range(5)
    ]
    assert split.lengths.tolist() == [batch.input_ids_BL.shape[1] for batch in batches]
    assert split.lengths[1] == len(split.rows(np.array([1]))[0].input_ids) < split.lengths[0]


def test_confidences_and_domains_go_with_the_rows_and_a_post_counts_once():
    tasks = (MOOD, replace(ASPECT, confidence_strategy="output"), POLARITY)
    confidences = {"aspect": [0.25, None, 0.5, None, None]}
    split = split_of(
        tasks=tasks, confidences=confidences, columns={"place": ["a", "b", "a", None, "b"]}
    )
    domains = Domains("place", ("a", "b"), (0.5, 0.5), 1, (1.0, 3.0))
    batch = Collator(TOKENIZER, tasks, domains=domains)(split, np.array([0, 1, 0, 3]))
    assert rows_of(batch)[:4] == [(0, -1), (0, 1), (0, 2), (1, -1)]
    assert batch.confidences["aspect"].tolist() == [0.25] * 3 + [1.0] + [0.25] * 3 + [1.0]
    assert batch.domains_B.tolist() == [0, 0, 0, 1, 0, 0, 0, IGNORED]
    # Drawn twice, the first post counts twice.
    torch.testing.assert_close(
        batch.domain_weights_B, torch.tensor([1 / 3] * 3 + [3.0] + [1 / 3] * 3 + [0.0])
    )


def test_tasks_of_other_data_sets_do_not_ask_about_posts_without_the_second_text():
    posts = posts_of(["a post", "b post"], {"mood": [None, 1]})
    split = tokenize_split(posts, TOKENIZER, tasks=TASKS, config=CONFIG)
    batch = Collator(TOKENIZER, TASKS)(split, np.arange(2), all_tasks=True)
    assert rows_of(batch) == [(0, -1), (0, 1), (1, -1)]


@pytest.mark.parametrize("tasks", [TASKS, (ASPECT, POLARITY)])
def test_the_decoder_is_not_asked_about_posts_without_labels_where_nothing_is_predicted(tasks):
    split, collator = split_of(tasks=tasks), Collator(TOKENIZER, tasks)
    assert rows_of(collator(split, np.array([4]))) == [(4 if MOOD in tasks else -1, -1)]
    asked = [
        split.labelled[post, task]
        for post, task in rows_of(collator(split, np.arange(5)))
        if task >= 0
    ]
    assert len(asked) == 5 and all(asked)


def test_soft_labels_of_a_decoders_task_make_a_row_with_its_prompt_where_it_can_be_asked():
    """All posts but the last have a second text; the soft label of polarity is of posts 0 to 4."""
    posts = posts_of(TEXTS, LABELS, pairs=["battery", "screen", "screen", "screen", None])
    split = tokenize_split(posts, TOKENIZER, tasks=TASKS, config=CONFIG, distilled={"polarity"})
    soft = SoftLabels.from_rows([np.array([[0.25, 0.75]])] * 5, width=2)
    split = with_soft_labels(split, {"polarity": soft})
    batch = Collator(TOKENIZER, TASKS)(split, np.arange(5))
    own = rows_of(Collator(TOKENIZER, TASKS)(split_of(), np.arange(5)))
    askable = {post for post in range(5) if posts.pairs[post] is not None}
    assert {post for post, task in rows_of(batch) if task == 2} == askable
    assert [row for row in rows_of(batch) if row[1] != 2] == [row for row in own if row[1] != 2]
    for (_, task), values in zip(
        rows_of(batch), batch.soft_labels["polarity"].tolist(), strict=True
    ):
        assert values == [0.25, 0.75] if task == 2 else np.isnan(values).all()


# Answers

WRITTEN = {0: "battery 😀", 2: "battery", 4: "screen 电池"}


def written_by(
    batch: Batch, *, tokenizer: Any = TOKENIZER, tasks: tuple[Task, ...] = TASKS
) -> ModelOutput:
    """Outputs of a model that generates ``WRITTEN``, scores "great" at 3/4 of both words, and is of mood 1 for all."""
    rows = batch.row_ids_B.tolist()
    ids = [tokenizer(WRITTEN.get(row, "post"))["input_ids"] for row in rows]
    generated = torch.full((len(rows), max(map(len, ids))), -1)
    for number, row in enumerate(ids):
        generated[number, : len(row)] = torch.tensor(row)
    logits = {
        "mood": torch.tensor([[0.0, 2.0]]).repeat(len(rows), 1),
        "aspect": torch.tensor([[-6.0, float(np.log(0.5))]]).repeat(len(rows), 1),
        "polarity": torch.tensor([[0.01, 0.03]]).log().repeat(len(rows), 1),
    }
    return ModelOutput(
        {task.name: logits[task.name] for task in tasks},
        {},
        {},
        (),
        torch.zeros(0, dtype=torch.int64),
        generated={"aspect": generated},
    )


def evaluated(*, shares: list[list[list[int]]], route_by: str = "token", **options: Any) -> Any:
    split, collator = split_of(), Collator(TOKENIZER, TASKS, row_per_task=route_by != "token")
    seen: list[Any] = []

    def of(batches: list[list[int]], gather: Any) -> Any:
        return evaluate(
            written_by, split, collator=lambda s, i: collator(s, i, all_tasks=True), tasks=TASKS,
            batches=[np.array(batch, dtype=np.int64) for batch in batches], gather=gather,
            detokenize=collator.detokenize, texts=split.texts, **options,
        )  # fmt: skip

    for batches in shares[1:]:
        of(batches, lambda predictions: (seen.append(predictions), [predictions])[1])
    return of(shares[0], lambda predictions: [predictions, *seen])


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_generated_texts_are_scored_and_shown(route_by):
    found = evaluated(shares=[[[0, 1], [2, 3, 4]]], route_by=route_by)
    aspect = found.metrics["aspect"]
    assert aspect["n"] == 2 and aspect["exact_match"] == 0.5 and aspect["token_f1"] == 0.5
    assert aspect["loss"] == pytest.approx(12 / 5)  # nats of both texts over their 3 + 2 tokens
    polarity = found.metrics["polarity"]
    assert polarity["n"] == 3 and polarity["accuracy"] == pytest.approx(1 / 3)
    assert polarity["loss"] == pytest.approx(-(np.log(0.03) + 2 * np.log(0.01)) / 3)
    assert found.confusions["polarity"].tolist() == [[0, 2], [0, 1]]
    assert "aspect" not in found.confusions
    assert found.predictions["aspect"] == [
        {"row": row, "text": TEXTS[row], "gold": LABELS["aspect"][row], "answer": WRITTEN[row],
         "probability": pytest.approx(0.5)}
        for row in (0, 2, 4)
    ]  # fmt: skip
    assert [row["row"] for row in found.predictions["polarity"]] == [0, 2, 3, 4]
    assert found.predictions["polarity"][3]["scores"] == pytest.approx({"bad": 0.25, "good": 0.75})
    labelled = [row["row"] for row in found.predictions["mood"] if row["gold"] is not None]
    assert labelled == [0, 1] and found.metrics["mood"]["n"] == 2


def test_two_ranks_give_what_one_does():
    whole = evaluated(shares=[[[0, 1, 2, 3, 4]]])
    parts = evaluated(shares=[[[4, 1], [0]], [[2], [3, 0]]])
    assert parts.metrics == whole.metrics and parts.predictions == whole.predictions


def test_scores_of_texts_can_be_sliced_and_chosen_by():
    tasks = (MOOD, replace(ASPECT, slices=("place",)), POLARITY)
    split, collator = split_of(), Collator(TOKENIZER, tasks)
    found = evaluate(
        written_by, split, collator=collator, tasks=tasks, batches=[np.arange(5)], gather=lambda a: [a],
        detokenize=collator.detokenize, columns={"place": ["x", None, "y", "y", "x"]}, predictions=False,
    )  # fmt: skip
    assert found.metrics["aspect"]["token_f1@place=x"] == 1.0
    assert found.metrics["aspect"]["token_f1@place=y"] == 0.0
    check_chosen_metric("aspect/rouge_l", tasks)
    assert {"loss", "token_f1", "exact_match", "rouge_l", "majority/token_f1"} == set(
        metric_names(ASPECT)
    )
    assert mean_metric(found.metrics, tasks) == pytest.approx(
        np.mean([found.metrics[task.name][task.metric] for task in tasks])
    )


def test_scored_words_are_calibrated_and_texts_left_alone():
    generator = np.random.default_rng(0)
    gold = generator.integers(2, size=60)
    # As sure as 9 to 1, right 7 times of 10: log-probabilities of words, which do not sum to 1.
    right = generator.random(60) < 0.7
    said = np.where(right, gold, 1 - gold)
    tasks = (ASPECT, POLARITY)
    labels = {"polarity": gold.tolist(), "aspect": ["x"] * 60}
    posts = posts_of(["post"] * 60, labels, pairs=["a"] * 60, tasks=tasks)
    split = tokenize_split(posts, TOKENIZER, tasks=tasks, config=CONFIG)
    collator = Collator(TOKENIZER, tasks)

    def forward(batch: Batch) -> ModelOutput:
        output = written_by(batch, tasks=tasks)
        logits = torch.full((len(batch.row_ids_B), 2), float(np.log(0.0001)))
        logits[torch.arange(len(logits)), torch.from_numpy(said)[batch.row_ids_B]] = float(
            np.log(0.0009)
        )
        return replace(output, logits={**output.logits, "polarity": logits})

    found = evaluate(
        forward, split, collator=collator, tasks=tasks, batches=[np.arange(60)], gather=lambda a: [a],
        detokenize=collator.detokenize,
    )  # fmt: skip
    assert set(ece_of(found.outputs, tasks)) == {"polarity"}
    calibrator = Calibrator(tasks, temperatures=True, thresholds=False)
    after = calibrator.take("validation", found)
    assert calibrator.tasks[0] == ASPECT and calibrator.tasks[1].temperature > 1.5
    sure = after.predictions["polarity"][0]["scores"].values()
    assert max(sure) == pytest.approx(right.mean(), abs=0.05) and sum(sure) == pytest.approx(1.0)
    assert after.metrics["polarity"]["loss"] == found.metrics["polarity"]["loss"]


# Prediction


def predictor_of(
    tasks: tuple[Task, ...] = TASKS,
    *,
    route_by: str = "token",
    columns: dict[str, Any] | None = None,
    seen: list[Batch] | None = None,
) -> Predictor:
    """A predictor of what ``written_by`` says; ``seen`` gets the batches that the model is given."""

    def model(batch: Batch) -> ModelOutput:
        if seen is not None:
            seen.append(batch)
        attentions = {"mood": batch.attention_mask_BL.float()}
        return replace(written_by(batch, tasks=tasks), attentions=attentions)

    exported = SimpleNamespace(
        tasks=tasks, tokenizer=TOKENIZER, data_config=CONFIG, config={"columns": columns or {}}, image_processor=None,
        model=model, folder=Path("export"), backend="torch", lexicon=None,
    )  # fmt: skip
    return Predictor(
        exported, Collator(TOKENIZER, tasks, row_per_task=route_by != "token"), torch.device("cpu")
    )


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_every_task_answers_a_post_and_one_without_the_second_text_says_so(route_by):
    predictions = predictor_of(route_by=route_by)(
        ["post one", "post two", " ", "post three"], pairs=["battery", None, "x", "y"], explain=True
    )
    assert predictions[0]["aspect"] == {"answer": "battery 😀", "probability": pytest.approx(0.5)}
    assert predictions[0]["polarity"]["label"] == "good"
    assert predictions[0]["mood"]["label"] == "wild"
    assert "attention" in predictions[0]["mood"] and "attention" not in predictions[0]["aspect"]
    assert predictions[1] == {
        "text": "post two",
        "error": "the second text is missing, which the prompt of polarity wants; give it (--pair-column), or ask for "
        "other tasks",
    }
    assert predictions[2] == {"text": " ", "error": "the text is empty"}
    assert predictions[3]["polarity"]["label"] == "good"


@pytest.mark.parametrize(
    ("cell", "read"),
    [(5, "5"), (2.5, "2.5"), (["battery", "great"], "battery great"), ("battery", "battery")],
)
def test_second_texts_are_read_as_in_training(cell, read):
    names = ("polarity", "mood")
    shared = TaskConfig(path="posts", pair="about", prompt=POLARITY.prompt)
    reader = RowReader(dict.fromkeys(names, shared), dict.fromkeys(names, ()), max_characters=99)
    assert reader.read({"text": "post", "about": cell}).pair == read
    predictor = predictor_of(seen=(seen := []))
    (prediction,) = predictor(["post"], pairs=[cell], tasks=["mood", "polarity"])
    assert "error" not in prediction
    expected = [f"post </s> {read} </s>", f"polarity of {read} in: post ? </s>"]
    assert [shown(seen[0], row) for row in range(2)] == expected


@pytest.mark.parametrize("cell", ["  ", float("nan"), [], True, {"a": 1}])
def test_a_second_text_that_is_none_is_said_and_a_line_of_ids_is_never_missing(cell, tmp_path):
    predictor = predictor_of()
    (prediction,) = predictor(["post one"], pairs=[cell], tasks=["polarity"])
    assert prediction["error"].startswith("the second text ") and "polarity" not in prediction
    source = write_jsonl(
        tmp_path / "in.jsonl", [{"text": "post one", "about": cell}, {"text": "b", "about": "c"}]
    )
    for task in ("polarity", "mood"):
        target = tmp_path / f"{task}.txt"
        predict_file(
            predictor,
            source,
            target,
            PredictOptions(pair_column="about", format="tweeteval", tasks=[task]),
        )
        assert target.read_text() == "1\n1\n"


def test_only_the_tasks_that_are_asked_for_run():
    predictor = predictor_of(seen=(seen := []))
    for task in ("aspect", "mood"):
        assert list(predictor(["post one"], tasks=[task])[0]) == ["text", task]
    assert [rows_of(batch) for batch in seen] == [[(0, 1)], [(0, -1)]]


def test_a_post_given_as_words_is_asked_about_as_in_training_and_a_cut_one_is_marked():
    predictor = predictor_of((ASPECT,), seen=(seen := []))
    first, second = predictor(["ignored", "great " * 50], words=[["battery", "great"], None])
    assert "truncated" not in first and second["truncated"]
    texts = {shown(batch, row) for batch in seen for row in range(len(batch.row_ids_B))}
    assert texts == {"aspect of: battery great </s>", f"aspect of: {'great ' * 29}</s>"}


def test_labelled_posts_are_scored_as_in_training(tmp_path):
    rows = [
        {"text": "post one", "aspect": "battery 😀", "polarity": "good", "target": "battery"},
        {"text": "post two", "aspect": "", "polarity": "bad", "target": "screen"},
        {"text": "post three", "aspect": "screen", "polarity": None, "target": ""},
    ]
    path = str(write_jsonl(tmp_path / "posts.jsonl", rows))
    predictor = predictor_of((ASPECT, POLARITY))
    scores = score(predictor, DataChoice(path, pair="target"), progress=False)
    assert scores.evaluation.metrics["aspect"]["n"] == 2
    assert scores.evaluation.metrics["aspect"]["exact_match"] == 0.5
    assert scores.evaluation.metrics["polarity"]["accuracy"] == 0.5
    assert "ece" in scores.evaluation.metrics["polarity"]
    with pytest.raises(
        ValueError, match=r"The prompt of polarity has \{pair\}; name its column with --pair-column"
    ):
        score(predictor, DataChoice(path), progress=False)
    assert (
        score(predictor, DataChoice(path, label="aspect"), tasks=["aspect"], progress=False).posts
        == 3
    )
    write_jsonl(tmp_path / "posts.jsonl", [rows[0], rows[1] | {"target": " "}])
    with pytest.raises(
        ValueError, match=r"posts.jsonl:2: column target is empty, but tasks.polarity.prompt has"
    ):
        score(predictor, DataChoice(path, pair="target"), progress=False)


def test_files_of_answers_hold_texts_and_scored_words(tmp_path, capsys):
    rows = [
        {"text": "post one", "about": "battery"},
        {"text": "post two"},
        {"text": "", "about": "x"},
    ]
    source, predictor = write_jsonl(tmp_path / "in.jsonl", rows), predictor_of()

    def written(name: str, **options: Any) -> list[str]:
        predict_file(
            predictor, source, tmp_path / name, PredictOptions(pair_column="about", **options)
        )
        return (tmp_path / name).read_text(encoding="utf-8").splitlines()

    table = list(csv.DictReader(written("out.csv", format="csv")))
    assert table[0]["aspect"] == "battery 😀"
    assert table[0]["polarity"] == "good"
    assert table[0]["error"] == ""
    last = ["aspect", "polarity", "polarity/bad", "polarity/good", "error", "truncated"]
    assert list(table[0])[-6:] == last
    assert table[1]["aspect"] == "" and table[1]["error"].startswith("the second text is missing")
    # Every line needs an id.
    assert written("out.txt", format="tweeteval", tasks=["polarity"]) == ["1", "1", "1"]
    said = capsys.readouterr().err
    assert (
        "2 lines without a text, or the second text that the prompt wants, were predicted as '@user'"
        in said
    )
    with pytest.raises(
        ValueError, match="wants a task with one label per post; aspect is a text task"
    ):
        written("out.txt", format="tweeteval", tasks=["aspect"])


ASKED_ABOUT = {name: {"pair": "target", "label": name} for name in ("mood", "aspect", "polarity")}


def test_second_texts_and_labels_are_read_from_the_columns_of_training(tmp_path, capsys):
    rows = [
        {"text": "post one", "target": "battery", "polarity": "good", "label": "bad"},
        {"text": "post two"},
    ]
    source, predictor = write_jsonl(tmp_path / "in.jsonl", rows), predictor_of(columns=ASKED_ABOUT)
    said = str(predict_file(predictor, source, tmp_path / "out.jsonl"))
    assert "2 posts predicted" in said and "1 of them could not" in said
    assert "second texts are read from column target, as in training" in capsys.readouterr().err
    scores = score(
        predictor, DataChoice(str(source), skip_bad=True), tasks=["polarity"], progress=False
    )
    assert scores.evaluation.metrics["polarity"]["accuracy"] == 1.0
    assert "--pair-column" in capsys.readouterr().err
    # A head that had no second text would read another post than in training.
    alone = predictor_of(columns=ASKED_ABOUT | {"mood": {"pair": None, "label": "mood"}})
    message = rf"none of the 2 posts of .* could be predicted, see {tmp_path}/out.jsonl; the first: .*--pair-column"
    with pytest.raises(ValueError, match=message):
        predict_file(alone, source, tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    # It is said, once, what is not read and how it is.
    said = capsys.readouterr().err
    assert said.count("warning: polarity had second texts from column target in training") == 1
    assert "; --task polarity alone reads the column" in said
    predict_file(
        alone, source, tmp_path / "out.jsonl", PredictOptions(tasks=["aspect", "polarity"])
    )
    assert "warning" not in capsys.readouterr().err


def test_the_columns_of_training_are_not_taken_where_they_say_nothing():
    columns = {
        "a": {"pair": "x", "label": "mood"},
        "b": {"pair": "y", "label": "mood"},
        "c": {"label": "shade"},
    }
    config, tasks = {"columns": columns}, [replace(MOOD, name=name) for name in "abc"]
    alike = {"a": "a", "b": "b"}
    for count, pair, asked, names, found in (
        (1, "x", None, ["mood", "shade"], {"a": "mood"}), (2, None, None, ["mood", "shade"], alike),
        (3, None, None, ["mood", "shade"], alike | {"c": "shade"}), (1, "x", None, ["label"], {"a": "label"}),
        (2, None, "z", ["mood"], {"a": "z", "b": "z"}),
    ):  # fmt: skip
        some = tasks[:count]
        assert choose_labels(config, some, asked=asked, columns=names) == found
        assert pair_in_training(config, some) == pair
    assert pair_in_training({}, tasks) is None


def test_attention_is_not_promised_where_no_head_pools(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "post one"}])
    predict_file(predictor_of((ASPECT,)), source, tmp_path / "out", PredictOptions(explain=True))
    assert (
        "--explain: none of these tasks has attention; only tasks with a pooled head"
        in capsys.readouterr().err
    )
    written, mixed = card((ASPECT,)), card(TASKS)
    assert "explain" not in written
    assert "Attention" not in written
    assert "Generated texts need not be true" in written
    assert "explain=True" in mixed and "Attention" in mixed and "Scored words are whole" in mixed


# What is shown


def test_the_dry_run_shows_prompt_and_answer_as_the_model_sees_them():
    split = split_of()
    seen = seen_by_the_decoder(split, TOKENIZER)
    aspect, polarity = (
        sample_lines(task, split.posts, CONFIG.normalize, seen=seen) for task in (ASPECT, POLARITY)
    )
    assert aspect[2:] == [
        "  battery 😀 </s> | aspect of: post one </s>", "  电池 </s> | aspect of: post three </s>"
    ]  # fmt: skip
    assert polarity[1] == "  words of the labels: bad = 'terrible', good = 'great'"
    assert polarity[3] == "  great </s> | polarity of battery in: post one ? </s>"


def card(tasks: tuple[Task, ...]) -> str:
    config: Mapping[str, Any] = {
        "data": {"normalize": {"language": "en"}}, "model": {"encoder": "some/t5"}, "encoder": {"model_type": "t5"},
        "comoe_version": "1",
    }  # fmt: skip
    return model_card("m", recipe=Recipe(), tasks=tasks, config=config, results=None)


def test_the_card_tells_the_prompts_and_how_to_give_the_second_text():
    mixed = card(TASKS)
    assert "pipeline_tag: text-classification" in mixed and "One encoder-decoder" in mixed
    assert "| polarity | polarity of {pair} in: {text} ? |" in mixed
    assert "| aspect | text | a text | token_f1 |" in mixed
    assert 'pairs=["the weather"]' in mixed and "--pair-column pair" in mixed
    written = card((ASPECT,))
    assert "pipeline_tag: text-generation" in written and "--pair-column" not in written
