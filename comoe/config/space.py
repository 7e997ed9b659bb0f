"""The search space of ``comoe tune``: a YAML file of ranges and choices for options of a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from comoe.config.errors import place_of, unknown_name
from comoe.config.fields import DIFFERENT, Flag, Number, Positive, Text, Whole, section
from comoe.config.load import load_settings, type_at
from comoe.config.reference import options


@section
class Range:
    """Numbers from one to another; whole ones where both ends are whole."""

    low: Whole | Number
    """Smallest value."""
    high: Whole | Number
    """Largest value."""
    log: Flag = False
    """Draw evenly on a logarithmic scale."""
    step: Positive | None = None
    """Distance between two values; null has none (whole numbers: 1)."""

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@section
class Space:
    """What is searched."""

    options: dict[Text, Range | Annotated[list[Any], MinLen(2), DIFFERENT]] = field(
        default_factory=dict
    )
    """Option -> range or list of values."""


def load_space(path: Path, taken: tuple[str, ...]) -> Space:
    """Read a search space.

    Args:
        path: the YAML file.
        taken: options that the command sets itself.

    Raises:
        ValueError: not such a file; no such option; a range that is empty.
    """
    space, origins = load_settings(path, Space)
    if not space.options:
        raise ValueError(
            f"{path}: options is empty; name an option of the recipe, with a range or a list."
        )
    for key, values in space.options.items():
        place = f"{place_of(f'options.{key}', origins)}options.{key}"
        if type_at(key) is None or dataclasses.is_dataclass(type_at(key)):
            raise unknown_name(f"{place}", key, [option.path for option in options()])
        if key in taken:
            raise ValueError(f"{place}: comoe tune sets {key} itself; leave it out.")
        if isinstance(values, Range):
            _check_range(values, place)
    return space


def _check_range(values: Range, place: str) -> None:
    if not values.low < values.high:
        raise ValueError(f"{place}: low ({values.low}) must be below high ({values.high}).")
    if values.log and (values.low <= 0 or values.step is not None):
        raise ValueError(f"{place}: with log, low must be above 0 and step left out.")
    if values.whole and values.step is not None and values.step != int(values.step):
        raise ValueError(f"{place}: step ({values.step}) must be whole, as low and high are.")


__all__ = ["Range", "Space", "load_space"]
