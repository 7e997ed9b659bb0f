"""What runs and exports meant before an option existed: their saved recipes lack it, and keep their numbers."""

from __future__ import annotations

from typing import Any

OLD_MEANINGS: dict[str, Any] = {
    "data.split_seed": "train",
    "tasks.*.standardize": False,
    "model.moe.gate_scale": 1.0,
    "model.moe.expert_init": 0.02,
    "train.max_grad_norm": 1.0,
    "model.moe.balance_schedule": "constant",
    "train.router_learning_rate": None,
}
"""Option (``*`` stands for every key of a mapping) -> its value in a saved recipe that does not have it.

Only options whose default is another one stand here. A recipe that a user wrote takes the default.
"""


def keep_old_meanings(raw: dict[str, Any]) -> None:
    """Fill a saved recipe, in place; sections that it does not have stay away.

    Args:
        raw: the nested dicts of a ``config.yaml`` or an export's ``config.json``.
    """
    for path, value in OLD_MEANINGS.items():
        *sections, option = path.split(".")
        found = [raw]
        for section in sections:
            below = [
                part
                for place in found
                for part in (place.values() if section == "*" else [place.get(section)])
            ]
            found = [part for part in below if isinstance(part, dict)]
        for place in found:
            place.setdefault(option, value)
