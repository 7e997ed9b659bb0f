"""Options of the recipe below ``model``: encoder, experts, pictures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class MoeConfig:
    """The cooperative block: experts beside the feed-forward of chosen encoder layers."""

    num_experts: int = 8
    """Experts per layer; 0 leaves the encoder without experts."""
    top_k: int = 2
    """Experts per token, 1 to ``num_experts``."""
    gate: str = "sigmoid"
    """Key of ``comoe.models.gate.GATES``: sigmoid (experts cooperate), softmax (they compete; the ablation), or uniform
    (all experts in turn, whatever the token: only for measuring speed)."""
    route_by: str = "token"
    """What the gate sees: token, task, or both. With task and both a post becomes one row per labelled task."""
    layers: str | list[int] = "alternate"
    """Layers that get experts: all, alternate (every second, the last one included), last_half, or a list of layer
    numbers from 0. A word counts in encoder and decoder each; numbers go on from the encoder into the decoder."""
    expert_width: int | str = "auto"
    """Hidden width F of one expert; auto is a quarter of the encoder's width, at least 16."""
    shared_width: int = 0
    """Hidden width of a shared expert that every token visits; 0 is none."""
    output_init: float = 0.0
    """Standard deviation of the experts' output projection at the start; 0 starts as the pre-trained encoder."""
    temperature: float = 1.0
    """Divides the gate's logits; anything but 1 is warned about (arXiv:2602.01466)."""
    cooperation_threshold: float = 0.0
    """Picked experts whose score is below this add nothing (never the best one); 0 is off."""
    task_embedding_width: int = 64
    """Width of the task embedding that ``route_by: task | both`` reads."""
    balance: str = "bias"
    """none, or bias: after each step the bias of a busy expert falls and an idle one's rises (arXiv:2408.15664). Can be
    combined with ``loss.balance_weight``, ``loss.z_weight`` and ``loss.task_separation_weight``."""
    balance_rate: float = 0.001
    """Step u of the balance bias."""


@dataclass(slots=True)
class VisionConfig:
    """How the pictures of posts are read."""

    tower: str | None = None
    """Folder or hub name of a vision model (ViT, CLIP, SigLIP, ...) or ``smoke:vision`` (tiny, random); null reads no
    pictures, unless ``model.encoder`` is a model of both sides (ViLT), which needs no tower."""
    fusion: str = "attention"
    """Key of ``comoe.models.fusion.FUSIONS``: concat, attention (text tokens look at image tokens), tokens (the text
    encoder reads the image tokens behind the text), or gated."""
    train_tower: bool = False
    """Train the tower too; otherwise it stays as it was read."""
    route_image_tokens: bool = False
    """Send image tokens through the experts too, where the text encoder reads them."""


@dataclass(slots=True)
class ModelConfig:
    """Encoder, experts and heads."""

    encoder: str = "kit:minilm"
    """Folder, hub name, ``kit:minilm`` (the starter kit), ``smoke:encoder``, or with a decoder ``smoke:t5`` and
    ``smoke:bart`` (tiny, random)."""
    trust_remote_code: bool = False
    """Let the encoder's repository run its own Python code."""
    dropout: float | None = None
    """Sets every dropout of encoder, experts and heads; null keeps the encoder's own and 0.1 in the heads."""
    train_layers: int | str = "all"
    """What of the pre-trained encoder is trained: all, none, or the number of last layers (of encoder and decoder
    each), the embeddings then frozen. Experts and heads always train."""
    projection_width: int = 128
    """Width P of the embeddings that the contrastive loss compares."""
    private_width: int = 0
    """Hidden width of a feed-forward of its own that each task puts between the shared states and its head; 0 is
    none."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """The experts."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The pictures."""
