"""Measure comoe against what else one would use. Ratios, taken side by side in one run; starts its own ranks.

python launch/bench.py experts --json experts.json     one layer: dense, DeepSpeed's own, the plain loop, E = 8 to 64
python launch/bench.py train --json train.json         whole training steps: Hugging Face Trainer with ZeRO-2
python launch/bench.py contrastive --json c.json       the loss: full matrix, open_clip's local one, reference code
python launch/bench.py routing --json routing.json     routing by task and by token: five tasks, blocks in some layers
python launch/bench.py updates --json u.json           what experts learn in ten steps, against a dense block
"""

import importlib
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

HERE = Path(__file__).resolve().parent

BENCHMARKS = {
    "experts": "comoe.benchmarks.experts",
    "train": "comoe.benchmarks.training",
    "contrastive": "comoe.benchmarks.contrastive",
    "routing": "comoe.benchmarks.routing",
    "updates": "comoe.benchmarks.updates",
}
"""Word of the command line -> module with ``run(json_path, config=..., rounds=...)``."""


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="recipe (launch/configs/starter.yaml)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="timed rounds (more: steadier medians)"
    )
    given = parser.parse_args()

    # Its ranks must not outlive it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # A run from a checkout that is not installed must find comoe, also where the working folder is
    # another one.
    sys.path.append(str(HERE.parent))
    report = importlib.import_module(BENCHMARKS[given.benchmark]).run(
        given.json, config=given.config, rounds=given.rounds
    )
    if report.missed():
        print(f"\nmissed: {', '.join(report.missed())}")


if __name__ == "__main__":
    main()
