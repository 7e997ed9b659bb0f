"""Classical models as arms: against formulas and scikit-learn, on the posts of the recipe, without any rank."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from comoe.config.files import read_json
from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.experiments import runner
from comoe.experiments.classical import Examples, lexicon, majority, naive_bayes, tfidf_svm
from comoe.experiments.compare.command import run_comparison
from comoe.experiments.compare.plan import plan_arms
from comoe.experiments.lexicon import applies, by_words
from comoe.tasks.lexicon import read_lexicon
from comoe.train.request import Request, load_requested
from comoe.train.run_folder import MARK
from tests.helpers_compare import MODEL, arguments, experiment_of

WORDS = {"positive": "good great", "negative": "bad awful", "neutral": "today plain"}
RECIPE = f"""{MODEL}data: {{root: POSTS, noise: [typos]}}
tasks:
  mood: {{path: posts, label: mood}}
  topics: {{path: posts, label: topics, kind: multi_label}}
  heat: {{path: posts, label: heat, kind: regression}}
"""


def write_posts(folder: Path) -> None:
    """90 and 45 posts whose words tell mood and topics; a third of the validation posts has no mood."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 90), ("validation", 45)):
        rows = []
        for number in range(count):
            mood = list(WORDS)[number % 3]
            topics = [name for name in ("health", "sport") if generator.random() < 0.5]
            said = [*WORDS[mood].split(), *topics]
            row = {"text": f"post {number} {' '.join(generator.permutation(said))}", "heat": number}
            row |= {
                "topics": topics,
                "mood": None if split != "train" and number % 9 == 0 else mood,
            }
            rows.append(row)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def experiment(tmp_path, encoder, monkeypatch):
    (tmp_path / "posts").mkdir()
    write_posts(tmp_path / "posts")

    def no_ranks(*_, **__):
        raise AssertionError("a classical arm started a process")

    monkeypatch.setattr(runner, "_run", no_ranks)
    return experiment_of(tmp_path, encoder, RECIPE.replace("POSTS", str(tmp_path)))


def words_file(folder: Path) -> Path:
    file = folder / "my words.csv"
    file.write_text("word,number\ngood,2\ngreat,3\nbad,-2\nawful,-3\n")
    return file


def test_classical_arms_predict_the_posts_of_the_recipe_and_stand_in_one_report(
    experiment, tmp_path, capsys
):
    names = "majority,lexicon,naive_bayes,tfidf_svm"
    given = arguments(experiment, arms=names, seeds="0,1", lexicon=words_file(tmp_path))
    assert run_comparison(given) == []
    corpus = load_corpus(load_recipe(experiment.config))
    posts = corpus.splits["validation"]
    labelled = [row for row, mood in enumerate(posts.labels["mood"]) if mood is not None]
    assert len(labelled) == 40
    for arm in names.split(","):
        (folder,) = experiment.runs.glob(f"{arm}*-s1")
        results = read_json(folder / "results.json")
        rows = [
            json.loads(line)
            for line in (folder / "predictions/validation/mood.jsonl").read_text().splitlines()
        ]
        assert [row["row"] for row in rows] == labelled
        gold, found = ([row[key] for row in rows] for key in ("gold", "label"))
        metrics = results["metrics"]["validation"]["mood"]
        assert math.isclose(metrics["macro_f1"], f1_score(gold, found, average="macro"))
        assert "mood" in results["metrics"]["validation+typos"]
        assert ("loss" in metrics) == (arm in ("majority", "naive_bayes"))
        assert set(results["skipped"]) == {"heat"} | ({"topics"} if arm == "lexicon" else set())
    scores = {
        arm: read_json(experiment.output / "summary.json")[arm]["mood"]["macro_f1"]["mean"]
        for arm in names.split(",")
    }
    assert scores["lexicon"] == scores["naive_bayes"] == scores["tfidf_svm"] == 1
    majority_of = read_json(experiment.runs / "majority-s0/results.json")["metrics"]["validation"]
    assert scores["majority"] == majority_of["mood"]["majority/macro_f1"] < 0.3
    table = (experiment.output / "table.md").read_text()
    assert "* lexicon skips topics: its labels (health, sport) are not negative" in table
    assert "* tfidf_svm skips heat: it is of kind regression" in table
    assert "* **tfidf_svm** against majority: helped" in table and "transfer" not in table
    gains = (experiment.output / "gains.csv").read_text()
    assert "\ntfidf_svm,majority,mood," in gains and "\nlexicon,majority,mean," not in gains
    # The same command finds them finished.
    before = {file: file.stat().st_mtime_ns for file in experiment.runs.glob("*/results.json")}
    assert run_comparison(given) == [] and len(before) == 8
    assert before == {file: file.stat().st_mtime_ns for file in before}
    capsys.readouterr()


