"""Random faults, one after another, until the time or the number asked for is over; not a part of CI.

    python tests/soak/run.py --minutes 60 --output /tmp/soak

A case is a run of the smoke recipe that is disturbed again and again until it is finished: killed,
stopped by SIGINT, SIGTERM or SIGHUP, its disk filled, its checkpoint damaged, its standard output
closed, started twice at once, resumed on another number of ranks. Its losses, weights and
predictions must then be those of the undisturbed run: to the last bit on the same ranks, to
``CLOSE`` on others. The same command goes on where an earlier one ended. The first failing case
keeps its folder; its seed gives the same faults again (``--case``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comoe.config.files import read_json, write_json
from comoe.inference.checkpoint_folder import sorted_checkpoints, step_of
from tests.end_to_end.commands import EVENTFUL, STEPS, read_lines, train_lines
from tests.soak.starts import Start, start

CLOSE = 2e-3
"""Relative difference of losses that another number of ranks may make in the steps of a case."""
DISK = 48 << 20
"""Bytes of the small disk."""
PATIENCE = 180.0
"""Seconds in which a start must have worked for half a second, or it counts as hung."""
MOST_FAULTS = 12
"""Faults of a case; after them it may finish."""
SAVED, MENDABLE, OVER, LOST, INTERRUPTED = 0, 2, 3, 4, 130
# Drawing is disturbed too.
COMMON = (
    *(word for word in EVENTFUL if word != "run.plots=false"),
    "parallel.timeout_seconds=60",
)


class Wrong(Exception):
    """Something that must not happen; the message says what."""


@dataclass
class Case:
    """One disturbed run."""

    folder: Path
    """Holds ``runs/smoke`` and the logs."""
    home: Path
    chance: random.Random
    ranks: int
    moves: bool
    small_disk: bool
    faults: Counter = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 4.0
    """Of an undisturbed start, roughly."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "smoke"

    @property
    def finished(self) -> bool:
        return (self.run / "export" / "model.safetensors").is_file()

    def words(self) -> list[str]:
        """What the user types next."""
        if (self.run / "config.yaml").is_file():
            return ["--resume", str(self.run)]
        # On other ranks dropout draws other numbers, and micro-batches would be compared with others.
        moving = ("model.dropout=0", "train.micro_batch_size=auto") if self.moves else ()
        return ["smoke", f"run.output_dir={self.run.parent}", *COMMON, *moving]

    def begin(self, **options: Any) -> Start:
        self.starts += 1
        logs = self.folder / f"start-{self.starts:03d}"
        return start(self.words(), self.ranks, logs, home=self.home, **options)


def _moment(case: Case, begun: Start) -> None:
    """Wait for a moment to disturb: a time, a step, or a checkpoint that is being written."""
    kind = case.chance.choice(["time", "step", "writing"])
    wait = case.chance.uniform(0.2, 1.4) * case.seconds
    step = case.chance.randint(1, STEPS)
    if kind == "time":
        begun.wait(PATIENCE, until=lambda: time.monotonic() - begun.began > wait)
    elif kind == "step":
        begun.wait(PATIENCE, until=lambda: max(train_lines_now(case.run), default=0) >= step)
        time.sleep(case.chance.uniform(0, 0.2))
    else:
        folder = case.run / "checkpoints"
        begun.wait(PATIENCE, until=lambda: any(folder.glob(".writing-*")))
        time.sleep(case.chance.uniform(0, 0.05))


def train_lines_now(run: Path) -> list[int]:
    """Steps that are logged; while they are written a line may be there twice."""
    try:
        return list(train_lines(run))
    except (AssertionError, OSError, ValueError):
        return []


def _kill(case: Case) -> tuple[Start, set[int]]:
    begun = case.begin()
    _moment(case, begun)
    some = case.chance.choice([None, [case.chance.randrange(case.ranks)]])
    begun.send(signal.SIGKILL, some)
    return begun, {SAVED, LOST, -signal.SIGKILL}


def _stop(number: signal.Signals, **options: Any) -> Callable[[Case], tuple[Start, set[int]]]:
    def disturb(case: Case) -> tuple[Start, set[int]]:
        begun = case.begin(**options)
        _moment(case, begun)
        begun.send(number)
        if case.chance.random() < 0.3:
            time.sleep(case.chance.uniform(0, 0.3))
            begun.send(number)
        # Before and after the steps a signal ends the process, as nothing is lost then.
        return begun, {SAVED, INTERRUPTED, LOST, -number}

    return disturb


