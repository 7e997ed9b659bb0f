"""Options of the recipe below ``loss``: contrastive, image-text and gate terms."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """Past embeddings per task that anchors are compared with too (XBM), for rare labels; 0 is none."""
    queue_warmup: int = 0
    """Optimizer steps before the queue is read: at first embeddings drift too fast to be kept."""
    chunk_size: int | None = None
    """GradCache: the contrastive set is the whole optimizer step over all ranks, whatever fits in memory. Every forward
    pass takes this many posts (``train.micro_batch_size`` must then be auto) and is run twice. null compares the posts
    of one forward pass over all ranks."""


@dataclass(slots=True)
class ImageTextConfig:
    """Losses between the two sides of posts with pictures: (1 - itc - itm) tasks + itc ITC + itm ITM; off without
    pictures (arXiv:2309.07794)."""

    itc_weight: float = 0.1
    """Image-text contrast: a picture and its own text among all of the global batch; 0 switches it off."""
    itm_weight: float = 0.1
    """Image-text matching: is this the picture's own text; 0 switches it off."""
    temperature: float = 0.07
    """Where the learned temperature of the contrast starts, at least 0.01."""
    negatives: str = "hard"
    """Which other post's text replaces the own one in half of the pairs: hard (drawn by similarity) or random."""


@dataclass(slots=True)
class AdversarialConfig:
    """Adversarial sharing: a discriminator behind a gradient reversal, which the shared representation must not help
    (arXiv:1505.07818)."""

    weight: float = 0.0
    """Weight of the term; 0 switches it off."""
    predict: str = "task"
    """What of a post the shared representation is not to tell: task (which data set it is from) or any column of the
    data by its name (platform, domain); posts whose cell is empty are left out."""
    hidden_width: int = 128
    """Width of the discriminator's hidden layer."""
    gamma: float = 10.0
    """How fast the reversal sets in: its strength is 2 / (1 + exp(-gamma p)) - 1, p the share of the steps done."""
    balanced: bool = False
    """Weigh each value by the inverse of its frequency, so that a rare one counts as much as a common one."""


@dataclass(slots=True)
class LossConfig:
    """The terms of the objective; a weight of 0 switches a term off."""

    weighting: str = "equal"
    """How the tasks' losses become one number, a key of ``comoe.weighting.WEIGHTINGS``: equal (their sum), static,
    uncertainty, uncertainty_positive, dynamic_average, gradnorm, pcgrad or cagrad."""
    weighting_rate: float = 0.01
    """Rate of learned weights: of the variances of uncertainty and uncertainty_positive, under the schedule of all
    rates and without decay, and of gradnorm's weights, always the same."""
    weighting_temperature: float = 2.0
    """Of dynamic_average: the larger, the more alike the weights."""
    weighting_window: int = 100
    """Optimizer steps whose losses dynamic_average averages before it compares them with those before; the paper takes
    an epoch."""
    gradnorm_alpha: float = 1.5
    """How strongly gradnorm favours tasks whose loss has fallen less; 0 makes all gradients equally long."""
    cagrad_c: float = 0.5
    """How far cagrad goes from the mean gradient for the task that is worst off, at least 0 and below 1; 0 is equal."""
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
    """Weight of the squared covariance of shared states and private parts (``model.private_width``), which keeps a
    private part from saying what is shared already (arXiv:1608.06019)."""
    task_separation_weight: float = 0.0
    """Weight of the mean cosine between the tasks' mean gate vectors; pulls tasks to different experts
    (arXiv:2605.20916, 0.4 there)."""
