"""The recipe: every option of a run as nested dataclasses, each with its meaning, unit and default.

``comoe.config.load`` fills these from one YAML file and ``key=value`` overrides. Steps are
optimizer steps, tokens are sub-word tokens, seconds are seconds. A field typed ``... | str``
accepts the word ``auto`` beside its number.
"""

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
    """Key of ``comoe.models.moe.gate.GATES``: sigmoid (experts cooperate), softmax (they compete;
    the ablation), or uniform (all experts in turn, whatever the token: only for measuring
    speed)."""
    route_by: str = "token"
    """What the gate sees: token, task, or both. With task and both a post becomes one row per
    labelled task."""
    layers: str | list[int] = "alternate"
    """Layers that get experts: all, alternate (every second, the last one included), last_half, or
    a list of layer numbers from 0. A word counts in encoder and decoder each; numbers go on from
    the encoder into the decoder."""
    expert_width: int | str = "auto"
    """Hidden width F of one expert; auto is a quarter of the encoder's width, at least 16."""
    shared_width: int = 0
    """Hidden width of a shared expert that every token visits; 0 is none."""
    output_init: float = 0.0
    """Standard deviation of the experts' output projection at the start; 0 starts as the
    pre-trained encoder."""
    temperature: float = 1.0
    """Divides the gate's logits; anything but 1 is warned about (arXiv:2602.01466)."""
    cooperation_threshold: float = 0.0
    """Picked experts whose score is below this add nothing (never the best one); 0 is off."""
    task_embedding_width: int = 64
    """Width of the task embedding that ``route_by: task | both`` reads."""
    balance: str = "bias"
    """none, or bias: after each step the bias of a busy expert falls and an idle one's rises
    (arXiv:2408.15664). Can be combined with ``loss.balance_weight``, ``loss.z_weight`` and
    ``loss.task_separation_weight``."""
    balance_rate: float = 0.001
    """Step u of the balance bias."""


@dataclass(slots=True)
class VisionConfig:
    """How the pictures of posts are read."""

    tower: str | None = None
    """Folder or hub name of a vision model (ViT, CLIP, SigLIP, ...) or ``smoke:vision`` (tiny,
    random); null reads no pictures, unless ``model.encoder`` is a model of both sides (ViLT), which
    needs no tower."""
    fusion: str = "attention"
    """Key of ``comoe.models.vision.fusion.FUSIONS``: concat, attention (text tokens look at image
    tokens), tokens (the text encoder reads the image tokens behind the text), or gated."""
    train_tower: bool = False
    """Train the tower too; otherwise it stays as it was read."""
    route_image_tokens: bool = False
    """Send image tokens through the experts too, where the text encoder reads them."""


@dataclass(slots=True)
class ModelConfig:
    """Encoder, experts and heads."""

    encoder: str = "kit:minilm"
    """Folder, hub name, ``kit:minilm`` (the starter kit), ``smoke:encoder``, or with a decoder
    ``smoke:t5`` and ``smoke:bart`` (tiny, random)."""
    trust_remote_code: bool = False
    """Let the encoder's repository run its own Python code."""
    dropout: float | None = None
    """Sets every dropout of encoder, experts and heads; null keeps the encoder's own and 0.1 in the
    heads."""
    train_layers: int | str = "all"
    """What of the pre-trained encoder is trained: all, none, or the number of last layers (of
    encoder and decoder each), the embeddings then frozen. Experts and heads always train."""
    projection_width: int = 128
    """Width P of the embeddings that the contrastive loss compares."""
    private_width: int = 0
    """Hidden width of a feed-forward of its own that each task puts between the shared states and
    its head; 0 is none."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """The experts."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The pictures."""


@dataclass(slots=True)
class ContrastiveConfig:
    """Task-adaptive contrastive loss over the embeddings of all ranks."""

    weight: float = 0.1
    """Weight of the term; 0 switches it off."""
    temperature: float = 0.1
    """Divides the cosine similarities."""
    learn_temperature: bool = False
    """Let each task's temperature be learned from there, never below 0.01."""
    over: str = "global"
    """global compares the posts of all ranks, local only those of one rank (the ablation)."""
    queue_size: int = 0
    """Past embeddings per task that anchors are compared with too (XBM), for rare labels; 0 is
    none."""
    queue_warmup: int = 0
    """Optimizer steps before the queue is read: at first embeddings drift too fast to be kept."""
    chunk_size: int | None = None
    """GradCache: the contrastive set is the whole optimizer step over all ranks, whatever fits in
    memory. Every forward pass takes this many posts (``train.micro_batch_size`` must then be auto)
    and is run twice. null compares the posts of one forward pass over all ranks."""