def _full_disk(case: Case) -> tuple[Start, set[int]]:
    """The disk takes so many bytes more; where no small disk can be mounted, a file so many."""
    if not case.small_disk:
        size = int(10 ** case.chance.uniform(2.5, 6.2))
        begun = case.begin(largest_file=size)
        begun.end(PATIENCE)
        return begun, {SAVED, MENDABLE, OVER, LOST}
    filler = case.folder / "filler"
    free = shutil.disk_usage(case.folder).free
    keep = int(case.chance.choice([10**3, 10**5, 10**6, 5 * 10**6]) * case.chance.uniform(0.1, 2))
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - keep))
    begun = case.begin()
    begun.wait(PATIENCE)
    filler.unlink()
    return begun, {SAVED, MENDABLE, OVER, LOST}


def _two_starts(case: Case) -> tuple[Start, set[int]]:
    """One of both trains; the other is refused. The first may be killed."""
    first = case.begin()
    time.sleep(case.chance.uniform(0, 0.5) * case.seconds)
    second = case.begin()
    if case.chance.random() < 0.5:
        _moment(case, first)
        first.send(signal.SIGKILL)
    codes = second.end(PATIENCE)
    if not set(codes) <= {SAVED, MENDABLE, LOST}:
        raise Wrong(f"the second of two starts ended with {codes}\n{second.said()}")
    _no_traceback(second)
    return first, {SAVED, MENDABLE, LOST, -signal.SIGKILL}


def _damage(case: Case) -> tuple[Start, set[int]]:
    """Spoil one file of the newest checkpoint, unless it is the only one or the best; then stop again."""
    whole, _ = sorted_checkpoints(case.run / "checkpoints")
    best = case.run / "checkpoints" / "best.json"
    if len(whole) > 1 and not (best.is_file() and read_json(best)["step"] == step_of(whole[-1])):
        files = sorted(path for path in whole[-1].rglob("*") if path.is_file())
        file = case.chance.choice([path for path in files if "any-layout" not in path.parts])
        content = bytearray(file.read_bytes())
        how = case.chance.choice(["delete", "empty", "cut", "flip"])
        if how == "delete":
            file.unlink()
        else:
            at = case.chance.randrange(max(1, len(content)))
            if how == "flip" and content:
                content[at] ^= 1 << case.chance.randrange(8)
            kept = {"empty": 0, "cut": at, "flip": len(content)}[how]
            file.write_bytes(content[:kept])
        case.faults[f"(damaged: {how})"] += 1
    return _stop(signal.SIGTERM)(case)


def _deaf(case: Case) -> tuple[Start, set[int]]:
    """Nobody reads what it prints; it must go on, until it is stopped."""
    return _stop(signal.SIGHUP, deaf=True)(case)


FAULTS: dict[str, Callable[[Case], tuple[Start, set[int]]]] = {
    "kill": _kill,
    "SIGINT": _stop(signal.SIGINT),
    "SIGTERM": _stop(signal.SIGTERM),
    "SIGHUP": _stop(signal.SIGHUP),
    "full disk": _full_disk,
    "two starts": _two_starts,
    "damage": _damage,
    "closed output": _deaf,
}
"""Name -> what starts and disturbs; it gives the start, and exit codes that may come of it."""


def _no_traceback(begun: Start) -> None:
    said = begun.said()
    for word in ("Traceback (most", "comoe: unexpected", "Exception ignored", "Fatal Python"):
        if word in said:
            raise Wrong(f"{word!r} was printed:\n{said[-4000:]}")


def disturb(case: Case) -> None:
    """One fault: start, disturb, look at what is left."""
    name = case.chance.choice(list(FAULTS))
    before = newest(case.run)
    if case.moves:
        case.ranks = case.chance.choice([1, 2])
    begun, codes = FAULTS[name](case)
    case.faults[name] += 1
    found = begun.end(PATIENCE)
    _no_traceback(begun)
    if not set(found) <= codes:
        raise Wrong(f"{name}: exit codes {found}, expected some of {codes}\n{begun.said()[-4000:]}")
    # A damaged newest one makes room for the one before.
    if newest(case.run) < before and name != "damage":
        raise Wrong(f"{name}: the newest checkpoint was step {before}, now {newest(case.run)}")


def newest(run: Path) -> int:
    """Step of the newest checkpoint whose bytes are whole; 0 where there is none."""
    whole, _ = sorted_checkpoints(run / "checkpoints", verify=True)
    return step_of(whole[-1]) if whole else 0


