"""The extras that ``pip install comoe`` leaves out: their packages, and the sentence where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "train": ("deepspeed", "accelerate", "datasets", "matplotlib", "psutil", "tensorboard"),
    "report": ("jinja2", "matplotlib"),
    "augment": ("gguf",),
    "explain": ("captum",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "track": ("mlflow", "sqlalchemy", "alembic"),
    "tune": ("optuna",),
    "lexicon": ("vaderSentiment",),
    "ray": ("ray",),
}
"""Extra -> its packages, as they are imported."""


def need(extra: str, *packages: str, what: str) -> None:
    """Check that an extra is installed.

    Args:
        extra: key of ``EXTRAS``.
        packages: those that are needed; none means all of the extra.
        what: what needs it, the beginning of the message.

    Raises:
        ValueError: a package is missing; the message has the line for pip.
    """
    missing = [name for name in packages or EXTRAS[extra] if find_spec(name) is None]
    if missing:
        verb = "which are" if len(missing) > 1 else "which is"
        raise ValueError(
            f'{what} needs {", ".join(missing)}, {verb} not installed: pip install "comoe[{extra}]"'
        )
