"""Make an export (a folder for launch/predict.py and for others) from any checkpoint of a run.

    python launch/export.py --checkpoint runs/starter --output exported
    python launch/export.py --checkpoint runs/starter/checkpoints/step-00000120 --output exported

It needs one process and no DeepSpeed, whatever the ranks, EP and ZeRO stage of the run were.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

# An installed comoe comes first; without one, the package beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Read the command line and export."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="run folder, or one checkpoint of it")
    add("--which", default="best", help="best or last checkpoint of a run folder")
    add("--output", required=True, type=Path,
        help="folder to write; an older export there is replaced")
    # fmt: on
    options = parser.parse_args()

    from comoe.inference.export import export_checkpoint

    try:
        used = export_checkpoint(options.checkpoint, options.output, which=options.which)
    except (ValueError, OSError) as error:
        sys.exit(f"export: {error}")
    print(f"{used.name} exported to {options.output}")


if __name__ == "__main__":
    main()
