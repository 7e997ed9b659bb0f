"""The ONNX file of an export as a model: batches in, ``ModelOutput`` out, run by onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comoe.config.extras import need
from comoe.config.failure import parsing
from comoe.types import Batch, ModelOutput

ONNX = "model.onnx"
"""The file, in the folder of an export."""

LOGITS, ATTENTION, EMBEDDING = "comoe.logits.", "comoe.attention.", "comoe.embedding"
"""Beginnings of the names of outputs, before that of the task; and the one of ``OnnxModel.embed``."""

TOKENS = 384
"""Tokens of a pass for each thread. What lies between two products then stays in the cache: of 8
bits four times as many take two fifths longer per post."""

SLOWER = ["SkipLayerNormFusion"]
"""What onnxruntime 1.32 fuses to operations that take longer on a CPU than their parts."""

INPUTS = {
    "input_ids": "input_ids_BL",
    "attention_mask": "attention_mask_BL",
    "token_type_ids": "token_type_ids_BL",
    "task_ids": "task_ids_B",
}
"""Name of an input -> field of ``Batch``; a file has those that its model reads."""


class OnnxModel:
    """What ``MultiTaskModel`` does for predictions: logits and attentions, without routings and projections.

    Args:
        path: the file.
        threads: of each operation; None is what PyTorch would take.

    Raises:
        ValueError: no onnxruntime, or a file that it cannot read.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        need("onnx", "onnxruntime", what="--backend onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        self._tokens = TOKENS * options.intra_op_num_threads
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

    def __call__(self, batch: Batch) -> ModelOutput:
        """Logits and attentions of every row."""
        found = self._run(batch, [name for name in self._outputs if name != EMBEDDING])
        logits, attentions = (
            {name.removeprefix(kind): value for name, value in found.items() if name.startswith(kind)}
            for kind in (LOGITS, ATTENTION)
        )  # fmt: skip
        return ModelOutput(logits, {}, attentions, (), torch.zeros(0, dtype=torch.int64))

    def embed(self, batch: Batch) -> Tensor:
        """As ``MultiTaskModel.embed``."""
        return self._run(batch, [EMBEDDING])[EMBEDDING]

    def _run(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        """Outputs of the rows, computed in passes of ``TOKENS``, each as long as its longest row."""
        given = {name: getattr(batch, INPUTS[name]).numpy() for name in self._inputs}
        rows, length = batch.input_ids_BL.shape
        lengths_B = batch.attention_mask_BL.sum(dim=1).numpy()
        step, parts = max(1, self._tokens // length), []
        for start in range(0, rows, step):
            some = slice(start, start + step)
            longest = int(lengths_B[some].max())
            part = {
                name: np.ascontiguousarray(
                    value[some, :longest] if value.ndim == 2 else value[some]
                )
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
        return {
            name: torch.from_numpy(np.concatenate(column))
            for name, column in zip(names, columns, strict=True)
        }


def _as_long(value: np.ndarray, length: int | None) -> np.ndarray:
    """Zeros behind the tokens of a shorter pass; None for what has none."""
    if length is None or value.shape[1] == length:
        return value
    return np.pad(value, [(0, 0), (0, length - value.shape[1]), (0, 0)][: value.ndim])
