"""Cleaning of posts: what each preset does, that it is idempotent, that no post vanishes."""

from __future__ import annotations

import pytest

from comoe.config.recipe import NormalizeConfig
from comoe.data.text.normalize import is_blank, normalize_post, normalize_words

SOCIAL, STRICT, NONE = (NormalizeConfig(preset=preset) for preset in ("social", "strict", "none"))
WEIBO = NormalizeConfig(preset="weibo", language="zh")


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
    [
        ("@Bob", "user"),
        ("https://t.co/x", "http"),
        ("#love", "love"),
        ("😀", "grinning face"),
        ("!!!", "!!!"),
    ],
)
def test_strict_leaves_something_of_every_post(raw: str, left: str) -> None:
    assert normalize_post(raw, STRICT) == left


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        # Full-width letters, digits and technical signs; sentence signs stay.
        ("ＡＢＣ１２３，真的很好用！！", "ABC123，真的很好用！！"),
        ("涨了５．５％　太快了～", "涨了5.5% 太快了～"),
        ("Ａ＆Ｂ ＆amp; C", "A&B & C"),
        # Topics: both signs, several, blanks inside, in the middle of a sentence.
        ("#世界读书日#今天读完了", "#世界读书日# 今天读完了"),
        ("＃上海 马拉松 2024＃冲！", "#上海 马拉松 2024# 冲！"),
        ("在#早安##新的一周#里醒来", "在 #早安# #新的一周# 里醒来"),
        ("#iPhone 15 Pro# 值不值", "#iPhone 15 Pro# 值不值"),
        # Hashtags of other platforms are none.
        ("so #happy 今天 and #blessed", "so #happy 今天 and #blessed"),
        ("#love#peace#joy 好", "#love#peace#joy 好"),
        ("他是 # 1 还是 # 2", "他是 # 1 还是 # 2"),
        # Emoji and their codes.
        ("今天太难了[笑cry][doge]", "今天太难了 :笑cry: :doge:"),
        ("［允悲］又停电", ":允悲: 又停电"),
        ("参考文献[1]", "参考文献[1]"),
        # Users: after a Chinese word, with a Chinese name, ended by a blank, a colon or nothing.
        ("谢谢@小红花_2020 的推荐", "谢谢 @user 的推荐"),
        ("回复@李雷:好的", "回复 @user:好的"),
        ("转给＠韩-梅梅：你看", "转给 @user：你看"),
        ("写信到 me@example.com 吧", "写信到 me@example.com 吧"),
        # Chains of reposts.
        (
            "转发微博//@老王:哈哈[笑cry]//@小张：真的吗",
            "转发微博 //@user:哈哈 :笑cry: //@user：真的吗",
        ),
        ("看 https://example.com/a//@老王:哈哈", "看 http //@user:哈哈"),
        # Links that Chinese words, topics, codes touch.
        ("视频在这http://t.cn/A6abcXY大家看", "视频在这 http 大家看"),
        ("http://t.cn/A6abc#晚安#", "http #晚安#"),
        ("链接http://t.cn/A6abc[心]。", "链接 http :心: 。"),
    ],
)
def test_weibo_reads_chinese_posts_as_their_authors_do(raw: str, cleaned: str) -> None:
    assert normalize_post(raw, WEIBO) == cleaned
    assert normalize_post(cleaned, WEIBO) == cleaned


def test_emoji_are_named_in_chinese_and_codes_read_like_them() -> None:
    assert normalize_post("好😂[笑cry]", WEIBO).split()[1:] == [
        normalize_post("😂", WEIBO),
        ":笑cry:",
    ]
    assert normalize_post("😂", WEIBO) == normalize_post("😂", NormalizeConfig(language="zh"))


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        ("今天#上海 马拉松#好累[笑cry][doge] @小红 //@老王:加油", "今天 好累 加油"),
        ("[二哈]", "二哈"),
        ("#早安#", "早安"),
        ("I said [ok] to #love 你好 and #peace", "i said to 你好 and"),
        ("I said [ok] to #love", "i said ok to"),
    ],
)
def test_strict_removes_codes_and_topics_and_leaves_something(raw: str, left: str) -> None:
    assert normalize_post(raw, STRICT) == left


@pytest.mark.parametrize("code", ["[笑cry]", "[doge]"])
def test_social_keeps_the_words_of_emoji_codes(code: str) -> None:
    assert normalize_post(f"难{code}", SOCIAL) == f"难{code}"


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
    for config in (SOCIAL, STRICT, NONE, WEIBO):
        assert normalize_post(text, config) == ""


@pytest.mark.parametrize("user", ["<@user>", "USER", "@USER", "", "http"])
@pytest.mark.parametrize("url", ["<https://url>", "www.url", "URL", ""])
@pytest.mark.parametrize("preset", ["social", "weibo"])
def test_any_placeholder_is_left_alone_the_second_time(user: str, url: str, preset: str) -> None:
    config = NormalizeConfig(preset=preset, user=user, url=url)
    once = normalize_post("@Bob read https://t.co/x and (www.y.z) @Ann", config)
    assert "Bob" not in once and "t.co" not in once
    assert normalize_post(once, config) == once


def test_emoji_have_names_in_other_languages() -> None:
    assert normalize_post("😀", NormalizeConfig(language="de")) != normalize_post("😀", SOCIAL)
    assert normalize_post("好😀", NormalizeConfig(language="zh")).startswith("好 :")


@pytest.mark.parametrize("config", [SOCIAL, STRICT, WEIBO])
def test_words_stay_as_many_as_they_are(config: NormalizeConfig) -> None:
    words = ["@Bob", "likes", "😀😀", "\u200b", "http://x.y", "!!", "&amp;"]
    cleaned = normalize_words(words, config)
    assert len(cleaned) == len(words)
    assert [bool(word) for word in cleaned] == [True, True, True, False, True, True, True]


def test_a_deeply_escaped_text_takes_no_time() -> None:
    assert normalize_post("&" + "amp;" * 25_000 + "x", SOCIAL) == "&x"


def test_an_unknown_language_names_the_right_ones() -> None:
    with pytest.raises(ValueError, match="one of en, es, "):
        NormalizeConfig(language="xx")
    config = NormalizeConfig()
    # That of a run from before this was checked.
    config.language = "xx"
    with pytest.raises(ValueError, match="'xx'.*en, "):
        normalize_post("😀", config)
