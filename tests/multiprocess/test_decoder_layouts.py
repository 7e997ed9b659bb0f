"""Decoders over ranks: T5 with one table of words, Flan-T5 with an output layer of its own, BART; Llama with LoRA.

A few layouts here; the figures of all of them, printed:

    python -m tests.multiprocess.test_decoder_layouts
"""

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers_ranks import run_ranks
from tests.multiprocess.decoder_workers import SAVED_AFTER, SERVED, make_models

pytestmark = pytest.mark.multiprocess
CASES: list[dict[str, Any]] = [
    {"family": "t5", "stage": 2, "ep": 1, "name": "t5-2"},
    # Split while it is read, recomputed layer by layer, output layer apart: what could be lost
    # would be lost here.
    {"family": "flan", "stage": 3, "ep": 2, "recompute": True, "name": "flan-3"},
    {"family": "bart", "stage": 1, "ep": 2},
    # Decoder-only, frozen, with LoRA experts.
    {"family": "llama", "stage": 3, "ep": 1, "recompute": True, "name": "llama-3"},
    {"family": "llama", "stage": 2, "ep": 1},
]
"""On two ranks, of which the second has no row for the decoder; with a name: saved, resumed, and
gone on with by one rank."""
STEPS = 3
"""Of the few layouts."""
TOLERANCE = 1e-5
"""Of losses relative, of weights and logits absolute."""


def run(work: str, ranks: int, **arguments: Any) -> list[Any]:
    return run_ranks(f"tests.multiprocess.decoder_workers:{work}", ranks, **arguments)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def on_two(models, folder) -> list[dict[str, Any]]:
    return run("cells", 2, models=models, cases=CASES, folder=folder, steps=STEPS)[0]


@pytest.fixture(scope="module")
def on_one(models, folder, on_two) -> dict[str, Any]:
    moved = tuple(case["name"] for case in CASES if "name" in case)
    return run(
        "plain_and_one_rank", 1, models=models, cases=[], folder=folder, moved=moved, steps=STEPS
    )[0]


def off_in_losses(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))


def off_in_weights(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() >= expected.keys()
    return max(float(np.abs(found[name].numpy() - value).max()) for name, value in expected.items())


def test_losses_and_weights_agree_with_one_process(on_two, on_one):
    for case, answer in zip(CASES, on_two, strict=True):
        plain = on_one["plain"][case["family"]]
        assert answer["ep"] == case["ep"]
        assert off_in_losses(answer["losses"], plain["losses"]) <= TOLERANCE, case
        assert off_in_weights(answer["state"], plain["state"]) <= TOLERANCE, case


def test_tied_weights_are_gathered_once_and_others_under_their_own_name(on_two):
    for case, answer in zip(CASES, on_two, strict=True):
        words = {name for name, value in answer["state"].items() if value.shape == (60, 16)}
        expected = {"t5": {"encoder.shared.weight"}, "bart": {"encoder.model.shared.weight"}}
        expected["llama"] = {"encoder.model.embed_tokens.weight"}
        expected["flan"] = {"encoder.shared.weight", "encoder.lm_head.weight"}
        assert words == expected[case["family"]], case


def test_scores_and_texts_of_the_ranks_are_those_of_the_exports_model(on_two):
    """Greedy and with three beams, each rank ending when it likes; the second has nothing to write."""
    for case, answer in zip(CASES, on_two, strict=True):
        expected = answer["alone"]
        for name, logits in expected.items():
            found = answer["engine"][name]
            if name.endswith("/ids"):
                # Ranks write as long as the longest of them; behind an end token all is -1.
                width = max(found.shape[1], logits.shape[1])
                found, logits = (
                    np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=-1)
                    for ids in (found, logits)
                )
            np.testing.assert_allclose(found, logits, atol=TOLERANCE, rtol=0, err_msg=str(case))
        # Random weights may say the same of every post; those of the BART do not.
        written = expected["reason/ids"][np.array(SERVED) == 4]
        assert (written[:, 0] >= 0).all()
        assert case["family"] != "bart" or len({*map(tuple, written)}) == 2


def test_a_resumed_run_equals_an_uninterrupted_one(on_two):
    resumed = [answer for answer in on_two if answer["name"]]
    assert len(resumed) == 3
    for answer in resumed:
        assert answer["resumed"] == answer["losses"][SAVED_AFTER:]


def test_a_run_moves_from_two_ranks_to_one(on_two, on_one):
    by_name = {answer["name"]: answer for answer in on_two}
    assert len(on_one["cells"]) == 3
    for answer in on_one["cells"]:
        expected = by_name[answer["name"]]["losses"][SAVED_AFTER:]
        assert off_in_losses(answer["losses"], expected) <= TOLERANCE, answer["name"]


def main() -> None:
    """Print the largest deviation of every layout from the one process."""
    with tempfile.TemporaryDirectory() as place:
        models = make_models(Path(place))
        plain = run("plain_and_one_rank", 1, models=models, cases=[])[0]["plain"]
        for world, eps in {1: (1,), 2: (1, 2), 4: (2, 4)}.items():
            cases = [
                {"family": family, "stage": stage, "ep": ep, "recompute": stage == 3}
                for family, ep, stage in product(models, eps, (1, 2, 3))
                if ep == 1 or family != "llama"
            ]
            found = run("cells", world, models=models, cases=cases, timeout=900)[0]
            for case, answer in zip(cases, found, strict=True):
                family = case["family"]
                alone = answer["alone"].items()
                logits = max(
                    float(np.abs(answer["engine"][name] - value).max()) for name, value in alone
                )
                print(
                    f"({world}, {case['ep']}) ZeRO {case['stage']} {family:<5}"
                    f"losses {off_in_losses(answer['losses'], plain[family]['losses']):.1e}  "
                    f"weights {off_in_weights(answer['state'], plain[family]['state']):.1e}  logits {logits:.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
