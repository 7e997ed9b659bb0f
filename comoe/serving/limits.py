"""What a server takes on: of one request, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 86_400.0
"""Most seconds of a timeout: a day."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server; each is a flag of ``comoe serve``.

    Raises:
        ValueError: a bound that is not positive, or two that do not fit.
    """

    max_bytes: int = 1 << 20
    """Bytes of a request's body."""
    max_posts: int = 256
    """Posts of a request."""
    max_gradients: int = 16
    """Posts of a request that is explained by gradients, which takes some hundred times as long per task."""
    max_characters: int = 20_000
    """Characters of a post, with its second text and its words."""
    queue: int = 1024
    """Posts that wait for a model; more are refused (429)."""
    requests: int = 256
    """Requests at once; more are refused (429)."""
    timeout: float = 30.0
    """Seconds from the arrival of a request to its answer (504)."""
    batch_tokens: int = 1024
    """Tokens of a forward pass, padding counted."""
    batch_wait: float = 5.0
    """Milliseconds that a post waits for others to share its forward pass."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if not 0 <= value < float("inf") or (value == 0 and name != "batch_wait"):
                raise ValueError(f"{flag} is {value}; it must be a positive number.")
        if self.timeout > LONGEST:
            raise ValueError(
                f"--timeout is {self.timeout:g}; it must be at most {LONGEST:g} seconds."
            )
        if self.batch_wait >= 1000 * self.timeout:
            raise ValueError(
                f"--batch-wait ({self.batch_wait:g} ms) must be below --timeout ({self.timeout:g} "
                "s): a post that waits longer gets no answer."
            )
        if self.queue < self.max_posts:
            raise ValueError(
                f"--queue ({self.queue}) must be at least --max-posts ({self.max_posts}): a request waits as a whole."
            )
