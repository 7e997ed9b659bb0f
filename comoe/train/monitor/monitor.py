"""What a run shows to people while it runs: ``metrics.jsonl``, TensorBoard and the images in ``plots/``.

The monitor reads and never computes, and only rank 0's writes: the caller reduces over ranks
before, on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from comoe.config.failure import doing
from comoe.config.files import plain
from comoe.config.recipe import RunConfig
from comoe.evaluation.cross_tables import CrossTable
from comoe.evaluation.embedding_stats import EmbeddingSummary
from comoe.evaluation.evaluate import Evaluation
from comoe.evaluation.routing_stats import RoutingSummary
from comoe.tasks.task import Task
from comoe.train.monitor import plots
from comoe.train.monitor.cross_plots import cross_tables_figure
from comoe.train.monitor.embedding_plots import embedding_figure, map_figure
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics, truncate_metrics
from comoe.train.monitor.trackers import TENSORBOARD, Silent, Trackers

TASK_TERM = "task"
"""Terms named ``task/<name>`` are the losses of the tasks."""


LONGEST_NAME = 200
"""Bytes of a plot's name; file systems take 255."""


BLOCK_MEASURES = ("update_ratio", "gate_entropy", "weight_spread")
"""Of ``RoutingSummary.by_layer``, drawn over the steps."""


