"""How the losses of the tasks become one number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from comoe.rules import unknown_name
from comoe.tasks.catalog import Task


class Equal(nn.Module):
    """The plain sum: every task's mean loss counts alike, however many posts it has."""

    reads_task_weights = False
    """True where ``tasks.<name>.weight`` counts."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()

    def combine(self, losses_T: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar, and the weights (T,), all 1."""
        return losses_T.sum(), losses_T.new_ones(losses_T.shape)


class Static(nn.Module):
    """The sum under the user's numbers, ``tasks.<name>.weight``."""

    reads_task_weights = True
    """See ``Equal``."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        # Numbers, not a buffer: they are in the recipe, and a buffer would turn bfloat16 with the model.
        self.weights = [task.weight for task in tasks]

    def combine(self, losses_T: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar, and the weights (T,)."""
        weights_T = losses_T.new_tensor(self.weights)
        return (losses_T * weights_T).sum(), weights_T


def build_weighting(name: str, tasks: Sequence[Task]) -> nn.Module:
    """The weighting that ``loss.weighting`` names, for these tasks; ValueError for an unknown name."""
    if name not in WEIGHTINGS:
        raise unknown_name("loss.weighting", name, WEIGHTINGS)
    return WEIGHTINGS[name](tasks)


WEIGHTINGS: dict[str, type[nn.Module]] = {"equal": Equal, "static": Static}
"""Name in ``loss.weighting`` -> class; made from the tasks, a module with ``combine`` and ``reads_task_weights``."""
