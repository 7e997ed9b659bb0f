"""The recipe: every option of a run, its type, range, words, default, unit, meaning, and when it is read.

``comoe.config.load`` fills these from one YAML file and ``key=value`` overrides. Steps are
optimizer steps, tokens are sub-word tokens, seconds are seconds. Words are the keys of the table of
the module that implements them (``tests/unit/config/test_recipe.py`` holds them together).
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Le, Len, MinLen
from pydantic import model_validator

from comoe.config.fields import (
    AT_LEAST_TWO,
    DIFFERENT,
    FOLDER_NAME,
    KEPT_LAYERS,
    PROMPT,
    TOP_LAYERS,
    Count,
    CountFrom0,
    Epochs,
    Flag,
    Fraction,
    Given,
    Names,
    NotNegative,
    Positive,
    PositiveShare,
    Posts,
    Rate,
    Seconds,
    Seed,
    Share,
    Table,
    Temperature,
    Text,
    Whole,
    Width,
    WidthFrom0,
    at_most,
    one_of,
    option,
    section,
)  # fmt: skip

GATE_TABLE = Table("comoe.models.moe.gate", "GATES")
KIND_TABLE = Table("comoe.tasks.kinds.registry", "KINDS")
LOSS_TABLE = Table("comoe.losses.objective", "LOSSES")
METRIC_TABLE = Table("comoe.tasks.metrics", "METRICS")
READER_TABLE = Table("comoe.data.reading.sources", "READERS")


@section
class MoeConfig:
    """The cooperative experts: beside the feed-forward of some layers, or in their linear maps."""

    form: Literal["beside", "lora"] = "beside"
    """beside: gated feed-forwards beside the feed-forward of a layer, at the start 0. lora:
    low-rank updates (arXiv:2106.09685) of the linear maps of a layer, W x + sum of g_e (alpha /
    rank) B_e A_e x, by default of a frozen model."""
    num_experts: Annotated[Whole, Ge(0), at_most(65_536)] = 8
    """Experts per layer; 0 leaves the encoder without experts."""
    top_k: Count = 2
    """Experts per token, 1 to ``num_experts``."""
    gate: Annotated[Literal["sigmoid", "softmax", "random", "uniform"], GATE_TABLE] = "sigmoid"
    """sigmoid (experts cooperate), softmax (they compete; the ablation), random (AdaMix: in
    training a post goes through one expert of each layer, drawn anew in each step; evaluations and
    exports have one block, the mean of the experts), or uniform (all experts in turn, whatever the
    token: only for measuring speed)."""
    route_by: Literal["token", "task", "both"] = "token"
    """What the gate sees: token, task, or both. With task and both a post becomes one row per
    labeled task."""
    layers: (
        Literal["all", "alternate", "last_half"]
        | Annotated[Text, TOP_LAYERS]
        | Annotated[list[CountFrom0], MinLen(1), DIFFERENT]
    ) = "alternate"
    """Layers that get experts: all, alternate (every second, the last one included), last_half,
    top-<n> (the last n), or a list of layer numbers from 0. A word counts in encoder and decoder
    each; numbers go on from the encoder into the decoder."""
    targets: Literal["attention", "feed_forward", "all"] = option(
        "all", read_when="model.moe.form = lora"
    )
    """Linear maps of a layer that get experts: of its attention, of its feed-forward, or all."""
    rank: Width = option(4, read_when="model.moe.form = lora")
    """Rank r of one expert in each linear map; four of rank 4 have the parameters of one LoRA of rank
    16."""
    alpha: Positive = option(8.0, read_when="model.moe.form = lora")
    """Each expert's update is multiplied by alpha / ``rank`` (``lora_alpha`` in peft)."""
    dropout: Share = option(0.1, read_when="model.moe.form = lora")
    """Dropout on what the experts of a linear map read, one mask for all of them; ``model.dropout``
    overrides it."""
    gate_scope: Literal["model", "layer"] = option("model", read_when="model.moe.form = lora")
    """model: one gate for all linear maps, which reads the input of the first layer with experts
    (an encoder-decoder has one per stack). layer: one for the linear maps of each layer."""
    expert_width: Width | Literal["auto"] = option("auto", read_when="model.moe.form = beside")
    """Hidden width F of one expert; auto is a quarter of the encoder's width, at least 16."""
    shared_width: WidthFrom0 = option(
        0, read_when="model.moe.num_experts > 0 and model.moe.form = beside"
    )
    """Hidden width of a shared expert that every token visits; 0 is none."""
    output_init: NotNegative = 0.0
    """Standard deviation of the experts' output projection (of lora: B) at the start; 0 starts as
    the pre-trained encoder."""
    temperature: Positive = 1.0
    """Divides the gate's logits; anything but 1 is warned about (arXiv:2602.01466)."""
    cooperation_threshold: Share = option(0.0, read_when="model.moe.top_k > 1")
    """Selected experts whose score is below this add nothing (never the best one); 0 is off."""
    task_embedding_width: Width = option(64, read_when="model.moe.route_by = task or both")
    """Width of the task embedding that ``route_by: task | both`` reads."""
    task_prior: NotNegative | Literal["own"] = 0.0
    """Experts that lean to a task: they are dealt to the tasks in turn (expert e to task e modulo
    the number of tasks), and those of its task have this much more in a token's logits, throughout
    the run. own: a task sees its own experts and the shared one alone. 0 is off; ``route_by`` task
    or both."""
    gate_scale: Positive | Literal["auto"] = "auto"
    """Factor of the gate's weights, which sum to 1. auto: selected experts weigh 1 on average at
    the start, so that the experts of a token learn as fast as one dense block of their total width:
    it is ``top_k``; at ``top_k: 1``, whose weight is the expert's share of all scores, 1 over the
    mean share of the best expert at the start. 1 is the weighted mean of the paper."""
    expert_init: Positive | Literal["fan_in"] = "fan_in"
    """Standard deviation of the experts' input projections (of lora: A) at the start; fan_in is 1 /
    sqrt(width of what they read)."""
    balance: Literal["none", "bias"] = "bias"
    """none, or bias: after each step the bias of a busy expert falls and an idle one's rises
    (arXiv:2408.15664). Can be combined with ``loss.balance_weight``, ``loss.z_weight`` and
    ``loss.task_separation_weight``."""
    balance_rate: NotNegative = option(0.001, read_when="model.moe.balance = bias")
    """Step u of the balance bias."""
    balance_schedule: Literal["follow_rate", "constant"] = option(
        "follow_rate", read_when="model.moe.balance = bias"
    )
    """follow_rate multiplies ``balance_rate`` by the schedule of the learning rates, so that late
    selections are the gate's and not the bias's; constant does not."""


