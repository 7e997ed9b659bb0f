"""The page's script, in Node with a document that holds what the script sets."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files

import pytest

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")

BROWSER = """
const fake = () => ({ value: "", options: [], selectedIndex: -1, style: {}, append() {}, addEventListener() {},
                      replaceChildren(...made) { this.options = made; this.selectedIndex = made.length ? 0 : -1; } });
const nodes = { model: Object.defineProperty(fake(), "value", {
  get() { return this.selectedIndex < 0 ? "" : this.options[this.selectedIndex].value; } }) };
globalThis.document = { getElementById: (id) => nodes[id] ??= fake(), createElement: fake, querySelector: fake };
let revision = "old";
const asked = [];
globalThis.fetch = async (path, options) => {
  asked.push(path);
  const models = ["news", "blogs"].map((model) => ({ model, revision }));
  if (path === "/v1/tasks") return { ok: true, status: 200, json: async () => ({ models }) };
  const { model, revision: wanted } = JSON.parse(options.body);
  const ok = wanted === revision;
  const found = { model, revision, predictions: [{ mood: { label: "good", scores: { good: 1 } } }] };
  const error = { error: { code: "unknown_model", message: "gone" } };
  return { ok, status: ok ? 200 : 404, json: async () => ok ? found : error };
};
"""

VISIT = """
setTimeout(async () => {
  nodes.model.selectedIndex = 1;
  revision = "new";
  await attempt(predict);
  console.log(JSON.stringify({ message: nodes.message.textContent, asked }));
}, 50);
"""


def test_a_new_revision_is_found_without_loading_the_page_again() -> None:
    script = (files("comoe.serving") / "page/page.js").read_text(encoding="utf-8")
    done = subprocess.run(
        ["node", "-"], input=BROWSER + script + VISIT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["message"].startswith("blogs new, ")
    assert seen["asked"] == ["/v1/tasks", "/v1/explain", "/v1/tasks", "/v1/explain"]
