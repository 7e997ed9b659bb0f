"""The ONNX file of an export as a model: batches in, ``ModelOutput`` out, run by onnxruntime on the CPU.

Batches of NumPy arrays need no PyTorch, which takes longer to import than the file to load.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.config.extras import need
from comoe.config.failure import parsing
from comoe.deferred import Deferred
from comoe.types import Batch, ModelOutput

if TYPE_CHECKING:
    import torch
else:
    torch = Deferred("torch")

ONNX = "model.onnx"
"""The file, in the folder of an export."""

LOGITS, ATTENTION, EMBEDDING = "comoe.logits.", "comoe.attention.", "comoe.embedding"
"""Beginnings of the names of outputs, before that of the task; and the one of ``OnnxModel.embed``."""

TOKENS = 384
"""Tokens of a pass. What lies between two products then stays in the cache: of 8 bits four times as
many take two fifths longer per post. Of any number of threads, as the scale of 8-bit states, and with
it every digit, depends on what shares a pass."""

SLOWER = ["SkipLayerNormFusion"]
"""What onnxruntime 1.32 fuses to operations that take longer on a CPU than their parts."""

INPUTS = {
    "input_ids": "input_ids_BL",
    "attention_mask": "attention_mask_BL",
    "token_type_ids": "token_type_ids_BL",
    "task_ids": "task_ids_B",
    "lexicon": "lexicon_BLK",
}
"""Name of an input -> field of ``Batch``; a file has those that its model reads."""


class OnnxModel:
    """What ``MultiTaskModel`` does for predictions: logits and attentions, without routings and projections.

    Args:
        path: the file.
        threads: of each operation; None is ``usual_threads``.

    Raises:
        ValueError: no onnxruntime, or a file that it cannot read.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        need("onnx", "onnxruntime", what="--backend onnx")
        import onnxruntime

        self.path = path
        options = onnxruntime.SessionOptions()
        self.threads = threads or usual_threads()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        with parsing(path, "export the model again"):
            self.session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=SLOWER,
            )
        self._inputs = [one.name for one in self.session.get_inputs()]
        self._outputs = [one.name for one in self.session.get_outputs()]

    def __reduce__(self) -> tuple[Any, ...]:
        """Read again where it is unpickled; a session cannot be."""
        return functools.partial(OnnxModel, self.path, threads=self.threads), ()

    def __call__(self, batch: Batch) -> ModelOutput:
        """Logits and attentions of every row, tensors or arrays as the batch has them."""
        found = self._run(batch, [name for name in self._outputs if name != EMBEDDING])
        logits, attentions = (
            {name.removeprefix(kind): value for name, value in found.items() if name.startswith(kind)}
            for kind in (LOGITS, ATTENTION)
        )  # fmt: skip
        return ModelOutput(logits, {}, attentions, (), _alike(batch)(np.zeros(0, dtype=np.int64)))

    def embed(self, batch: Batch) -> Any:
        """As ``MultiTaskModel.embed``."""
        return self._run(batch, [EMBEDDING])[EMBEDDING]

    def _run(self, batch: Batch, names: list[str]) -> dict[str, Any]:
        """Outputs of the rows, computed in passes of ``TOKENS``, each as long as its longest row."""
        given = {name: np.asarray(getattr(batch, INPUTS[name])) for name in self._inputs}
        rows, length = batch.input_ids_BL.shape
        lengths_B = np.asarray(batch.attention_mask_BL).sum(axis=1)
        step, parts = max(1, TOKENS // length), []
        for start in range(0, rows, step):
            some = slice(start, start + step)
            longest = int(lengths_B[some].max())
            part = {
                name: np.ascontiguousarray(value[some, :longest] if value.ndim > 1 else value[some])
                for name, value in given.items()
            }
            parts.append(
                [
                    _as_long(
                        value, length if value.ndim == 3 or name.startswith(ATTENTION) else None
                    )
                    for name, value in zip(names, self.session.run(names, part), strict=True)
                ]
            )
        columns = zip(*parts, strict=True)
        alike = _alike(batch)
        return {
            name: alike(np.concatenate(column)) for name, column in zip(names, columns, strict=True)
        }


def _alike(batch: Batch) -> Any:
    """Makes what the batch is made of out of an array."""
    return np.asarray if isinstance(batch.input_ids_BL, np.ndarray) else torch.from_numpy


def _as_long(value: np.ndarray, length: int | None) -> np.ndarray:
    """Zeros behind the tokens of a shorter pass; None for what has none."""
    if length is None or value.shape[1] == length:
        return value
    return np.pad(value, [(0, 0), (0, length - value.shape[1]), (0, 0)][: value.ndim])


def usual_threads() -> int:
    """Threads of an operation that PyTorch was told to take, or would: OMP_NUM_THREADS, else one per core."""
    if "torch" in sys.modules:
        return torch.get_num_threads()
    told = re.match(r"\s*([1-9]\d{0,3})\b", os.environ.get("OMP_NUM_THREADS", ""))
    return min(int(told[1]), _cores()) if told else _cores()


def _cores() -> int:
    """Cores of this process; two processors of one core compute in turns."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    place = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {number: Path(place.format(number)) for number in os.sched_getaffinity(0)}
    return len({f.read_text() if f.is_file() else number for number, f in files.items()})
