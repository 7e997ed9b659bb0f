"""Which learning rate a parameter follows, told from its path."""

from __future__ import annotations

from itertools import pairwise

BLOCK_CHILDREN = ("norm", "task_projection", "mixture", "shared")
"""Modules of a ``CooperativeBlock``; a path that merely holds the word block, as every layer of a T5 does, goes on with
another."""


def parameter_group(name: str) -> str:
    """Which learning rate a parameter follows: "encoder", "experts" or "heads", from its path.

    Blocks, the task embedding and private parts are "experts": all that is new beside or behind the pre-trained layers.
    """
    parts = name.split(".")
    child = next((part for part in parts if part in PARAMETER_GROUPS), None)
    assert child, f"{name} lies in none of the modules {', '.join(PARAMETER_GROUPS)} of MultiTaskModel"
    # The blocks live inside the encoder they are attached to.
    in_block = any(part == "block" and following in BLOCK_CHILDREN for part, following in pairwise(parts))
    return "experts" if child == "encoder" and in_block else PARAMETER_GROUPS[child]


PARAMETER_GROUPS: dict[str, str] = {
    "encoder": "encoder",
    "task_embedding": "experts",
    "heads": "heads",
    "projection": "heads",
    "tower": "encoder",
    "fusion": "heads",
    "image_text": "heads",
    "private": "experts",
}
"""Child of ``MultiTaskModel`` -> group of its parameters."""