@section
class VisionConfig:
    """How the images of posts are read."""

    tower: Text | None = None
    """Folder or hub name of a vision model (ViT, CLIP, SigLIP, ...) or ``smoke:vision`` (tiny,
    random); null reads no images, unless ``model.encoder`` is a model of both sides (ViLT), which
    needs no tower."""
    fusion: Literal["concat", "attention", "tokens", "gated"] = option(
        "attention", read_when="images are read"
    )
    """How text and image meet: concat, attention (text tokens look at image
    tokens), tokens (the text encoder reads the image tokens behind the text), or gated."""
    train_tower: Flag = option(False, read_when="images are read")
    """Train the tower too; otherwise it stays as it was read."""
    route_image_tokens: Flag = option(False, read_when="images are read")
    """Send image tokens through the experts too, where the text encoder reads them."""


@section
class LexiconConfig:
    """Numbers that a lexicon has for words, such as their valence."""

    path: Given | None = None
    """vader (the package of ``comoe[lexicon]``), or a file with a word or phrase and one or more
    numbers per line, tabs or commas between; the lexicon's content goes into the export. Of a
    concept hierarchy give 1 and 0 per concept. null reads none. ``loss.lexicon_weight`` learns to
    predict the numbers; not with tasks that a decoder predicts."""
    input: Flag = True
    """Adds a linear map of a word's numbers, 0 at the start, to the embedding of each of its
    pieces; false leaves them to ``loss.lexicon_weight``, and the export needs no lexicon."""


@section
class ModelConfig:
    """Encoder, experts and heads."""

    encoder: Given = "kit:minilm"
    """Folder, hub name, ``kit:minilm`` (the starter kit), ``kit:mpnet`` (all-mpnet-base-v2, five
    times larger), ``kit:chinese_encoder`` (m3e-small, not for commercial use) or ``smoke:encoder``
    (tiny, random); with a decoder ``smoke:t5`` and ``smoke:bart`` (tiny, random); decoder-only
    ``kit:smollm2`` (SmolLM2-135M-Instruct) and ``smoke:llama`` (tiny, random); of both sides
    ``smoke:vilt`` (tiny, random). Of a CLIP or SigLIP the text half is taken."""
    trust_remote_code: Flag = False
    """Let the repositories of encoder and vision tower run their own Python code; counts on the
    command line alone, also for a dry run."""
    keep_layers: Count | Annotated[Text, KEPT_LAYERS] | None = None
    """Builds the encoder from some of its pre-trained layers: a number takes so many, evenly spaced
    and the last one included, ``top-3`` the last three, ``bottom-3`` the first three; null keeps
    all."""
    random_width: Width | None = None
    """Builds an encoder of this hidden width with random weights: tokenizer, family, number of
    layers and width of an attention head are those of ``model.encoder``, the feed-forward is as
    many times wider as there; null takes the pre-trained weights."""
    start_from: Given | None = None
    """Folder of an export of comoe that this run starts from: its encoder, the heads of tasks with
    the same name, kind and labels, and its experts. The blocks of a run with one dense block per
    layer (``moe.num_experts: 1``) become experts: ``moe.top_k`` of them, with the shared one, have
    its hidden units (arXiv:2212.05055). null starts from the pre-trained encoder alone."""
    dropout: Share | None = None
    """Sets every dropout of encoder, experts and heads; null keeps the encoder's own and 0.1 in the
    heads."""
    train_layers: Count | Literal["auto", "all", "none"] = "auto"
    """What of the pre-trained encoder is trained: all, none, or the number of last layers (of
    encoder and decoder each), the embeddings then frozen. auto is none with ``moe.form: lora``,
    else all. Experts and heads always train."""
    pooling: Literal["attention", "mean", "first", "last", "layers"] = "attention"
    """How the states of a text become one vector for a task's head: attention (a learned query per
    task), mean, first (the state of the first token, CLS of BERT), last (that of the last token;
    for decoder-only models), or layers: attention over a mixture of all layers' states that each
    task learns (arXiv:1802.05365), which heads on word tags read too. Measured with 100 posts per
    task: layers lose 0.019, the others are not told apart."""
    projection_width: Width = 128
    """Width P of the embeddings that the contrastive loss compares."""
    private_width: WidthFrom0 = 0
    """Hidden width of a feed-forward of its own that each task puts between the shared states and
    its head; 0 is none. Measured with 100 posts per task: no gain."""
    own_layers: CountFrom0 = 0
    """Last layers of the encoder that each task has for itself, all copies of the pre-trained ones;
    ``loss.soft_sharing_weight`` ties them. A post becomes one row per labeled task: layers below
    these, and below the first one with experts, read it once. They always train, and have no
    experts: the words of ``moe.layers`` count the shared layers. 0 is none; not with tasks that a
    decoder predicts. Measured with 100 posts per task, tied or not: no gain."""
    task_attention_width: WidthFrom0 = 0
    """Width of queries, keys and values of an attention between tasks: what each task has pooled of
    a row looks at what the others have, before the heads. Tasks whose heads pool take part, word
    tags and those of a decoder do not. Does nothing at the start; 0 is none. Measured with
    100 posts per task: no gain."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """The experts."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The images."""
    lexicon: LexiconConfig = field(default_factory=LexiconConfig)
    """Words with numbers."""

    @property
    def row_per_task(self) -> bool:
        """Whether a row of a batch serves one task instead of all that have heads."""
        return self.moe.route_by != "token" or self.own_layers > 0


