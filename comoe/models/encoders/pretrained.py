"""Reading pre-trained models: their files, what is wrong with them, and each rank's share of them under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from comoe.config.hub_access import cached_where_unreachable
from comoe.deferred import Deferred
from comoe.distributed import sum_over_ranks

if TYPE_CHECKING:
    import transformers
else:
    transformers = Deferred("transformers")


class Role(NamedTuple):
    """What a pre-trained model is for, in the words of error messages."""

    option: str
    """Of the recipe, with its name."""
    noun: str
    """The model, with its article."""
    ready_made: str
    """Names of ready-made ones."""


ENCODER = Role("model.encoder", "an encoder", "kit:minilm, smoke:encoder or smoke:t5")
"""The text encoder's role."""


class Unfit(ValueError):
    """A model that cannot do what it is for; its message has the remedy already."""


def load_pretrained(
    name: str,
    role: Role,
    *,
    trust_remote_code: bool,
    prepare: Callable[[Any], tuple[Any, dict[str, Any]]],
    auto_class: Callable[[Any], Any] = lambda hf_config: transformers.AutoModel,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a model, or raise what is wrong with it.

    Args:
        name: folder or hub name.
        role: what it is for.
        trust_remote_code: let the repository run its own Python code.
        prepare: Hugging Face configuration -> the one to build, and arguments of the model's
            constructor.
        auto_class: the one to build -> the library's loader.
        dtype: of the weights.

    Raises:
        ValueError: no such folder or hub name, no network, unreadable or incomplete weights.
    """
    source, hf_config = read_config(name, role, trust_remote_code=trust_remote_code)
    hf_config, arguments = prepare(hf_config)
    with readable_errors(name, role), quiet():
        model, report = auto_class(hf_config).from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    if report["missing_keys"]:
        # The library would fill them with random numbers and go on.
        raise ValueError(
            f"{role.option} ({name}) has no weights for {', '.join(sorted(report['missing_keys'])[:3])} "
            f"({len(report['missing_keys'])} in all); its weights file does not belong to its config.json."
        )
    return model


def read_config(name: str, role: Role, *, trust_remote_code: bool) -> tuple[str, Any]:
    """Where a model lies, and its Hugging Face configuration; arguments and errors of ``load_pretrained``."""
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if (looks_local and not folder.is_dir()) or (
        folder.is_dir() and not (folder / "config.json").is_file()
    ):
        raise ValueError(
            f"{role.option} ({name}) is not a folder with {role.noun} (config.json is missing); "
            f"give a folder that save_pretrained wrote, a hub name, {role.ready_made}."
        )
    source = str(folder) if folder.is_dir() else name
    with readable_errors(name, role):
        return source, transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )


@contextmanager
def split_as_it_loads(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``build_encoder`` gives every rank only its ZeRO-3 share of each weight, and no rank holds the whole.

    A layer's weights are made and split at once, before the next layer's are; then rank 0 reads the
    file tensor by tensor, and each goes to the ranks in shares. Every rank must build the same
    encoder. Without this an encoder is whole on every rank until DeepSpeed splits it.

    Args:
        settings: complete DeepSpeed configuration of stage 3; weights are made in its precision.
    """
    # Needs accelerate, which prediction does not.
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # The library keeps a weak reference and reads it in each from_pretrained: the object must live
    # as long as it counts.
    alive = HfDeepSpeedConfig(dict(settings))
    # It ties weights that are equal, and finds split ones equal whatever they hold: a Flan-T5's
    # output layer would be thrown away.
    modeling_utils = transformers.modeling_utils
    equal, modeling_utils._tied_params_are_equal = (
        modeling_utils._tied_params_are_equal,
        _equal_shares,
    )
    try:
        yield
    finally:
        modeling_utils._tied_params_are_equal = equal
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def whole_on_each_rank() -> Iterator[None]:
    """Inside, a model made from a configuration is whole, in ``split_as_it_loads`` too."""
    with transformers.modeling_utils.set_zero3_state():
        yield


def _equal_shares(source: Tensor, target: Tensor) -> bool:
    differ = not torch.equal(source.ds_tensor, target.ds_tensor)
    return int(sum_over_ranks(torch.tensor(int(differ), device=source.ds_tensor.device))) == 0


@contextmanager
def readable_errors(name: str, role: Role) -> Iterator[None]:
    """Inside, an error of the library becomes a ValueError with name and what to give instead."""
    try:
        with cached_where_unreachable(name):
            yield
    except Unfit:
        raise
    except Exception as error:  # sizes that do not fit one another end anywhere in the library
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"{role.option} ({name}) could not be loaded: {reason} Give the folder of {role.noun} "
            f"that was downloaded, a hub name that this machine can reach, {role.ready_made}."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the library logs errors alone."""
    # The library prints a bar and a table of unused weights on every rank; missing ones are an
    # error above.
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
