"""Predictions as a page for people: each post with its tasks, and the words that explain them in color.

The page needs nothing else, runs no script, and holds texts as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STRONGEST = 0.6
"""Opacity of the color behind the word that counts most: black letters stay legible on it."""

FOR, AGAINST = "230, 130, 20", "40, 110, 220"
"""Orange and blue: told apart by color-blind people too."""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>comoe</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif;
       color: #1d2733; background: #f6f7f9; }
article { background: #fff; border: 1px solid #d5dae1; border-radius: 8px; padding: .8rem 1.1rem; margin: 0 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: .8rem 0 .2rem; font-weight: 400; color: #5a6675; } h3 b { color: #1d2733; }
p { margin: .2rem 0; overflow-wrap: anywhere; } p.note, td, th, dl { font-size: .85rem; color: #45505d; }
i { font-style: normal; border-radius: 4px; padding: .1rem .2rem; color: #000; }
i.span { background: rgba(60, 110, 200, .25); }
table { border-collapse: collapse; }
td, th { padding: .1rem .8rem .1rem 0; text-align: left; font-weight: 400; border-bottom: 1px solid #e5e8ec; }
p.bad { color: #b3261e; }
</style></head><body><h1>Predictions</h1>
"""

LEGENDS = {
    "attention": "Color: share of the attention of a task's head, which is no proof of a cause.",
    "gradients": f'Color: <i style="background: rgba({FOR}, .4)">speaks for</i> and <i style="background: '
    f'rgba({AGAINST}, .4)">speaks against</i> the label (integrated gradients, log-odds; of a number its own unit).',
    "experts": "Experts that each word used, by layer, with their gates.",
}


def head(method: str | None) -> str:
    """What comes before the first post."""
    return HEAD + (f'<p class="note">{LEGENDS[method]}</p>\n' if method else "")


def post_block(prediction: Mapping[str, Any], tasks: Sequence[str], kept: Sequence[str]) -> str:
    """One post: a line of the predictions as HTML."""
    lines = [f"<article><h2>{_text(prediction.get('text'))}</h2>"]
    notes = [f"{_text(name)}: {_text(prediction.get(name))}" for name in kept]
    notes += ["cut to the model's length"] if prediction.get("truncated") else []
    notes += [f"read in {prediction['windows']} windows"] if "windows" in prediction else []
    lines += [f'<p class="note">{" · ".join(notes)}</p>'] if notes else []
    for key in ("error", "image_error"):
        lines += [f'<p class="bad">{_text(prediction[key])}</p>'] if key in prediction else []
    for task in tasks:
        if task in prediction:
            lines += _task(task, prediction[task])
    return "\n".join([*lines, "</article>\n"])


def _task(name: str, found: Mapping[str, Any]) -> list[str]:
    scores = found.get("scores", {})
    head = f"{_text(name)}: <b>{_text(_headline(found))}</b>{_score(found, scores)}"
    if "prior" in found:
        head += f", adapted to another mix of labels ({_text(found['prior'])})"
    lines = [f"<h3>{head}</h3>"]
    if "spans" in found:
        lines.append(_spans(found))
    if weights := found.get("attention"):
        lines.append(_colored(weights, "{:.1%} of the attention on words"))
    for entry in found.get("gradients", ()):
        label = f"<b>{_text(entry['label'])}</b>: " if len(found["gradients"]) > 1 else ""
        lines.append(_colored(entry["words"], "{:+.3f}"))
        change = f"from {entry['from']:+.2f} without its words to {entry['to']:+.2f}"
        sums = (
            f"{entry['steps']} steps, the words sum to the change within {abs(entry['delta']):.3f}"
        )
        sums += "" if entry.get("converged", True) else ", which is <b>not converged</b>"
        lines.append(f'<p class="note">{label}{change}; {sums}</p>')
    if "experts" in found:
        lines.append(_experts(found["experts"]))
    return lines


def _headline(found: Mapping[str, Any]) -> str:
    if "labels" in found:
        return ", ".join(found["labels"]) or "none"
    if "value" in found:
        return f"{found['value']:.3f}"
    if "spans" in found:
        return f"{len(found['spans'])} found"
    return found.get("label", found.get("answer"))


def _score(found: Mapping[str, Any], scores: Any) -> str:
    if not isinstance(scores, Mapping):
        return ""
    named = found.get("labels") or [found.get("label")]
    shares = [f"{scores[label]:.2f}" for label in named if label in scores]
    return f" {', '.join(shares)}" if shares else ""


def _colored(words: Sequence[tuple[str, float]], title: str) -> str:
    most = max((abs(value) for _, value in words), default=0.0) or 1.0
    marks = [
        f'<i style="background: rgba({FOR if value > 0 else AGAINST}, {STRONGEST * abs(value) / most:.3f})" '
        f'title="{title.format(value)}">{_text(word)}</i>'
        for word, value in words
    ]
    return f"<p>{' '.join(marks)}</p>"


def _spans(found: Mapping[str, Any]) -> str:
    kinds = {span["start"]: span for span in found["spans"]}
    shown, place = [], 0
    while place < len(found["words"]):
        span = kinds.get(place)
        end = span["end"] if span else place + 1
        text = _text(" ".join(found["words"][place:end]))
        shown.append(
            f'<i class="span">{text} <small>{_text(span["type"])}</small></i>' if span else text
        )
        place = end
    return f"<p>{' '.join(shown)}</p>"


def _experts(found: Mapping[str, Any]) -> str:
    heads = "".join(f"<th>layer {layer}</th>" for layer in found["layers"])
    rows = []
    for word, layers in found["words"]:
        used = ("<br>".join(f"{expert}: {gate:.2f}" for expert, gate in layer) for layer in layers)
        rows.append(
            f"<tr><td>{_text(word)}</td>{''.join(f'<td>{cell}</td>' for cell in used)}</tr>"
        )
    return f"<table><tr><th>word</th>{heads}</tr>{''.join(rows)}</table>"


def _text(value: Any) -> str:
    return escape("" if value is None else str(value))