@section
class ContrastiveConfig:
    """Task-adaptive contrastive loss over the embeddings of all ranks."""

    weight: NotNegative = 0.1
    """Weight of the term beside the tasks; 0 switches it off there."""
    first_steps: CountFrom0 = 0
    """Optimizer steps at the start of the run that learn from this term alone, before the heads, as
    SetFit does for few labels (arXiv:2209.11055). They count in ``train.max_steps`` and
    ``train.epochs``, are not evaluated, and have a warm-up and a schedule of their own; those of
    the tasks begin after them. With ``weight: 0`` the term ends there. 0 is no such stage."""
    temperature: Temperature = 0.1
    """Divides the cosine similarities."""
    learn_temperature: Flag = False
    """Let each task's temperature be learned from there, never below 0.01."""
    over: Literal["global", "local"] = "global"
    """global compares the posts of all ranks, local only those of one rank (the ablation)."""
    views: Annotated[Whole, Ge(1), Le(2)] = 1
    """2 passes every labeled post once more, under other dropout: this second view is a further
    positive and an anchor, so a post alone with its label has a positive too (as in TaCL-CoMoE's
    code, after SimCSE, arXiv:2104.08821). A second forward pass of these posts; kinds without labels
    to compare have it in any case."""
    negatives: Literal["task", "all"] = "task"
    """Which posts an anchor is pushed from: those of its own task, or those of all tasks, but for
    its own post, so that the tasks part in the common space."""
    queue_size: Annotated[Whole, Ge(0), at_most(10_000_000)] = 0
    """Past embeddings per task that anchors are compared with too (XBM), for rare labels; 0 is
    none."""
    queue_warmup: CountFrom0 = option(0, read_when="loss.contrastive.queue_size > 0")
    """Optimizer steps before the queue is read: at first embeddings drift too fast to be kept."""
    chunk_size: Posts | None = None
    """GradCache: the contrastive set is the whole optimizer step over all ranks, whatever fits in
    memory. Every forward pass takes this many posts (``train.micro_batch_size`` must then be auto)
    and is run twice. null compares the posts of one forward pass over all ranks."""


@section
class ImageTextConfig:
    """Losses between the two sides of posts with images: (1 - itc - itm) tasks + itc ITC + itm
    ITM; off without images (arXiv:2309.07794)."""

    itc_weight: Share = option(0.1, read_when="images are read")
    """Image-text contrast: an image and its own text among all of the global batch; 0 switches it
    off."""
    itm_weight: Share = option(0.1, read_when="images are read")
    """Image-text matching: is this the image's own text; 0 switches it off."""
    temperature: Temperature = option(0.07, read_when="images are read")
    """Where the learned temperature of the contrast starts, at least 0.01."""
    separate_passes: Flag = option(False, read_when="images are read")
    """In an encoder of one stream (ViLT), which has no two sides to compare, make them by two more
    passes of the encoder, of each text alone and of each image alone; false leaves the contrast out
    there."""
    negatives: Literal["hard", "random"] = option("hard", read_when="images are read")
    """Which other post's text replaces the own one in half of the pairs: hard (drawn by similarity)
    or random."""


@section
class AdversarialConfig:
    """Adversarial sharing: a discriminator behind a gradient reversal, which the shared
    representation must not help (arXiv:1505.07818)."""

    weight: NotNegative = 0.0
    """Weight of the term; 0 switches it off. Measured with 100 posts per task, alone and with private
    parts: no gain."""
    predict: Given = option("task", read_when="loss.adversarial.weight > 0")
    """What of a post the shared representation is not to tell: task (which data set it is from) or
    any column of the data by its name (platform, domain); posts whose cell is empty are left
    out."""
    hidden_width: Width = option(128, read_when="loss.adversarial.weight > 0")
    """Width of the discriminator's hidden layer."""
    gamma: NotNegative = option(10.0, read_when="loss.adversarial.weight > 0")
    """How fast the reversal sets in: its strength is 2 / (1 + exp(-gamma p)) - 1, p the share of
    the steps done."""
    balanced: Flag = option(False, read_when="loss.adversarial.weight > 0")
    """Weigh each value by the inverse of its frequency, so that a rare one counts as much as a
    common one."""


