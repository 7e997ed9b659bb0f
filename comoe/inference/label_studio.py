"""Posts with predictions as tasks of Label Studio, and the labeling interface that fits them.

Source of the form: the pages "Label Studio task format" and "Import pre-annotations" of its guide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from comoe.tasks.labels import OUTSIDE
from comoe.tasks.task import Task

TEXT, PAIR = "text", "pair"


def labeling_task(
    data: Mapping[str, Any],
    prediction: Mapping[str, Any],
    tasks: Iterable[Task],
    *,
    model: str,
    score: float | None,
) -> dict[str, Any]:
    """One post as it is imported: its data, and what the model predicts as a pre-annotation.

    Args:
        data: ``text``, ``pair`` where there is one, and further columns.
        prediction: of the post, by task.
        tasks: that are to be labeled.
        model: name of the model, shown to annotators.
        score: how sure the model is; Label Studio can sort by it.
    """
    results = [
        {"from_name": task.name, "to_name": TEXT, "type": kind, "value": value}
        for task in tasks
        if task.name in prediction
        for kind, value in _results(prediction[task.name], data[TEXT])
    ]
    made = {"model_version": model, "result": results}
    return {"data": dict(data), "predictions": [made if score is None else made | {"score": score}]}


def _results(found: Mapping[str, Any], text: str) -> list[tuple[str, dict[str, Any]]]:
    if "spans" in found:
        return [("labels", span) for span in _spans(found, text)]
    if "value" in found:
        return [("number", {"number": found["value"]})]
    if "answer" in found:
        return [("textarea", {"text": [found["answer"]]})]
    labels = [found["label"]] if "label" in found else found["labels"]
    return [("choices", {"choices": labels})] if labels else []


def _spans(found: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    """Places in characters; what cannot be found in the text, as the model cleaned it away, is left out."""
    places: list[tuple[int, int] | None] = []
    at = 0
    for word in found["words"]:
        start = text.find(word, at)
        places.append(None if start < 0 else (start, start + len(word)))
        at = at if start < 0 else start + len(word)
    spans = []
    for span in found["spans"]:
        inside = places[span["start"] : span["end"]]
        if inside and all(inside):
            start, end = inside[0][0], inside[-1][1]
            spans.append(
                {"start": start, "end": end, "text": text[start:end], "labels": [span["type"]]}
            )
    return spans


def interface(tasks: Sequence[Task], *, with_pair: bool) -> str:
    """The labeling interface as XML: a control of the name of each task."""
    lines = ["<View>", f'  <Text name="{TEXT}" value="${TEXT}"/>']
    lines += [f'  <Text name="{PAIR}" value="${PAIR}"/>'] * with_pair
    for task in tasks:
        name = quoteattr(task.name)
        lines.append(f"  <Header value={name}/>")
        if task.mode == "tokens":
            types = dict.fromkeys(
                re.sub("^[BIES]-", "", label) for label in task.labels if label != OUTSIDE
            )
            lines += _control("Labels", name, "", "Label", types)
        elif task.labels:
            choice = ' choice="single"' if task.rules.exclusive else ' choice="multiple"'
            lines += _control("Choices", name, choice, "Choice", task.labels)
        else:
            control = "TextArea" if task.mode == "decoder" else "Number"
            lines.append(f'  <{control} name={name} toName="{TEXT}"/>')
    return "\n".join([*lines, "</View>"]) + "\n"


def _control(tag: str, name: str, more: str, item: str, labels: Iterable[str]) -> list[str]:
    items = [f"    <{item} value={quoteattr(label)}/>" for label in labels]
    return [f'  <{tag} name={name} toName="{TEXT}"{more}>', *items, f"  </{tag}>"]
