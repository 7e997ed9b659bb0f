"""The recipe: every option of a run as nested dataclasses, each with its meaning, unit and default.

``comoe.config`` fills these from one YAML file and ``key=value`` overrides. Steps are optimizer steps, tokens are
sub-word tokens, seconds are seconds. A field typed ``... | str`` accepts the word ``auto`` beside its number.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RunConfig:
    """Name and place of the run."""

    name: str = "starter"
    """Folder of the run below ``output_dir``; letters, digits, dot, dash, underscore."""
    output_dir: str = "runs"
    """Folder that holds all runs."""
    overwrite: bool = False
    """Delete what an earlier run of the same name left; otherwise such a start is refused."""
    verbose: bool = False
    """Let DeepSpeed and the libraries log as they like; otherwise only warnings are shown."""
    histograms: bool = True
    """Write histograms of the gate's scores to TensorBoard at each evaluation."""


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
    """Encoder layers that get experts: all, alternate (every second, the last one included), last_half, or a list of
    layer numbers from 0."""
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
class ModelConfig:
    """Encoder, experts and heads."""

    encoder: str = "kit:minilm"
    """Folder, hub name, ``kit:minilm`` (the starter kit) or ``smoke:encoder`` (tiny, random)."""
    trust_remote_code: bool = False
    """Let the encoder's repository run its own Python code."""
    dropout: float | None = None
    """Sets every dropout of encoder, experts and heads; null keeps the encoder's own and 0.1 in the heads."""
    train_layers: int | str = "all"
    """What of the pre-trained encoder is trained: all, none, or the number of last layers, the embeddings then frozen.
    Experts and heads always train."""
    projection_width: int = 128
    """Width P of the embeddings that the contrastive loss compares."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """The experts."""


@dataclass(slots=True)
class ParallelConfig:
    """How the run is laid over ranks; ZeRO, precision and clipping are in the DeepSpeed JSON."""

    ep_size: int | str = "auto"
    """Ranks that share one set of experts; auto is the largest divisor of both the ranks and the experts."""
    timeout_seconds: float = 1800.0
    """A rank that is silent, or a training step that takes, longer than this ends the run, with a message that names
    the rank and the step."""


@dataclass(slots=True)
class NormalizeConfig:
    """How the text of a post is cleaned before it is tokenised."""

    preset: str = "social"
    """none, social (users, links, emoji to words; case and hashtag words kept) or
    strict (Stein & Keller: lower case; URLs, mentions, hashtags, emoji, punctuation removed)."""
    language: str = "en"
    """Language of the emoji names, as in the package emoji (en, zh, de, ...)."""
    user: str = "@user"
    """What replaces a user name under the preset social."""
    url: str = "http"
    """What replaces a link under the preset social."""


@dataclass(slots=True)
class DataConfig:
    """Where posts come from and what is done with bad ones."""

    root: str | None = None
    """Folder that relative task paths start from; null is the recipe's own. ``kit:posts`` is the starter kit."""
    max_length: int = 128
    """Longest post in tokens; the rest is cut and counted."""
    limit_per_task: int | None = None
    """Keep at most this many training posts per data set (chosen by the seed); null keeps all."""
    limit_eval: int | None = None
    """Keep at most this many validation and test posts per data set; null keeps all."""
    validation_fraction: float = 0.1
    """Share of the training posts that becomes the validation split where a data set has none (stratified by label)."""
    on_error: str = "stop"
    """stop at the first bad row, or skip: set it aside, count it and go on."""
    max_characters: int = 100_000
    """A text longer than this is a bad row."""
    mixing: str = "proportional"
    """Key of ``comoe.data.sampling.MIXINGS``: proportional, uniform, or temperature."""
    mixing_temperature: float = 2.0
    """Rates are proportional to size ** (1 / temperature) under ``mixing: temperature``."""
    cache: bool = True
    """Keep tokenised posts on disk and use them again."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    """Cleaning of the text."""


@dataclass(slots=True)
class TaskConfig:
    """One task. Tasks with the same path, format, subset, splits and text columns share their posts."""

    path: str = ""
    """Folder, file, or hub name; relative to ``data.root``. A folder holds train, validation (val, dev), test files."""
    kind: str = "single_label"
    """Key of ``comoe.tasks.kinds.KINDS``: single_label, multi_label, regression, tags."""
    format: str = "auto"
    """Key of ``comoe.data.sources.READERS``: tweeteval, jsonl, csv, tsv, parquet, hub; auto looks at the path."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    splits: dict[str, str] = field(default_factory=dict)
    """File (or hub split) of train, validation, test where the names are not the usual ones."""
    text: str = "text"
    """Column with the post; for tags a list of words."""
    pair: str | None = None
    """Column with a second text (stance target, aspect)."""
    label: str = "label"
    """Column with the label; empty cells are posts without this label."""
    confidence: str | None = None
    """Reserved column with a number in [0, 1] per label; read by the data, shown by --dry-run."""
    labels: list[str] = field(default_factory=list)
    """Label names in the order of their ids; empty finds them in the training split."""
    metric: str = "auto"
    """Main metric, a key of ``comoe.tasks.metrics.METRICS``; auto depends on the kind (macro_f1, pearson, span_f1)."""
    weight: float = 1.0
    """Weight of this task's loss under ``loss.weighting: static``."""
    class_weights: str | list[float] = "none"
    """none, balanced (inverse frequency), or one number per label."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all labels."""
    contrastive: bool = True
    """Take part in the contrastive loss (single-label tasks)."""


