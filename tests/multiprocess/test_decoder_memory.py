"""The memory plan of a decoder-only model with LoRA experts against the peak of a process that trains it.

A small model here; any recipe's, such as smollm2, printed:

    python -m tests.multiprocess.test_decoder_memory launch/configs/smollm2.yaml data.root=<folder>
"""

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers_ranks import run_ranks

pytestmark = pytest.mark.multiprocess
STEPS = 3
LIKE_SMOLLM2 = dict(
    hidden_size=192, intermediate_size=512, num_hidden_layers=12, num_attention_heads=3, num_key_value_heads=1,
    max_position_embeddings=160, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=3,
)  # fmt: skip
"""A third of SmolLM2-135M's width, and two fifths of its layers."""


def held() -> int:
    """Bytes of this process that lie in no file."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(config: str, words: list[str], settings: str, home: str | None) -> dict[str, Any]:
    """The plan of a run, and the most that its first steps held beyond what the process held before it."""
    if home is not None:
        os.environ["COMOE_HOME"] = home
    from comoe.config.load import load_recipe
    from comoe.losses.objective import count_units, unit_scale
    from comoe.train.build import build_run
    from comoe.train.memory_plan import plan_run
    from comoe.train.parallel.ds_config import load_settings
    from comoe.train.parallel.setup import start_ranks

    device = start_ranks(timeout_seconds=600)
    recipe = load_recipe(config, words)
    before, most, done = held(), 0, Event()
    run = build_run(recipe, load_settings(settings), Path(recipe.run.output_dir), device=device)
    plan = plan_run(run.engine.recipe, run.layout, run.model, run.splits["train"], run.settings)

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held())
            time.sleep(0.002)

    watcher, tokens = Thread(target=watch), 0
    watcher.start()
    for step in range(STEPS):
        batches = [run.collator(run.splits["train"], rows) for rows in run.sampler.share(step, 0)]
        units = sum(count_units(batch, run.tasks) for batch in batches)
        scale = unit_scale(units, world_size=1, accumulation=len(batches))
        run.engine.train_step(
            [replace(batch, step=step, unit_scale_T=scale) for batch in batches], max_grad_norm=1.0
        )
        tokens = max(tokens, sum(batch.input_ids_BL.numel() for batch in batches))
    done.set()
    watcher.join()
    return {"plan": plan, "peak": most - before, "tokens": tokens}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_peak_of_training_is_within_15_percent_of_the_plan(tmp_path, dropout):
    from comoe.starter.registry import prepare

    source = prepare(["smoke:llama"], progress=False)["smoke:llama"]
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for file in source.glob("tokenizer*"):
        (encoder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    vocabulary = LlamaConfig.from_pretrained(source).vocab_size
    LlamaForCausalLM(LlamaConfig(**LIKE_SMOLLM2, vocab_size=vocabulary)).save_pretrained(encoder)
    words = [
        f"model.encoder={encoder}", f"run.output_dir={tmp_path}", f"model.moe.dropout={dropout}",
        "model.train_layers=none", "tasks.topic=null", "tasks.strength=null", "train.batch_size=192",
        "data.cache=false",
    ]  # fmt: skip
    (found,) = run_ranks(
        "tests.multiprocess.test_decoder_memory:measure", 1, config="launch/configs/lora_smoke.yaml", words=words,
        settings="zero2", home=os.environ.get("COMOE_HOME"),
    )  # fmt: skip
    assert found["peak"] == pytest.approx(found["plan"].device_bytes, rel=0.15), found


def main() -> None:
    """Print plan and peak of the recipe of the command line."""
    (found,) = run_ranks(
        "tests.multiprocess.test_decoder_memory:measure", 1, timeout=3000, config=sys.argv[1], words=sys.argv[2:],
        settings="zero2", home=os.environ.get("COMOE_HOME"),
    )  # fmt: skip
    plan, peak = found["plan"], found["peak"]
    print(*plan.lines(), sep="\n")
    print(
        f"  peak of {STEPS} steps {peak / 2**20:,.1f} MiB, {peak / plan.device_bytes:.3f} of the plan"
    )


if __name__ == "__main__":
    main()
