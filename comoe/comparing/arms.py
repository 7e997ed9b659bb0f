"""The arms of a comparison: named variants of one recipe with equal active parameters and an equal budget of posts.

What stands beside an encoder layer's feed-forward has the same active width A = ``top_k * expert_width`` in every arm
with experts: k experts of width A / k, or one dense block of width A. Posts, steps, seeds and rates are the recipe's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from comoe.cluster_plan import shape_of_recipe
from comoe.config import load_recipe, recipe_to_dict, unknown_name
from comoe.scaling import Experiment, difference_of
from comoe.schema import Recipe, RunConfig
from comoe.train.settings import load_settings, plan_layout

OWN_KEYS = ("run.name", "run.output_dir", "run.overwrite", "train.seed")
"""Keys that the comparison sets for each run."""
UNBALANCED = ("model.moe.balance=none", "loss.balance_weight=0")
"""Where every expert runs there is nothing to balance, and a balance term is refused."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: an arm with a seed."""

    arm: str
    """Name of the arm."""
    seed: int
    """The seed."""
    words: tuple[str, ...]
    """``key=value`` words that make the recipe this arm."""
    experts: int
    """Experts per layer."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.arm}-s{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The arm's words and the seed."""
        return [*self.words, f"train.seed={self.seed}"]


@dataclass(frozen=True, slots=True)
class Active:
    """What the arms of one recipe have in common."""

    experts: int
    """Experts per layer, E."""
    top_k: int
    """The recipe's own k."""
    width: int
    """Hidden width that a token sees in one layer, over all its experts: A."""

    def experts_words(self, gate: str, top_k: int, *, route_by: str | None = None) -> list[str]:
        """``top_k`` experts of width A / top_k, picked by ``gate``.

        Raises:
            ValueError: more than there are, or a width that does not divide.
        """
        if not 1 <= top_k <= self.experts:
            raise ValueError(f"an arm wants k = {top_k}, but the recipe has model.moe.num_experts = {self.experts}.")
        if self.width % top_k:
            raise ValueError(
                f"the active width {self.width} (top_k * expert_width of the recipe) does not divide into k = {top_k} "
                f"experts; set model.moe.expert_width to a multiple of {top_k}."
            )
        words = [f"model.moe.num_experts={self.experts}", f"model.moe.gate={gate}", f"model.moe.top_k={top_k}",
                 f"model.moe.expert_width={self.width // top_k}"]  # fmt: skip
        words += [] if route_by is None else [f"model.moe.route_by={route_by}"]
        return [*words, *(UNBALANCED if top_k == self.experts else ())]

    def dense_words(self, width: int) -> list[str]:
        """One block of this width that every token visits."""
        return ["model.moe.num_experts=1", "model.moe.top_k=1", "model.moe.gate=sigmoid", "model.moe.route_by=token",
                f"model.moe.expert_width={width}", *UNBALANCED]  # fmt: skip


def active_of(recipe: Recipe) -> Active:
    """E, k and active width of the recipe; reads the encoder's shape where the expert width is auto.

    Raises:
        ValueError: a recipe without experts, which has no active width to keep.
    """
    shape = shape_of_recipe(recipe)
    if not shape.num_experts:
        raise ValueError("model.moe.num_experts is 0: a comparison starts from a recipe with experts.")
    return Active(shape.num_experts, shape.top_k, shape.top_k * shape.expert_width)


