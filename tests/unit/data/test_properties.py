"""What holds for any rows, any text and any number of ranks."""

import csv
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.config.recipe import NormalizeConfig
from comoe.data.posts import Post, PostSplit
from comoe.data.reading.rows import read_rows
from comoe.data.reading.sources import read_input
from comoe.data.sampling.mixing import MIXINGS
from comoe.data.sampling.sampler import SamplerConfig, TrainSampler, eval_batches
from comoe.data.text.normalize import is_blank, normalize_post

few = settings(max_examples=40, derandomize=True, database=None)
Rows = list[dict[str, str]]


def write_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(rows: Rows) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["text", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def write_tsv(rows: Rows) -> bytes:
    lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
    return "".join(f"{line}\n" for line in lines).encode()


def write_parquet(rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("ending", "write", "forbidden"),
    [("jsonl", write_jsonl, ""), ("csv", write_csv, "\x00\r"), ("tsv", write_tsv, "\x00\r\n\t"),
     ("parquet", write_parquet, "")],
)  # fmt: skip
def test_rows_are_read_back_as_they_were_written(ending, write, forbidden):
    cell = st.text(st.characters(codec="utf-8", exclude_characters=forbidden), max_size=12)
    row = st.fixed_dictionaries({"text": cell, "label": cell})

    @few
    @given(st.lists(row, min_size=1, max_size=5))
    def read_back(rows: Rows) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"posts.{ending}"
            path.write_bytes(write(rows))
            raw = read_input("--input", str(path))
            posts = list(read_rows(raw, lambda row: Post(row["text"], labels=row)))
        assert raw.rows == rows and raw.bad == []
        assert [post.text for post in posts] == [row["text"] for row in rows]
        # Each post is on the line where its row begins, below the header of a table.
        line = 2 if ending in ("csv", "tsv") else 1
        for post, row in zip(posts, rows, strict=True):
            assert (post.file, post.line, post.error) == (str(path), line, None)
            line += 1 + (sum(map(str.count, row.values(), "\n\n")) if ending == "csv" else 0)

    read_back()


def post_of(text: str, words: bool, label: int | None) -> Post:
    return Post(text, words=text.split() if words else None, labels={"mood": label}, line=len(text))


posts = st.lists(
    st.builds(post_of, st.text(max_size=9), st.booleans(), st.none() | st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@few
@given(posts, st.data())
def test_taking_the_parts_of_a_split_and_joining_them_gives_the_split(posts, data):
    whole = PostSplit.from_posts(posts, tasks=["mood"])
    at = data.draw(st.integers(0, len(posts)))
    rows = np.arange(len(posts))
    joined = PostSplit.join([whole.take(rows[:at]), whole.take(rows[at:])])
    assert (joined.texts, joined.words, joined.labels, joined.origins) == (
        whole.texts,
        whole.words,
        whole.labels,
        whole.origins,
    )
    assert np.array_equal(joined.groups, whole.groups)


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
    "#甲#乙#丙##丁# #a#b#c# # 戊 # ##己# ###",
    "//@a//@b://@@c: ///@d http://@e //  @f：",
    "[[笑cry]] [笑[cry]] ［a］ [1a] [] [ ] ［＃］",
    "＠＃＆amp； ＆lt;＆＃６５; ｈｔｔｐ：//t.cn/a ｈttp://t.cn/ab中http",
    "#" + "长" * 40 + "http://t.cn/" + "x" * 40 + "完#尾",
]


PIECES = [" ", "\n", "\ud83d", *{piece for text in AWKWARD for piece in (*text.split(" "), *text)}]


@pytest.mark.parametrize("preset", ["none", "social", "strict", "weibo"])
def test_cleaning_twice_is_cleaning_once_and_no_post_vanishes(preset):
    config = NormalizeConfig(preset=preset)

    def clean(text: str) -> None:
        once = normalize_post(text, config)
        assert normalize_post(once, config) == once
        assert bool(once) != is_blank(text) or preset == "none"

    for text in AWKWARD:
        clean(text)
    texts = st.lists(st.sampled_from(sorted(PIECES)) | st.text(max_size=3), max_size=12)
    settings(few, max_examples=100)(given(texts.map("".join))(clean))()


@few
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    mixing=st.sampled_from(sorted(set(MIXINGS) - {"progress"})),
    batch_size=st.integers(1, 24),
    world_size=st.integers(1, 8),
    micro=st.integers(1, 6) | st.just("auto"),
    seed=st.integers(0, 9),
)
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    sizes, mixing, batch_size, world_size, micro, seed
):
    lengths = np.random.default_rng(seed).integers(3, 60, sum(sizes))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared = {"batch_size": batch_size, "mixing": mixing, "seed": seed}
    alone = TrainSampler(lengths, groups, SamplerConfig(**shared))
    laid_out = SamplerConfig(world_size=world_size, micro_batch_size=micro, **shared)
    ranks = TrainSampler(lengths, groups, laid_out)
    assert ranks.steps_per_epoch == alone.steps_per_epoch
    for step in range(min(alone.steps_per_epoch, 4) + 1):
        shares = [ranks.share(step, rank) for rank in range(world_size)]
        assert {len(share) for share in shares} == {ranks.accumulation}
        assert max(len(part) for share in shares for part in share) <= ranks.micro_batch_size
        dealt = np.concatenate([part for share in shares for part in share])
        assert sorted(dealt) == sorted(alone.global_batch(step))


@few
@given(count=st.integers(0, 50), batch_size=st.integers(1, 9), world_size=st.integers(1, 6))
def test_evaluation_reads_every_row_once_with_as_many_batches_on_each_rank(
    count, batch_size, world_size
):
    lengths = np.random.default_rng(count).integers(3, 60, count)
    ranks = [
        eval_batches(lengths, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(
        range(count)
    )
