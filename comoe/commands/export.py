"""Make an export (a folder for `comoe predict` and for others) from any checkpoint of a run.

    comoe export --checkpoint runs/starter --output exported
    comoe export --checkpoint runs/starter/checkpoints/step-00000120 --output exported
    comoe export --checkpoint runs/smollm2 --output adapters --adapters
    comoe export --checkpoint runs/smollm2 --output merged --merged
    comoe export --checkpoint runs/starter/export --output exported --format onnx --int8

It needs one process and no DeepSpeed, whatever the ranks, EP and ZeRO stage of the run were.
--format onnx adds an ONNX file for `--backend onnx` of the other commands.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import need_extra, new_parser
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("export", __doc__)
    add = found.add_argument
    add("--checkpoint", required=True, type=Path,
        help="run folder, or one checkpoint of it; with --merged and --format onnx also an export")
    add("--which", default="best", help="best or last checkpoint of a run folder")
    add("--output", required=True, type=Path,
        help="folder to write; an older export there is replaced")
    add("--adapters", action="store_true",
        help="write LoRA experts as adapters of peft instead, a folder of some MB for each task (moe.form lora)")
    add("--merged", action="store_true",
        help="write the model with its LoRA experts merged instead, a folder for each task that transformers loads")
    add("--format", choices=("safetensors", "onnx"), default="safetensors",
        help="onnx: with an ONNX file beside the weights (pip install \"comoe[onnx]\")")
    add("--int8", action="store_true", help="onnx: 8-bit weights, a quarter of the size")
    add("--no-verify", action="store_true",
        help="read the checkpoint without comparing its digests")
    # fmt: on
    add_plugins(found)
    return found


@guarded("export")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and export."""
    options = parser().parse_args(argv)

    verify, source = not options.no_verify, options.checkpoint
    if options.adapters and options.merged:
        raise ValueError(
            "--adapters and --merged are two forms of the same experts; give one of them."
        )
    if (options.adapters or options.merged) and options.format == "onnx":
        raise ValueError(
            "--adapters are files of peft and --merged those of transformers; leave out --format onnx."
        )
    if options.int8 and options.format != "onnx":
        raise ValueError("--int8 wants --format onnx.")
    if options.format == "onnx":
        need_extra("onnx", "export --format onnx")

    from comoe.inference.adapters import checkpoint_adapters
    from comoe.inference.export import export_checkpoint
    from comoe.inference.merged import checkpoint_merged

    make, done = export_checkpoint, []
    if options.adapters or options.merged:
        make = checkpoint_adapters if options.adapters else checkpoint_merged
    if options.format != "onnx" or not (source / "config.json").is_file():
        used = make(source, options.output, which=options.which, verify=verify)
        done, source = [f"{used.name} exported to {options.output}"], options.output
    if options.format == "onnx":
        from comoe.inference.onnx_export import add_onnx

        found = add_onnx(source, options.output, int8=options.int8, verify=verify)
        done.append(f"{options.output / 'model.onnx'}: {found}")
    print("\n".join(done))
