"""How much memory one rank takes until a ZeRO-3 run has its encoder in shares: split as it is read, or split after it.

Counted is anonymous memory (RssAnon in /proc/self/status), which is the process's own: not the
pages of the mapped weights file, which the ranks of a machine share and the kernel may drop. The
most of a sample every two milliseconds, less what the process held before. Split after reading, the
ranks other than 0 hold the whole: what rank 0 sends them overwrites the pages of the file. (A GPU
has no such file: there every rank holds the whole then.) By hand, with the 355-million-parameter
RoBERTa shape (random weights, no download):

    python -m tests.multiprocess.test_construction_memory --world 1,2,4
"""

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel

from comoe.train.memory_plan import kept_whole
from tests.helpers_model import HF_CONFIGS
from tests.helpers_ranks import run_ranks
from tests.multiprocess import workers
from tests.multiprocess.test_memory_measured import LARGE, SMALL, look_before, make_encoder

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc"),
]

MIDDLE = {"vocab_size": 2000, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 4,
          "intermediate_size": 1536, "max_position_embeddings": 64, "type_vocab_size": 1}  # fmt: skip
BOUNDS = ((10_000, 200_000), (100_000, 10_000), (100_000, 200_000))
"""(``stage3_max_live_parameters``, ``stage3_max_reuse_distance``)."""
WAYS = ("while", "after")
"""Splitting while reading, as ``building`` makes it, or after it, as DeepSpeed does by itself; the
second leaves memory behind that the first would use again."""


class Watch:
    """The most anonymous memory since the start, sampled by a thread."""

    def __init__(self) -> None:
        gc.collect()
        self.start, self.most, self.over = anonymous_bytes(), 0, False
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.over:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.002)

    def stop(self) -> int:
        self.over = True
        self.thread.join()
        return max(self.most, anonymous_bytes()) - self.start


def anonymous_bytes() -> int:
    fields = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


def construct(encoder: str, *, ways: Sequence[str], experts: int) -> list[dict[str, Any]]:
    """For each way build the objective and split its weights: bytes beyond what was there before, most and last."""
    import deepspeed

    from comoe.distributed import world_size
    from comoe.losses.build import build_objective
    from comoe.train.parallel.ds_config import fill_settings, plan_layout
    from comoe.train.parallel.setup import building, start_ranks

    start_ranks(timeout_seconds=600)
    recipe = workers.recipe_of(encoder, model__moe__num_experts=experts)
    raw = {"zero_optimization": {"stage": 3}}
    layout = plan_layout(recipe, raw, world_size=world_size(), gpu=False)
    filled = fill_settings(raw, recipe, layout, gpu=False)

    def build(recipe: Any, way: str) -> Any:
        with building(filled) if way == "while" else nullcontext():
            objective = build_objective(recipe, workers.TASKS)
        # What deepspeed.initialize does to what is not split yet.
        deepspeed.zero.Init(module=objective, config_dict_or_path=filled)
        return objective

    answers = []
    for way in ways:
        # The first use of the libraries takes memory of its own.
        build(workers.recipe_of(str(Path(encoder) / "first"), model__moe__num_experts=4), way)
        watch, began = Watch(), time.monotonic()
        objective = build(recipe, way)
        sizes = [weight.ds_numel * 4 for weight in objective.model.encoder.parameters()]
        answers.append({
            "most": watch.stop(), "held": anonymous_bytes() - watch.start, "seconds": time.monotonic() - began,
            "encoder": sum(sizes), "largest": max(sizes),
        })  # fmt: skip
        del objective
    return answers


def make_encoders(folder: Path, shape: dict[str, int]) -> str:
    workers.make_encoder(folder / "first")
    make_encoder(folder / "small", **SMALL)
    return make_encoder(folder, **shape)


def in_one_world(encoder: str, checkpoints: dict[str, str], broken: str) -> dict[str, Any]:
    return {
        "measured": dict(zip(WAYS, construct(encoder, ways=WAYS, experts=0), strict=True)),
        "same": {name: reads_the_same(path) for name, path in checkpoints.items()},
        "refused": refusal(broken),
        "kept": {pair: kept(str(Path(encoder) / "small"), *pair) for pair in BOUNDS},
    }


def reads_the_same(encoder: str) -> dict[str, Any]:
    """Whether the encoder split as it is read has the ordinary one's weights and buffers, and the share it holds."""
    import deepspeed

    from comoe.models.encoders.build import build_encoder
    from comoe.train.parallel.setup import building

    config = workers.recipe_of(encoder).model
    ordinary = build_encoder(config)
    with building({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}):
        split = build_encoder(config)
    weights = dict(split.named_parameters())
    held = sum(weight.ds_tensor.numel() for weight in weights.values()) / sum(
        w.numel() for w in ordinary.parameters()
    )
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        pairs = [(weights.pop(name), weight) for name, weight in ordinary.named_parameters()]
        pairs += list(zip(split.buffers(), ordinary.buffers(), strict=True))
        same = all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    return {"same": same and not weights, "held": held, "tensors": len(pairs)}


