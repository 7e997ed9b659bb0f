"""What ``comoe predict`` is asked for, in one record: the command, its workers and other engines hand it on whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from comoe.config.errors import unknown_name


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """How the posts of a file are predicted and written.

    Raises:
        ValueError: a value that is out of range, or options that do not go together.
    """

    format: str = "jsonl"
    """Key of ``comoe.inference.writers.WRITERS``."""
    input_format: str | None = None
    """Format of the input; None goes by its ending."""
    tasks: Sequence[str] | None = None
    """Names of the tasks; None is all."""
    text_column: str | None = None
    """Column with the post; None is that of training, else ``text``."""
    pair_column: str | None = None
    """Column with the second text; None is that of training, if there is one."""
    image_column: str | None = None
    """Column with the image; None is that of training, else ``image``."""
    author_column: str | None = None
    """Column with the author, for tasks of authors; None is that of training."""
    keep: Sequence[str] | None = None
    """Columns to copy to the predictions; None is ``id``, if there is one."""
    raw_csv: bool = False
    """Leave text in a CSV file as it is, also where a spreadsheet would run it as a formula."""
    explain: bool | str = False
    """Explain by this key of ``comoe.inference.explain.METHODS`` (jsonl and html); True is attention."""
    assume_rates: Sequence[str] = ()
    """``TASK.LABEL=RATE``: adapt the scores to rates of labels that are known."""
    adapt_prior: str | None = None
    """Adapt the scores to rates that are estimated from the posts: ``em``."""
    batch_size: int = 64
    """Posts per forward pass."""
    batch_tokens: int | None = None
    """Most tokens of a forward pass, padding counted, if it has several posts."""
    dedupe: bool = False
    """Predict a text (with its second text, image and words) once."""
    resume: bool = False
    """Go on behind what an earlier run has written."""
    workers: int = 1
    """Processes, each with a model of its own."""
    engine: str = "processes"
    """Key of ``comoe.inference.predict_file.ENGINES``."""

    def __post_init__(self) -> None:
        for flag, least in (("batch_size", 1), ("batch_tokens", 1), ("workers", 1)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise ValueError(
                    f"--{flag.replace('_', '-')} is {value}; it must be at least {least}."
                )
        if self.raw_csv and self.format != "csv":
            raise ValueError("--raw-csv wants --format csv; the others hold text as it is.")
        if self.adapt_prior not in (None, "em"):
            raise unknown_name("--adapt-prior", self.adapt_prior, ("em",))
        if self.adapts and self.explain == "gradients":
            raise ValueError(
                "--explain gradients explains labels as the model gives them; leave it or the adaptation of rates out."
            )

    @property
    def adapts(self) -> bool:
        """Whether scores are adapted to another mix of labels."""
        return bool(self.assume_rates or self.adapt_prior)

    def head(self) -> dict[str, str]:
        """Option -> value of all that the output depends on, as text."""
        shown = asdict(self)
        for free in ("resume", "workers", "engine", "input_format"):
            del shown[free]
        return {f"--{name.replace('_', '-')}": str(value) for name, value in shown.items()}


DEFAULT = PredictOptions()
"""All posts, all tasks, JSON lines."""
