"""Lexicons: files of words with numbers, what they make of a word, and where they find it in a text."""

import math

import numpy as np
import pytest

from comoe.tasks.lexicon import FILE, Lexicon, load_lexicon, read_lexicon

WORDS = {"good": [1, 0], "Not Good": [-2, 1], ":)": [2, 2], "bad": [-1, 1], "f**k": [-3, 5]}


def found(lexicon, text):
    return [(text[one.start : one.end], one.entry) for one in lexicon.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GOOD, goodness; not  good", [("GOOD", 1), ("not  good", 2)]),
        ("bad#good #bad", [("bad", 4), ("#good", 1), ("#bad", 4)]),
        (":) good :)", [(":)", 3), ("good", 1), (":)", 3)]),
        ("good:) (:)) 3:) :):)", [("good", 1)]),
        ("F**K this", [("F**K", 5)]),
        ("", []),
        ("nothing http://good.org @bad", []),
    ],
)
def test_entries_are_found_as_words_phrases_hashtags_and_signs_between_blanks(text, expected):
    assert found(Lexicon(WORDS), text) == expected


def test_features_are_standardized_over_the_entries_and_mark_what_is_known():
    rows = np.array([*WORDS.values()], dtype=np.float64)
    features = Lexicon(WORDS).features
    assert features.shape == (6, 3) and features.dtype == np.float32
    assert not features[0].any() and (features[1:, 2] == 1).all()
    for column in range(2):
        mean = math.fsum(rows[:, column]) / 5
        spread = math.sqrt(math.fsum((rows[:, column] - mean) ** 2) / 5)
        np.testing.assert_allclose(
            features[1:, column], (rows[:, column] - mean) / spread, rtol=1e-6
        )
    # A column without spread says nothing but that the word is known.
    assert Lexicon({"a": [3], "b": [3]}).features.tolist() == [[0, 0], [0, 1], [0, 1]]


def test_a_file_gives_the_numbers_of_its_first_word_to_all(tmp_path):
    file = tmp_path / "own.tsv"
    file.write_text(
        "word\tvalence\tarousal\nGood\t1.5\t2\twell\nnot good\t-1\t0.5\t[1, 2]\n\n:)\t2\t1\n"
    )
    expected = {"good": (1.5, 2.0), "not good": (-1.0, 0.5), ":)": (2.0, 1.0)}
    assert read_lexicon(file) == expected == load_lexicon(str(file)).numbers


@pytest.mark.parametrize(
    ("content", "named"),
    [("good,1,2\nbad,1\n", ":2: 'bad,1' must be a word and 2 numbers, as the first word has"),
     ("good,1,2\nbad,1,x\n", ":2: 'bad,1,x' must be a word and 2 numbers"),
     ("good,1,2\ngood,1,3\n", ":2: good has other numbers above; keep one of the lines"),
     ("good,1\n ,2\n", ":2: ' ,2' must be a word and a number, as in good,1.9"),
     (None, "model.lexicon.path .*own.csv: there is no such file")],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line_and_what_to_do(tmp_path, content, named):
    file = tmp_path / "own.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=named):
        load_lexicon(str(file))


def test_a_saved_lexicon_is_the_same_and_other_numbers_have_another_digest(tmp_path):
    lexicon = Lexicon(WORDS | {"ß 0.1": [0.1, 1 / 3]})
    assert Lexicon.load(tmp_path) is None
    lexicon.save(tmp_path)
    again = Lexicon.load(tmp_path)
    assert again.numbers == lexicon.numbers and again.digest == lexicon.digest
    assert np.array_equal(again.features, lexicon.features)
    assert Lexicon(WORDS | {"good": [1, 0.5]}).digest != Lexicon(WORDS).digest
    for content in ("[]", "{}", '{"a": [1], "b": [1, 2]}', '{"a": ["x"]}', '{"a": [1e999]}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match=r"lexicon.json"):
            Lexicon.load(tmp_path)


def test_vader_is_the_lexicon_of_its_package():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    lexicon = load_lexicon("vader")
    assert lexicon.width == 1 and len(lexicon.numbers) > 7000
    for word, number in vader.lexicon.items():
        low = word.casefold()
        assert lexicon.numbers[low] == (vader.lexicon.get(low, number),)
    assert [lexicon.numbers[word][0] for word in (":)", "<3", "good", "can't stand")] == [
        vader.lexicon[word] for word in (":)", "<3", "good", "can't stand")
    ]
    assert [word for word, _ in found(lexicon, "I can't stand it :( but <3 #love")] == [
        "can't stand", ":(", "<3", "#love",
    ]  # fmt: skip
