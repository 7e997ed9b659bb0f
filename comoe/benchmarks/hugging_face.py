"""The reference of ``comoe bench train``: a dense encoder under Hugging Face's Trainer with DeepSpeed ZeRO-2.

The trainer runs one step at a time: it blocks at the end of each step until its next turn.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from comoe.config.recipe import Recipe
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import world_size


class _Hold(TrainerCallback):
    def __init__(self, owner: HeldTrainer) -> None:
        self.owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.owner.hold(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.owner.hold(control)


class HeldTrainer:
    """Runs the trainer's own loop, with its loader, collator and callbacks, in a thread.

    Only one of main thread and trainer runs at any time, so two of them can alternate in one
    process.

    Args:
        trainer: ready to train, with more steps than are timed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        trainer.add_callback(_Hold(self))
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()
        self._wait()

    def step(self) -> None:
        """One whole training step: batch, forward, backward, optimizer.

        Raises:
            RuntimeError: the trainer failed or has ended.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the trainer has ended; give it more steps")
        self._go.release()
        self._wait()

    def stop(self) -> None:
        """Let the loop end."""
        self._stopping = True
        self._go.release()
        self._thread.join(timeout=60)

    def hold(self, control: Any) -> None:
        """Called in the trainer's thread at the end of a step."""
        self._done.release()
        self._go.acquire()
        control.should_training_stop = self._stopping

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:  # noqa: B902 - handed to the main thread, which waits for it
            self._error = error
        finally:
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError(f"the trainer failed: {self._error}") from self._error


STRATEGIES = {"hf": "random", "hf grouped": "group_by_length"}
"""Contestant -> ``train_sampling_strategy``; random is the Trainer's default."""

BASE = {"vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}  # fmt: skip
"""A BERT of 125 million parameters, the size of roberta-base."""

STEPS = 100_000
"""More than any benchmark runs: the loop is stopped from outside."""


class PostDataset(Dataset):
    """The tokenized posts that comoe trains on; the task is the data set of a post."""

    def __init__(self, split: TokenizedSplit) -> None:
        self.split = split
        self.labels = split.groups.tolist()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.split.rows([index])
        ids = row.input_ids.tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}


class CountingCollator:
    """The Trainer's default collator, which pads to the longest post of the batch; counts tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.collate = DataCollatorWithPadding(tokenizer)
        self.counts: list[tuple[int, int]] = []

    def __call__(self, posts: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(posts)
        self.counts.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch


class ReferenceTrainer:
    """One trainer that runs step by step, with its token counts.

    Args:
        recipe: its encoder is a folder with the tokenizer of ``split``; batch size, learning rate
            and clipping are the same.
        split: training posts.
        folder: output of the Trainer.
        device: of this rank.
        strategy: ``train_sampling_strategy``.
        bf16: bfloat16 as comoe's run has it.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: TokenizedSplit,
        *,
        folder: Path,
        device: torch.device,
        strategy: str,
        bf16: bool,
    ) -> None:
        gpu = device.type == "cuda"
        model = AutoModelForSequenceClassification.from_pretrained(
            recipe.model.encoder, num_labels=int(split.groups.max()) + 1, dtype=torch.float32
        )
        arguments = TrainingArguments(
            output_dir=str(folder / "hf"),
            per_device_train_batch_size=-(-recipe.train.batch_size // world_size()),
            max_steps=STEPS,
            learning_rate=recipe.train.learning_rate,
            # As ``fill_settings`` has it; nothing here is an outlier.
            max_grad_norm=0.0 if (norm := recipe.train.max_grad_norm) == "auto" else norm,
            train_sampling_strategy=strategy,
            deepspeed=zero2_settings(),
            bf16=bf16,
            use_cpu=not gpu,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        self.collator = CountingCollator(AutoTokenizer.from_pretrained(recipe.model.encoder))
        self.trainer = Trainer(
            model, arguments, data_collator=self.collator, train_dataset=PostDataset(split)
        )
        self.held = HeldTrainer(self.trainer)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.trainer.model_wrapped


def zero2_settings() -> dict[str, Any]:
    """ZeRO-2 as users write it for the Trainer; torch's AdamW, because DeepSpeed's needs compiling."""
    zero = {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
    adamw = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | {"torch_adam": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
             "gradient_clipping")  # fmt: skip
    optimizer = {"type": "AdamW", "params": adamw}
    return {"zero_optimization": zero, "optimizer": optimizer, "bf16": {"enabled": "auto"},
            **dict.fromkeys(sizes, "auto")}  # fmt: skip


def save_base_encoder(folder: Path, tokenizer_folder: str) -> str:
    """Write an encoder of 125 million parameters with random weights; the posts keep their own tokenizer."""
    torch.manual_seed(0)
    BertModel(BertConfig(**BASE), add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return str(folder)
