"""Vision towers: any Hugging Face vision model as a reader of images into tokens."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import ModelConfig, VisionConfig
from comoe.deferred import Deferred
from comoe.models.encoders.families import FAMILIES
from comoe.models.encoders.pretrained import ENCODER, Role, load_pretrained, read_config

if TYPE_CHECKING:
    import transformers
else:
    transformers = Deferred("transformers")

TOWER = Role("model.vision.tower", "a vision model", "smoke:vision")
"""The tower's role, in the words of error messages."""


class Tower(nn.Module):
    """Images in, image tokens out.

    Args:
        inner: a vision model.
        train: train it too. Otherwise it stays as it was read: no gradient, no dropout, nothing
            kept for a backward pass.
    """

    def __init__(self, inner: nn.Module, *, train: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.trained = train
        for name, parameter in inner.named_parameters():
            # What stands for hidden patches in pre-training is never read here.
            parameter.requires_grad_(train and not name.endswith("mask_token"))
        for module in inner.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = partial(_normalize, module)
        self.width = tower_width(inner.config)
        self.train(self.training)

    def train(self, mode: bool = True) -> Tower:
        """Training or evaluation mode; a frozen tower is always in the latter."""
        super().train(mode)
        self.inner.train(mode and self.trained)
        for module in self.inner.modules():
            # The statistics of a batch would differ between ranks, and let posts change one
            # another's predictions.
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """Image tokens (I, R, V): patches in reading order, after a class token where the model has one."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = self.inner(pixels_I3HW.to(self.inner.dtype))
            tokens = output.last_hidden_state
            if tokens.ndim == 4:
                # A convolutional model's map: a token is what it sees at one place.
                tokens = tokens.flatten(2).transpose(1, 2)
            pooled = getattr(output, "pooler_output", None)
            if self.trained and pooled is not None:
                # Nobody reads it, but what makes it must get a gradient on every rank.
                tokens = tokens + 0.0 * pooled.sum()
            return tokens


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm by its running statistics, which stay float32 where the weights are bfloat16: PyTorch
    refuses the mixture on a CPU."""
    dtype = torch.promote_types(x.dtype, norm.running_mean.dtype)
    numbers = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(*[number.to(dtype) for number in numbers], eps=norm.eps).to(x.dtype)


def tower_width(hf_config: Any) -> int:
    """Width V of a vision model's tokens.

    Raises:
        ValueError: the configuration has none.
    """
    width = getattr(hf_config, "hidden_size", None) or next(
        reversed(getattr(hf_config, "hidden_sizes", ())), None
    )
    if width is None:
        raise ValueError(
            f"{TOWER.option}: a model of type {hf_config.model_type} does not say how wide its image tokens are; take "
            "one like ViT, CLIP, SigLIP, DeiT, BEiT, DINOv2, Swin, ResNet or ConvNeXt."
        )
    return int(width)


def expected_tokens(hf_config: Any) -> int:
    """Image tokens per image as far as the configuration has them: the patches and a class token; 0
    where it does not, as with models that narrow their maps from stage to stage."""
    side, patch = getattr(hf_config, "image_size", None), getattr(hf_config, "patch_size", None)
    if side is None or patch is None or hasattr(hf_config, "depths"):
        return 0
    (height, width), (high, wide) = (
        (size, size) if isinstance(size, int) else size for size in (side, patch)
    )
    return (height // high) * (width // wide) + 1


def build_tower(config: VisionConfig, *, trust_remote_code: bool = False) -> Tower:
    """Load ``model.vision.tower`` in float32, without its pooler; of a model of both sides (CLIP) the vision half.

    Args:
        config: ``model.vision`` with a tower.
        trust_remote_code: let the tower's repository run its own Python code.

    Raises:
        ValueError: no such folder or hub name, no network, no vision model, unreadable or
            incomplete weights.
    """
    inner = load_pretrained(
        config.tower, TOWER, trust_remote_code=trust_remote_code, prepare=_prepared
    )
    return Tower(inner, train=config.train_tower)


def build_tower_from_config(hf_config: dict[str, Any], *, train: bool = False) -> Tower:
    """The same network with random weights, from ``tower.inner.config.to_dict()``: an export fills the weights in."""
    fields = dict(hf_config)
    config, arguments = _prepared(
        transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    )
    return Tower(
        transformers.AutoModel.from_config(config, dtype=torch.float32, **arguments), train=train
    )


def build_tower_shape(config: VisionConfig, *, trust_remote_code: bool = False) -> Tower:
    """The tower of ``build_tower`` on the meta device: sizes without numbers, for which config.json suffices."""
    _, hf_config = read_config(config.tower, TOWER, trust_remote_code=trust_remote_code)
    hf_config, arguments = _prepared(hf_config)
    with torch.device("meta"):
        inner = transformers.AutoModel.from_config(
            hf_config, dtype=torch.float32, trust_remote_code=trust_remote_code, **arguments
        )
        return Tower(inner, train=config.train_tower)


def image_side(config: ModelConfig) -> str | None:
    """Folder or hub name whose processor prepares the images; None where the model reads none.

    Args:
        config: ``model``, ready-made names resolved.

    Raises:
        ValueError: a tower beside an encoder that reads images by itself, or an encoder that
            cannot be read.
    """
    if config.vision.tower is None and not reads_images(config):
        return None
    if config.vision.tower is not None and reads_images(config):
        raise ValueError(
            f"model.vision.tower ({config.vision.tower}) has nothing to do: model.encoder ({config.encoder}) reads "
            "images by itself; set model.vision.tower to null, or choose an encoder of text."
        )
    return config.vision.tower or config.encoder


def reads_images(config: ModelConfig) -> bool:
    """Whether ``model.encoder`` reads both sides (ViLT); its configuration is read for it."""
    _, hf_config = read_config(config.encoder, ENCODER, trust_remote_code=config.trust_remote_code)
    return hf_config.model_type in FAMILIES and FAMILIES[hf_config.model_type].single_stream


def _prepared(hf_config: Any) -> tuple[Any, dict[str, Any]]:
    half = getattr(hf_config, "vision_config", None)
    hf_config = hf_config if half is None else half
    if not (hasattr(hf_config, "num_channels") or hasattr(hf_config, "image_size")):
        raise ValueError(
            f"{TOWER.option} is a model of type {hf_config.model_type}, which reads no images; "
            "take a vision model such as ViT, CLIP, SigLIP, DeiT, BEiT, ResNet or ConvNeXt."
        )
    kind = transformers.MODEL_MAPPING.get(type(hf_config), None)
    takes = () if kind is None else inspect.signature(kind.__init__).parameters
    return hf_config, {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
