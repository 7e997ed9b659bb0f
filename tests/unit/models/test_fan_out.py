"""Routing by task: layers below the first block run once per text, with the numbers of one pass per row."""

from dataclasses import replace

import pytest
import torch

from comoe.models.encoders.families import layers_of
from tests.helpers_model import (
    HF_CONFIGS,
    VARIANTS,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
    tiny_objective,
)

TEXTS, TASKS = [0, 0, 1, 2, 2, 2, 1], [0, 1, 2, 0, 3, 4, 4]
"""Text and task of each row; not sorted, and tags among them, which take a second pass for their views."""


def batches(texts=TEXTS):
    """The same rows, without and with the numbers of their texts."""
    whole = random_batch(rows=max(texts) + 1)
    batch = whole.take(torch.tensor(texts))
    batch = replace(
        scaled(batch), task_ids_B=torch.tensor(TASKS[: len(texts)]), row_ids_B=torch.tensor(texts)
    )
    return batch, replace(batch, text_numbers_B=7 - batch.row_ids_B)


def learned(batch, **options):
    torch.manual_seed(0)
    family, recompute = options.pop("family", "bert"), options.pop("recompute", False)
    objective = tiny_objective(moe_config(**options), family=family, recompute=recompute)
    seen: list[list[int]] = [[] for _ in layers_of(objective.model.encoder)]
    for layer, rows in zip(layers_of(objective.model.encoder), seen, strict=True):
        part = next(
            module
            for name, module in layer.named_modules()
            if "Norm" in type(module).__name__ and "block." not in name
        )
        part.register_forward_hook(
            lambda module, inputs, output, rows=rows: rows.append(len(output))
        )
    # Sums of gradients over other rows round otherwise: by up to 3e-6 in float32.
    objective.double()
    step = objective(batch)
    step.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    routings = [(routing.indices_Sk, routing.weights_Sk) for routing in step.output.routings]
    return (step.loss, dict(step.output.logits), routings, gradients), seen


@pytest.mark.parametrize("layers", [[0], [1, 2], [2]])
@pytest.mark.parametrize("family", HF_CONFIGS | VARIANTS)
def test_losses_routings_and_gradients_are_those_of_a_pass_per_row(family, layers):
    options = {"family": family, "layers": layers, "route_by": "both", "recompute": layers == [2]}
    (expected, all_rows), (found, rows) = (learned(batch, **options) for batch in batches())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    first = layers[0]
    assert all(set(counts) <= {7, 4} for counts in all_rows if counts)
    # Of seven rows three texts; in the second pass, for the views of the tags, as many.
    assert all(max(counts) == 3 for counts in rows[:first])
    assert all(max(counts) == 7 for counts in rows[first:])


@pytest.mark.parametrize("texts", [[0, 0, 0], [0, 1, 2], [0]])
@pytest.mark.parametrize(
    "family, num_experts", [*((family, 4) for family in HF_CONFIGS | VARIANTS), ("bert", 0)]
)
def test_one_text_no_repeated_text_and_no_block_at_all(texts, family, num_experts):
    options = {"route_by": "task", "layers": [1], "num_experts": num_experts}
    model = tiny_model(moe_config(**options), family=family).eval()
    outputs = [model(batch).logits for batch in batches(texts)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=0)


def test_rows_that_weigh_their_text_differently_run_one_by_one():
    from comoe.models.encoder_io import Texts

    batch = batches()[1]
    texts = (batch.input_ids_BL, batch.attention_mask_BL, None, batch.task_ids_B)
    weights_B = torch.linspace(0.1, 1.0, len(TEXTS))
    assert Texts(*texts, weights_B, batch.text_numbers_B).distinct()[1] is None
    read, fan_out = Texts(*texts, None, batch.text_numbers_B).distinct()
    torch.testing.assert_close(read.ids_BL[fan_out.texts_B], batch.input_ids_BL)
    assert len(read.ids_BL) == fan_out.num_texts == 3
