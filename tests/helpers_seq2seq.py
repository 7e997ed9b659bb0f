"""Tiny encoder-decoders, and batches for the tasks that their decoder answers."""

from __future__ import annotations

from dataclasses import replace

import torch

from comoe.config.recipe import ContrastiveConfig, LossConfig, ModelConfig, MoeConfig
from comoe.losses.objective import Objective
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder_from_config
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch
from tests.helpers_model import HEAT, MOOD, SEQ2SEQ, VOCABULARY, moe_config

OPINION = Task(
    "opinion", "text", (), "token_f1", prompt="opinion of {text}", max_answer_length=7, num_beams=1
)
REASON = Task(
    "reason", "text", (), "token_f1", prompt="reason of {text}", max_answer_length=5, num_beams=3
)
POLARITY = Task(
    "polarity", "label_words", ("bad", "fair", "good"), "accuracy",
    prompt="polarity of {text}", label_words=("bad", "so so", "good"),
)  # fmt: skip
DECODED = (POLARITY, OPINION, REASON)
MIXED = (MOOD, POLARITY, HEAT, OPINION, REASON)
"""Tasks of heads and of the decoder."""
END = {"t5": 1, "mt5": 1, "umt5": 1, "bart": 2, "mbart": 2}
OFF = LossConfig(contrastive=ContrastiveConfig(weight=0.0))


def decoder_config(family: str, **changes) -> dict:
    return SEQ2SEQ[family].to_dict() | changes


def whole_model(family: str = "t5", seed: int = 0, **changes):
    """The library's own model, without experts."""
    torch.manual_seed(seed)
    return build_encoder_from_config(decoder_config(family, **changes), dropout=0.0, generates=True)


def decoder_model(
    family: str = "t5",
    moe: MoeConfig | None = None,
    *,
    tasks=MIXED,
    seed=0,
    recompute=False,
    dropout=0.0,
    **options,
) -> MultiTaskModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        dropout=dropout, projection_width=8, moe=moe_config() if moe is None else moe, **options
    )
    return build_model(config, tasks, encoder_config=decoder_config(family), recompute=recompute)


def decoder_objective(
    family: str = "t5",
    moe: MoeConfig | None = None,
    *,
    tasks=MIXED,
    loss: LossConfig = OFF,
    **options,
) -> Objective:
    moe = moe_config() if moe is None else moe
    return Objective(decoder_model(family, moe, tasks=tasks, **options), tasks, loss, moe)


def words(number: int, family: str) -> list[int]:
    """Tokens of a label, end token included."""
    return [*range(10 + 3 * number, 11 + 3 * number + number % 2), END[family]]


def decoder_batch(
    rows=8, length=9, *, tasks=MIXED, family="t5", seed=0, served=None, labelled=True
) -> Batch:
    """Rows for all tasks with heads (-1) and for one that the decoder answers, in turn unless ``served`` says which."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [number for number, task in enumerate(tasks) if task.mode == "decoder"]
    turns = ([-1] if len(numbers) < len(tasks) else []) + numbers
    served = [turns[row % len(turns)] for row in range(rows)] if served is None else served
    rows = len(served)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    padding = SEQ2SEQ[family].pad_token_id
    ids = (
        torch.randint(5, VOCABULARY, (rows, length), generator=generator) * mask
        + (1 - mask) * padding
    )
    choices = {task.name: ragged([words(label, family) for label in range(len(task.labels))])
               for task in tasks if task.label_words}  # fmt: skip
    answers, labels = [[] for _ in served], {}
    for number, task in enumerate(tasks):
        mine = [
            row
            for row, one in enumerate(served)
            if labelled and one in (number, -1 * (task.mode != "decoder"))
        ]
        if task.label_words or task.rules.exclusive:
            drawn = torch.randint(0, len(task.labels), (rows,), generator=generator)
            labels[task.name] = torch.full((rows,), IGNORED).index_copy(
                0, torch.tensor(mine).long(), drawn[mine]
            )
            for row in mine if task.label_words else ():
                answers[row] = words(int(drawn[row]), family)
        elif task.mode == "decoder":
            labels[task.name] = torch.full((rows,), IGNORED)
            for row in mine:
                count = int(torch.randint(1, 6, (), generator=generator))
                answers[row] = [
                    *torch.randint(5, VOCABULARY, (count,), generator=generator).tolist(),
                    END[family],
                ]
                labels[task.name][row] = count + 1
        else:
            values = torch.randn(rows, generator=generator)
            labels[task.name] = torch.full((rows,), torch.nan).index_copy(
                0, torch.tensor(mine).long(), values[mine]
            )
    return Batch(
        ids, mask, None, mask.bool(), torch.tensor(served), torch.arange(rows), labels,
        target_ids_BD=ragged(answers), choices=choices,
    )  # fmt: skip


def ragged(rows) -> torch.Tensor:
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows])


def filler(batch: Batch) -> Batch:
    """One row that only gives a rank something to run."""
    one = batch.take(torch.tensor([0]))
    labels = {
        name: torch.full_like(value, torch.nan if value.is_floating_point() else IGNORED)
        for name, value in one.labels.items()
    }
    return replace(
        one, labels=labels, target_ids_BD=torch.full_like(one.target_ids_BD, IGNORED), row_ids_B=torch.tensor([-1]),
        task_ids_B=torch.tensor([-1]),
    )  # fmt: skip
