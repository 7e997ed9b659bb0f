"""Words of a lexicon over real ranks; a run with one, cut short and resumed, and its export."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from comoe.config.recipe import LossConfig
from comoe.distributed import sum_over_ranks, world_size
from comoe.inference.checkpoint_folder import CARD
from comoe.losses.objective import Objective, count_units, unit_scale
from comoe.tasks.lexicon import FILE, Lexicon
from tests.helpers_model import TASKS, moe_config, random_batch
from tests.helpers_ranks import run_ranks
from tests.multiprocess.sittings import lines_of, sit
from tests.unit.models.test_lexicon import model_of, told, told_weight

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_lexicon_ranks"
ROWS = list(range(12))
CUTS = (7, 11)
"""Seven rows against five; eleven against one without a word of the lexicon."""
SMALL = (
    "data.cache=false", "tasks.mentions=null", "tasks.stance=null", "tasks.aspects=null", "tasks.topic=null",
    "train.batch_size=16", "train.max_steps=8", "train.eval_every=8", "train.save_every=2", "run.histograms=false",
    "run.plots=false", "train.measure_experts=false", "model.dropout=0.1", "data.limit_per_task=64",
    "loss.lexicon_weight=0.5",
)  # fmt: skip
STOPPED_AT = 4


def both_cuts() -> list[dict[str, np.ndarray]]:
    dist.init_process_group("gloo")
    return [loss_and_gradients([ROWS[:cut], ROWS[cut:]]) for cut in CUTS]


def loss_and_gradients(shares: list[list[int]]) -> dict[str, np.ndarray]:
    """This rank's step on its share of one batch; every number averaged over ranks, as ZeRO does."""
    model = told_weight(model_of())
    torch.manual_seed(1)
    objective = Objective(model, TASKS, LossConfig(lexicon_weight=0.5), moe_config())
    whole = told(random_batch(rows=12))
    whole.lexicon_starts_BL[11] = False
    batch = whole.take(torch.tensor(shares[dist.get_rank() if len(shares) > 1 else 0]))
    units = sum_over_ranks(count_units(batch, TASKS))
    scale = unit_scale(units, world_size=world_size(), accumulation=1)
    step = objective(replace(batch, unit_scale_T=scale))
    step.loss.backward()
    numbers = {"loss": step.loss.detach(), **step.terms}
    numbers |= {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    return {name: (sum_over_ranks(value) / world_size()).numpy() for name, value in numbers.items()}


def test_two_uneven_ranks_equal_one_process_on_the_joined_batch():
    joined = loss_and_gradients([ROWS])
    assert joined["lexicon"] > 0 and joined["losses.lexicon.head.weight"].any()
    assert joined["model.lexicon.weight"].any()
    for answers in run_ranks(f"{HERE}:both_cuts", 2):
        for cut, answer in zip(CUTS, answers, strict=True):
            assert list(answer) == list(joined)
            for name, expected in joined.items():
                scale = max(abs(expected).max(), 1e-3)
                assert abs(answer[name] - expected).max() < 1e-5 * scale + 1e-8, (cut, name)


def test_a_resumed_run_equals_one_in_one_sitting_and_its_export_needs_no_file(tmp_path):
    words = "word,valence,length\ngood,2,4\nbad,-2,3\nthe,0,3\nfood,1,4\nwas,0.5,3\nslow,-1,4\n"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        (folder / "own.csv").write_text(words)
    sit(whole, overrides=[*SMALL, f"model.lexicon.path={whole}/own.csv"])
    sit(cut, overrides=[*SMALL, f"model.lexicon.path={cut}/own.csv"], stop_at=STOPPED_AT)
    (cut / "own.csv").write_text(words.replace("slow,-1", "slow,-2"))
    with pytest.raises(Exception, match=r"give the one that the run was begun with"):
        sit(cut, resume=True)
    (cut / "own.csv").write_text(words)
    sit(cut, resume=True)
    told_whole, told_cut = lines_of(whole), lines_of(cut)
    assert told_cut == told_whole and all(
        line["lexicon"] > 0 for line in told_whole if line["split"] == "train"
    )

    from comoe.inference.predictor import Predictor

    exports = [folder / "smoke" / "export" for folder in (whole, cut)]
    (whole / "own.csv").unlink()
    found = [
        Predictor.from_pretrained(export, device="cpu")(["good food", "the bad one"])
        for export in exports
    ]
    assert found[0] == found[1]
    assert Lexicon.load(exports[0]).numbers["slow"] == (-1.0, 4.0)
    names = {path.name for path in exports[0].iterdir()}
    assert {FILE, CARD} <= names and "own.csv" not in (exports[0] / "manifest.json").read_text()
    # The weights that were learned are not those of the start.
    weight = Predictor.from_pretrained(exports[0], device="cpu").exported.model.lexicon.weight
    assert weight.abs().max() > 0
