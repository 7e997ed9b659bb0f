"""GradCache: the gradient of the large batch in the memory of a small one, dropout, routing and two views included."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import ContrastiveConfig, LossConfig
from comoe.losses.contrastive.gradcache import concatenated
from comoe.losses.objective import Objective, count_units, unit_scale
from comoe.types import IGNORED, Batch
from tests.helpers_model import (
    HEAT,
    MOOD,
    SIGNS,
    TOPIC,
    WORDS,
    cut,
    moe_config,
    random_batch,
    tiny_objective,
)

TASKS = tuple(replace(task, contrastive=True) for task in (MOOD, TOPIC, HEAT, WORDS, SIGNS))
LOSS = LossConfig(contrastive=ContrastiveConfig(weight=0.7, learn_temperature=True, chunk_size=3))
ROWS = 12


def some_missing(batch: Batch) -> Batch:
    batch.labels["mood"][::3] = IGNORED
    batch.labels["words"][:7] = IGNORED
    return batch


def chunks_of(batch: Batch, size: int) -> list[Batch]:
    return cut(batch, [list(range(at, at + size)) for at in range(0, ROWS, size)], TASKS)


def cached_step(
    objective: Objective, batches: Sequence[Batch]
) -> tuple[float, dict[str, torch.Tensor], list]:
    """What the engine does, by PyTorch alone: (loss, gradients, outputs of the second pass)."""
    objective.zero_grad()
    objective.begin_step()
    with torch.random.fork_rng([]), torch.no_grad():
        passes = [objective(batch, mode="embed") for batch in batches]
    outputs = []
    for batch, cached in zip(batches, objective.contrast(batches, passes), strict=True):
        outputs.append(objective(batch, cached=cached))
        (outputs[-1].loss / len(batches)).backward()
    loss = sum(float(output.loss.detach()) for output in outputs) / len(batches)
    grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
    return loss, grads, [passes, outputs]


WIDER = replace(LOSS, contrastive=replace(LOSS.contrastive, views=2, negatives="all"))


@pytest.mark.parametrize(
    "size, route_by, loss",
    [
        *((size, "token", LOSS) for size in (2, 3, 6)),
        *((size, "task", LOSS) for size in (2, 3, 6)),
        (3, "token", WIDER),
        (3, "task", WIDER),
    ],
)
def test_chunks_give_the_loss_and_the_gradient_of_the_large_batch(size, route_by, loss):
    batch = some_missing(random_batch(rows=ROWS, tasks=TASKS))
    objective = tiny_objective(moe_config(route_by=route_by), tasks=TASKS, loss=loss).train()
    whole = objective(chunks_of(batch, ROWS)[0])
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
    assert whole.terms["contrastive"] > 0.1
    # Without the cache small batches have another loss: this test can fail.
    alone = [float(objective(part).terms["contrastive"]) for part in chunks_of(batch, size)]
    assert abs(sum(alone) / len(alone) - float(whole.terms["contrastive"])) > 0.05
    loss, grads, (_, outputs) = cached_step(objective, chunks_of(batch, size))
    assert loss == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    for output in outputs:
        torch.testing.assert_close(output.terms["contrastive"], whole.terms["contrastive"])
    for name, value in expected.items():
        torch.testing.assert_close(
            grads[name], value, rtol=1e-4, atol=1e-5 * float(value.norm()) + 1e-9, msg=name
        )


def test_the_second_pass_repeats_dropout_and_routing_of_the_first_and_counts_loads_once():
    batch = some_missing(random_batch(rows=ROWS, tasks=TASKS))
    objective = tiny_objective(tasks=TASKS, loss=LOSS, dropout=0.3).train()
    _, _, (passes, outputs) = cached_step(objective, chunks_of(batch, 3))
    for first, output in zip(passes, outputs, strict=True):
        for name, embeddings in first[0].embeddings.items():
            torch.testing.assert_close(output.output.embeddings[name].detach(), embeddings)
        torch.testing.assert_close(output.output.views["words"].detach(), first[0].views["words"])
        for before_Sk, after in zip(first[0].selected, output.output.routings, strict=True):
            assert torch.equal(before_Sk, after.indices_Sk)
    # The engine takes the loads from these outputs: each real token once per layer, k routes each.
    tokens = int(batch.attention_mask_BL.sum())
    for layer in range(3):
        assert (
            sum(int(output.output.routings[layer].counts_E.sum()) for output in outputs)
            == 2 * tokens
        )
    # Two views of one post differ under dropout.
    first = passes[-1][0]
    labelled = first.views["words"].norm(dim=1) > 0
    assert labelled.any()
    assert not torch.allclose(first.views["words"][labelled], first.embeddings["words"][labelled])


def test_the_first_pass_keeps_embeddings_and_picks_alone():
    """They are kept for the whole step: states, logits or pictures would be what the cache is there to save."""
    objective = tiny_objective(tasks=TASKS, loss=LOSS).train()
    batch = chunks_of(random_batch(rows=ROWS, tasks=TASKS), ROWS)[0]
    with torch.no_grad():
        answers = objective(batch, mode="embed")
    tokens = int(batch.attention_mask_BL.sum())
    for answer in answers:
        held = [
            *answer.embeddings.values(),
            *answer.views.values(),
            *answer.selected,
            answer.token_rows_S,
        ]
        assert sum(tensor.numel() for tensor in answer.selected) == 3 * 2 * tokens
        assert (
            sum(tensor.numel() for tensor in held[: -len(answer.selected) - 1])
            <= (len(TASKS) + 1) * ROWS * 8
        )
        assert not answer.logits
        assert not answer.routings
        assert answer.image_text is None
        assert not answer.attentions


def test_a_near_tie_between_experts_is_not_decided_another_way():
    batch = random_batch(rows=ROWS, tasks=TASKS)
    objective = tiny_objective(tasks=TASKS, loss=LOSS).train()
    batches = chunks_of(batch, 6)
    with torch.no_grad():
        passes = [objective(part, mode="embed") for part in batches]
    cached = objective.contrast(batches, passes)
    for layer in objective.model.moe_layers():
        layer.mixture.gate.e_score_correction_bias += torch.tensor([9.0, -9.0, 9.0, -9.0])
    moved = objective(batches[0]).output.routings[0].indices_Sk
    replayed = objective(batches[0], cached=cached[0]).output.routings[0].indices_Sk
    assert torch.equal(replayed, passes[0][0].selected[0]) and not torch.equal(replayed, moved)


def test_a_micro_batch_without_posts_takes_part():
    batch = random_batch(rows=3, tasks=TASKS)
    objective = tiny_objective(tasks=TASKS, loss=LOSS).train()
    filler = random_batch(rows=1, tasks=TASKS, labelled=False)
    filler = replace(filler, row_ids_B=torch.tensor([-1]), task_ids_B=torch.tensor([-1]))
    units = count_units(batch, TASKS)
    pair = [
        replace(part, unit_scale_T=unit_scale(units, world_size=1, accumulation=2))
        for part in (batch, filler)
    ]
    loss, grads, _ = cached_step(objective, pair)
    alone, expected, _ = cached_step(
        objective, [replace(batch, unit_scale_T=pair[0].unit_scale_T / 2)]
    )
    assert loss == pytest.approx(alone, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6)


def test_tags_of_different_lengths_are_joined():
    parts = [random_batch(rows=2, length=length, tasks=TASKS) for length in (5, 9)]
    joined = concatenated(parts)
    assert joined.labels["words"].shape == (4, 9)
    assert (joined.labels["words"][:2, 5:] == IGNORED).all()
    assert joined.row_ids_B.tolist() == [0, 1, 0, 1]


class Holder:
    tensor: torch.Tensor


class SavedBytes:
    """Most bytes that autograd held at one time for a backward pass."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor):
        holder = Holder()
        # Detached: a saved answer would hold its own graph for ever.
        holder.tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._less, size)
        return holder

    def _less(self, size: int) -> None:
        self.now -= size

    def watching(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda holder: holder.tensor)


def test_a_batch_four_times_as_large_fits_in_the_same_memory():
    objective = tiny_objective(tasks=TASKS, loss=LOSS).train()
    small = chunks_of(random_batch(rows=ROWS, tasks=TASKS), ROWS)[0]
    plain, cached, large = SavedBytes(), SavedBytes(), SavedBytes()
    with plain.watching():
        objective(small).loss.backward()
    parts = [replace(small, row_ids_B=small.row_ids_B + ROWS * number) for number in range(4)]
    with cached.watching():
        cached_step(objective, parts)
    joined = replace(
        concatenated(parts),
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("input_ids_BL", "attention_mask_BL", "word_starts_BL")
        },
    )
    with large.watching():
        objective(joined).loss.backward()
    gc.collect()
    assert plain.now == cached.now == large.now == 0
    assert large.peak > 3.5 * plain.peak
    assert cached.peak < 1.05 * plain.peak