@section
class LossConfig:
    """The terms of the objective; a weight of 0 switches a term off."""

    weighting: Literal[
        "equal",
        "posts",
        "static",
        "uncertainty",
        "uncertainty_positive",
        "dynamic_average",
        "gradnorm",
        "pcgrad",
        "cagrad",
    ] = "equal"
    """How the tasks' losses become one number: equal (their sum, so a post of a rare task weighs
    more), posts (every labeled post weighs the same), static, uncertainty, uncertainty_positive,
    dynamic_average, gradnorm, pcgrad or cagrad. Measured with 100 posts per task: none of
    dynamic_average, pcgrad and cagrad gains over equal."""
    weighting_rate: Positive = option(
        0.01, read_when="loss.weighting = uncertainty or uncertainty_positive or gradnorm"
    )
    """Rate of learned weights: of the variances of uncertainty and uncertainty_positive, under the
    schedule of all rates and without decay, and of gradnorm's weights, always the same."""
    weighting_temperature: Positive = option(2.0, read_when="loss.weighting = dynamic_average")
    """Of dynamic_average: the larger, the more alike the weights."""
    weighting_window: Count = option(100, read_when="loss.weighting = dynamic_average")
    """Optimizer steps whose losses dynamic_average averages before it compares them with those
    before; the paper takes an epoch."""
    gradnorm_alpha: NotNegative = option(1.5, read_when="loss.weighting = gradnorm")
    """How strongly gradnorm favors tasks whose loss has fallen less; 0 makes all gradients equally
    long."""
    cagrad_c: Share = option(0.5, read_when="loss.weighting = cagrad")
    """How far cagrad goes from the mean gradient for the task that is worst off, at least 0 and
    below 1; 0 is equal."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive term."""
    image_text: ImageTextConfig = field(default_factory=ImageTextConfig)
    """Terms between image and text."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """What the shared representation must not tell."""
    added: dict[Text, NotNegative] = field(default_factory=dict)
    """Terms that plugins put into the objective, name -> weight; 0 switches one off."""
    balance_weight: NotNegative = option(0.0, read_when="model.moe.num_experts > 0")
    """Weight of the load-balance loss of the gates."""
    z_weight: NotNegative = option(0.0, read_when="model.moe.num_experts > 0")
    """Weight of the z-loss of the gates."""
    r_drop_weight: NotNegative = 0.0
    """Weight of R-Drop: each post passes twice, under different dropout, its task losses are the
    means of both passes, and the symmetric divergence of the two predictions is added (half of the
    paper's alpha, arXiv:2106.14448). Twice the time and activations; 0 switches it off."""
    orthogonal_weight: NotNegative = 0.0
    """Weight of the squared covariance of shared states and private parts
    (``model.private_width``), which keeps a private part from saying what is shared already
    (arXiv:1608.06019)."""
    soft_sharing_weight: NotNegative = option(0.0, read_when="model.own_layers > 0 and tasks > 1")
    """Weight of the squared distance between two tasks' own layers (``model.own_layers``), soft
    parameter sharing (Duong et al. 2015); of T tasks the sum over pairs over T - 1. At 0 they part
    freely."""
    lexicon_weight: NotNegative = 0.0
    """Weight of an auxiliary regression: the last shared state of the first piece of a word of
    ``model.lexicon`` predicts the word's standardized numbers, mean squared error over the words
    of the lexicon in the whole optimizer step."""
    task_separation_weight: NotNegative = option(
        0.0, read_when="model.moe.num_experts > 1 and tasks > 1"
    )
    """Weight of the mean cosine between the tasks' mean gate vectors; pulls tasks to different
    experts (arXiv:2605.20916, 0.4 there)."""


@section
class DistillConfig:
    """Soft labels: what finished models, the teachers, say of every post for every task that they
    know. A post without a label of a task is learned from all the same."""

    teachers: Annotated[list[Given], DIFFERENT] = field(default_factory=list)
    """Exports of comoe (folders), of any encoder: joint ones, one per task, or several per task,
    whose probabilities are averaged. Tasks and labels are matched by name. A task that no teacher
    knows is learned from its gold labels alone. Empty is no distillation."""
    tasks: Names = option([], read_when="distill.teachers > 0")
    """Tasks that learn from the teachers; empty is all that a teacher knows."""
    temperature: Positive = 1.0
    """Both sides of the soft loss are softened by it, and the loss is multiplied by its square
    (arXiv:1503.02531). Numbers of regression tasks have none."""
    gold_weight: NotNegative = option(0.3, read_when="distill.annealing = none")
    """Weight of the loss on gold labels beside the soft loss, in tasks with teachers or
    ``soft_label``."""
    annealing: Literal["none", "linear"] = "none"
    """none, or linear: from soft to gold labels over the run; the gold loss weighs p and the soft
    loss of posts with a gold label 1 - p, p the share of the steps done (BAM, arXiv:1907.04829)."""
    unlabelled: Annotated[list[Given], DIFFERENT] = option([], read_when="distill.teachers > 0")
    """Files, folders or hub names of posts, with or without labels, that join training with the
    teachers' soft labels alone; relative to ``data.root``. Each is a data set to
    ``data.mixing`` and ``data.limit_per_task``."""
    unlabelled_text: Given = option("text", read_when="distill.unlabelled > 0")
    """Column with the post in files of ``unlabelled`` that have columns."""
    cache: Flag = option(True, read_when="distill.teachers > 0")
    """Keep the teachers' probabilities on disk, by the content of teacher and post, and use them
    again; an interrupted computation goes on where it was."""


@section
class RunConfig:
    """Name and place of the run."""

    name: Annotated[Text, FOLDER_NAME] = "starter"
    """Folder of the run below ``output_dir``; letters, digits, dot, dash, underscore."""
    output_dir: Given = "runs"
    """Folder that holds all runs."""
    overwrite: Flag = False
    """Delete what an earlier run of the same name left; otherwise such a start is refused."""
    verbose: Flag = False
    """Let DeepSpeed and the libraries log as they like; otherwise only warnings are shown."""
    histograms: Flag = True
    """Write histograms of the gate's scores to TensorBoard at each evaluation."""
    plots: Flag = True
    """Draw the figures in ``plots/`` and TensorBoard; numbers are written in any case."""
    embedding_plot: Literal["pca", "tsne"] = "pca"
    """How the map of all tasks' embeddings is laid out that is drawn at the end of a run
    (``plots/embedding_map_validation.png``): on their two principal axes, or by t-SNE, which keeps
    neighbors together and takes up to half a minute for 2,000 posts."""
    trackers: Annotated[
        list[
            Literal[
                "tensorboard",
                "mlflow",
                "wandb",
                "comet_ml",
                "aim",
                "clearml",
                "dvclive",
                "swanlab",
                "trackio",
            ]
        ],
        DIFFERENT,
    ] = field(default_factory=lambda: ["tensorboard"])
    """Where the numbers of the run go beside ``metrics.jsonl``. All but tensorboard need a package
    of their own, and take account, project and address from its variables (``MLFLOW_TRACKING_URI``,
    ``WANDB_PROJECT``, ...); images and histograms go to tensorboard alone."""


@section
class ParallelConfig:
    """How the run is laid over ranks; ZeRO, precision and clipping are in the DeepSpeed JSON."""

    ep_size: Count | Literal["auto"] = "auto"
    """Ranks that share one set of experts; auto is the largest divisor of both the ranks and the
    experts."""
    timeout_seconds: Seconds = 1800.0
    """A rank that is silent, or a training step that takes, longer than this ends the run, with a
    message that names the rank and the step."""


LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
"""Of the package emoji."""


@section
class NormalizeConfig:
    """How the text of a post is cleaned before it is tokenized."""

    preset: Literal["none", "social", "strict", "weibo"] = "social"
    """none, social (users, links, emoji to words; case and hashtag words kept),
    strict (Stein & Keller: lower case; URLs, mentions, hashtags, emoji, punctuation removed) or
    weibo (social for Chinese posts: full-width forms, #topics#, emoji codes, repost chains)."""
    language: Annotated[Given, one_of(LANGUAGES)] = "en"
    """Language of the emoji names, as in the package emoji (en, zh, de, ...)."""
    user: Text = "@user"
    """What replaces a user name under the presets social and weibo."""
    url: Text = "http"
    """What replaces a link under the presets social and weibo."""


@section
class DataConfig:
    """Where posts come from and what is done with bad ones."""

    root: Text | None = None
    """Folder that relative task paths start from; null is the recipe's own. ``kit:posts`` is the
    starter kit, ``kit:chinese_posts`` its Chinese part; ``smoke:posts``, ``smoke:tacl_posts``,
    ``smoke:drawn_posts``, ``smoke:related_posts``, ``smoke:implied_posts`` and ``smoke:linked_posts``
    are generated."""
    max_length: Annotated[Whole, Ge(4), at_most(1_000_000)] = 128
    """Longest post in tokens; the rest is cut and counted."""
    max_posts: Count = 8
    """Most posts that are read together: of an author (``tasks.<name>.per``), or of a post with its
    context as neighbors. Of an author with more, each training step draws others, and evaluations
    and predictions read the first; of a thread the nearest are read."""
    limit_per_task: Count | None = None
    """Keep at most this many training posts per data set (chosen by ``train.seed``); null keeps
    all."""
    limit_eval: Count | None = None
    """Keep at most this many validation and test posts per data set (chosen by ``split_seed``);
    null keeps all."""
    validation_fraction: Share = 0.1
    """Share of the training posts that becomes the validation split where a data set has none
    (see ``stratify``, chosen by ``split_seed``)."""
    test_fraction: Share = 0.0
    """Share of the training posts that becomes the test split where a data set has none, drawn
    before the validation posts; 0 makes none. Both fractions are of all of these posts."""
    stratify: Literal["first", "all", "none"] = "first"
    """By what these parts are stratified: first (the labels of the first task), all (the
    combinations of the labels of all tasks on a post) or none. With first and all, runs without
    some of the tasks hold out other posts. With none seed and text of a post alone decide, so that
    single and joint models are measured on the same posts."""
    split_seed: Seed | Literal["train"] = 0
    """Seeds which posts are evaluated on, where there is a choice, so that runs of different
    ``train.seed`` are scored on the same posts; train follows ``train.seed``."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at the first bad row, or skip: set it aside, count it and go on."""
    max_characters: Count = 100_000
    """A text longer than this is a bad row."""
    mixing: Literal["proportional", "uniform", "temperature", "progress"] = "proportional"
    """How often data sets are drawn from: proportional, uniform, temperature, or progress (as
    temperature, and more often where the validation loss still falls)."""
    mixing_temperature: Positive = 2.0
    """Rates are proportional to size ** (1 / temperature) under ``mixing: temperature`` and
    ``progress``."""
    posts_per_label: CountFrom0 = 0
    """Each batch holds at least this many posts of every label of the contrastive tasks, where the
    data have them; labels take turns where the batch has no room. 0 leaves it to chance; 2 gives
    every label a positive pair."""
    image_root: Text | None = None
    """Folder that the paths of images start from; null is the folder of the file that names
    them."""
    max_image_pixels: Annotated[Count, Le(178_956_970)] = 50_000_000
    """An image with more pixels than this is bad: decoded it could fill the memory."""
    max_image_bytes: Count = 20_000_000
    """An image file larger than this is bad."""
    on_bad_image: Literal["skip", "text"] = "skip"
    """What becomes of a post whose image is broken, missing, huge or no image: skip sets the
    post aside, text keeps it without image; both are counted and named."""
    hide: Literal["none", "text", "image"] = "none"
    """none, or what the model is not to see of the posts: text or image. For measuring what one
    side alone can tell."""
    noise: Annotated[list[Literal["typos", "informal", "no_hashtags", "no_emoji"]], DIFFERENT] = (
        field(default_factory=list)
    )
    """At the end of the run
    the validation posts, and the test posts where they have labels, are scored once more under
    each. informal: short forms (u, gr8, thx), no apostrophes, letters drawn out (sooo)."""
    noise_rate: Fraction = option(0.1, read_when="data.noise = typos or informal")
    """Share of the words that get a typo (``typos``), or a letter drawn out (``informal``)."""
    cache: Flag = True
    """Keep tokenized posts, and which images are good, on disk and use them again."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    """Cleaning of the text."""


UNLABELLED = "unlabelled"
"""The kind of task that nothing is measured of."""

BY_HIDING = "masked_words"
"""The kind of task that finds words which are hidden from the encoder."""

OWN_COLUMNS = ("text", "error", "truncated", "windows", "image_error")
"""Keys of a prediction beside those of the tasks, which a task cannot be called."""


@section
class TaskConfig:
    """One task. Tasks with the same path, format, subset, splits, text and image columns share
    their posts."""

    path: Text = ""
    """Folder, file, or hub name; relative to ``data.root``. A folder holds train, validation (val,
    dev), test files."""
    kind: Annotated[
        Literal[
            "single_label",
            "multi_label",
            "regression",
            "tags",
            "phrases",
            "unlabelled",
            "masked_words",
            "text",
            "label_words",
        ],
        KIND_TABLE,
    ] = "single_label"
    """What the task predicts: single_label, multi_label, regression, tags,
    phrases (words of the post, to be found), unlabelled; masked_words (words that are hidden from
    the encoder, of any post; beside other tasks it is ``auxiliary``); and with a decoder text
    (written by it) and label_words (the decoder scores each label's words). text with ``labels``
    means label_words."""
    probability: PositiveShare = 0.15
    """Share of a post's words that masked_words hides, at least one; whole words, drawn anew in each
    step."""
    format: Annotated[
        Literal[
            "auto",
            "tweeteval",
            "jsonl",
            "csv",
            "tsv",
            "parquet",
            "txt",
            "label_studio",
            "hub",
            "mvsa",
            "msd",
            "mmhs150k",
            "text_image",
        ],
        READER_TABLE,
    ] = "auto"
    """Of the files; auto looks at the path. mvsa, msd, mmhs150k and text_image are folders of public
    sets of posts with images, as their authors give them."""
    subset: Text | None = None
    """Configuration name of a hub data set."""
    splits: dict[Literal["train", "validation", "test"], Text] = field(default_factory=dict)
    """File (or hub split) of train, validation, test where the names are not the usual ones."""
    text: Given = "text"
    """Column with the post; for tags a list of words."""
    pair: Text | None = None
    """Column with a second text (stance target, aspect)."""
    context: Text | None = None
    """Column with what a post answers: the parent post, or a list, the thread from its first post to
    the parent. An empty cell is a post that answers none. Kinds with a head."""
    context_as: Literal["segment", "neighbors"] = "segment"
    """How the context is read: segment (behind the post, the nearest first; of too long a post the
    far end of the context is cut, and the post itself only where it is too long alone) or neighbors
    (each post of the thread by itself; the head adds attention over their pooled states,
    arXiv:1710.10903). neighbors: single_label, multi_label and regression only."""
    author: Text | None = None
    """Column with who wrote the post. Validation and test parts that are held out never divide an
    author; without ``stratify``."""
    per: Literal["post", "author"] = "post"
    """What has the label and is predicted: each post, or its ``author`` (single_label, multi_label
    and regression only), by attention over the pooled states of the author's posts, up to
    ``data.max_posts`` (arXiv:1802.04712). Rows of an author have the same label or none; limits,
    splits and metrics count authors."""
    image: Text | None = None
    """Column with the image: a path, or the bytes of the file; an empty cell is a post without
    image."""
    label: Given = "label"
    """Column with the label; empty cells are posts without this label."""
    soft_label: Given | None = None
    """Column with a soft label, such as the shares or counts of the annotators that gave each
    label: a list in the order of ``labels``, or a mapping of labels to numbers (0 where one is
    left out); in CSV as JSON. Of multi_label each label has a probability of its own. Learned as a
    teacher's, and in its place, under ``distill``; empty cells are posts without. single_label
    and multi_label only."""
    confidence: Text | None = None
    """Column with a number in [0, 1] per label, an annotator's agreement or a model's certainty; an
    empty cell is 1. Its mean is shown by --dry-run."""
    confidence_strategy: Literal["none", "input", "output", "input_output"] = "none"
    """What the confidence does in training: none, input (scales what the encoder reads of the
    post), output (scales the post's loss), or input_output (arXiv:2412.09046)."""
    auxiliary: Flag = False
    """Only there to help the others: trained and reported, but in no mean, and no checkpoint is
    chosen by it."""
    hold_out: dict[Text, list[Text]] = field(default_factory=dict)
    """Column -> values. Training and validation posts with one of them leave these splits and
    become a further split, ``unseen``, scored at the end; tasks of one data set say the same."""
    slices: Names = field(default_factory=list)
    """Columns; the main metrics are also given for the posts of each of their values
    (``accuracy@implicit=true``), with the gap between the best and the worst value
    (``gap/accuracy@implicit``). ``confidence<0.7`` cuts a column of numbers in two, the posts below
    and the others (``accuracy@confidence<0.7=true``): so ambiguous posts, of which annotators were
    less sure, have scores of their own."""
    prompt: Annotated[Text, PROMPT] | None = None
    """What a model with a decoder reads of a post for a task of kind text or label_words: {text}
    and {pair} stand for the cleaned post and its second text. A post too long for
    ``data.max_length`` loses the end of {text}."""
    label_words: Names = field(default_factory=list)
    """Words that the decoder scores for each label, in the order of ``labels``; empty are the
    labels themselves."""
    length_normalized: Flag = False
    """Predict by the mean log-probability of a token of each label's words instead of by their sum,
    so that labels of many tokens are not at a disadvantage; kind label_words only. Training is the
    same."""
    max_answer_length: Annotated[Whole, Ge(3), at_most(100_000)] = 32
    """Longest prediction of kind text in tokens, its end token included; longer ones in the data
    are cut and counted."""
    num_beams: Annotated[Whole, Ge(1), at_most(1_000)] = 1
    """Beams of the search for a prediction of kind text; 1 is greedy."""
    balanced_sampling: Flag = False
    """Draw the posts of the data set such that the labels of this task come equally often
    (single_label and label_words only). Several tasks on the same posts may ask for it: then the
    labels of each of them do, as far as posts with both allow."""
    labels: Names = field(default_factory=list)
    """Label names in the order of their ids; empty finds them in the training split."""
    descriptions: dict[Text, Given] = field(default_factory=dict)
    """Label -> a text that says what it means, one for each label of a single_label or multi_label
    task. The head starts at the texts' embeddings by the pre-trained encoder, and so predicts from
    their likeness to a post before it has learned anything; empty starts at random."""
    limit: Count | None = None
    """Keep at most this many training posts with a label of this task, gold or soft, chosen by
    ``train.seed`` among those that ``data.limit_per_task`` leaves; a post without any label left is
    dropped. Tasks on the same posts keep them in the same order. null keeps all."""
    limit_per_label: Count | None = None
    """Few-shot: keep at most this many training posts of each label (single_label, multi_label and
    label_words only), drawn as by ``limit`` and before it, so that each ``train.seed`` has posts of
    its own and a smaller number a part of a larger one's; of multi_label a post stays while one of
    its labels has fewer. null keeps all."""
    metric: Annotated[
        Literal[
            "auto",
            "accuracy",
            "macro_f1",
            "macro_precision",
            "macro_recall",
            "micro_f1",
            "sample_f1",
            "jaccard",
            "f1_class_1",
            "mean_f1_against_favor",
            "mae",
            "pearson",
            "spearman",
            "span_f1",
            "span_precision",
            "span_recall",
            "exact_match",
            "token_f1",
            "rouge_l",
            "masked_accuracy",
        ],
        METRIC_TABLE,
    ] = "auto"
    """Main metric; auto depends on the kind (macro_f1,
    pearson, span_f1)."""
    weight: NotNegative = option(1.0, read_when="loss.weighting = static")
    """Weight of this task's loss under ``loss.weighting: static``."""
    class_weights: Literal["none", "balanced"] | Annotated[list[Positive], AT_LEAST_TWO] = "none"
    """none, balanced (inverse frequency), or one number per label."""
    label_smoothing: Share = 0.0
    """Share of the target spread evenly over all labels; for multi_label of each label's yes or no,
    which both move towards 1/2."""
    contrastive: Flag | Literal["auto"] = "auto"
    """Take part in the contrastive loss; auto is yes, but no for tags, whose positives (two dropout
    draws of one post) cost a second forward pass."""
    contrastive_weight: NotNegative = 1.0
    """Weight of this task inside the contrastive term."""
    contrastive_temperature: Temperature | None = None
    """Temperature of this task; null is ``loss.contrastive.temperature``."""
    contrastive_width: Positive | Literal["auto"] = "auto"
    """Regression: positives weigh exp(-|difference of labels| / width); auto is the standard
    deviation of the training labels."""
    standardize: Flag = True
    """Regression: the head learns (label - mean) / standard deviation of the training labels, so
    that its loss and gradient are as large as those of other tasks whatever the unit. Predictions
    and metrics are in the unit of the labels."""

    @model_validator(mode="after")
    def _score_instead(self) -> TaskConfig:
        # A text that is one of a few labels is better scored than written.
        if self.labels and self.kind == "text":
            self.kind = "label_words"
        return self


@section
class TrainConfig:
    """The optimization."""

    epochs: Epochs = 3.0
    """Passes over the training posts, unless ``max_steps`` is given."""
    max_steps: Count | None = None
    """Optimizer steps; null follows ``epochs``."""
    batch_size: Posts = 32
    """Posts per optimizer step on all ranks together."""
    micro_batch_size: Posts | Literal["auto"] = "auto"
    """Posts per forward pass on one rank; auto is the whole share of the rank, at most 128."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd."""
    learning_rate: Rate = 5e-5
    """Peak rate of the encoder."""
    expert_learning_rate: Rate = 5e-4
    """Peak rate of experts and private parts."""
    router_learning_rate: Rate | Literal["auto"] | None = "auto"
    """Peak rate of the gates' projections and the task embeddings; auto is 10 times
    ``expert_learning_rate``, at most 0.01 (or that rate, where it is higher). null makes them a
    part of the experts."""
    head_learning_rate: Rate = 5e-4
    """Peak rate of heads and projections."""
    layer_decay: PositiveShare = 1.0
    """Each layer of the encoder (and of the decoder) learns at this times the rate of the layer
    above it: the last one at ``learning_rate``, the embeddings at the lowest. 1 is one rate for
    all."""
    weight_decay: NotNegative = 0.01
    """Decay of matrices; norms, biases and loss weights have none."""
    betas: Annotated[list[Share], Len(2, 2)] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment rates."""
    epsilon: Positive = 1e-8
    """Adam's epsilon."""
    momentum: Share = option(0.0, read_when="train.optimizer = sgd")
    """Momentum of sgd."""
    average_weights: Share = 0.0
    """Decay of a moving average of the weights over the steps, which evaluations, the choice of the
    best checkpoint, and exports use: 0.99 looks back on about 100 steps (the mean of all steps
    until there are so many). 0 is off."""
    reptile_steps: CountFrom0 = 0
    """Meta-learning by Reptile (arXiv:1803.02999): in each inner loop of so many steps all posts are
    of one data set, then the weights go back to a point between where the loop began and where it
    ended. For a run whose export new tasks with few labels start from (``model.start_from``).
    Evaluations, checkpoints and the export have the weights between loops. 0 is off."""
    reptile_rate: PositiveShare = option(1.0, read_when="train.reptile_steps > 0")
    """Share of the way that the weights go after the first inner loop; it falls linearly to 0 over
    the loops of the run."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """linear, cosine, or constant, after the warm-up."""
    warmup_fraction: Share = 0.06
    """Share of the steps in which the rate rises from 0."""
    activation_checkpointing: Flag = False
    """Keep only each encoder layer's input and compute the rest again in the backward pass: less
    memory, about a third more time, the same numbers."""
    max_grad_norm: NotNegative | Literal["auto"] = "auto"
    """Gradients are scaled down to this norm, of all weights together; 0 switches clipping off.
    auto is 3 times the median norm of the last 100 steps: only outliers are scaled down, however
    long the gradients of the recipe are."""
    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: Count | Literal["auto"] = "auto"
    """Steps between two evaluations; auto is twice an epoch, with ``reptile_steps`` after whole inner
    loops."""
    save_every: Count | Literal["auto"] = "auto"
    """Steps between two checkpoints; auto follows ``eval_every``."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay beside the best one."""
    early_stop_metric: Text = "mean"
    """mean (of each task's main metric), task/metric, or with teachers teacher_kl (how far the
    predictions are from theirs, on all validation posts, the mean over tasks)."""
    patience: CountFrom0 = 0
    """Evaluations without a better ``early_stop_metric`` before the run stops; 0 never stops
    early."""
    calibrate: Flag = True
    """At the end of the run fit a temperature per task on the validation posts, so that
    probabilities are frequencies; it changes no prediction. The calibration error is reported in
    any case."""
    fit_thresholds: Flag = True
    """At the end of the run fit the probability from which a label is given (multi_label;
    single_label with two labels) on the validation posts; kept only where it also gains on posts
    that did not choose it."""
    measure_experts: Flag = option(True, read_when="model.moe.num_experts > 0")
    """At the end of the run score up to 1,000 validation posts per data set twice more, with all
    experts off and with experts in turn, and say what experts and gate are worth."""
    max_nonfinite: Count = 5
    """Steps in a row with a loss that is not finite before the run stops."""
    seed: Seed = 0
    """Seeds weights, sampling and dropout."""


@section
class Recipe:
    """One run, whole.

    Example:
        >>> recipe = comoe.load_recipe("smoke")
        >>> recipe.tasks["mood"].label, recipe.train.batch_size
        ('mood', 96)
    """

    run: RunConfig = field(default_factory=RunConfig)
    """Name and place."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder, experts, heads."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Posts."""
    tasks: dict[Text, TaskConfig] = field(default_factory=dict)
    """Task name -> task."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Soft labels of teachers."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimization."""
    plugins: Annotated[list[Given], DIFFERENT] = field(default_factory=list)
    """Modules of your own (``my_package.module``), or plugins that a package installed, whose
    metrics, kinds, losses, readers and gates this recipe uses. Their code runs, so a module is
    imported only where it is named on the command line too (``--plugins``)."""

    @model_validator(mode="after")
    def _beside_others(self) -> Recipe:
        # Words that are found say nothing of the labels that others predict.
        if any(task.kind not in (BY_HIDING, UNLABELLED) for task in self.tasks.values()):
            self.tasks = {
                name: replace(task, auxiliary=True) if task.kind == BY_HIDING else task
                for name, task in self.tasks.items()
            }
        return self


__all__ = [
    "AdversarialConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DistillConfig",
    "ImageTextConfig",
    "LexiconConfig",
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