def finish(case: Case) -> None:
    """Let the run go to its end; starts that find it finished do nothing."""
    for _ in range(3):
        begun = case.begin()
        codes = begun.end(PATIENCE)
        _no_traceback(begun)
        if set(codes) != {SAVED}:
            raise Wrong(f"undisturbed, it ended with {codes}\n{begun.said()[-4000:]}")
        if case.finished:
            return
    raise Wrong("it does not come to its end")


def compare(case: Case, reference: Path) -> None:
    """Raise where losses, weights or predictions are not those of the undisturbed run."""
    ours, theirs = train_lines(case.run), train_lines(reference)
    if sorted(ours) != list(range(1, STEPS + 1)):
        raise Wrong(f"steps {sorted(ours)} are logged")
    for step, line in theirs.items():
        difference = abs(ours[step]["loss"] - line["loss"])
        if difference > (CLOSE * abs(line["loss"]) if case.moves else 0):
            raise Wrong(f"loss of step {step}: {ours[step]['loss']} instead of {line['loss']}")
    if case.moves:
        return
    if validations(case.run) != validations(reference):
        raise Wrong(f"evaluated {validations(case.run)} instead of {validations(reference)}")
    for file in ["export/model.safetensors", *predictions(reference)]:
        if (case.run / file).read_bytes() != (reference / file).read_bytes():
            raise Wrong(f"{file} differs")


def validations(run: Path) -> dict[int, float]:
    """Step -> mean of the metrics."""
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line["mean"] for line in lines if line["split"] == "validation"}


def predictions(run: Path) -> list[str]:
    """Files of predictions of a run."""
    return sorted(path.relative_to(run).as_posix() for path in run.glob("predictions/*/*.jsonl"))


@contextmanager
def disk(folder: Path, *, small: bool):
    """A folder, on a disk of its own where the system lets us mount one; gives whether it is."""
    folder.mkdir(parents=True)
    mounted = False
    if small:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run_case(number: int, seed: int, output: Path) -> tuple[Counter, int]:
    """One case from its number; the faults and starts that it had. Raises ``Wrong``."""
    chance = random.Random(f"{seed}-{number}")
    moves = chance.random() < 0.15
    ranks = 1 if chance.random() < 0.65 else 2
    undisturbed = reference(output, 1 if moves else ranks, moves=moves)
    folder = output / f"case-{number:05d}"
    shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as stack:
        mounted = stack.enter_context(disk(folder, small=chance.random() < 0.5))
        case = Case(folder, output / "home", chance, ranks, moves, mounted)
        try:
            for _ in range(chance.randint(1, MOST_FAULTS)):
                if case.finished:
                    break
                disturb(case)
            finish(case)
            compare(case, undisturbed)
        except Exception as error:
            kept = output / "first-failure"
            if not kept.exists():
                shutil.copytree(folder, kept, symlinks=True)
                (kept / "what.txt").write_text(f"--seed {seed} --case {number}\n{error}\n")
            raise
    return case.faults, case.starts


def reference(output: Path, ranks: int, *, moves: bool) -> Path:
    """The undisturbed run, made when it is first needed."""
    folder = output / f"reference-{ranks}{'-moves' if moves else ''}"
    if not (folder / "runs/smoke/export/model.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        finish(Case(folder, output / "home", random.Random(0), ranks, moves, False))
    return folder / "runs" / "smoke"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and counts")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=10**9, help="end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    given = parser.parse_args()
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    file = output / "counts.json"
    state = {"seed": given.seed, "case": 0, "starts": 0, "seconds": 0.0, "faults": {}, "failed": []}
    if file.is_file() and given.case is None:
        state |= read_json(file)
    if given.case is not None:
        print(run_case(given.case, given.seed, output))
        return
    end = time.monotonic() + 60 * given.minutes
    while time.monotonic() < end and total(state) < given.faults:
        began = time.monotonic()
        try:
            faults, starts = run_case(state["case"], state["seed"], output)
            state["faults"] = dict(Counter(state["faults"]) + faults)
            state["starts"] += starts
        except (Wrong, OSError, AssertionError, ValueError) as error:
            state["failed"].append([state["case"], str(error)[-2000:]])
            print(f"case {state['case']} FAILED: {error}", flush=True)
        state["case"] += 1
        state["seconds"] += time.monotonic() - began
        write_json(file, state)
        print(
            f"{state['case']} cases, {total(state)} faults, {state['starts']} starts, "
            f"{len(state['failed'])} failed, {state['seconds']:.0f} s",
            flush=True,
        )
    print(json.dumps(state, indent=1))
    sys.exit(1 if state["failed"] else 0)


def total(state: dict[str, Any]) -> int:
    """Faults so far; a damaged file and the stop after it are two."""
    return sum(state["faults"].values())


if __name__ == "__main__":
    main()
