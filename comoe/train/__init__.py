"""One training run. The package can be called: ``comoe.train(...)`` is ``comoe.train.run.train(...)``."""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    # An import of any module below sets the attribute ``train`` of comoe to this package, whatever
    # function was there before.
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from comoe.config.extras import need

        need("train", what="training")
        from comoe.train.run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
