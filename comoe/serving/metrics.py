"""What a server counts, for Prometheus. Nothing of a post: names of models, tasks and labels, and numbers."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from comoe.serving.batcher import Work
from comoe.tasks.task import Task

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
POSTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SCORES = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        # fmt: off
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("comoe_requests", "Answered requests", ["route", "status"], registry=registry)
        self.latency = Histogram("comoe_request_seconds", "From the arrival of a request to its answer", ["route"],
                                 buckets=SECONDS, registry=registry)
        self.posts = Counter("comoe_posts", "Posts that were predicted, or could not be (error)", ["model", "outcome"],
                             registry=registry)
        self.truncated = Counter("comoe_truncated_posts", "Posts cut to the model's length", ["model"],
                                 registry=registry)
        self.lost_images = Counter("comoe_lost_images", "Posts predicted without their bad image", ["model"],
                                   registry=registry)
        self.queue = Gauge("comoe_queue_posts", "Posts that wait", ["model"], registry=registry)
        self.batch_posts = Histogram("comoe_batch_posts", "Posts taken at once", ["model"], buckets=POSTS,
                                     registry=registry)
        self.batch_tokens = Histogram("comoe_batch_tokens", "Their estimated tokens", ["model"], buckets=TOKENS,
                                      registry=registry)
        self.batch_seconds = Histogram("comoe_batch_seconds", "Their time", ["model"], buckets=SECONDS,
                                       registry=registry)
        self.labels = Counter("comoe_labels", "Predicted labels; of tags, types of spans", ["model", "task", "label"],
                              registry=registry)
        self.scores = Histogram("comoe_score", "Score of the predicted label", ["model", "task"], buckets=SCORES,
                                registry=registry)
        self.reloads = Counter("comoe_reloads", "Looks for new revisions that found one", ["model", "outcome"],
                               registry=registry)
        self.served = Gauge("comoe_model_info", "1 for each served revision", ["model", "revision"], registry=registry)
        # fmt: on

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def batch(self, model: str, work: Work) -> None:
        """Count what was taken at once."""
        self.batch_posts.labels(model).observe(work.posts)
        self.batch_tokens.labels(model).observe(work.tokens)
        self.batch_seconds.labels(model).observe(work.seconds)

    def predictions(
        self, model: str, tasks: Sequence[Task], results: Iterable[Mapping[str, Any]]
    ) -> None:
        """Count what was predicted."""
        outcomes: Count[str] = Count()
        labels: Count[tuple[str, str]] = Count()
        for result in results:
            outcomes["error" if "error" in result else "predicted"] += 1
            self.truncated.labels(model).inc("truncated" in result)
            self.lost_images.labels(model).inc("image_error" in result)
            for task in tasks:
                found = result.get(task.name, {})
                for label in _labels(found):
                    labels[task.name, label] += 1
                if "label" in found and "scores" in found:
                    score = found["scores"][found["label"]]
                    self.scores.labels(model, task.name).observe(score)
        for outcome, count in outcomes.items():
            self.posts.labels(model, outcome).inc(count)
        for (task_name, label), count in labels.items():
            self.labels.labels(model, task_name, label).inc(count)


def _labels(prediction: Mapping[str, Any]) -> list[str]:
    """Labels of a prediction; none of a number or of a text."""
    if "label" in prediction:
        return [prediction["label"]]
    if "spans" in prediction:
        return [span["type"] for span in prediction["spans"]]
    return list(prediction.get("labels", ()))
