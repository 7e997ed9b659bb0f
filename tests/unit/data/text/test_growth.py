"""Reading a post takes time in proportion to its length, whatever a stranger writes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import emoji
import pytest

from comoe.config.recipe import NormalizeConfig
from comoe.data.text import emoji_runs
from comoe.data.text.emoji_runs import replace_runs, without_emoji
from comoe.data.text.noise import NOISES
from comoe.data.text.normalize import PRESETS, is_blank, normalize_post
from comoe.data.tokens import tokenize
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.labels import split_words

JOINER, TONE = "\u200d", "\U0001f3fb"
JOINED = [
    f"👍{JOINER}",
    f"{TONE}{JOINER}",
    f"👩{JOINER}❤\ufe0f{JOINER}",
    f"👍{TONE}{JOINER}",
    f"1{JOINER}",
]
UNITS = [*JOINED, "👍", "1\ufe0f\u20e3", "&amp;", "&#0", "&#x0", "a ", " ", "\n", "!", "'", "a'", "@", "@a ", "＠a",
         "#a", "#中 ", "#a#", "[", "[笑", "[笑cry]", "//@", "// ", "http://", "http://t.cn/a ", "www.", "www.a ",
         "pic.twitter.com/", "中@a", "\u200b", "\ufe0f", "A-", "_", "ß", "ｗ"]  # fmt: skip
"""What a text is made of, a hundred thousand times."""


def seconds(work: Callable[[], object]) -> float:
    """Processor time."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("preset", [*PRESETS, "words", "noise", "phrases"])
def test_no_text_takes_more_than_in_proportion(preset: str, unit: str) -> None:
    def work(size: int) -> Callable[[], object]:
        text = (unit * size)[:size] + "a"
        config = NormalizeConfig(preset=preset) if preset in PRESETS else None
        phrases = KINDS["phrases"]
        return {
            "words": lambda: split_words(text),
            "noise": lambda: [NOISES[name][0](text, 0.0, None) for name in ("no_hashtags", "no_emoji")],
            "phrases": lambda: phrases.fitted(["a"], [text, "a"]),
        }.get(preset, lambda: normalize_post(text, config))  # fmt: skip

    # 16 times the text: quadratic would be 256 times the time. A busy machine gets three tries.
    short, long = work(2_000), work(32_000)
    assert any(seconds(long) < 64 * seconds(short) + 0.05 for _ in range(3))


@pytest.mark.parametrize("unit", JOINED)
def test_the_package_is_given_no_more_than_a_window_of_joined_emoji(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    inner = emoji.core.tokenize

    def counted(string: str, **options: bool) -> object:
        given.append(len(string))
        return inner(string, **options)

    monkeypatch.setattr(emoji.core, "tokenize", counted)
    work = []
    for size in (10_000, 20_000, 40_000):
        given.clear()
        without_emoji((unit * size)[:size], " ")
        # What the package may take for a text: the square of its length.
        work.append(sum(length**2 for length in given))
        assert sum(given) < 3 * size
    if unit != f"1{JOINER}":
        assert work[1] < 2.2 * work[0] and work[2] < 2.2 * work[1]


def test_emoji_are_what_the_package_finds_in_the_whole_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emoji_runs, "WINDOW", 70)
    monkeypatch.setattr(emoji_runs, "LONGEST", 32)
    rng = random.Random(0)
    names = list(emoji.EMOJI_DATA)
    families = [name for name in names if JOINER in name]
    others = [JOINER, "\ufe0f", "1", "#", "a", " ", "\u20e3", "中", "👩"]
    functions = [lambda run: emoji.replace_emoji(run, " "), emoji.demojize]
    compared = 0
    for _ in range(600):
        few = [rng.choice([rng.choice(names), rng.choice(families), rng.choice(others)]) for _ in range(6)]  # fmt: skip
        text = "".join(rng.choices(few, k=rng.randint(1, 100)))
        if any(f"{JOINER}{tone}{JOINER}" in text for tone in TONES):
            continue
        compared += 1
        for function in functions:
            assert replace_runs(text, function) == function(text)
    assert compared > 500


TONES = [name for name, data in emoji.EMOJI_DATA.items() if data["status"] == emoji.STATUS["component"]]  # fmt: skip


def test_the_package_loses_a_letter_there_that_is_kept_here() -> None:
    text = f"a🏊🏽{JOINER}♀{JOINER}{TONE}{JOINER}"
    assert emoji.replace_emoji(text, "") == "" and without_emoji(text, "") == "a"


@pytest.mark.parametrize(
    ("text", "short", "cut"),
    [
        ("a" * 800, "a" * 800, False),
        ("a" * 801, "a" * 800, True),
        (["ab"] * 267, ["ab"] * 267, False),
        (["ab"] * 268, [*["ab"] * 266, "ab"], True),
        (["a" * 900, "b"], ["a" * 800], True),
        ([""] * 900, [""] * 800, True),
        (None, None, False),
        ("http://" + "a" * 5000, "http", False),
        ("http://" + "a" * 9000, "http", True),
    ],
)
def test_no_more_is_tokenized_than_can_count(text: object, short: object, cut: bool) -> None:
    found, was_cut = tokenize.readable(text, NormalizeConfig(), 8)
    assert was_cut == cut and found == short
    assert not isinstance(text, str) or is_blank(text) == is_blank(found)
