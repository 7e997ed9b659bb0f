"""DeepSpeed's files of a checkpoint, which are pickles, read as data: none of them runs code."""

from __future__ import annotations

import copyreg
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from comoe.distributed import is_main

CLASSES = (LossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's optimizer state holds beside tensors and plain values."""

# Pythons before 3.11.4 pickle a member of an enumeration as a call of getattr, which is not read.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))

ONLY_DATA, ANY_PICKLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables of torch: ``torch.load`` reads data alone, or runs what a pickle holds."""


@contextmanager
def reading_data_only(path: Path) -> Iterator[None]:
    """``torch.load`` runs nothing that a file of a checkpoint holds, although DeepSpeed asks for any pickle.

    A user who sets ``ANY_PICKLE`` trusts the files; a warning says so.

    Args:
        path: the checkpoint.

    Raises:
        ValueError: a file holds something else.
    """
    if ANY_PICKLE in os.environ:
        if is_main():
            print(
                f"warning: {ANY_PICKLE} is set: the files of {path} may run code", file=sys.stderr
            )
        yield
        return
    before = os.environ.get(ONLY_DATA)
    os.environ[ONLY_DATA] = "1"
    try:
        with torch.serialization.safe_globals(list(CLASSES)):
            yield
    except UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = (
            f"a pickle of {found[1]}" if found else "a pickle that is damaged or of something else"
        )
        raise ValueError(
            f"{path} holds {what} and not numbers alone; it was not read, as it could run code. "
            f"Resume from another checkpoint; if you trust this one, set {ANY_PICKLE}=1."
        ) from error
    finally:
        os.environ.pop(ONLY_DATA)
        os.environ.update({} if before is None else {ONLY_DATA: before})