@dataclass(slots=True)
class ImageTextConfig:
    """Losses between the two sides of posts with pictures: (1 - itc - itm) tasks + itc ITC + itm
    ITM; off without pictures (arXiv:2309.07794)."""

    itc_weight: float = 0.1
    """Image-text contrast: a picture and its own text among all of the global batch; 0 switches it
    off."""
    itm_weight: float = 0.1
    """Image-text matching: is this the picture's own text; 0 switches it off."""
    temperature: float = 0.07
    """Where the learned temperature of the contrast starts, at least 0.01."""
    negatives: str = "hard"
    """Which other post's text replaces the own one in half of the pairs: hard (drawn by similarity)
    or random."""


@dataclass(slots=True)
class AdversarialConfig:
    """Adversarial sharing: a discriminator behind a gradient reversal, which the shared
    representation must not help (arXiv:1505.07818)."""

    weight: float = 0.0
    """Weight of the term; 0 switches it off."""
    predict: str = "task"
    """What of a post the shared representation is not to tell: task (which data set it is from) or
    any column of the data by its name (platform, domain); posts whose cell is empty are left
    out."""
    hidden_width: int = 128
    """Width of the discriminator's hidden layer."""
    gamma: float = 10.0
    """How fast the reversal sets in: its strength is 2 / (1 + exp(-gamma p)) - 1, p the share of
    the steps done."""
    balanced: bool = False
    """Weigh each value by the inverse of its frequency, so that a rare one counts as much as a
    common one."""


