"""Make an export (a folder for `comoe predict` and for others) from any checkpoint of a run.

    comoe export --checkpoint runs/starter --output exported
    comoe export --checkpoint runs/starter/checkpoints/step-00000120 --output exported
    comoe export --checkpoint runs/smollm2 --output adapters --adapters

It needs one process and no DeepSpeed, whatever the ranks, EP and ZeRO stage of the run were.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import new_parser
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("export", __doc__)
    add = found.add_argument
    add("--checkpoint", required=True, type=Path, help="run folder, or one checkpoint of it")
    add("--which", default="best", help="best or last checkpoint of a run folder")
    add("--output", required=True, type=Path,
        help="folder to write; an older export there is replaced")
    add("--adapters", action="store_true",
        help="write LoRA experts as adapters of peft instead, a folder of some MB for each task (moe.form lora)")
    add("--no-verify", action="store_true",
        help="read the checkpoint without comparing its digests")
    # fmt: on
    add_plugins(found)
    return found


@guarded("export")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and export."""
    options = parser().parse_args(argv)

    from comoe.inference.adapters import checkpoint_adapters
    from comoe.inference.export import export_checkpoint

    make = checkpoint_adapters if options.adapters else export_checkpoint
    used = make(
        options.checkpoint, options.output, which=options.which, verify=not options.no_verify
    )
    print(f"{used.name} exported to {options.output}")
