"""Auxiliary data with a scripted model: rounds, malformed texts, interruption, files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from comoe.augment.command import COLUMNS, Report, augment
from comoe.augment.generator import Generation, Prompt, in_batches
from comoe.augment.prompts import Prompts, load_prompts
from comoe.augment.refine import Settings, fault_of, tidy
from comoe.config.failure import sentence
from comoe.config.recipe import DataConfig, Recipe, TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.reading.inputs import DataChoice
from tests.helpers_data import files_up_to

DEFAULT = Path(__file__).parents[3] / "launch" / "configs" / "augment_prompts.yaml"
PROMPTS = """
labels: {positive: good, negative: bad}
no_target: the place
no_answer: [none, not mentioned]
most_words: {aspect: 3, opinion: 4}
templates:
  aspect: "{text} | {target} | aspect?"
  opinion: "{text} | {target} | {aspect} | opinion?"
  polarity: "{text} | {target} | {aspect} | {opinion} | {labels}?"
  refine_aspect: "{text} | {target} | it is {gold}, not {previous_polarity} | aspect?"
  refine_opinion: "{text} | {target} | {aspect} | it is {gold}, not {previous_opinion} | opinion?"
"""
Script = Callable[[str, "int | None"], "str | Generation"]


@dataclass
class Scripted:
    """A model that generates what a function returns; it finds an opinion bad if it contains the word slow."""

    script: Script
    generated: list[tuple[str, int | None]] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)
    identity: Mapping[str, str] = field(default_factory=lambda: {"--model": "scripted"})
    stop_after: int | None = None
    most_words: int = 10**6
    limit: str = "it reads few words"

    def generate(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int | None]
    ) -> list[Generation]:
        if self.stop_after is not None and len(self.generated) >= self.stop_after:
            raise KeyboardInterrupt
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.generated.append((prompt.question, seed))
            text = self.script(prompt.question, seed)
            found.append(text if isinstance(text, Generation) else Generation(text, 0.5, True))
        return found

    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        assert tuple(choices) == ("good", "bad")
        self.scored += [prompt.question for prompt in prompts]
        slow = ["slow" in prompt.question.split(" | ")[3] for prompt in prompts]
        return [(0.1, 0.9) if bad else (0.75, 0.25) for bad in slow]

    def excess(self, prompt: Prompt) -> int:
        return max(len(prompt.question.split()) - self.most_words, 0)


def is_opinion(question: str) -> bool:
    return question.endswith("opinion?")


def honest(question: str, seed: int | None) -> str:
    """Finds the service friendly until the prompt has the other label."""
    if not is_opinion(question):
        return "service"
    return "slow people" if "it is bad" in question else "friendly people"


def stubborn(question: str, seed: int | None) -> str:
    return "friendly people" if is_opinion(question) else "service"


@pytest.fixture
def prompts(tmp_path) -> Prompts:
    return prompts_of(tmp_path, PROMPTS)


def prompts_of(folder: Path, text: str) -> Prompts:
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return load_prompts(path)


def post(text: str, polarity: str | None, aspect: str = "service") -> dict[str, str | None]:
    return {"text": text, "aspect": aspect, "polarity": polarity}


ONE, HOUR = post("One.", "positive"), post("An hour passed.", "negative")


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def kept(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run(
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    model: Scripted,
    prompts: Prompts,
    **changes: Any,
) -> tuple[list[dict[str, object]], Report]:
    """Output and report; ``changes`` are settings, fields of the choice, or arguments of ``augment``."""
    path = write(folder / "posts.jsonl", rows)
    settings = {name: changes.pop(name) for name in list(changes) if name in Settings.__slots__}
    choice = {name: changes.pop(name) for name in list(changes) if name in DataChoice.__slots__}
    report = augment(
        DataChoice(str(path), **choice), folder / "out" / "aux.jsonl", prompts=prompts, load=lambda: model,
        settings=Settings(**settings), progress=False, **changes,
    )  # fmt: skip
    return rows_of(report.files.posts), report


def from_file(path: Path, output: Path, prompts: Prompts, **changes: Any) -> Report:
    choice = {name: changes.pop(name) for name in list(changes) if name in DataChoice.__slots__}
    return augment(
        DataChoice(str(path), **choice), output, prompts=prompts, load=lambda: Scripted(honest), settings=Settings(),
        progress=False, **changes,
    )  # fmt: skip


# Rounds


def test_the_gold_label_is_given_only_to_refine_and_a_result_that_implies_it_converges(
    tmp_path, prompts
):
    model = Scripted(honest)
    (row, late), report = run(
        tmp_path, [{"id": 7, **post("They smiled.", "positive")}, HOUR], model, prompts
    )
    assert row == {
        "id": 7, "text": "They smiled.", "aspect": "service", "polarity": "positive",
        "aux_aspect": "service", "aux_opinion": "friendly people", "aux_polarity": "positive",
        "aux_aspect_confidence": 0.5, "aux_opinion_confidence": 0.5, "aux_polarity_confidence": 0.75,
        "aux_rounds": 1, "aux_converged": True,
    }  # fmt: skip
    assert list(row)[-len(COLUMNS) :] == list(COLUMNS)
    assert [late[name] for name in COLUMNS] == [
        "service", "slow people", "negative", 0.5, 0.5, 0.9, 2, True,
    ]  # fmt: skip
    start = "An hour passed. | service"
    assert [question for question, _ in model.generated[-2:]] == [
        f"{start} | it is bad, not good | aspect?",
        f"{start} | service | it is bad, not friendly people | opinion?",
    ]
    assert [question for question in model.scored if "hour" in question] == [
        f"{start} | service | friendly people | good or bad?",
        f"{start} | service | slow people | good or bad?",
    ]
    lines = {"converged: 2 of 2 posts with a gold label", "  in round 1: 1", "  in round 2: 1"}
    assert lines | {"mean confidence of the polarity: 0.825"} <= set(report.lines())


def test_what_never_converges_keeps_its_last_text_and_one_round_is_enough_without_gold_label(
    tmp_path, prompts
):
    texts: list[str] = []

    def changing(question: str, seed: int | None) -> str:
        if "hour" not in question or not is_opinion(question):
            return "service"
        texts.append(f"friendly {len(texts) + 1}")
        return texts[-1]

    model = Scripted(changing)
    rows, report = run(tmp_path, [HOUR, post("Quick.", None), post("So so.", "")], model, prompts)
    assert [(row["aux_rounds"], row["aux_converged"]) for row in rows] == [
        (10, False), (1, None), (1, None),
    ]  # fmt: skip
    assert (rows[0]["aux_opinion"], rows[0]["aux_polarity"]) == ("friendly 10", "positive")
    assert len(texts) == 10 and "  not converged: 1" in report.lines()
    assert sum("hour" not in question for question, _ in model.generated) == 4


def test_a_prompt_is_continued_greedily_once_and_sampled_when_it_comes_back(tmp_path, prompts):
    def opinion_seeds(**changes: Any) -> list[int | None]:
        model = Scripted(stubborn)
        (row,), _ = run(tmp_path, [HOUR], model, prompts, overwrite=True, **changes)
        assert row["aux_converged"] is False
        return [seed for question, seed in model.generated if is_opinion(question)]

    first = opinion_seeds(rounds=4)
    # Rounds 1 and 2 have two different prompts; rounds 3 and 4 repeat the second one.
    assert first[:2] == [None, None] and None not in first[2:] and first[2] != first[3]
    assert opinion_seeds(rounds=4, seed=1)[2:] != first[2:]
    assert opinion_seeds(temperature=0.0) == [None, None]


# Malformed texts


MALFORMED = {
    "empty": ["", "  ", "...", Generation("\n", 0.1, True)],
    "several lines": ["slow\nand rude", "slow\n\nExplanation: ..."],
    "repeats itself": ["slow slow slow slow", "so, so, so, so"],
    "cut off": [Generation("slow and", 0.5, False)],
    "too many words": ["one two three four five"],
    "echoes the prompt": ["It is which of all these things?"],
    "says nothing": ["None.", "not mentioned"],
    "only a label": ["good", "Bad!", "negative"],
    None: ["slow", "slow, not good", '"no one came"', "slow and rude people.", "慢"],
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_text_has_a_reason(reason, tmp_path):
    changed = PROMPTS.replace("| aspect?", "| Which of all these things is it?", 1)
    prompts = prompts_of(tmp_path, changed)
    for text in MALFORMED[reason]:
        generation = text if isinstance(text, Generation) else Generation(text, 0.5, True)
        assert fault_of(generation, "opinion", prompts=prompts) == reason, text


def test_blanks_quotes_and_the_full_stop_around_a_text_go():
    texts = {
        ' "slow."\n': "slow",
        "“slow”.": "slow",
        "slow": "slow",
        "slow. It was": "slow. It was",
    }
    assert {text: tidy(text) for text in texts} == texts


def test_a_malformed_text_is_left_out_counted_and_generated_again(tmp_path, prompts):
    def hesitant(question: str, seed: int | None) -> str:
        late = "Late" in question and seed is None and is_opinion(question)
        return "" if "Empty" in question or late else honest(question, seed)

    texts = {"Empty.": "positive", "Late.": "positive", "Empty too.": None, "Fine.": "positive"}
    rows = [post(text, polarity) for text, polarity in texts.items()]
    found, report = run(tmp_path, rows, Scripted(hesitant), prompts, rounds=3)
    names = ("text", "aux_opinion", "aux_converged", "aux_rounds")
    # Of the second post the first prompt comes back, so the second time it is sampled.
    assert [tuple(row[name] for name in names) for row in found] == [
        ("Empty.", None, False, 3),
        ("Late.", "friendly people", True, 2),
        ("Empty too.", None, None, 1),
        ("Fine.", "friendly people", True, 1),
    ]
    aside = rows_of(report.files.malformed)
    assert [(row["line"], row["round"], row["part"], row["reason"]) for row in aside] == [
        (1, 1, "aspect", "empty"), (1, 2, "aspect", "empty"), (1, 3, "aspect", "empty"),
        (2, 1, "opinion", "empty"), (3, 1, "aspect", "empty"),
    ]  # fmt: skip
    assert {"  aspect, empty: 4", "  opinion, empty: 1"} <= set(report.lines())
    run(tmp_path, rows[3:], Scripted(honest), prompts, overwrite=True)
    assert not report.files.malformed.exists()


# Interruption


def test_a_run_that_was_killed_continues_and_ends_with_the_same_bytes(tmp_path, prompts):
    rows = [post(f"Post {number} " + "long " * (number % 5), "negative" if number % 3 else "positive")
            for number in range(30)]  # fmt: skip

    def script(question: str, seed: int | None) -> str:
        if "7" not in question:
            return honest(question, seed)
        return "good" if seed is None else f"friendly {seed}"

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    first, second = Scripted(script), Scripted(script)
    run(whole, rows, first, prompts, batch_size=2)
    begun, output = killed / "out" / ".aux.jsonl.part", killed / "out" / "aux.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(killed, rows, Scripted(script, stop_after=60), prompts, batch_size=2)
    assert begun.is_file() and not output.exists()
    # A kill in the middle of a write leaves half a line.
    done = begun.read_bytes()
    begun.write_bytes(done + b'[{"index": 3, "rea')
    _, report = run(killed, rows, second, prompts, batch_size=2)
    assert report.resumed == 8 * (len(done.splitlines()) - 1) > 0
    assert len(second.generated) < len(first.generated)
    files = [kept(folder / "out") for folder in (whole, killed)]
    for name in ("aux.jsonl", "aux.malformed.jsonl"):
        assert files[0][name] == files[1][name]
    assert b"only a label" in files[1]["aux.malformed.jsonl"] and not begun.exists()


def test_a_journal_without_room_is_named_and_the_run_goes_on_once_there_is_some(tmp_path, prompts):
    rows = [post(f"Post {number} " + "long " * 20, "positive") for number in range(400)]
    source = write(tmp_path / "posts.jsonl", rows)
    whole, full = tmp_path / "whole" / "aux.jsonl", tmp_path / "full" / "aux.jsonl"
    from_file(source, whole, prompts)
    with files_up_to(50_000), pytest.raises(OSError) as raised:
        from_file(source, full, prompts)
    part = full.with_name(".aux.jsonl.part")
    assert sentence(raised.value).startswith(f"writing {part}: File too large; raise the limit")
    report = from_file(source, full, prompts)
    assert report.resumed > 0 and full.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("option", ["--model", "--prompts", "--input", "--batch-size", "--rounds"])
def test_a_stopped_run_is_not_continued_otherwise(option, tmp_path, prompts):
    rows = [post(f"Post {number}", "positive") for number in range(20)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rows, Scripted(honest, stop_after=16), prompts, batch_size=2)
    model = Scripted(honest, identity={"--model": "another" if option == "--model" else "scripted"})
    if option == "--prompts":
        prompts = prompts_of(tmp_path, PROMPTS.replace("it is", "that is"))
    changes = {"--batch-size": {"batch_size": 3}, "--rounds": {"batch_size": 2, "rounds": 3}}
    changes = changes.get(option, {"batch_size": 2})
    rows = rows[:-1] if option == "--input" else rows
    message = rf"stopped after 8 posts, begun otherwise: {option} was .*, is now"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows, model, prompts, **changes)
    found, report = run(tmp_path, rows, model, prompts, **changes, overwrite=True)
    assert len(found) == len(rows) and report.resumed == 0


def test_a_finished_run_started_again_changes_nothing_and_another_replaces_it_only_on_demand(
    tmp_path, prompts
):
    _, first = run(tmp_path, [ONE], Scripted(honest), prompts)
    assert sorted(kept(tmp_path / "out")) == [".aux.jsonl.done", "aux.jsonl"]
    before, idle = kept(tmp_path / "out"), Scripted(honest)
    _, again = run(tmp_path, [ONE], idle, prompts)
    assert again.lines()[0].startswith("done already") and again.lines()[1:] == first.lines()
    other = Scripted(honest, identity={"--model": "another"})
    for text, model, changes, message in (
        ("One.", idle, {"rounds": 3}, "--rounds was 10, is now 3"),
        ("One.", other, {}, "--model was scripted, is now another"),
        ("Two.", idle, {}, "--input was .*Name another file, or .* --overwrite"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise: {message}"):
            run(tmp_path, [post(text, "positive")], model, prompts, **changes)
    assert kept(tmp_path / "out") == before and not idle.generated
    (row,), _ = run(tmp_path, [post("Two.", "positive")], idle, prompts, overwrite=True)
    assert row["text"] == "Two."


def test_a_log_has_lines_with_the_posts_done_the_time_left_and_the_round(
    tmp_path, prompts, capsys, monkeypatch
):
    monkeypatch.setattr("comoe.augment.command.LOG_SECONDS", 0.0)
    rows = [post(f"Post {number}", None) for number in range(8)]
    run(tmp_path, rows, Scripted(honest), prompts, batch_size=1)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    done = dict.fromkeys(line.partition(" posts")[0] for line in lines)
    assert list(done) == [f"augment: {count} of 8" for count in (0, 4, 8)]
    assert all(line.endswith("left, posts=4, round=1") for line in lines[1:])


# Files that are not replaced


READ_FILES = {
    "itself": ("own.jsonl", "own.jsonl"),
    "through a link": ("own.jsonl", "link.jsonl"),
    "read through a link": ("link.jsonl", "own.jsonl"),
    "through a linked folder": ("own.jsonl", "linked/own.jsonl"),
    "a hard link": ("own.jsonl", "hard.jsonl"),
    "the work aside": (".aux.jsonl.part", "aux.jsonl"),
    "the malformed texts": ("aux.malformed.jsonl", "aux.jsonl"),
    "the prompts": ("own.jsonl", "prompts.json"),
    "in the folder": ("data", "data/train.jsonl"),
    "beside what is read": ("data", "linked/data/validation.json"),
}


@pytest.mark.parametrize("case", READ_FILES)
def test_a_file_that_is_read_is_never_written(case, tmp_path, prompts):
    source, output = READ_FILES[case]
    (tmp_path / "data").mkdir()
    for name in ("own.jsonl", ".aux.jsonl.part", "aux.malformed.jsonl", "data/train.jsonl"):
        write(tmp_path / name, [ONE])
    (tmp_path / "link.jsonl").symlink_to("own.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "own.jsonl")
    (tmp_path / "prompts.json").symlink_to("prompts.yaml")
    before = kept(tmp_path)
    with pytest.raises(ValueError, match=r"--output .* would write .*, which is read"):
        from_file(tmp_path / source, tmp_path / output, prompts, overwrite=True)
    assert kept(tmp_path) == before


@pytest.mark.parametrize("taken", ["aux.jsonl", "aux.malformed.jsonl", ".aux.jsonl.part"])
def test_overwrite_replaces_no_other_file(taken, tmp_path, prompts):
    own, output = write(tmp_path / "own.jsonl", [ONE]), tmp_path / "aux.jsonl"
    (tmp_path / taken).write_text('{"text": "mine"}', encoding="utf-8")
    before = kept(tmp_path)
    with pytest.raises(ValueError, match="move it away"):
        from_file(own, output, prompts, overwrite=True)
    assert kept(tmp_path) == before
    (tmp_path / taken).unlink()
    for _ in range(2):
        from_file(own, output, prompts, overwrite=True)
    with output.open("a") as file:  # an output that was corrected by hand
        file.write("\n")
    with pytest.raises(ValueError, match="so it is never replaced, not even with --overwrite"):
        from_file(own, output, prompts, overwrite=True)


def test_an_output_that_appears_during_the_work_is_kept_and_the_work_too(tmp_path, prompts):
    taken = tmp_path / "out" / "aux.jsonl"

    def meddling(question: str, seed: int | None) -> str:
        taken.write_text("mine")
        return honest(question, seed)

    with pytest.raises(ValueError, match="move it away"):
        run(tmp_path, [ONE], Scripted(meddling), prompts)
    assert taken.read_text() == "mine"
    taken.unlink()
    idle = Scripted(honest)
    _, report = run(tmp_path, [ONE], idle, prompts)
    assert report.resumed == 1 and not idle.generated


def test_two_processes_do_not_write_the_same_output(tmp_path, prompts):
    def nested(question: str, seed: int | None) -> str:
        run(tmp_path, [ONE], Scripted(honest), prompts)
        return "never"

    with pytest.raises(ValueError, match="another process is writing it"):
        run(tmp_path, [ONE], Scripted(nested), prompts)


# Posts and options


BAD_INPUT: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "taken": ([{"text": "a", "aux_rounds": 1}], {}, "has the column aux_rounds already"),
    "label": (
        [post("a", "mixed")],
        {},
        r"posts.jsonl:1: column polarity is a label without a word",
    ),
    "blank": ([ONE, post(" ", "positive")], {}, r"posts.jsonl:2: column text is empty.*--skip-bad"),
    "column": ([ONE], {"label": "polarty"}, "--label-column is 'polarty'.*did you mean polarity"),
    "empty": ([], {}, "posts.jsonl has no usable post"),
    "rounds": ([ONE], {"rounds": 0}, "--rounds is 0; it must be 1 or more"),
    "limit": ([ONE], {"limit": 0}, "--limit is 0; it must be 1 or more"),
    "temperature": ([ONE], {"temperature": -1.0}, "--temperature is -1.0; it must be 0 or more"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_posts_and_options_are_refused(case, tmp_path, prompts):
    rows, changes, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows, Scripted(honest), prompts, **changes)
    assert not (tmp_path / "out" / "aux.jsonl").exists()


def test_a_cell_that_json_cannot_hold_is_refused_before_any_work(tmp_path, prompts):
    path = tmp_path / "posts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."], "raw": [b"1"]}), path)
    with pytest.raises(ValueError, match="post 1 has a cell that JSON lines cannot hold"):
        augment(DataChoice(str(path)), tmp_path / "aux.jsonl", prompts=prompts, load=pytest.fail,
                settings=Settings(), progress=False)  # fmt: skip


def test_bad_rows_can_be_skipped_and_a_file_needs_no_target_and_no_label(tmp_path, prompts):
    model, rows = Scripted(honest), [{"text": "One."}, {"text": ""}, {"text": "Two."}]
    found, report = run(tmp_path, rows, model, prompts, skip_bad=True)
    assert [row["text"] for row in found] == ["One.", "Two."] and len(report.posts.bad) == 1
    assert model.generated[0][0] == "One. | the place | aspect?"
    notes = [line.partition(":")[0] for line in report.lines()[:2]]
    assert notes == ["no column aspect", "no column polarity"]


def test_csv_posts_with_other_columns_keep_every_column(tmp_path, prompts):
    path = tmp_path / "posts.csv"
    path.write_text("tweet,about,mood,id\nThey smiled.,staff,positive,007\n", encoding="utf-8")
    columns = {"text": "tweet", "pair": "about", "label": "mood"}
    report = from_file(path, tmp_path / "aux.jsonl", prompts, **columns)
    (row,) = rows_of(report.files.posts)
    assert (row["id"], row["mood"], row["aux_converged"]) == ("007", "positive", True)


def test_line_separators_and_half_characters_do_no_harm(tmp_path, prompts):
    rows = [post("a\u2028b\nc \ud83d \U0001f600", "positive")]
    model = Scripted(honest)
    (row,), report = run(tmp_path, rows, model, prompts)
    written = report.files.posts.read_text(encoding="utf-8")
    assert row["text"] == rows[0]["text"] and len(written.splitlines()) == 1
    # The prompt has one line.
    assert model.generated[0][0].startswith("a b c \ufffd \U0001f600 |")


def test_a_post_that_is_too_long_loses_its_end_and_a_template_that_is_too_long_is_refused(
    tmp_path, prompts
):
    refusal = "the question aspect alone is 3 tokens too long.*it reads few words. Copy .*shorten"
    with pytest.raises(ValueError, match=refusal):
        run(tmp_path, [ONE], Scripted(honest, most_words=1), prompts)
    # It failed before any post was done: it may be started otherwise.
    model, text = Scripted(honest, most_words=15), "one two three four five six seven eight nine"
    (row,), report = run(tmp_path, [post(text, "positive")], model, prompts, rounds=3)
    assert model.generated[0][0].startswith("one two three")
    assert all(len(question.split()) <= 15 for question, _ in model.generated)
    assert row["text"] == text and "shortened, too long for the model: 1 posts" in report.lines()


def test_batches_hold_prompts_of_similar_length_and_keep_their_places():
    batches: list[list[int]] = []

    def call(rows: list[int]) -> list[str]:
        batches.append(rows)
        return [f"text {row}" for row in rows]

    prompts = [Prompt(text) for text in ("a", "ccc", "bb", "dddd", "e")]
    found = in_batches([0, 1, 3, 4], call, prompts=prompts, size=3)
    assert found == {row: f"text {row}" for row in (0, 1, 3, 4)}
    assert batches == [[3, 1, 0], [4]]


# Prompts


BAD_PROMPTS = {
    "{text} | {target} | aspect?": ("{txt} aspect?", r":7: templates.aspect has the field \{txt\}"),
    "{text} | {target} | {aspect} | opinion?": ("{text}?", r"opinion lacks the field \{aspect\}"),
    "{opinion} | {labels}?": ("{opinion} {gold}?", "Only the templates that refine may have it"),
    "it is {gold}, not {previous_polarity}": ("{text.real} {gold}", "not a plain field"),
    "| it is {gold}, not {previous_opinion} |": ("{", "templates.refine_opinion.*is doubled"),
    "positive: good, negative: bad": ("positive: good", "at least two labels"),
    "negative: bad}": ("negative: Good}", "a word of its own"),
    "no_target": ("no_taget", "no_taget is not an option; did you mean no_target"),
    "aspect: 3": ("aspect: 0", "most_words.aspect is 0; it must be a whole number, at least 1"),
    "no_answer: [none, not mentioned]": ("examples: [{gold: mixed}]", "number 1: label.*mixed"),
}


@pytest.mark.parametrize("found", BAD_PROMPTS)
def test_bad_prompts_are_refused(found, tmp_path):
    instead, message = BAD_PROMPTS[found]
    assert PROMPTS.count(found) == 1
    with pytest.raises(ValueError, match=message):
        prompts_of(tmp_path, PROMPTS.replace(found, instead))


def test_posts_with_braces_are_not_taken_for_fields_and_examples_go_before_the_question(tmp_path):
    examples = "examples: [{text: T, aspect: A, opinion: O, gold: negative}, {text: U}]\n"
    prompts = prompts_of(tmp_path, PROMPTS + examples)
    built = prompts.build("opinion", {"text": "{gold} {", "target": "x", "aspect": "y"})
    assert built == Prompt("{gold} { | x | y | opinion?", (("T | the place | A | opinion?", "O"),))
    blank = dict.fromkeys(("text", "target", "aspect", "opinion"), "")
    expected = (("T | the place | A | O | good or bad?", "bad"),)
    assert prompts.build("polarity", blank).examples == expected
    # Without the previous result an example cannot precede a template that contains it.
    values = dict.fromkeys(("text", "target", "gold", "previous_polarity"), "")
    assert prompts.build("refine_aspect", values).examples == ()


def test_the_default_prompts_are_valid_and_every_example_serves_every_template():
    prompts = load_prompts(DEFAULT)
    values = dict.fromkeys(("text", "target", "aspect", "opinion", "gold"), "x")
    values |= dict.fromkeys(("previous_aspect", "previous_opinion", "previous_polarity"), "x")
    for part in ("aspect", "opinion", "polarity", "refine_aspect", "refine_opinion"):
        assert len(prompts.build(part, values).examples) == len(prompts.file.examples) == 3
    for example in prompts.file.examples:
        for part in ("aspect", "opinion"):
            fault = fault_of(Generation(getattr(example, part), 1.0, True), part, prompts=prompts)
            assert fault in (None, "echoes the prompt")


def test_a_recipe_reads_the_output_as_it_is(tmp_path, prompts):
    rows = [post("They smiled.", "positive"), post("Empty.", "positive"), HOUR]
    model = Scripted(lambda question, seed: "" if "Empty" in question else honest(question, seed))
    _, report = run(tmp_path, rows, model, prompts)
    splits = {"train": "aux.jsonl", "validation": "aux.jsonl"}
    shared = {"path": ".", "splits": splits, "pair": "aspect"}
    auxiliary = {**shared, "auxiliary": True, "confidence_strategy": "output"}
    recipe = Recipe(
        data=DataConfig(root=str(report.files.posts.parent)),
        tasks={
            "polarity": TaskConfig(label="polarity", **shared),
            "opinion": TaskConfig(
                kind="text", prompt="opinion on {pair}: {text}", label="aux_opinion",
                confidence="aux_opinion_confidence", **auxiliary,
            ),
            "implied": TaskConfig(label="aux_polarity", confidence="aux_polarity_confidence", **auxiliary),
        },
    )  # fmt: skip
    split = load_corpus(recipe).splits["train"]
    gold = split.labels["polarity"]
    assert split.texts == [row["text"] for row in rows]
    assert split.labels["opinion"] == ["friendly people", None, "slow people"]
    assert split.labels["implied"] == [1, None, 0] == [gold[0], None, gold[2]]
    assert split.confidences["opinion"] == [0.5, None, 0.5]