@dataclass(slots=True)
class LossConfig:
    """The terms of the objective; a weight of 0 switches a term off."""

    weighting: str = "equal"
    """How the tasks' losses become one number, a key of
    ``comoe.losses.weighting.strategies.WEIGHTINGS``: equal (their sum), static, uncertainty,
    uncertainty_positive, dynamic_average, gradnorm, pcgrad or cagrad."""
    weighting_rate: float = 0.01
    """Rate of learned weights: of the variances of uncertainty and uncertainty_positive, under the
    schedule of all rates and without decay, and of gradnorm's weights, always the same."""
    weighting_temperature: float = 2.0
    """Of dynamic_average: the larger, the more alike the weights."""
    weighting_window: int = 100
    """Optimizer steps whose losses dynamic_average averages before it compares them with those
    before; the paper takes an epoch."""
    gradnorm_alpha: float = 1.5
    """How strongly gradnorm favours tasks whose loss has fallen less; 0 makes all gradients equally
    long."""
    cagrad_c: float = 0.5
    """How far cagrad goes from the mean gradient for the task that is worst off, at least 0 and
    below 1; 0 is equal."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive term."""
    image_text: ImageTextConfig = field(default_factory=ImageTextConfig)
    """Terms between picture and text."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """What the shared representation must not tell."""
    balance_weight: float = 0.0
    """Weight of the load-balance loss of the gates."""
    z_weight: float = 0.0
    """Weight of the z-loss of the gates."""
    orthogonal_weight: float = 0.0
    """Weight of the squared covariance of shared states and private parts
    (``model.private_width``), which keeps a private part from saying what is shared already
    (arXiv:1608.06019)."""
    task_separation_weight: float = 0.0
    """Weight of the mean cosine between the tasks' mean gate vectors; pulls tasks to different
    experts (arXiv:2605.20916, 0.4 there)."""


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
class ParallelConfig:
    """How the run is laid over ranks; ZeRO, precision and clipping are in the DeepSpeed JSON."""

    ep_size: int | str = "auto"
    """Ranks that share one set of experts; auto is the largest divisor of both the ranks and the
    experts."""
    timeout_seconds: float = 1800.0
    """A rank that is silent, or a training step that takes, longer than this ends the run, with a
    message that names the rank and the step."""


@dataclass(slots=True)
class NormalizeConfig:
    """How the text of a post is cleaned before it is tokenised."""

    preset: str = "social"
    """none, social (users, links, emoji to words; case and hashtag words kept),
    strict (Stein & Keller: lower case; URLs, mentions, hashtags, emoji, punctuation removed) or
    weibo (social for Chinese posts: full-width forms, #topics#, emoji codes, repost chains)."""
    language: str = "en"
    """Language of the emoji names, as in the package emoji (en, zh, de, ...)."""
    user: str = "@user"
    """What replaces a user name under the presets social and weibo."""
    url: str = "http"
    """What replaces a link under the presets social and weibo."""


@dataclass(slots=True)
class DataConfig:
    """Where posts come from and what is done with bad ones."""

    root: str | None = None
    """Folder that relative task paths start from; null is the recipe's own. ``kit:posts`` is the
    starter kit, ``smoke:posts``, ``smoke:drawn_posts`` and ``smoke:implied_posts`` are
    generated."""
    max_length: int = 128
    """Longest post in tokens; the rest is cut and counted."""
    limit_per_task: int | None = None
    """Keep at most this many training posts per data set (chosen by the seed); null keeps all."""
    limit_eval: int | None = None
    """Keep at most this many validation and test posts per data set; null keeps all."""
    validation_fraction: float = 0.1
    """Share of the training posts that becomes the validation split where a data set has none
    (stratified by label)."""
    on_error: str = "stop"
    """stop at the first bad row, or skip: set it aside, count it and go on."""
    max_characters: int = 100_000
    """A text longer than this is a bad row."""
    mixing: str = "proportional"
    """How often data sets are drawn from, key of ``comoe.data.sampling.mixing.MIXINGS``:
    proportional, uniform, temperature, or progress (as temperature, and more often where the
    validation loss still falls)."""
    mixing_temperature: float = 2.0
    """Rates are proportional to size ** (1 / temperature) under ``mixing: temperature`` and
    ``progress``."""
    posts_per_label: int = 0
    """Each batch holds at least this many posts of every label of the contrastive tasks, where the
    data have them; labels take turns where the batch has no room. 0 leaves it to chance; 2 gives
    every label a positive pair."""
    image_root: str | None = None
    """Folder that the paths of pictures start from; null is the folder of the file that names
    them."""
    max_image_pixels: int = 50_000_000
    """A picture with more pixels than this is bad: decoded it could fill the memory."""
    max_image_bytes: int = 20_000_000
    """A picture file larger than this is bad."""
    on_bad_image: str = "skip"
    """What becomes of a post whose picture is broken, missing, huge or no picture: skip sets the
    post aside, text keeps it without picture; both are counted and named."""
    hide: str = "none"
    """none, or what the model is not to see of the posts: text or image. For measuring what one
    side alone can tell."""
    noise: list[str] = field(default_factory=list)
    """Keys of ``comoe.data.text.noise.NOISES``: typos, no_hashtags, no_emoji. At the end of the run
    the validation posts, and the test posts where they have labels, are scored once more under
    each."""
    noise_rate: float = 0.1
    """Share of the words that get a typo under ``noise: [typos]``."""
    cache: bool = True
    """Keep tokenised posts, and which pictures are good, on disk and use them again."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    """Cleaning of the text."""


SCORED_INSTEAD = {"text": "label_words"}
"""Kind of task -> what it is where labels are given."""


@dataclass(slots=True)
class TaskConfig:
    """One task. Tasks with the same path, format, subset, splits and text columns share their posts."""

    path: str = ""
    """Folder, file, or hub name; relative to ``data.root``. A folder holds train, validation (val,
    dev), test files."""
    kind: str = "single_label"
    """Key of ``comoe.tasks.kinds.registry.KINDS``: single_label, multi_label, regression, tags,
    phrases (words of the post, to be found), unlabelled; and with an encoder-decoder text (written
    by the decoder) and label_words (the decoder scores each label's words). text with ``labels``
    means label_words."""
    format: str = "auto"
    """Key of ``comoe.data.reading.sources.READERS``: tweeteval, jsonl, csv, tsv, parquet, txt, hub;
    auto looks at the path."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    splits: dict[str, str] = field(default_factory=dict)
    """File (or hub split) of train, validation, test where the names are not the usual ones."""
    text: str = "text"
    """Column with the post; for tags a list of words."""
    pair: str | None = None
    """Column with a second text (stance target, aspect)."""
    image: str | None = None
    """Column with the picture: a path, or the bytes of the file; an empty cell is a post without
    picture."""
    label: str = "label"
    """Column with the label; empty cells are posts without this label."""
    confidence: str | None = None
    """Column with a number in [0, 1] per label, an annotator's agreement or a model's certainty; an
    empty cell is 1. Its mean is shown by --dry-run."""
    confidence_strategy: str = "none"
    """What the confidence does in training: none, input (scales what the encoder reads of the
    post), output (scales the post's loss), or input_output (arXiv:2412.09046)."""
    auxiliary: bool = False
    """Only there to help the others: trained and reported, but in no mean, and no checkpoint is
    chosen by it."""
    hold_out: dict[str, list[str]] = field(default_factory=dict)
    """Column -> values. Training and validation posts with one of them leave these splits and
    become a further split, ``unseen``, scored at the end; tasks of one data set say the same."""
    slices: list[str] = field(default_factory=list)
    """Columns; the main metrics are also given for the posts of each of their values
    (``accuracy@implicit=true``)."""
    prompt: str | None = None
    """What an encoder-decoder reads of a post for a task of kind text or label_words: {text} and
    {pair} stand for the cleaned post and its second text. A post too long for ``data.max_length``
    loses the end of {text}."""
    label_words: list[str] = field(default_factory=list)
    """Words that the decoder scores for each label, in the order of ``labels``; empty are the
    labels themselves."""
    max_answer_length: int = 32
    """Longest answer of kind text in tokens, its end sign included; longer ones in the data are cut
    and counted."""
    num_beams: int = 1
    """Beams of the search for an answer of kind text; 1 is greedy."""
    balanced_sampling: bool = False
    """Draw the posts of the data set such that the labels of this task come equally often
    (single_label and label_words only)."""
    labels: list[str] = field(default_factory=list)
    """Label names in the order of their ids; empty finds them in the training split."""
    metric: str = "auto"
    """Main metric, a key of ``comoe.tasks.metrics.METRICS``; auto depends on the kind (macro_f1,
    pearson, span_f1)."""
    weight: float = 1.0
    """Weight of this task's loss under ``loss.weighting: static``."""
    class_weights: str | list[float] = "none"
    """none, balanced (inverse frequency), or one number per label."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all labels; for multi_label of each label's yes or no,
    which both move towards 1/2."""
    contrastive: bool | str = "auto"
    """Take part in the contrastive loss; auto is yes, but no for tags, whose positives (two dropout
    draws of one post) cost a second forward pass."""
    contrastive_weight: float = 1.0
    """Weight of this task inside the contrastive term."""
    contrastive_temperature: float | None = None
    """Temperature of this task; null is ``loss.contrastive.temperature``."""
    contrastive_width: float | str = "auto"
    """Regression: positives weigh exp(-|difference of labels| / width); auto is the standard
    deviation of the training labels."""

    def __post_init__(self) -> None:
        # A text that is one of a few labels is better scored than written.
        if self.labels:
            self.kind = SCORED_INSTEAD.get(self.kind, self.kind)


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
    """Keep only each encoder layer's input and compute the rest again in the backward pass: less
    memory, about a third more time, the same numbers."""
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
    """Evaluations without a better ``early_stop_metric`` before the run stops; 0 never stops
    early."""
    calibrate: bool = True
    """At the end of the run fit a temperature per task on the validation posts, so that
    probabilities are frequencies; it changes no answer. The calibration error is reported in any
    case."""
    fit_thresholds: bool = True
    """At the end of the run fit the probability from which a label is given (multi_label;
    single_label with two labels) on the validation posts; kept only where it also gains on posts
    that did not choose it."""
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


__all__ = [
    "AdversarialConfig",
    "ContrastiveConfig",
    "DataConfig",
    "ImageTextConfig",
    "LossConfig",
    "ModelConfig",
    "MoeConfig",
    "NormalizeConfig",
    "ParallelConfig",
    "Recipe",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "VisionConfig",
]
