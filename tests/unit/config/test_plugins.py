"""Plugins: what they add works everywhere, and their code runs only where the user agreed."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers_export import make_run, tiny_recipe

from comoe.commands import predict
from comoe.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from comoe.config.plugins import CONSENT, GROUP
from comoe.config.recipe import ContrastiveConfig, LossConfig
from comoe.config.reference import options_markdown
from comoe.data.corpus import load_corpus
from comoe.data.reading import sources
from comoe.inference.export import export_checkpoint
from comoe.inference.predictor import Predictor
from comoe.losses.objective import LOSSES
from comoe.models.moe.gate import GATES
from comoe.models.moe.router import build_gate
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.metrics import METRICS
from tests.helpers_model import moe_config, random_batch, scaled, tiny_objective

EXTENDING = Path(__file__).parents[3] / "docs/extending.md"
MORE = """
from pathlib import Path
from comoe.data.reading.sources import ENDINGS, READERS, RawSplit
from comoe.tasks.kinds.classification import SingleLabel

Path(__file__).with_name("imported").touch()

class Shout(SingleLabel):
    metrics = KINDS["single_label"].metrics

    def parse(self, value, labels):
        return super().parse(value and value.lower(), labels)

def read_pipes(source, split):
    return READERS["csv"](source, split)

