"""Multi-task learning on social-media posts: one encoder with a mixture of experts, trained on all tasks at once.

The names of ``__all__`` are the public API; each is imported when it is first used, so that
``import comoe`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comoe import train as train
    from comoe.config.load import load_recipe as load_recipe
    from comoe.config.recipe import Recipe as Recipe
    from comoe.inference.export import export_checkpoint as export_checkpoint
    from comoe.inference.predictor import Predictor as Predictor
    from comoe.inference.score import score as score

__version__ = "0.1.0"
__all__ = [
    "Predictor", "Recipe", "__version__", "export_checkpoint", "load_recipe", "score", "train",
]  # fmt: skip

_MODULES = {
    "Predictor": "comoe.inference.predictor",
    "Recipe": "comoe.config.recipe",
    "export_checkpoint": "comoe.inference.export",
    "load_recipe": "comoe.config.load",
    "score": "comoe.inference.score",
}
"""Public name -> module that defines it."""


def __getattr__(name: str) -> Any:
    if name == "train":
        # A package of that name exists, and can be called.
        return import_module("comoe.train")
    if name not in _MODULES:
        raise AttributeError(f"module 'comoe' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