class Monitor:
    """Writes metrics on rank 0; on the other ranks every method does nothing.

    Args:
        run_dir: folder of the run.
        enabled: True on the rank that writes.
        tasks: the tasks of the run.
        recipe_text: the resolved recipe as YAML, shown in TensorBoard.
        shown: ``run.histograms``, ``run.plots`` and ``run.embedding_plot`` are read.
        trackers: where numbers go too; None is TensorBoard alone.
        resumed_at: step of the restored checkpoint. Lines and events after it are dropped, and the
            curves go on. None starts anew: what an earlier run of that name wrote is dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        tasks: Sequence[Task],
        recipe_text: str,
        shown: RunConfig | None = None,
        trackers: Trackers | None = None,
        resumed_at: int | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._plots = run_dir / "plots"
        self._tasks = tuple(task for task in tasks if task.rules.scored)
        self._histograms = shown is None or shown.histograms
        self._draws = shown is None or shown.plots
        self._map = "pca" if shown is None else shown.embedding_plot
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if resumed_at is None:
            path.unlink(missing_ok=True)
        else:
            truncate_metrics(path, after_step=resumed_at)
        self._records = read_metrics(path)
        self._drawn, self._warned = (0, 0), False
        self._path, self._file = path, path.open("a", encoding="utf-8")
        # TensorBoard hides older events from the purge step on; without it a resumed run draws two
        # curves.
        purge_step = 0 if resumed_at is None else resumed_at + 1
        events = str(run_dir / "tensorboard")
        self._trackers = trackers or Trackers([TENSORBOARD], run_dir)
        fenced = "\n".join(f"    {line}" for line in recipe_text.splitlines())
        with doing("writing", run_dir / "tensorboard"):
            self._writer = (
                SummaryWriter(events, purge_step=purge_step)
                if self._trackers.tensorboard
                else Silent()
            )
            self._writer.add_text("recipe", fenced, global_step=purge_step)

    def log_train(
        self,
        step: int,
        *,
        loss: float,
        terms: Mapping[str, float | torch.Tensor],
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        rates: Mapping[str, float],
        task_weights: Mapping[str, float],
        **measured: float | None,
    ) -> None:
        """Log one optimizer step; every number is the global one.

        Args:
            step: optimizer steps done.
            loss: the objective.
            terms: as in ``StepOutput.terms``.
            metrics: task -> metric -> value on the training posts since the last line.
            rates: parameter group -> learning rate.
            task_weights: task -> weight of its loss.
            measured: grad_norm, posts_per_second, tokens_per_second, seconds, and whatever else the
                caller measures; None where there is no number.
        """
        if not self.enabled:
            return
        tasks, rest = _terms_by_task(terms)
        for name, values in (metrics or {}).items():
            tasks.setdefault(name, {}).update(values)
        line = {"step": step, "split": "train", "loss": float(loss), "tasks": tasks, **rest}
        self._write({**line, "rates": dict(rates), "weights": dict(task_weights), **measured})
        scalars = {"train/loss": loss}
        scalars |= {
            f"train/{name}/{key}": value
            for name, values in tasks.items()
            for key, value in values.items()
        }
        scalars |= {f"train/{name}": value for name, value in rest.items()}
        scalars |= {f"rate/{name}": value for name, value in rates.items()}
        scalars |= {f"weight/{name}": value for name, value in task_weights.items()}
        scalars |= {f"measured/{name}": value for name, value in measured.items()}
        with self._harmless():
            self._scalars(scalars, step)

    def log_evaluation(
        self,
        step: int,
        *,
        split: str,
        evaluation: Evaluation,
        **measured: float | None,
    ) -> None:
        """Log an evaluation, its confusion matrices, what the gates did and how embeddings lie; draw all again.

        Args:
            step: optimizer steps done.
            split: validation or test.
            evaluation: metrics, confusion matrices and measures.
            measured: mean (of the main metrics), chosen (``train.early_stop_metric``), and whatever else the caller
                measures.
        """
        if not self.enabled:
            return
        routing, embeddings = evaluation.routing, evaluation.embeddings
        line: dict[str, Any] = {
            "step": step,
            "split": split,
            "tasks": dict(evaluation.metrics),
            **measured,
        }
        if routing is not None and routing.layers:
            line["routing"] = routing.to_dict()
        if embeddings is not None:
            line["embeddings"] = {
                name: dict(view.measures) for name, view in embeddings.tasks.items()
            }
            line |= {"retrieval": dict(embeddings.retrieval)} if embeddings.retrieval else {}
        self._write(line)
        with self._harmless():
            self._scalars({f"{split}/{name}": value for name, value in measured.items()}, step)
            self._show_evaluation(step, split, evaluation)

    def _show_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        routing, embeddings = evaluation.routing, evaluation.embeddings
        for task, values in evaluation.metrics.items():
            self._scalars({f"{split}/{task}/{name}": value for name, value in values.items()}, step)
        for task in self._tasks:
            if self._draws and task.name in evaluation.confusions:
                title = f"{task.name}, {split}, step {step}"
                figure = plots.confusion_figure(
                    evaluation.confusions[task.name], labels=task.labels, title=title
                )
                self._figure(
                    f"confusion/{split}/{task.name}", f"confusion_{split}_{task.name}", figure, step
                )
        if routing is not None and routing.layers:
            self._log_routing(routing, split=split, step=step)
        if embeddings is not None:
            self._log_embeddings(embeddings, split=split, step=step)
        if split == "validation":
            self._draw_curves()

    def log_projector(self, step: int, *, split: str, embeddings: EmbeddingSummary) -> None:
        """Hand the embeddings to TensorBoard's projector, where they can be turned, searched and colored by label.

        Draw the map of all tasks too: by t-SNE it takes too long for every evaluation.
        """
        with self._harmless():
            if self.enabled and self._draws and embeddings.tasks:
                title = f"Embeddings of all tasks ({split}, step {step})"
                figure = map_figure(embeddings.tasks, how=self._map, title=title)
                if figure is not None:
                    self._figure(f"map/{split}", f"embedding_map_{split}", figure, step)
            for task, view in embeddings.tasks.items() if self.enabled else ():
                # The projector's table has one line per post: a label must not break it.
                names = [" ".join(str(label).split()) or "none" for label in view.labels]
                self._writer.add_embedding(
                    view.points, metadata=names, global_step=step, tag=f"{split}_{task}"
                )

    def log_reliability(
        self,
        step: int,
        *,
        split: str,
        task: str,
        curves: Mapping[str, plots.Bins],
        errors: Mapping[str, float],
    ) -> None:
        """Show how far the probabilities of a task hold.

        Args:
            step: of the weights.
            split: validation or test.
            task: its name.
            curves: as in ``plots.reliability_figure``.
            errors: name -> expected calibration error.
        """
        if not self.enabled:
            return
        with self._harmless():
            self._scalars(
                {f"calibration/{split}/{task}/{name}": value for name, value in errors.items()},
                step,
            )
            if self._draws:
                title = f"Reliability of {task} ({split}, step {step})"
                figure = plots.reliability_figure(curves, title=title)
                self._figure(
                    f"reliability/{split}/{task}", f"reliability_{split}_{task}", figure, step
                )

    def log_cross_tables(
        self, step: int, *, split: str, tasks: tuple[str, str], tables: Mapping[str, CrossTable]
    ) -> None:
        """Draw the cross-tables of two tasks on a split.

        Args:
            step: of the weights.
            split: name of the posts.
            tasks: of rows and of columns.
            tables: as in ``cross_tables_figure``.
        """
        if not self.enabled or not self._draws:
            return
        with self._harmless():
            title = f"{tasks[1]} within {tasks[0]} ({split}), %"
            figure = cross_tables_figure(tables, title=title)
            if figure is not None:
                tag, name = "/".join((split, *tasks)), "_".join(("cross", split, *tasks))
                self._figure(f"cross/{tag}", name, figure, step)

    def log_experts(
        self, step: int, changes: Mapping[str, Mapping[str, Any]], *, lines: Sequence[str]
    ) -> None:
        """Show what experts and gate are worth: ``<condition>/<task>/<metric>``, and a table as text.

        Args:
            step: of the weights.
            changes: condition -> of ``comoe.evaluation.experts_off.change``.
            lines: the table.
        """
        if not self.enabled or not changes:
            return
        with self._harmless():
            for condition, found in changes.items():
                for task, values in {**found["tasks"], "mean": found["mean"]}.items():
                    scalars = {f"{condition}/{task}/{key}": value for key, value in values.items()}
                    self._scalars(scalars, step)
            fenced = "\n".join(f"    {line}" for line in lines)
            self._writer.add_text("experts", fenced, global_step=step)

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Write something that happened (a skipped step, a stop, a checkpoint) as a line with ``split: event``."""
        if self.enabled:
            self._write({"split": "event", **event})

    def close(self) -> None:
        """Draw the curves once more and close the files."""
        if self.enabled:
            with self._harmless():
                self._draw_curves()
                self._writer.close()
            self._trackers.close()
            self._file.close()
            self.enabled = False

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What people look at never ends a run: one warning, and the run goes on without it."""
        try:
            yield
        except Exception as error:  # whatever a library of plots may raise
            if not self._warned:
                reason = f"{type(error).__name__}: {error}"
                print(f"warning: plots or TensorBoard lack something ({reason})", file=sys.stderr)
            self._warned = True

    def _log_routing(self, routing: RoutingSummary, *, split: str, step: int) -> None:
        where = "routing" if split == "validation" else f"routing_{split}"
        for index, name in enumerate(routing.layer_names):
            tag = f"{where}/layer_{name.replace(' ', '_')}"
            scalars = {name: values[index] for name, values in routing.by_layer.items()}
            scalars |= {
                f"share/expert_{expert}": share
                for expert, share in enumerate(routing.share_LE[index])
            }
            for name, values in routing.by_task.items():
                scalars |= {
                    f"{name}/{task}": value
                    for task, value in zip(routing.tasks, values[index], strict=True)
                }
            self._scalars({f"{tag}/{name}": value for name, value in scalars.items()}, step)
            if self._histograms:
                self._histogram(f"{tag}/scores", routing.histogram_LH[index], step)
        if not self._draws:
            return
        # Where all experts see all tokens, only the weights of the gate tell them apart.
        even = 1 / routing.share_LE.shape[1]
        weighed = np.allclose(np.nan_to_num(routing.share_LE, nan=even), even)
        what = "gate weight" if weighed else "tokens"
        share_LE = routing.weight_LE if weighed else routing.share_LE
        share_LTE = routing.weight_LTE if weighed else routing.share_LTE
        title, names = (
            f"Share of {what} per expert, in % ({split}, step {step})",
            routing.layer_names,
        )
        layers = plots.share_figure(share_LE, rows=names, title=title, row_axis="layer")
        tasks = plots.task_share_figure(share_LTE, layers=names, tasks=routing.tasks, what=what)
        self._figure(f"{where}/layer_expert", f"{where}_layer_expert", layers, step)
        self._figure(f"{where}/task_expert", f"{where}_task_expert", tasks, step)

    def _log_embeddings(self, embeddings: EmbeddingSummary, *, split: str, step: int) -> None:
        where = "embedding" if split == "validation" else f"embedding_{split}"
        for task, view in embeddings.tasks.items():
            self._scalars(
                {f"{where}/{task}/{name}": value for name, value in view.measures.items()}, step
            )
            if self._draws:
                title = f"Embeddings of {task} ({split}, step {step})"
                figure = embedding_figure(view.points, view.labels, title=title)
                self._figure(f"{where}/{task}", f"{where}_{task}", figure, step)
        self._scalars(
            {f"{where}/{name}": value for name, value in embeddings.retrieval.items()}, step
        )

    def _histogram(self, tag: str, counts_H: np.ndarray, step: int) -> None:
        edges = np.linspace(0.0, 1.0, len(counts_H) + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        moments = {
            "num": counts_H.sum(),
            "sum": counts_H @ middles,
            "sum_squares": counts_H @ middles**2,
        }
        buckets = {"bucket_limits": edges[1:].tolist(), "bucket_counts": counts_H.tolist()}
        if counts_H.any():
            self._writer.add_histogram_raw(
                tag, min=0.0, max=1.0, **moments, **buckets, global_step=step
            )

    def _draw_curves(self) -> None:
        train = [record for record in self._records if record.get("split") == "train"]
        checks = [record for record in self._records if record.get("split") == "validation"]
        if not self._draws or self._drawn == (len(train), len(checks)):
            return  # A figure takes longer than a step of a small model.
        self._drawn = len(train), len(checks)
        losses = {task.name: _curve(train, task.name, "loss") for task in self._tasks}
        losses["loss"] = [(record["step"], record["loss"]) for record in train]
        validation = {task.name: _curve(checks, task.name, "loss") for task in self._tasks}
        plots.save_figure(plots.loss_figure(losses, validation), self._plots / "loss.png")
        main = {
            f"{task.name}: {task.metric}": _curve(checks, task.name, task.metric)
            for task in self._tasks
        }
        floor = {
            f"{task.name}: {task.metric}": curve[-1][1]
            for task in self._tasks
            if (curve := _curve(checks, task.name, f"majority/{task.metric}"))
        }
        plots.save_figure(plots.metric_figure(main, floor), self._plots / "metrics.png")
        routed = [record for record in checks if BLOCK_MEASURES[0] in record.get("routing", {})]
        if routed:
            curves = {
                name: {
                    layer: [(one["step"], one["routing"][name][place]) for one in routed]
                    for place, layer in enumerate(routed[0]["routing"]["layers"])
                }
                for name in BLOCK_MEASURES
            }
            plots.save_figure(plots.experts_figure(curves), self._plots / "experts.png")

    def _figure(self, tag: str, name: str, figure: plots.Figure, step: int) -> None:
        name = re.sub(r"[^\w.-]", "_", name)
        if len(os.fsencode(name)) > LONGEST_NAME:
            name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        file = self._plots / f"{name}.png"
        self._writer.add_image(tag, plots.save_figure(figure, file), step, dataformats="HWC")

    def _scalars(self, scalars: Mapping[str, float | torch.Tensor], step: int) -> None:
        finite = {
            name: float(value)
            for name, value in scalars.items()
            if value is not None and math.isfinite(value)
        }
        for name, value in finite.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._trackers.log(finite, step)

    def _write(self, record: Mapping[str, Any]) -> None:
        line = plain(record)
        with doing("writing", self._path):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._records.append(line)


def _terms_by_task(
    terms: Mapping[str, float | torch.Tensor],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """``task/<name>`` becomes the loss of the task, ``<term>/<name>`` a number beside it; the rest stays as it is."""
    tasks: dict[str, dict[str, float]] = {}
    rest: dict[str, float] = {}
    for key, value in terms.items():
        term, _, task = key.partition("/")
        if task:
            tasks.setdefault(task, {})["loss" if term == TASK_TERM else term] = float(value)
        else:
            rest[key] = float(value)
    return tasks, rest


def _curve(records: Sequence[Mapping[str, Any]], task: str, name: str) -> list[tuple[int, float]]:
    points = (
        (record["step"], record.get("tasks", {}).get(task, {}).get(name)) for record in records
    )
    return [(step, value) for step, value in points if value is not None]