def test_a_classical_run_has_the_mark_of_a_run_and_replaces_nothing_of_others(experiment):
    given = arguments(experiment, arms="majority")
    assert run_comparison(given) == []
    folder = experiment.runs / "majority-s0"
    assert (folder / MARK).is_file()
    with pytest.raises(ValueError, match="holds a classical model .majority."):
        load_requested(Request(resume=folder, deepspeed="zero2"))
    (folder / "results.json").unlink()  # cut short: the next call makes it again
    assert run_comparison(given) == [] and (folder / "results.json").is_file()
    for name in ("results.json", MARK):
        (folder / name).unlink()
    before = (folder / "predictions/validation/mood.jsonl").stat().st_mtime_ns
    (failed,) = run_comparison(given)
    assert "holds files that no run of comoe wrote" in experiment.problem(failed)
    assert (folder / "predictions/validation/mood.jsonl").stat().st_mtime_ns == before


def test_a_trained_arm_is_compared_with_a_classical_one_on_the_same_posts(experiment):
    assert run_comparison(arguments(experiment, arms="naive_bayes,tfidf_svm")) == []
    trained = experiment.runs / "recipe-s0"
    (experiment.runs / "naive_bayes-s0").rename(trained)
    (trained / "export").mkdir()
    file = trained / "predictions/validation/mood.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:10]:
        row["label"] = "neutral"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_comparison(arguments(experiment, arms="tfidf_svm,multi", affinity_posts=0)) == []
    gold, found = ([row[key] for row in rows] for key in ("gold", "label"))
    comparison = read_json(experiment.output / "comparison.json")
    assert comparison["joint"] == "multi" and comparison["baseline"] == "tfidf_svm"
    gain = comparison["arms"]["multi"]["against_baseline"]["mood"]["mean"]
    assert math.isclose(gain, f1_score(gold, found, average="macro") - 1)


def test_naive_bayes_is_the_formula_and_the_majority_the_shares():
    texts, gold = ["a a b", "b c", "c c"], np.array([0, 1, 1])
    examples = Examples(texts, gold, ("x", "y"), seed=0)
    predict, numbers = naive_bayes(examples)
    # Words and pairs: a b c, "a a" "a b" "b c" "c c": counts + 1 over the sums + 7.
    of_x = np.array([2, 1, 0, 1, 1, 0, 0]) + 1.0
    of_y = np.array([0, 1, 3, 0, 0, 1, 1]) + 1.0
    seen = np.array([1, 0, 1, 0, 0, 0, 0])  # "a c": no known pair
    joint = np.array([np.log(prior) + seen @ np.log(counts / counts.sum())
                      for prior, counts in ((1 / 3, of_x), (2 / 3, of_y))])  # fmt: skip
    expected = joint - np.log(np.exp(joint).sum())
    np.testing.assert_allclose(predict(["a c"]), [expected], rtol=1e-12)
    assert numbers == 14
    shares = np.exp(majority(examples)[0](["z"]))
    np.testing.assert_allclose(shares, [[1.5 / 4, 2.5 / 4]], rtol=1e-12)


@pytest.mark.parametrize("fit", [naive_bayes, tfidf_svm])
def test_a_label_without_training_posts_is_never_predicted(fit):
    texts = ["good day", "bad day", "good", "bad"]
    examples = Examples(texts, np.array([0, 2, 0, 2]), ("a", "none", "b"), seed=0)
    predict, _ = fit(examples)
    assert predict(["good", "bad", "what"]).argmax(1).tolist()[:2] == [0, 2]
    assert (predict(["what", ""]).argmax(1) != 1).all()
    several = replace(examples, gold=np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]))
    found = fit(several)[0](["good", "bad"]) > 0
    assert found.tolist() == [[True, False, False], [False, False, True]]
    alone = replace(examples, gold=np.zeros(4, dtype=np.int64))
    assert (fit(alone)[0](["x"]).argmax(1) == 0).all()


