"""Modules that are imported when something of them is first used: nobody waits for one that is never needed.

PyTorch takes 1.5 s to import and transformers as much again, which a prediction of an ONNX file needs
neither of, and one of a BERT needs only the former of.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Deferred(ModuleType):
    """Stands for a module until an attribute of it is asked for; ``sys.modules`` does not know it.

    Example:
        >>> decimal = Deferred("decimal")
        >>> print(decimal.Decimal("0.1"))
        0.1
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
