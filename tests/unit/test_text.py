"""Cleaning of posts: what each preset does, that it is idempotent, that no post vanishes."""

from __future__ import annotations

import pytest

from comoe.data.text import is_blank, normalize_post, normalize_words
from comoe.schema import NormalizeConfig

SOCIAL, STRICT, NONE = (NormalizeConfig(preset=preset) for preset in ("social", "strict", "none"))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("I \u2764\ufe0f it 😀", "I :red_heart: it :grinning_face:"),
        ("so good😀😀", "so good :grinning_face: :grinning_face:"),
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("AT&T &copy 2020", "AT&T &copy 2020"),
        ("@Bob_1 hi @user", "@user hi @user"),
        ("mail me: bob@example.com", "mail me: bob@example.com"),
        ("see https://t.co/aB3?x=1&y=2 now", "see http now"),
        ("www.example.com!", "http"),
        ("看这个http://t.cn/abc，很好", "看这个http，很好"),
        ("  a\t\tb\r\n\u2028c\u00a0d  ", "a b c d"),
        ("NUL\x00 and bell\x07 and zero\u200bwidth", "NUL and bell and zerowidth"),
        ("#LoveThis SO MUCH!!!", "#LoveThis SO MUCH!!!"),
        ("half a pair \ud83d!", "half a pair !"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_social_keeps_what_carries_sentiment(raw: str, cleaned: str) -> None:
    assert normalize_post(raw, SOCIAL) == cleaned


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("I LOVE this 😀 @Bob #fun https://t.co/x !!!", "i love this"),
        ("Don't stop-me now...", "dont stop me now"),
        ("Tom &amp; Jerry", "tom jerry"),
        ("हिन्दी में!", "हिन्दी में"),
        ("很好！", "很好"),
    ],
)
def test_strict_follows_stein_and_keller(raw: str, cleaned: str) -> None:
    assert normalize_post(raw, STRICT) == cleaned


@pytest.mark.parametrize(
    ("raw", "left"),
    [("@Bob", "user"), ("https://t.co/x", "http"), ("#love", "love"), ("😀", "grinning face"), ("!!!", "!!!")],
)
def test_strict_leaves_something_of_every_post(raw: str, left: str) -> None:
    assert normalize_post(raw, STRICT) == left


def test_a_post_of_a_user_alone_is_not_empty_where_the_placeholder_is() -> None:
    config = NormalizeConfig(user="", url="")
    assert normalize_post("@Bob https://t.co/x", config) == "@user"
    assert normalize_post("@Bob hello", config) == "hello"


def test_none_changes_nothing_but_control_characters() -> None:
    assert normalize_post(" @Bob &amp; 😀  http://x.y ", NONE) == " @Bob &amp; 😀  http://x.y "
    assert normalize_post("a\x00b", NONE) == "ab"


@pytest.mark.parametrize("text", ["", "  \n", "\u200b\u200b", "\x00\x07", "\ufeff"])
def test_only_a_blank_post_becomes_empty(text: str) -> None:
    assert is_blank(text)
    for config in (SOCIAL, STRICT, NONE):
        assert normalize_post(text, config) == ""


AWKWARD = [
    "&amp;lt;b&amp;gt; &#38;#38;lt; &&#97;mp;lt;",
    "@@bob @ bob ＠张三 a@b @user's",
    "hthttp://ttp://x.y http http:// https:// www. pic.twitter.com/aB",
    "😀😀👨\u200d👩\u200d👧 1\ufe0f\u20e3 ©®™ 👍🏽 :grinning_face: \u2764 \u2764\ufe0f \ufe0f",
    "ΑΣ ΑΣ. İstanbul ẞ ǅ",
    "'' ' don't’ll '‘x’' --__-- ¿¡ «»",
    "#a#b ##c #1 # d ＃e",
    "http\u200b://x.com @\u200bbob &\u200bamp;",
    "&#128512; &#x1F600; &#0; &nbsp; &unknown; &amp",
    "a\u0301 \u0915\u093f \u200d \u200c",
    "RT @a: \"@b: 'x' http://y.z\" 100% $5 +1 <3 :-)",
]


@pytest.mark.parametrize("preset", ["none", "social", "strict"])
@pytest.mark.parametrize("text", AWKWARD)
def test_cleaning_twice_is_cleaning_once(text: str, preset: str) -> None:
    config = NormalizeConfig(preset=preset)
    once = normalize_post(text, config)
    assert once
    assert normalize_post(once, config) == once


@pytest.mark.parametrize("user", ["<@user>", "USER", "@USER", "", "http"])
@pytest.mark.parametrize("url", ["<https://url>", "www.url", "URL", ""])
def test_any_placeholder_is_left_alone_the_second_time(user: str, url: str) -> None:
    config = NormalizeConfig(user=user, url=url)
    once = normalize_post("@Bob read https://t.co/x and (www.y.z) @Ann", config)
    assert "Bob" not in once and "t.co" not in once
    assert normalize_post(once, config) == once


def test_emoji_have_names_in_other_languages() -> None:
    assert normalize_post("😀", NormalizeConfig(language="de")) != normalize_post("😀", SOCIAL)
    assert normalize_post("好😀", NormalizeConfig(language="zh")).startswith("好 :")


@pytest.mark.parametrize("config", [SOCIAL, STRICT])
def test_words_stay_as_many_as_they_are(config: NormalizeConfig) -> None:
    words = ["@Bob", "likes", "😀😀", "\u200b", "http://x.y", "!!", "&amp;"]
    cleaned = normalize_words(words, config)
    assert len(cleaned) == len(words)
    assert [bool(word) for word in cleaned] == [True, True, True, False, True, True, True]


def test_a_deeply_escaped_text_takes_no_time() -> None:
    assert normalize_post("&" + "amp;" * 25_000 + "x", SOCIAL) == "&x"


def test_wrong_settings_name_the_right_ones() -> None:
    with pytest.raises(ValueError, match="'scoial'.*did you mean social"):
        normalize_post("a", NormalizeConfig(preset="scoial"))
    with pytest.raises(ValueError, match="'xx'.*en, "):
        normalize_post("😀", NormalizeConfig(language="xx"))