@dataclass(slots=True)
class ContrastiveConfig:
    """Task-adaptive contrastive loss over the embeddings of all ranks."""

    weight: float = 0.1
    """Weight of the term; 0 switches it off."""
    temperature: float = 0.1
    """Divides the cosine similarities."""


@dataclass(slots=True)
class LossConfig:
    """The terms of the objective; a weight of 0 switches a term off."""

    weighting: str = "equal"
    """Key of ``comoe.weighting.WEIGHTINGS``: equal or static."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive term."""
    balance_weight: float = 0.0
    """Weight of the load-balance loss of the gates."""
    z_weight: float = 0.0
    """Weight of the z-loss of the gates."""
    task_separation_weight: float = 0.0
    """Weight of the mean cosine between the tasks' mean gate vectors; pulls tasks to different experts
    (arXiv:2605.20916, 0.4 there)."""


@dataclass(slots=True)
class TrainConfig:
    """The optimization."""

    epochs: float = 3.0
    """Passes over the training posts, unless ``max_steps`` is given."""
    max_steps: int | None = None
    """Optimizer steps; null follows ``epochs``."""
    batch_size: int = 32
    """Posts per optimizer step on all ranks together."""
    micro_batch_size: int | str = "auto"
    """Posts per forward pass on one rank; auto is the whole share of the rank, at most 128."""
    optimizer: str = "adamw"
    """adamw or sgd."""
    learning_rate: float = 5e-5
    """Peak rate of the encoder."""
    expert_learning_rate: float = 5e-4
    """Peak rate of experts and gates."""
    head_learning_rate: float = 5e-4
    """Peak rate of heads and projections."""
    weight_decay: float = 0.01
    """Decay of matrices; norms, biases and loss weights have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment rates."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.0
    """Momentum of sgd."""
    schedule: str = "linear"
    """linear, cosine, or constant, after the warm-up."""
    warmup_fraction: float = 0.06
    """Share of the steps in which the rate rises from 0."""
    activation_checkpointing: bool = False
    """Keep only each encoder layer's input and compute the rest again in the backward pass: less memory, about a third
    more time, the same numbers."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches clipping off."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | str = "auto"
    """Steps between two evaluations; auto is twice an epoch."""
    save_every: int | str = "auto"
    """Steps between two checkpoints; auto follows ``eval_every``."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay beside the best one."""
    early_stop_metric: str = "mean"
    """mean (of each task's main metric) or task/metric."""
    patience: int = 0
    """Evaluations without a better ``early_stop_metric`` before the run stops; 0 never stops early."""
    max_nonfinite: int = 5
    """Steps in a row with a loss that is not finite before the run stops."""
    seed: int = 0
    """Seeds weights, sampling and dropout."""


@dataclass(slots=True)
class Recipe:
    """One run, whole."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name and place."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder, experts, heads."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Posts."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Task name -> task."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimization."""