KINDS["shout"] = Shout()
READERS["pipes"] = read_pipes
"""


@pytest.fixture(autouse=True)
def tables_as_they_were(monkeypatch: pytest.MonkeyPatch):
    """Forget afterwards what a plugin added, its module, and the consent."""
    monkeypatch.setenv(CONSENT, "")
    tables = (METRICS, KINDS, GATES, LOSSES, sources.READERS, sources.ENDINGS)
    before, metrics = [dict(table) for table in tables], KINDS["single_label"].metrics
    yield
    for table, content in zip(tables, before, strict=True):
        for key in set(table) - set(content):
            del table[key]
    KINDS["single_label"].metrics = metrics
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The package ``my_package``: the example of the documentation, a kind and a reader."""
    folder = tmp_path / "path/my_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    code = next(
        text
        for text in re.findall(r"```python\n(.*?)```", EXTENDING.read_text(), flags=re.DOTALL)
        if "ReluGate" in text
    )
    (folder / "mine.py").write_text(code + MORE)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path):
    """The recipe of the documentation, with a kind and a reader of the plugin's."""
    rows = [f"good day {n},GOOD\nbad day {n},bad\n" for n in range(8)]
    (tmp_path / "mood.csv").write_text("text,label\n" + "".join(rows))
    (text,) = (
        text
        for text in re.findall(r"```yaml\n(.*?)```", EXTENDING.read_text(), flags=re.DOTALL)
        if "plugins:" in text
    )
    raw = yaml.safe_load(text)
    raw["tasks"]["mood"] |= {"kind": "shout", "format": "pipes", "labels": ["good", "bad"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "mine.yaml"


def test_a_recipe_runs_no_plugin_that_the_user_did_not_agree_to(plugin, recipe_file):
    with pytest.raises(ValueError, match=r"mine.yaml:\d+ names the plugin my_package.mine, whose"):
        load_recipe(recipe_file)
    with pytest.raises(ValueError, match="--plugins my_package.mine on the command line"):
        load_recipe(recipe_file, plugins=["my_package.other"])
    assert "my_package" not in sys.modules and not (plugin / "imported").exists()
    assert load_recipe(recipe_file, plugins=["my_package.mine"]).model.moe.gate == "relu"
    # As ranks and the runs of an experiment inherit it.
    assert load_recipe(recipe_file).plugins == ["my_package.mine"]


def test_an_installed_plugin_has_a_name_and_needs_no_flag(plugin, recipe_file: Path):
    info = plugin.parent / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = my_package.mine\n")
    load_recipe("smoke")
    assert not (plugin / "imported").exists()
    assert load_recipe(recipe_file, ["plugins=[mine]"]).plugins == ["mine"]
    assert (plugin / "imported").exists()


@pytest.mark.parametrize("given", ["plugins=os;x", "plugins=[a/b]", "plugins=[1]", "plugins=['']"])
def test_what_is_no_module_is_refused(given: str):
    with pytest.raises(ValueError, match=r"^command line: plugins is .*; it must be a list of mod"):
        load_recipe("smoke", [given])


def test_a_plugin_that_fails_is_named_with_its_error(plugin, recipe_file: Path):
    (plugin / "mine.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"my_package.mine cannot be imported \(ZeroDivisionError"):
        load_recipe(recipe_file, plugins=["my_package.mine"])


def test_its_words_are_those_of_the_options_and_its_reader_and_kind_read_posts(plugin, recipe_file):
    with pytest.raises(ValueError, match=r"model.moe.gate is 'relu'; it must be one of sigmoid"):
        recipe_from_dict({"model": {"moe": {"gate": "relu"}}})
    recipe = load_recipe(recipe_file, plugins=["my_package.mine"])
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert "one of sigmoid, softmax, random, uniform, relu, or that of a plugin" in (
        options_markdown()
    )
    with pytest.raises(ValueError, match="did you mean relu"):
        recipe_from_dict({"model": {"moe": {"gate": "rellu"}}})
    corpus = load_corpus(recipe)
    (task,) = corpus.tasks
    assert (task.kind, task.metric, task.labels) == ("shout", "worst_recall", ("good", "bad"))
    with pytest.raises(ValueError, match=r"loss.added has 'other', .* \(there is confidence\)"):
        load_recipe(recipe_file, ["loss.added.other=1"])


def test_its_metric_scores_and_its_gate_routes(plugin, recipe_file: Path):
    load_recipe(recipe_file, plugins=["my_package.mine"])
    gold, predicted = torch.tensor([0, 0, 1, 1, 1]).numpy(), torch.tensor([0, 1, 1, 1, 0]).numpy()
    assert METRICS["worst_recall"](gold, predicted, ("a", "b")) == 0.5
    logits_SE = torch.tensor([[1.0, -2.0, 3.0]])
    routing = build_gate(replace(moe_config(), gate="relu", num_experts=3), 8)(
        logits_SE, torch.zeros(3)
    )
    assert routing.scores_SE.tolist() == [[1.0, 0.0, 3.0]]
    assert routing.indices_Sk.tolist() == [[2, 0]]


def test_its_loss_is_added_with_its_weight(plugin, recipe_file: Path):
    load_recipe(recipe_file, plugins=["my_package.mine"])
    batch = scaled(random_batch())
    plain = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
    steps = {
        weight: tiny_objective(loss=replace(plain, added={"confidence": weight})).eval()(batch)
        for weight in (0.0, 0.5)
    }
    mood = steps[0.5].output.logits["mood"].double()
    expected = steps[0.0].loss.double() + 0.5 * mood.square().mean()
    torch.testing.assert_close(steps[0.5].loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert "confidence" in steps[0.5].terms and "confidence" not in steps[0.0].terms


def test_an_export_names_its_plugins_and_runs_none_without_consent(
    plugin, recipe_file, tmp_path, monkeypatch
):
    run, out = tmp_path / "run", tmp_path / "export"
    make_run(run)
    saved = recipe_to_dict(tiny_recipe()) | {"plugins": ["my_package.mine"]}
    saved["model"]["moe"]["gate"] = "relu"
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=r"config.yaml:\d+ names the plugin my_package.mine"):
        export_checkpoint(run, out)
    monkeypatch.setenv(CONSENT, "my_package.mine")
    export_checkpoint(run, out)
    card = (out / "README.md").read_text()
    assert 'this/folder", plugins=["my_package.mine"])' in card
    assert "--plugins my_package.mine --output" in card
    # Another process, on the machine of somebody else.
    monkeypatch.setenv(CONSENT, "")
    (plugin / "imported").unlink()
    del sys.modules["my_package.mine"], GATES["relu"]
    (tmp_path / "posts.txt").write_text("good day\n")
    words = ["--model", str(out), "--input", str(tmp_path / "posts.txt"), "--output"]
    words += [str(tmp_path / "out.jsonl"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="config.json names the plugin my_package.mine, whose"):
        predict.main(words)
    assert not (plugin / "imported").exists()
    predict.main([*words, "--plugins", "my_package.mine"])
    assert (plugin / "imported").exists() and (tmp_path / "out.jsonl").stat().st_size > 50
    with pytest.raises(ValueError, match="plugin other"):
        (out / "config.json").write_text(
            (out / "config.json").read_text().replace("my_package.mine", "other")
        )
        Predictor.from_pretrained(out, verify=False, plugins=["my_package.mine"])
