"""Whole runs on real ranks: in one sitting, or stopped after some steps and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.end_to_end.commands import read_lines
from tests.helpers_ranks import run_ranks

SMOKE = Path("launch/configs/smoke.yaml")


def train(
    folder: str, *, overrides: Sequence[str] = (), stop_at: int | None = None, resume: bool = False,
    float32: bool = False,
) -> None:  # fmt: skip
    """A run of the recipe smoke, or one that is asked to stop after some steps, or the rest of it."""
    os.environ["COMOE_HOME"] = folder
    from comoe.train.fault.signals import StopSignal
    from comoe.train.request import Request
    from comoe.train.run import run_request

    class StopAt(StopSignal):
        def asked(self) -> bool:
            lines = read_lines(Path(folder) / "smoke" / "metrics.jsonl")
            return max([line["step"] for line in lines], default=0) == stop_at

    if resume:
        request = Request(resume=Path(folder) / "smoke")
    else:
        settings = Path(folder) / "float32.json"
        if float32:
            given = json.loads(Path("ds_configs/zero2.json").read_text())
            settings.write_text(json.dumps(given | {"bf16": {"enabled": False}}))
        request = Request(
            config=SMOKE,
            deepspeed=settings if float32 else None,
            overrides=[*overrides, f"run.output_dir={folder}"],
        )
    run_request(request, StopSignal() if stop_at is None else StopAt())


def sit(folder: Path, *, ranks: int = 1, **arguments: Any) -> None:
    """Call ``train`` on every rank."""
    run_ranks("tests.multiprocess.sittings:train", ranks, folder=str(folder), **arguments)


def sit_twice(folder: Path, *, overrides: Sequence[str], stop_at: int) -> None:
    """A run in two sittings; the first one ends without an export."""
    sit(folder, overrides=overrides, stop_at=stop_at)
    assert max(line["step"] for line in read_lines(folder / "smoke" / "metrics.jsonl")) == stop_at
    assert not (folder / "smoke" / "export").exists()
    sit(folder, resume=True)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged, without what depends on the machine or tells of a resume."""
    timed = {"seconds", "posts_per_second", "tokens_per_second"}
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_lines(folder / "smoke" / "metrics.jsonl")
        if line["split"] != "resume"
    ]