def plan_trials(
    experiment: Experiment, *, arms: Sequence[str], custom: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> list[Trial]:
    """Every arm with every seed, the seeds in the outer loop: what is done at any time can be compared.

    Args:
        experiment: recipe, DeepSpeed JSON and words that all runs share.
        arms: keys of ``ARMS`` or of ``custom``.
        custom: name of an arm of the user's -> its ``key=value`` words.
        seeds: one run of each arm per seed.

    Raises:
        ValueError: an unknown arm, an impossible one, or a shared word that belongs to the comparison.
    """
    taken = [key for key in map(_key, experiment.overrides) if key in OWN_KEYS]
    if taken:
        raise ValueError(f"{taken[0]} cannot be an override here: --seeds and --output set it.")
    for name in custom:
        if name in ARMS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", name):
            raise ValueError(f"--arm {name}: choose a name of letters, digits, dots, underscores that is not taken.")
    active = active_of(load_recipe(experiment.config, experiment.overrides))
    settings = load_settings(experiment.deepspeed)
    trials = []
    for arm in dict.fromkeys(arms):
        if arm not in ARMS and arm not in custom:
            raise unknown_name("arm", arm, [*ARMS, *custom])
        words = tuple(custom[arm] if arm in custom else ARMS[arm](active))
        recipe = load_recipe(experiment.config, [*experiment.overrides, *words])
        plan_layout(recipe, settings, world_size=experiment.ranks, gpu=False)
        trials += [Trial(arm, seed, words, recipe.model.moe.num_experts) for seed in seeds]
    return sorted(trials, key=lambda trial: seeds.index(trial.seed))


def check_earlier(experiment: Experiment, trial: Trial) -> None:
    """Make sure that a run of this name, where there is one, is of this arm.

    Raises:
        ValueError: it was trained by another recipe.
    """
    file = experiment.runs / trial.name / "config.yaml"
    if not file.is_file():
        return
    recipes = [load_recipe(file), load_recipe(experiment.config, [*experiment.overrides, *trial.overrides])]
    earlier, now = (recipe_to_dict(replace(recipe, run=RunConfig())) for recipe in recipes)
    if difference := difference_of(earlier, now):
        raise ValueError(
            f"{file.parent} was trained with {difference}; give the arm another name, or choose another --output."
        )


def custom_arms(texts: Sequence[str]) -> dict[str, list[str]]:
    """The user's own arms from ``name:key=value,key=value`` texts.

    Raises:
        ValueError: a text of another form.
    """
    found = {}
    for text in texts:
        name, colon, words = text.partition(":")
        # A comma separates words only where a new key follows: a list such as [1,3] has commas of its own.
        parts = [part.strip() for part in re.split(r",(?=[A-Za-z_.]+=)", words)]
        if not colon or not all("=" in part for part in parts):
            raise ValueError(f"--arm {text!r} must read name:key=value,key=value.")
        found[name.strip()] = parts
    return found


def _key(word: str) -> str:
    return word.partition("=")[0].strip().lstrip("-")


ARMS: dict[str, Callable[[Active], list[str]]] = {
    "recipe": lambda active: [],
    "no_experts": lambda active: ["model.moe.num_experts=0"],
    "dense": lambda active: active.dense_words(active.width),
    "dense_total": lambda active: active.dense_words(active.width // active.top_k * active.experts),
    "softmax": lambda active: active.experts_words("softmax", active.top_k),
    "sigmoid": lambda active: active.experts_words("sigmoid", active.top_k),
    "sigmoid_k1": lambda active: active.experts_words("sigmoid", 1),
    "sigmoid_k2": lambda active: active.experts_words("sigmoid", 2),
    "sigmoid_k4": lambda active: active.experts_words("sigmoid", 4),
    "sigmoid_all": lambda active: active.experts_words("sigmoid", active.experts),
    "softmax_k1": lambda active: active.experts_words("softmax", 1),
    "softmax_k2": lambda active: active.experts_words("softmax", 2),
    "softmax_k4": lambda active: active.experts_words("softmax", 4),
    "softmax_all": lambda active: active.experts_words("softmax", active.experts),
    "paper": lambda active: active.experts_words("sigmoid", active.experts, route_by="task"),
    "task_and_token": lambda active: active.experts_words("sigmoid", active.top_k, route_by="both"),
    "no_balance": lambda active: list(UNBALANCED),
    "no_contrastive": lambda active: ["loss.contrastive.weight=0"],
}
"""Arm -> the words that make it; ``dense_total`` has the parameters of all experts in one block, so it costs more."""
