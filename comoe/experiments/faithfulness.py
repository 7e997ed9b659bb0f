"""Do explanations name the words that a prediction rests on? Words are deleted in the order of each, and at random.

    python -m comoe.experiments.faithfulness --model runs/starter/export --output faithful \
        --task sentiment=tweets.jsonl --task event=events.jsonl

The sooner the probability of the predicted label falls, the better the order. faithfulness.json and
faithfulness.png are written into the folder.

Source: Samek et al. 2017, doi:10.1109/TNNLS.2016.2599820; the mean fall over shares is the
comprehensiveness of DeYoung et al. 2020, arXiv:1911.03429.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.files import write_json
from comoe.inference.explain import check_explained, method_of
from comoe.inference.options import PredictOptions
from comoe.inference.post_stream import open_posts
from comoe.inference.predictor import Predictor
from comoe.train.monitor.plots import BLUE, GREY, RED, legend_below, panel_grid, save_figure

METHODS = ("attention", "gradients")
RANDOM = "random words"
DRAWS = 5
"""Random orders of a post's words, averaged."""

SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(10))
"""Shares of the words that are deleted; one word always stays."""

FEWEST = 5
"""Words of a post below which tenths of it mean nothing."""

RESAMPLES = 2000


def curves(
    predictor: Predictor, texts: Sequence[str], task: str, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Method -> probability of the label that was predicted for each whole post, (N, shares).

    Posts with fewer than ``FEWEST`` words, or without a prediction, are left out. The words are
    those of the cleaned posts, joined by blanks.

    Args:
        predictor: the model.
        texts: posts.
        task: with a head on the whole post, and labels.
        seed: of the random orders.
    """
    explained = {
        method: predictor.explain(texts, method=method, tasks=[task]) for method in METHODS
    }
    draw = np.random.default_rng(seed)
    orders: dict[str, list[tuple[list[str], str, np.ndarray]]] = {}
    for attention, gradients in zip(*explained.values(), strict=True):
        if "error" in attention or "error" in gradients:
            continue
        weighed = {"attention": attention[task]["attention"]}
        entry = gradients[task]["gradients"][0]
        weighed["gradients"] = entry["words"]
        words = [word for word, _ in entry["words"]]
        if len(words) < FEWEST:
            continue
        for method, pairs in weighed.items():
            order = np.argsort([-value for _, value in pairs], kind="stable")
            orders.setdefault(method, []).append((words, entry["label"], order))
        for number in range(DRAWS):
            order = draw.permutation(len(words))
            orders.setdefault(f"{RANDOM} {number}", []).append((words, entry["label"], order))
    found = {name: _after_deletion(predictor, posts, task) for name, posts in orders.items()}
    random = np.mean([found.pop(f"{RANDOM} {number}") for number in range(DRAWS)], axis=0)
    return found | {RANDOM: random}


def _after_deletion(
    predictor: Predictor, posts: Sequence[tuple[list[str], str, np.ndarray]], task: str
) -> np.ndarray:
    texts, labels = [], []
    for words, label, order in posts:
        for share in SHARES:
            gone = set(order[: min(round(share * len(words)), len(words) - 1)].tolist())
            texts.append(" ".join(w for place, w in enumerate(words) if place not in gone))
            labels.append(label)
    predictions = predictor(texts, tasks=[task])
    # A word that the cleaning takes away leaves nothing to predict: no evidence at all.
    scores = [
        found[task]["scores"][label] if task in found else np.nan
        for found, label in zip(predictions, labels, strict=True)
    ]
    return np.array(scores).reshape(len(posts), len(SHARES))


def summary(found: Mapping[str, np.ndarray], *, seed: int = 0) -> dict[str, Any]:
    """Curves, areas (mean probability over the shares above 0), and differences of areas, with 95 % intervals.

    The intervals are of a bootstrap over posts; differences are paired.
    """
    areas_N = {name: np.nanmean(curve_NS[:, 1:], axis=1) for name, curve_NS in found.items()}
    size = len(next(iter(areas_N.values())))
    rows = np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))

    def interval(values_N: np.ndarray) -> list[float]:
        return [
            float(values_N.mean()),
            *np.quantile(values_N[rows].mean(1), [0.025, 0.975]).tolist(),
        ]

    pairs = [("gradients", RANDOM), ("attention", RANDOM), ("gradients", "attention")]
    return {
        "posts": size,
        "shares": list(SHARES),
        "curves": {name: np.nanmean(curve_NS, axis=0).tolist() for name, curve_NS in found.items()},
        "areas": {name: interval(values_N) for name, values_N in areas_N.items()},
        "differences": {
            f"{one} - {other}": interval(areas_N[one] - areas_N[other]) for one, other in pairs
        },
    }


def draw_curves(tasks: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel per task."""
    figure, panels = panel_grid(
        len(tasks), size=(2.9, 2.4), title="Words deleted in the order of", sharey=True
    )
    colors = {"attention": BLUE, "gradients": RED, RANDOM: GREY}
    for panel, (name, found) in zip(panels, tasks.items(), strict=True):
        for method, curve in found["curves"].items():
            panel.plot(
                found["shares"], curve, color=colors[method], label=method, marker="o", markersize=3
            )
        panel.set_title(f"{name}, {found['posts']} posts", fontsize=8)
        panel.set_xlabel("share of the words deleted", fontsize=7)
    panels[0].set_ylabel("probability of the label", fontsize=7)
    legend_below(figure, panels)
    save_figure(figure, path)


def _texts(predictor: Predictor, task: str, file: Path) -> list[str]:
    chosen = predictor.choose_tasks([task])
    check_explained(method_of("gradients"), chosen, predictor.exported.model)
    posts = open_posts(str(file), PredictOptions(tasks=[task]), model=predictor, tasks=chosen)
    return [post.text for post in posts if not post.error and post.text]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, a row per task, and write figures and numbers."""
    parser = ArgumentParser(prog="faithfulness", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, help="folder of an export")
    add("--task", action="append", required=True, dest="tasks", metavar="TASK=FILE",
        help="a task, and posts for it; may be repeated")
    add("--output", required=True, type=Path, help="folder for faithfulness.json and .png")
    add("--posts", type=int, default=200, help="drawn of each file (200)")
    add("--seed", type=int, default=0)
    # fmt: on
    options = parser.parse_args(argv)
    try:
        predictor = Predictor.from_pretrained(options.model, device="cpu")
        found = {}
        for word in options.tasks:
            task, _, file = word.partition("=")
            texts = _texts(predictor, task, Path(file))
            draw = np.random.default_rng(options.seed).permutation(len(texts))
            texts = [texts[row] for row in draw[: options.posts]]
            found[task] = summary(
                curves(predictor, texts, task, seed=options.seed), seed=options.seed
            )
    except ValueError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "faithfulness.json", found)
    draw_curves(found, options.output / "faithfulness.png")
    for task, one in found.items():
        for name, (mean, low, high) in (one["areas"] | one["differences"]).items():
            print(f"{task:<12} {name:<28} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
