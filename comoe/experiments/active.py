"""Does it pay to choose the posts to label? A labeling loop on real posts whose labels are hidden until asked for.

    python -m comoe.experiments.active --output active --seeds 20

A frozen encoder (kit:minilm) reads every post once; a logistic regression on its vectors is trained
anew after each round, so that a training takes a second and differences of a point can be seen. The
first round is random; the others are chosen by the functions behind comoe select. Runs are written
one by one into runs.jsonl and not repeated; active.json and active.png sum them up.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from comoe.config.failure import doing
from comoe.config.files import atomic_file, write_json
from comoe.config.recipe import DataConfig, ModelConfig, MoeConfig, NormalizeConfig
from comoe.data.collator import Collator
from comoe.data.reading.sources import read_input
from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.experiments.compare.statistics import MEAN, seed_interval
from comoe.inference.select import (
    DIVERSE,
    ENTROPY,
    MARGIN,
    POOL,
    RANDOM,
    STRATEGIES,
    entropies,
    margins,
    unlike,
)
from comoe.models.build import build_model
from comoe.starter.registry import prepare
from comoe.tasks.metrics import METRICS
from comoe.tasks.task import Task
from comoe.train.monitor.plots import COLORS, legend_below, panel_grid, save_figure

DATA = {
    "sentiment": ("tweets/train_small.jsonl", "tweets/validation.jsonl"),
    "sarcasm": ("sarcasm/train.jsonl", "sarcasm/validation.jsonl"),
    "event": ("event/train.jsonl", "event/validation.jsonl"),
}
"""Label -> files of kit:posts that the posts are drawn from, and that models are measured on."""

MOST = 5000
"""Posts to choose from."""

START, SIZES = 100, (200, 400, 800)
"""Labels at random, and at the end of each round."""


def embedded(files: Sequence[Path], tasks: Sequence[Task]) -> list[tuple[np.ndarray, list[str]]]:
    """Vectors of the posts by the frozen encoder, float32, (N, M), and their labels."""
    encoder = prepare(["kit:minilm"])["kit:minilm"]
    torch.manual_seed(0)
    config = ModelConfig(encoder=str(encoder), moe=MoeConfig(num_experts=0))
    model = build_model(config, tasks).eval()
    collator = Collator(load_tokenizer(str(encoder)), tasks)
    data, found = DataConfig(max_length=64, normalize=NormalizeConfig()), []
    for file in files:
        rows = read_input("--data", str(file)).rows[:MOST]
        split = collator.encode_texts([row["text"] for row in rows], config=data)
        vectors_NM = np.zeros((len(rows), model.encoder.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for posts in eval_batches(split.lengths, batch_size=64):
                vectors_NM[posts] = model.embed(collator(split, posts)).numpy()
        found.append((vectors_NM, [row[tasks[0].name] for row in rows]))
    return found


def loop(
    pool_NM: np.ndarray,
    gold_N: np.ndarray,
    test_KM: np.ndarray,
    test_K: np.ndarray,
    *,
    strategy: str,
    seed: int,
    labels: Sequence[str],
) -> dict[int, float]:
    """Labels -> macro F1 on the test posts, of one labeling loop."""
    draw = np.random.default_rng(seed)
    known = draw.permutation(len(pool_NM))[:START]
    found = {}
    for size in SIZES:
        model = _fitted(pool_NM[known], gold_N[known])
        rest = np.setdiff1d(np.arange(len(pool_NM)), known)
        chosen = _chosen(model, pool_NM[rest], size - len(known), strategy, draw)
        known = np.concatenate([known, rest[chosen]])
        predicted_K = _fitted(pool_NM[known], gold_N[known]).predict(test_KM)
        found[size] = METRICS["macro_f1"](test_K, predicted_K, labels)
    return found


def _fitted(vectors_NM: np.ndarray, gold_N: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=10.0, max_iter=1000).fit(vectors_NM, gold_N)


def _chosen(
    model: LogisticRegression,
    vectors_NM: np.ndarray,
    count: int,
    strategy: str,
    draw: np.random.Generator,
) -> np.ndarray:
    if strategy == RANDOM:
        return draw.permutation(len(vectors_NM))[:count]
    scores_NY = model.predict_proba(vectors_NM)
    unsure_N = (entropies if strategy == ENTROPY else margins)(scores_NY)
    order = np.argsort(-unsure_N, kind="stable")
    if strategy != DIVERSE:
        return order[:count]
    near = order[: POOL * count]
    seed = int(draw.integers(2**31))
    return near[unlike(vectors_NM[near], unsure_N[near], count, seed=seed)]


def run_all(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Every loop that ``runs.jsonl`` of the folder lacks; all of its rows."""
    path = folder / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(row["data"], row["strategy"], row["seed"]) for row in rows}
    wanted = [
        (seed, name, strategy)
        for seed in range(seeds)
        for name in DATA
        for strategy in STRATEGIES
        if (name, strategy, seed) not in done
    ]
    posts = {
        name: _read(name, folder / f"{name}.npz")
        for name in dict.fromkeys(one[1] for one in wanted)
    }
    for seed, name, strategy in wanted:
        scores = loop(**posts[name], strategy=strategy, seed=seed)
        rows.append({"data": name, "strategy": strategy, "seed": seed, "macro_f1": scores})
        with doing("writing", path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    # Keys as they come out of the file.
    return json.loads(json.dumps(rows))


def _read(name: str, cache: Path) -> dict[str, Any]:
    """What ``loop`` takes of a data set; vectors and labels are kept in a file."""
    if not cache.is_file():
        root = prepare(["kit:posts"])["kit:posts"]
        files = [root / file for file in DATA[name]]
        rows = read_input("--data", str(files[0])).rows[:MOST]
        labels = sorted({row[name] for row in rows})
        (pool_NM, pool), (test_KM, test) = embedded(
            files, [Task(name, "single_label", tuple(labels), "macro_f1")]
        )
        gold_N, test_K = (np.array([labels.index(y) for y in column]) for column in (pool, test))
        with atomic_file(cache) as file:
            np.savez(
                file, pool_NM=pool_NM, gold_N=gold_N, test_KM=test_KM, test_K=test_K, labels=labels
            )
    with np.load(cache) as kept:
        return {key: kept[key] for key in kept} | {"labels": kept["labels"].tolist()}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Data set (and ``mean`` over them) -> labels -> seeds; mean of each strategy; and gain, the
    paired difference from random; with 95 % intervals over seeds."""
    scores = {(row["data"], row["strategy"], row["seed"]): row["macro_f1"] for row in rows}
    names = list(dict.fromkeys(row["data"] for row in rows))
    found: dict[str, Any] = {}
    for name in [*names, MEAN]:
        some = names if name == MEAN else [name]
        seeds = sorted({seed for _, _, seed in scores})
        # Seeds that all loops have ended.
        seeds = [k for k in seeds if all((d, s, k) in scores for d in some for s in STRATEGIES)]
        for size in map(str, SIZES):
            cells = {
                s: [float(np.mean([scores[d, s, k][size] for d in some])) for k in seeds]
                for s in STRATEGIES
            }
            found.setdefault(name, {})[size] = {
                "seeds": len(seeds),
                "mean": {s: seed_interval(values).to_dict() for s, values in cells.items()},
                "gain": {
                    s: seed_interval(np.subtract(values, cells[RANDOM]).tolist()).to_dict()
                    for s, values in cells.items()
                    if s != RANDOM
                },
            }
    return found


def draw_gains(found: Mapping[str, Any], path: Path) -> None:
    """A panel per data set, and one of their mean: what each strategy gains over random, with intervals."""
    figure, panels = panel_grid(
        len(found), size=(2.2, 2.3), title="Macro F1 over random posts", most=4, sharey=True
    )
    for panel, (name, sizes) in zip(panels, found.items(), strict=True):
        panel.axhline(0, color=COLORS[6], linewidth=1)
        for place, strategy in enumerate((MARGIN, ENTROPY, DIVERSE)):
            gains = [sizes[str(size)]["gain"][strategy] for size in SIZES]
            means = [100 * gain["mean"] for gain in gains]
            ends = [
                [100 * abs(gain["mean"] - gain[end]) for gain in gains] for end in ("low", "high")
            ]
            places = np.arange(len(SIZES)) + 0.12 * (place - 1)
            panel.errorbar(
                places,
                means,
                yerr=ends,
                fmt="o-",
                color=COLORS[place],
                label=strategy,
                markersize=4,
                capsize=2,
            )
        panel.set_xticks(range(len(SIZES)), map(str, SIZES))
        panel.set_title(name, fontsize=8)
        panel.set_xlabel("labels", fontsize=7)
    panels[0].set_ylabel("points", fontsize=7)
    legend_below(figure, panels)
    save_figure(figure, path)


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    for name, sizes in found.items():
        for size, cell in sizes.items():
            shown = [f"{cell['mean'][RANDOM]['mean']:.3f}"]
            for gain in cell["gain"].values():
                shown.append(f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
            yield f"| {name} | {size} | {' | '.join(shown)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; print a table and write numbers and a figure."""
    parser = ArgumentParser(prog="active", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        found = summary(run_all(options.output, options.seeds))
    except ValueError as error:
        sys.exit(str(error))
    write_json(options.output / "active.json", found)
    draw_gains(found, options.output / "active.png")
    print(f"| data | labels | {' | '.join([RANDOM, MARGIN, ENTROPY, DIVERSE])} |")
    print("\n".join(_table(found)))


if __name__ == "__main__":
    main()