def test_a_lexicon_takes_the_longest_entry_and_the_sign_decides(tmp_path):
    score = by_words({"good": [2.0], "not good": [-1.5], "bad": [-2.0]})
    assert score("GOOD, very good") == pytest.approx(4 / math.sqrt(16 + 15))
    assert score("not good") == pytest.approx(-1.5 / math.sqrt(1.5**2 + 15))
    assert score("nothing") == 0
    file = words_file(tmp_path)
    assert read_lexicon(file) == {"good": (2,), "great": (3,), "bad": (-2,), "awful": (-3,)}
    # Of a table with further numbers the first one counts, whatever the others are.
    file.write_text("good,2,0.1\ngreat,3,\nbad,-2,1,5\nawful,-3\nbad,-2,7\n")
    labels = ("Negative", "neutral", "positive")
    examples = Examples(["x"] * 3, np.array([0, 0, 2]), labels, seed=0)
    predict, numbers = lexicon(examples, str(file))
    assert numbers == 4
    assert predict(["bad", "x", "good", "bad good"]).argmax(1).tolist() == [0, 1, 2, 1]
    two = Examples(["x"] * 3, np.array([1, 1, 0]), ("negative", "positive"), seed=0)
    # Without a neutral label what has no word is as most posts.
    assert lexicon(two, str(file))[0](["x", "bad"]).argmax(1).tolist() == [1, 0]
    assert applies(labels) and not applies(("negative", "neutral"))
    assert not applies(("negative", "positive", "mixed"))


def test_vader_is_its_package_with_the_edge_of_its_authors():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    labels = ("negative", "neutral", "positive")
    texts = ["not good at all :(", "GREAT!!! <3", "the train leaves at nine", "fine, but late"]
    predict, _ = lexicon(Examples(texts, np.array([0, 1, 2, 2]), labels, seed=0))
    scores = [vader.polarity_scores(text)["compound"] for text in texts]
    expected = [2 if score >= 0.05 else 0 if score <= -0.05 else 1 for score in scores]
    assert predict(texts).argmax(1).tolist() == expected
    assert expected[:3] == [0, 2, 1]


@pytest.mark.parametrize(
    ("content", "named"),
    [("good,1\nbad\n", ":2: 'bad'"), ("word,n\ngood,1\nbad,low\n", ":3: 'bad,low'"), ("a,nan\nb,inf\n", ":2:"),
     ("good;1.9\nbad,1\n", ":1: 'good;1.9'"), ("good,1\nbad,2\ngood,-1\n", ":3: good has the number 1"),
     ('good,1\n"' + "x" * 140_000, "not closed"), ("", "has no word"), (None, "no such file")],
)  # fmt: skip
def test_a_wrong_lexicon_is_refused_with_its_line(tmp_path, content, named):
    file = tmp_path / "own.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="good,1.9|--lexicon|own.csv:") as raised:
        read_lexicon(file)
    assert named in str(raised.value)


def test_what_a_classical_arm_cannot_do_is_refused(experiment, tmp_path):
    with pytest.raises(ValueError, match="arm lexicon; add it to --arms"):
        run_comparison(arguments(experiment, arms="majority", lexicon=tmp_path / "x.csv"))
    with pytest.raises(ValueError, match="majority: this arm is no trained model"):
        run_comparison(arguments(experiment, arms="majority,multi", affinity="majority"))
    with pytest.raises(ValueError, match="choose an unused name"):
        plan_arms(experiment, arms=["majority"], custom={"majority": []}, seeds=[0])
    # Of words for another task there is none to predict: the run fails, the others go on.
    text = experiment.config.read_text().replace("label: mood", "label: topics, kind: multi_label")
    experiment.config.write_text(text)
    given = arguments(experiment, arms="lexicon,majority", lexicon=words_file(tmp_path))
    (failed,) = run_comparison(given)
    assert failed.baseline[0] == "lexicon"
    assert "can predict no task" in (experiment.output / "table.md").read_text()
