"""How far several annotators agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

Distance = Callable[[Hashable, Hashable], float]
"""Of two labels, 0 where they are the same; at most 1."""


def krippendorff_alpha(
    units: Iterable[Sequence[Hashable]], distance: Distance | None = None
) -> float:
    """1 - observed over expected disagreement: 1 where all agree, 0 where labels fall by chance.

    Args:
        units: what the annotators of each post say, one entry per annotator; posts with one entry
            do not count.
        distance: of two labels; None is 0 or 1 (nominal).

    Returns:
        NaN where no post has two entries, or where all entries are the same and nothing is
            known of chance.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    distance = distance or (lambda one, other: float(one != other))
    units = [Counter(unit) for unit in units if len(unit) > 1]
    total: Counter[Hashable] = sum(units, Counter())
    n = total.total()
    # A pair of the same label twice is at distance 0, so the counts need no correction for it.
    observed = sum(_between(unit, distance) / (unit.total() - 1) for unit in units)
    expected = _between(total, distance) / (n - 1) if n > 1 else 0.0
    return 1 - observed / expected if expected else float("nan")


def set_distance(one: Hashable, other: Hashable) -> float:
    """1 - the Jaccard overlap of two frozen sets; 0 between two empty ones."""
    both = one | other
    return 1 - len(one & other) / len(both) if both else 0.0


def squared_distance(one: Hashable, other: Hashable) -> float:
    """Squared difference of two numbers (interval data)."""
    return (one - other) ** 2


def _between(counts: Counter[Hashable], distance: Distance) -> float:
    """Sum of the distances of all ordered pairs."""
    labels = list(counts.items())
    return 2 * sum(
        count * other_count * distance(label, other)
        for place, (label, count) in enumerate(labels)
        for other, other_count in labels[:place]
    )
