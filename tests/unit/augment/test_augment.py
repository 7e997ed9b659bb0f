"""Auxiliary data with a scripted model: rounds, malformed answers, interruption, files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from comoe.augment.command import COLUMNS, Report, augment
from comoe.augment.generator import Answer, Prompt, in_batches
from comoe.augment.prompts import Prompts, load_prompts
from comoe.augment.refine import Settings, fault_of, tidy
from comoe.config.recipe import DataConfig, Recipe, TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.reading.inputs import DataChoice

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
Say = Callable[[str, "int | None"], "str | Answer"]


@dataclass
class Scripted:
    """A model that says what it is told to; it finds an opinion bad where it holds the word slow."""

    say: Say
    asked: list[tuple[str, int | None]] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    identity: Mapping[str, str] = field(default_factory=lambda: {"--model": "scripted"})
    stop_after: int | None = None
    most_words: int = 10**6
    limit: str = "it reads few words"

    def answer(self, prompts: Sequence[Prompt], *, draws: Sequence[int | None]) -> list[Answer]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        found = []
        for prompt, draw in zip(prompts, draws, strict=True):
            self.asked.append((prompt.question, draw))
            said = self.say(prompt.question, draw)
            found.append(said if isinstance(said, Answer) else Answer(said, 0.5, True))
        return found

    def score(
        self, prompts: Sequence[Prompt], *, choices: Sequence[str]
    ) -> list[tuple[float, ...]]:
        assert tuple(choices) == ("good", "bad")
        self.judged += [prompt.question for prompt in prompts]
        return [
            (0.1, 0.9) if "slow" in prompt.question.split(" | ")[3] else (0.75, 0.25)
            for prompt in prompts
        ]

    def excess(self, prompt: Prompt) -> int:
        return max(len(prompt.question.split()) - self.most_words, 0)


def is_opinion(question: str) -> bool:
    return question.endswith("opinion?")


def honest(question: str, draw: int | None) -> str:
    """Finds the service friendly until it is told otherwise."""
    if not is_opinion(question):
        return "service"
    return "slow people" if "it is bad" in question else "friendly people"


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return prompts_of(tmp_path, PROMPTS)


def prompts_of(folder: Path, text: str) -> Prompts:
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return load_prompts(path)


def post(text: str, polarity: str | None, aspect: str = "service") -> dict[str, str | None]:
    return {"text": text, "aspect": aspect, "polarity": polarity}


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def run(
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    model: Scripted,
    prompts: Prompts,
    **changes: object,
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


def test_an_answer_that_implies_the_gold_label_converges_at_once(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest)
    (row,), report = run(tmp_path, [{"id": 7, **post("They smiled.", "positive")}], model, prompts)
    assert row == {
        "id": 7, "text": "They smiled.", "aspect": "service", "polarity": "positive",
        "aux_aspect": "service", "aux_opinion": "friendly people", "aux_polarity": "positive",
        "aux_aspect_confidence": 0.5, "aux_opinion_confidence": 0.5, "aux_polarity_confidence": 0.75,
        "aux_rounds": 1, "aux_converged": True,
    }  # fmt: skip
    assert list(row)[-len(COLUMNS) :] == list(COLUMNS)
    assert (
        "  in round 1: 1" in report.lines()
        and "mean confidence of the polarity: 0.750" in report.lines()
    )


def test_an_answer_against_the_gold_label_is_refined_with_the_label_told(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest)
    (row,), report = run(tmp_path, [post("An hour passed.", "negative")], model, prompts)
    assert (row["aux_opinion"], row["aux_polarity"], row["aux_rounds"]) == (
        "slow people",
        "negative",
        2,
    )
    assert row["aux_converged"] is True and row["aux_polarity_confidence"] == 0.9
    assert model.asked[2][0] == "An hour passed. | service | it is bad, not good | aspect?"
    assert (
        model.asked[3][0]
        == "An hour passed. | service | service | it is bad, not friendly people | opinion?"
    )
    assert (
        "converged: 1 of 1 posts with a gold label" in report.lines()
        and "  in round 2: 1" in report.lines()
    )


def test_the_question_for_the_polarity_never_tells_the_gold_label(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest)
    run(tmp_path, [post("An hour passed.", "negative")], model, prompts)
    assert model.judged == [
        "An hour passed. | service | service | friendly people | good or bad?",
        "An hour passed. | service | service | slow people | good or bad?",
    ]


def test_what_never_converges_keeps_its_last_answer_and_is_marked(
    tmp_path: Path, prompts: Prompts
) -> None:
    said: list[str] = []

    def stubborn(question: str, draw: int | None) -> str:
        if not is_opinion(question):
            return "service"
        said.append(f"friendly {len(said) + 1}")
        return said[-1]

    (row,), report = run(
        tmp_path, [post("An hour passed.", "negative")], Scripted(stubborn), prompts
    )
    assert (row["aux_rounds"], row["aux_converged"]) == (10, False)
    assert (row["aux_opinion"], row["aux_polarity"]) == ("friendly 10", "positive") and len(
        said
    ) == 10
    assert "  not converged: 1" in report.lines()


def test_a_post_without_gold_label_has_one_round_and_no_verdict(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest)
    rows, _ = run(tmp_path, [post("An hour passed.", None), post("So so.", "")], model, prompts)
    assert [(row["aux_rounds"], row["aux_converged"]) for row in rows] == [(1, None), (1, None)]
    assert len(model.asked) == 4


def test_a_question_is_answered_greedily_once_and_drawn_when_it_comes_back(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(
        lambda question, draw: "friendly people" if is_opinion(question) else "service"
    )
    run(tmp_path, [post("An hour passed.", "negative")], model, prompts, rounds=4)
    draws = [draw for question, draw in model.asked if is_opinion(question)]
    # Rounds 1 and 2 ask two different questions; rounds 3 and 4 repeat the second one.
    assert draws[:2] == [None, None] and None not in draws[2:] and draws[2] != draws[3]
    again = Scripted(model.say)
    run(
        tmp_path,
        [post("An hour passed.", "negative")],
        again,
        prompts,
        rounds=4,
        seed=1,
        overwrite=True,
    )
    assert [draw for question, draw in again.asked if is_opinion(question)][2:] != draws[2:]


def test_without_temperature_nothing_is_drawn_and_no_question_is_asked_twice(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(
        lambda question, draw: "friendly people" if is_opinion(question) else "service"
    )
    (row,), _ = run(
        tmp_path, [post("An hour passed.", "negative")], model, prompts, temperature=0.0
    )
    assert (row["aux_rounds"], row["aux_converged"]) == (10, False)
    assert [draw for _, draw in model.asked] == [None] * 4


BAD_ANSWERS = {
    "empty": ["", "  ", "...", Answer("\n", 0.1, True)],
    "several lines": ["slow\nand rude", "slow\n\nExplanation: ..."],
    "repeats itself": ["slow slow slow slow", "so, so, so, so"],
    "cut off": [Answer("slow and", 0.5, False)],
    "too many words": ["one two three four five"],
    "echoes the prompt": ["It is which of all these things?"],
    "says nothing": ["None.", "not mentioned"],
    "only a label": ["good", "Bad!", "negative"],
}


@pytest.mark.parametrize("reason", BAD_ANSWERS)
def test_a_malformed_answer_has_a_reason(reason: str, tmp_path: Path) -> None:
    prompts = prompts_of(
        tmp_path, PROMPTS.replace("| aspect?", "| Which of all these things is it?", 1)
    )
    for text in BAD_ANSWERS[reason]:
        answer = text if isinstance(text, Answer) else Answer(text, 0.5, True)
        assert fault_of(answer, "opinion", prompts=prompts) == reason, text


@pytest.mark.parametrize(
    "text", ["slow", "slow, not good", '"no one came"', "slow and rude people.", "慢"]
)
def test_a_good_answer_has_no_fault(text: str, prompts: Prompts) -> None:
    assert fault_of(Answer(text, 0.5, True), "opinion", prompts=prompts) is None


def test_blanks_quotes_and_the_full_stop_around_an_answer_go() -> None:
    assert [tidy(text) for text in (' "slow."\n', "“slow”.", "slow", "slow. It was")] == [
        "slow"
    ] * 3 + ["slow. It was"]


def test_a_malformed_answer_is_kept_out_counted_and_asked_anew(
    tmp_path: Path, prompts: Prompts
) -> None:
    def hesitant(question: str, draw: int | None) -> str:
        if "Empty" in question or ("Late" in question and draw is None and is_opinion(question)):
            return ""
        return honest(question, draw)

    rows = [
        post("Empty.", "positive"),
        post("Late.", "positive"),
        post("Empty too.", None),
        post("Fine.", "positive"),
    ]
    found, report = run(tmp_path, rows, Scripted(hesitant), prompts, rounds=3)
    assert [row["aux_opinion"] for row in found] == [
        None,
        "friendly people",
        None,
        "friendly people",
    ]
    assert [row["aux_converged"] for row in found] == [False, True, None, True]
    # The first question comes back, so the second time it is drawn.
    assert [row["aux_rounds"] for row in found] == [3, 2, 1, 1]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    aside = rows_of(report.files.malformed)
    assert [(row["line"], row["round"], row["part"], row["reason"]) for row in aside] == [
        (1, 1, "aspect", "empty"), (1, 2, "aspect", "empty"), (1, 3, "aspect", "empty"),
        (2, 1, "opinion", "empty"), (3, 1, "aspect", "empty"),
    ]  # fmt: skip
    assert "malformed answers kept out: 5, see " in "\n".join(report.lines())
    assert "  aspect, empty: 4" in report.lines() and "  opinion, empty: 1" in report.lines()


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, prompts: Prompts
) -> None:
    rows = [post(f"Post {number} " + "long " * (number % 5), "negative" if number % 3 else "positive")
            for number in range(30)]  # fmt: skip

    def script(question: str, draw: int | None) -> str:
        return (
            honest(question, draw)
            if "7" not in question
            else "good"
            if draw is None
            else f"friendly {draw}"
        )

    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", rows, Scripted(script), prompts, batch_size=2)
    whole = (tmp_path / "whole" / "out" / "aux.jsonl").read_bytes()
    (tmp_path / "killed").mkdir()
    begun, output = (
        tmp_path / "killed" / "out" / ".aux.jsonl.part",
        tmp_path / "killed" / "out" / "aux.jsonl",
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", rows, Scripted(script, stop_after=60), prompts, batch_size=2)
    assert begun.is_file() and not output.exists()
    # A kill in the middle of a write leaves half a line.
    done = begun.read_bytes()
    begun.write_bytes(done + b'[{"index": 3, "rea')
    second = Scripted(script)
    _, report = run(tmp_path / "killed", rows, second, prompts, batch_size=2)
    assert report.resumed == 8 * (len(done.splitlines()) - 1) > 0
    assert output.read_bytes() == whole and not begun.exists()
    aside = "out/aux.malformed.jsonl"
    assert b"only a label" in (tmp_path / "killed" / aside).read_bytes()
    assert (tmp_path / "killed" / aside).read_bytes() == (tmp_path / "whole" / aside).read_bytes()
    first = Scripted(script)
    run(tmp_path / "whole", rows, first, prompts, batch_size=2, overwrite=True)
    assert len(second.asked) < len(first.asked)


@pytest.mark.parametrize("option", ["--model", "--prompts", "--input", "--batch-size", "--rounds"])
def test_a_stopped_run_is_not_gone_on_with_otherwise(
    option: str, tmp_path: Path, prompts: Prompts
) -> None:
    rows = [post(f"Post {number}", "positive") for number in range(20)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rows, Scripted(honest, stop_after=16), prompts, batch_size=2)
    model = Scripted(honest, identity={"--model": "another" if option == "--model" else "scripted"})
    if option == "--prompts":
        prompts = prompts_of(tmp_path, PROMPTS.replace("it is", "that is"))
    changes = {"--batch-size": {"batch_size": 3}, "--rounds": {"batch_size": 2, "rounds": 3}}
    changes = changes.get(option, {"batch_size": 2})
    rows = rows[:-1] if option == "--input" else rows
    with pytest.raises(
        ValueError, match=rf"stopped after 8 posts, begun otherwise: {option} was .*, is now"
    ):
        run(tmp_path, rows, model, prompts, **changes)
    found, report = run(tmp_path, rows, model, prompts, **changes, overwrite=True)
    assert len(found) == len(rows) and report.resumed == 0


def test_two_processes_do_not_write_the_same_output(tmp_path: Path, prompts: Prompts) -> None:
    def nested(question: str, draw: int | None) -> str:
        run(tmp_path, [post("One.", "positive")], Scripted(honest), prompts)
        return "never"

    with pytest.raises(ValueError, match="another process is writing it"):
        run(tmp_path, [post("One.", "positive")], Scripted(nested), prompts)


def test_an_output_that_is_there_is_replaced_only_when_asked(
    tmp_path: Path, prompts: Prompts
) -> None:
    run(tmp_path, [post("One.", "positive")], Scripted(honest), prompts)
    made_otherwise = r"aux.jsonl is there already, made otherwise: --input was .*Name another file, or .* --overwrite"
    with pytest.raises(ValueError, match=made_otherwise):
        run(tmp_path, [post("Two.", "positive")], Scripted(honest), prompts)
    (row,), _ = run(tmp_path, [post("Two.", "positive")], Scripted(honest), prompts, overwrite=True)
    assert row["text"] == "Two."


def kept(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def give(folder: Path, path: str, output: str, prompts: Prompts, **changes: object) -> Report:
    return augment(
        DataChoice(str(folder / path)), folder / output, prompts=prompts, load=lambda: Scripted(honest),
        settings=Settings(), progress=False, overwrite=True, spared=(folder / "prompts.yaml",), **changes,
    )  # fmt: skip


READ_FILES = {
    "itself": ("own.jsonl", "own.jsonl"),
    "through a link": ("own.jsonl", "link.jsonl"),
    "read through a link": ("link.jsonl", "own.jsonl"),
    "through a linked folder": ("own.jsonl", "linked/own.jsonl"),
    "a hard link": ("own.jsonl", "hard.jsonl"),
    "the work aside": (".aux.jsonl.part", "aux.jsonl"),
    "the malformed answers": ("aux.malformed.jsonl", "aux.jsonl"),
    "the prompts": ("own.jsonl", "prompts.json"),
    "in the folder": ("data", "data/train.jsonl"),
    "beside what is read": ("data", "linked/data/validation.json"),
}


@pytest.mark.parametrize("case", READ_FILES)
def test_a_file_that_is_read_is_never_written(case: str, tmp_path: Path, prompts: Prompts) -> None:
    source, output = READ_FILES[case]
    (tmp_path / "data").mkdir()
    for name in ("own.jsonl", ".aux.jsonl.part", "aux.malformed.jsonl", "data/train.jsonl"):
        write(tmp_path / name, [post("One.", "positive")])
    (tmp_path / "link.jsonl").symlink_to("own.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "own.jsonl")
    (tmp_path / "prompts.json").symlink_to("prompts.yaml")
    before = kept(tmp_path)
    with pytest.raises(
        ValueError, match=r"--output .* would write .*, which is read .*; name another file"
    ):
        give(tmp_path, source, output, prompts)
    assert kept(tmp_path) == before


@pytest.mark.parametrize("taken", ["aux.jsonl", "aux.malformed.jsonl", ".aux.jsonl.part"])
def test_overwrite_replaces_no_file_of_somebody_else(
    taken: str, tmp_path: Path, prompts: Prompts
) -> None:
    write(tmp_path / "own.jsonl", [post("One.", "positive")])
    (tmp_path / taken).write_text('{"text": "mine"}', encoding="utf-8")
    before = kept(tmp_path)
    with pytest.raises(ValueError, match="move it away"):
        give(tmp_path, "own.jsonl", "aux.jsonl", prompts)
    assert kept(tmp_path) == before


def test_overwrite_does_not_replace_an_output_that_was_corrected_by_hand(
    tmp_path: Path, prompts: Prompts
) -> None:
    write(tmp_path / "own.jsonl", [post("One.", "positive")])
    give(tmp_path, "own.jsonl", "aux.jsonl", prompts)
    give(tmp_path, "own.jsonl", "aux.jsonl", prompts)
    with (tmp_path / "aux.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(
        ValueError,
        match="is not as augment wrote it, so it is never replaced, not even with --overw",
    ):
        give(tmp_path, "own.jsonl", "aux.jsonl", prompts)


def test_an_output_that_appears_while_the_posts_are_read_is_kept_and_the_work_too(
    tmp_path: Path, prompts: Prompts
) -> None:
    taken = tmp_path / "out" / "aux.jsonl"

    def meddling(question: str, draw: int | None) -> str:
        taken.write_text("mine")
        return honest(question, draw)

    with pytest.raises(ValueError, match="move it away"):
        run(tmp_path, [post("One.", "positive")], Scripted(meddling), prompts)
    assert taken.read_text() == "mine"
    taken.unlink()
    idle = Scripted(honest)
    _, report = run(tmp_path, [post("One.", "positive")], idle, prompts)
    assert report.resumed == 1 and not idle.asked


def test_a_finished_run_given_again_says_so_and_changes_nothing(
    tmp_path: Path, prompts: Prompts
) -> None:
    rows = [post("One.", "positive")]
    _, first = run(tmp_path, rows, Scripted(honest), prompts)
    assert sorted(kept(tmp_path / "out")) == [".aux.jsonl.done", "aux.jsonl"]
    before, idle = kept(tmp_path), Scripted(honest)
    _, again = run(tmp_path, rows, idle, prompts)
    assert (
        again.lines()[0].startswith("done already by the same command")
        and again.lines()[1:] == first.lines()
    )
    assert kept(tmp_path) == before and not idle.asked
    with pytest.raises(ValueError, match="made otherwise: --rounds was 10, is now 3"):
        run(tmp_path, rows, idle, prompts, rounds=3)
    with pytest.raises(ValueError, match="made otherwise: --model was scripted, is now another"):
        run(tmp_path, rows, Scripted(honest, identity={"--model": "another"}), prompts)
    assert kept(tmp_path) == before


def test_a_file_of_malformed_answers_goes_when_there_are_none_any_more(
    tmp_path: Path, prompts: Prompts
) -> None:
    _, report = run(tmp_path, [post("One.", None)], Scripted(lambda question, draw: ""), prompts)
    assert rows_of(report.files.malformed)
    run(tmp_path, [post("One.", None)], Scripted(honest), prompts, overwrite=True)
    assert not report.files.malformed.exists()


def test_a_run_that_failed_before_any_post_was_done_may_be_given_otherwise(
    tmp_path: Path, prompts: Prompts
) -> None:
    with pytest.raises(
        ValueError, match="it reads few words. Copy launch/configs/augment_prompts.yaml"
    ):
        run(tmp_path, [post("One.", "positive")], Scripted(honest, most_words=1), prompts)
    (row,), _ = run(tmp_path, [post("One.", "positive")], Scripted(honest), prompts, rounds=3)
    assert row["aux_converged"] is True


def test_a_log_has_lines_with_the_posts_done_the_time_left_and_the_round(
    tmp_path: Path,
    prompts: Prompts,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("comoe.augment.command.LOG_SECONDS", 0.0)
    rows = [post(f"Post {number}", None) for number in range(8)]
    run(tmp_path, rows, Scripted(honest), prompts, batch_size=1)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    done = dict.fromkeys(line.partition(" posts")[0] for line in lines)
    assert list(done) == [f"augment: {count} of 8" for count in (0, 4, 8)]
    assert all(line.endswith("left, posts=4, round=1") for line in lines[1:])


def test_a_cell_that_json_cannot_hold_is_told_before_any_work(
    tmp_path: Path, prompts: Prompts
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "posts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One."], "raw": [b"1"]}), path)
    model = Scripted(honest)
    with pytest.raises(
        ValueError, match="post 1 has a cell that JSON lines cannot hold.*drop its column"
    ):
        augment(DataChoice(str(path)), tmp_path / "aux.jsonl", prompts=prompts, load=lambda: model,
                settings=Settings(), progress=False)  # fmt: skip
    assert not model.asked


HELP = {
    "rounds": "10",
    "temperature": "0.7",
    "seed": "0",
    "max-new-tokens": "32",
    "batch-size": "16",
}


def test_help_tells_the_defaults() -> None:
    asked = subprocess.run(
        [sys.executable, str(DEFAULT.parents[1] / "augment.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(asked.stdout.split())
    for flag, default in HELP.items():
        assert re.search(rf"--{flag} \S+ (?:(?!--).)*\(default: {re.escape(default)}\)", text), flag


MISTAKES: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "taken": (
        [{"text": "a", "aux_rounds": 1}],
        {},
        "has the column aux_rounds already, which would be overwritten",
    ),
    "label": (
        [post("a", "mixed")],
        {},
        r"posts.jsonl:1: column polarity is a label without a word in the prompts",
    ),
    "blank": (
        [post("a", "positive"), post(" ", "positive")],
        {},
        r"posts.jsonl:2: column text is empty.*--skip-bad",
    ),
    "column": (
        [post("a", "positive")],
        {"label": "polarty"},
        "--label-column is 'polarty'.*no such column; did you mean polarity",
    ),
    "empty": ([], {}, "posts.jsonl has no usable post"),
    "rounds": ([post("a", None)], {"rounds": 0}, "--rounds is 0; it must be 1 or more"),
    "limit": ([post("a", None)], {"limit": 0}, "--limit is 0; it must be 1 or more"),
    "temperature": (
        [post("a", None)],
        {"temperature": -1.0},
        "--temperature is -1.0; it must be 0 or more",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_posts_or_options_is_told(case: str, tmp_path: Path, prompts: Prompts) -> None:
    rows, changes, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows, Scripted(honest), prompts, **changes)
    assert not (tmp_path / "out" / "aux.jsonl").exists()


def test_bad_rows_can_be_left_out_and_a_file_needs_no_target_and_no_label(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest)
    found, report = run(
        tmp_path, [{"text": "One."}, {"text": ""}, {"text": "Two."}], model, prompts, skip_bad=True
    )
    assert [row["text"] for row in found] == ["One.", "Two."] and len(report.posts.bad) == 1
    assert model.asked[0][0] == "One. | the place | aspect?"
    assert [line.partition(":")[0] for line in report.lines()[:2]] == [
        "no column aspect",
        "no column polarity",
    ]


def test_csv_posts_with_other_columns_keep_every_column(tmp_path: Path, prompts: Prompts) -> None:
    path = tmp_path / "posts.csv"
    path.write_text("tweet,about,mood,id\nThey smiled.,staff,positive,007\n", encoding="utf-8")
    choice = DataChoice(str(path), text="tweet", pair="about", label="mood")
    report = augment(choice, tmp_path / "aux.jsonl", prompts=prompts, load=lambda: Scripted(honest),
                     settings=Settings(), progress=False)  # fmt: skip
    (row,) = rows_of(report.files.posts)
    assert (row["id"], row["mood"], row["aux_converged"]) == ("007", "positive", True)


def test_line_separators_and_half_characters_do_no_harm(tmp_path: Path, prompts: Prompts) -> None:
    rows = [post("a\u2028b\nc \ud83d \U0001f600", "positive")]
    model = Scripted(honest)
    (row,), report = run(tmp_path, rows, model, prompts)
    assert (
        row["text"] == rows[0]["text"]
        and len(report.files.posts.read_text(encoding="utf-8").splitlines()) == 1
    )
    # Asked on one line.
    assert model.asked[0][0].startswith("a b c \ufffd \U0001f600 |")


def test_a_post_that_is_too_long_loses_its_end_and_a_prompt_that_is_too_long_is_refused(
    tmp_path: Path, prompts: Prompts
) -> None:
    model = Scripted(honest, most_words=15)
    (row,), report = run(
        tmp_path, [post("one two three four five six seven eight nine", "positive")], model, prompts
    )
    assert model.asked[0][0].startswith("one two three") and all(
        len(asked.split()) <= 15 for asked, _ in model.asked
    )
    assert (
        row["text"].endswith("nine")
        and "shortened, too long for the model: 1 posts" in report.lines()
    )
    with pytest.raises(ValueError, match="the question aspect alone is 3 tokens too long"):
        run(
            tmp_path,
            [post("one", "positive")],
            Scripted(honest, most_words=1),
            prompts,
            overwrite=True,
        )


def test_batches_hold_prompts_of_similar_length_and_keep_their_places() -> None:
    batches: list[list[int]] = []

    def ask(rows: list[int]) -> list[str]:
        batches.append(rows)
        return [f"answer {row}" for row in rows]

    prompts = [Prompt(text) for text in ("a", "ccc", "bb", "dddd", "e")]
    found = in_batches([0, 1, 3, 4], ask, prompts=prompts, size=3)
    assert found == {row: f"answer {row}" for row in (0, 1, 3, 4)}
    assert batches == [[3, 1, 0], [4]]


BAD_PROMPTS = {
    "{text} | {target} | aspect?": (
        "{txt} aspect?",
        r"prompts.yaml:7: templates.aspect has the field \{txt\}",
    ),
    "{text} | {target} | {aspect} | opinion?": (
        "{text} opinion?",
        r"templates.opinion lacks the field \{aspect\}",
    ),
    "{opinion} | {labels}?": ("{opinion} {gold}?", "told in the templates that refine only"),
    "it is {gold}, not {previous_polarity}": ("{text.real} {gold}", "not a plain field"),
    "| it is {gold}, not {previous_opinion} |": (
        "{",
        "templates.refine_opinion.*a brace itself is doubled",
    ),
    "positive: good, negative: bad": ("positive: good", "at least two labels"),
    "negative: bad}": ("negative: Good}", "a word of its own"),
    "no_target": ("no_taget", "no_taget is not an option; did you mean no_target"),
    "aspect: 3": ("aspect: 0", "most_words.aspect is 0; it must be a whole number, at least 1"),
    "no_answer: [none, not mentioned]": (
        "examples: [{gold: mixed}]",
        "examples, number 1: label.*mixed",
    ),
}


@pytest.mark.parametrize("found", BAD_PROMPTS)
def test_a_mistake_in_the_prompts_is_told(found: str, tmp_path: Path) -> None:
    instead, message = BAD_PROMPTS[found]
    assert PROMPTS.count(found) == 1
    with pytest.raises(ValueError, match=message):
        prompts_of(tmp_path, PROMPTS.replace(found, instead))


def test_posts_with_braces_are_not_taken_for_fields_and_examples_go_before_the_question(
    tmp_path: Path,
) -> None:
    examples = "examples: [{text: T, aspect: A, opinion: O, gold: negative}, {text: U}]\n"
    prompts = prompts_of(tmp_path, PROMPTS + examples)
    built = prompts.build("opinion", {"text": "{gold} {", "target": "x", "aspect": "y"})
    assert built == Prompt("{gold} { | x | y | opinion?", (("T | the place | A | opinion?", "O"),))
    assert prompts.build(
        "polarity", {"text": "", "target": "", "aspect": "", "opinion": ""}
    ).examples == (("T | the place | A | O | good or bad?", "bad"),)
    # Without the previous answers an example cannot go before a template that tells them.
    values = dict.fromkeys(("text", "target", "gold", "previous_polarity"), "")
    assert prompts.build("refine_aspect", values).examples == ()


def test_the_default_prompts_are_valid_and_every_example_serves_every_template() -> None:
    prompts = load_prompts(DEFAULT)
    values = dict.fromkeys(("text", "target", "aspect", "opinion", "gold"), "x")
    values |= dict.fromkeys(("previous_aspect", "previous_opinion", "previous_polarity"), "x")
    for part in ("aspect", "opinion", "polarity", "refine_aspect", "refine_opinion"):
        assert len(prompts.build(part, values).examples) == len(prompts.file.examples) == 3
    for example in prompts.file.examples:
        for part in ("aspect", "opinion"):
            fault = fault_of(Answer(getattr(example, part), 1.0, True), part, prompts=prompts)
            assert fault in (None, "echoes the prompt")


def test_a_recipe_reads_the_output_as_it_is(tmp_path: Path, prompts: Prompts) -> None:
    rows = [
        post("They smiled.", "positive"),
        post("Empty.", "positive"),
        post("An hour passed.", "negative"),
    ]

    def say(question: str, draw: int | None) -> str | Answer:
        return "" if "Empty" in question else honest(question, draw)

    _, report = run(tmp_path, rows, Scripted(say), prompts)
    shared = {
        "path": ".",
        "splits": {"train": "aux.jsonl", "validation": "aux.jsonl"},
        "pair": "aspect",
    }
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
    assert split.texts == [row["text"] for row in rows]
    assert split.labels["opinion"] == ["friendly people", None, "slow people"]
    assert (
        split.labels["implied"]
        == [1, None, 0]
        == [split.labels["polarity"][0], None, split.labels["polarity"][2]]
    )
    assert split.confidences["opinion"] == [0.5, None, 0.5]