def refusal(encoder: str) -> str:
    from comoe.models.encoders.build import build_encoder
    from comoe.train.parallel.setup import building

    with (
        pytest.raises(ValueError, match="has no weights for") as error,
        building({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}),
    ):
        build_encoder(workers.recipe_of(encoder).model)
    return str(error.value)


def kept(encoder: str, live: int, reuse: int) -> int:
    """Weights that are whole on this rank when the backward pass begins."""
    bounds = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
    small = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20_000}
    engine, _ = workers.build(
        workers.recipe_of(encoder),
        stage=3,
        settings={"zero_optimization": {"stage": 3, **small, **bounds}},
    )
    whole: list[int] = []

    def look() -> None:
        whole.append(sum(parameter.data.numel() for parameter in engine.objective.parameters()))

    look_before(engine.deepspeed, "backward", look)
    for step in range(2):
        # In its first step stage 3 learns the order of the layers.
        workers.one_step(engine, step)
    return whole[-1]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(2)
    # Hub checkpoints often hold a whole language model, its encoder under a prefix, in several
    # files.
    checkpoints = {"a language model in pieces": str(folder / "pieces")}
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder / "pieces", max_shard_size="30KB")
    assert len(list((folder / "pieces").glob("*.safetensors"))) > 1
    for family, config in HF_CONFIGS.items():
        checkpoints[family] = str(folder / family)
        AutoModel.from_config(config).save_pretrained(checkpoints[family])
    broken = BertModel(BertConfig(**shape))
    state = broken.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    broken.save_pretrained(folder / "broken", state_dict=state)
    work = {
        "encoder": make_encoders(folder, MIDDLE),
        "checkpoints": checkpoints,
        "broken": str(folder / "broken"),
    }
    return run_ranks("tests.multiprocess.test_construction_memory:in_one_world", 2, **work)


@pytest.fixture(scope="module")
def built(answers) -> dict[str, list[dict[str, Any]]]:
    return {way: [answer["measured"][way] for answer in answers] for way in WAYS}


def test_an_encoder_split_while_it_is_read_has_the_weights_of_its_files(answers):
    for name, found in [pair for answer in answers for pair in answer["same"].items()]:
        assert found["same"] and found["tensors"] > 20, (name, found)
        assert 0.5 <= found["held"] < 0.51, (name, found)


def test_the_larger_of_live_weights_and_half_the_reuse_distance_stays_whole_between_the_passes(
    answers,
):
    for (live, reuse), found in [pair for answer in answers for pair in answer["kept"].items()]:
        expected = kept_whole(
            {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
        )
        assert found == pytest.approx(expected, rel=0.2), (live, reuse)


def test_a_file_that_lacks_a_weight_is_refused_on_every_rank(answers):
    assert all("encoder.layer.1.output.dense.weight" in answer["refused"] for answer in answers)


def test_no_rank_holds_the_whole_encoder_while_it_is_read(built):
    for answer in built["while"]:
        # Its half, the largest tensor whole and on its way to the other rank, and a little for
        # modules.
        allowed = answer["encoder"] / 2 + 2 * answer["largest"] + 0.1 * answer["encoder"]
        assert answer["most"] < allowed < 0.75 * answer["encoder"], answer
        assert answer["most"] > 0.45 * answer["encoder"], answer


def test_the_measure_sees_a_rank_that_holds_the_whole(built):
    assert built["after"][1]["most"] > 0.95 * built["after"][1]["encoder"]


def main() -> None:
    """Measure the 355M shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", default="1,2,4")
    parser.add_argument("--experts", type=int, default=0)
    given = parser.parse_args()
    print(
        f"{'W':>3} {'split':>7}  MiB of each rank: at most | in the end | of a whole encoder | seconds"
    )
    for world in map(int, given.world.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            encoder = make_encoders(Path(folder), LARGE)
            ways = {
                way: run_ranks(f"{__spec__.name}:construct", world, timeout=1200, encoder=encoder, ways=[way],
                               experts=given.experts)
                for way in WAYS
            }  # fmt: skip
        for way, ranks in ((way, [rank[0] for rank in ranks]) for way, ranks in ways.items()):
            cells = [
                ", ".join(f"{rank[key] / 2**20:.0f}" for rank in ranks) for key in ("most", "held")
            ]
            cells += [
                f"{ranks[0]['encoder'] / 2**20:.0f}",
                f"{max(rank['seconds'] for rank in ranks):.0f}",
            ]
            print(f"{world:>3} {way:>7}  {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
