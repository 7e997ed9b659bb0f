"""The hub: exports pushed and pulled by name and revision against a stand-in, and nothing in them executed."""

import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers_export import TASKS, export_tiny, tiny_predictor, tiny_recipe
from helpers_hub import served
from transformers import AutoConfig, AutoModel, AutoTokenizer

import comoe.hub
from comoe.commands import predict, push
from comoe.inference.checkpoint_folder import write_manifest
from comoe.inference.exported import load_exported
from comoe.inference.hub import copy_export, find_export, push_export
from comoe.inference.model_card import model_card
from comoe.inference.predictor import Predictor

TOKEN = "hf_thisIsAVeryPrivateToken"
POSTS = ["good day", "bad rain"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A private hub that the library takes for the real one."""
    with served(TOKEN) as (hub, address):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_two_revisions_are_pushed_and_pulled_by_name_and_the_token_is_nowhere(hub, tmp_path, capfd):
    for seed, branch in ((1, None), (2, "v2")):
        export_tiny(tmp_path / f"run{seed}", seed=seed)
        folder = tmp_path / f"run{seed}/export"
        (folder / "notes of mine.txt").write_text("private")
        words = ["--model", str(folder), "--to", "ann/tiny", "--private"]
        push.main(words + (["--revision", branch] if branch else []))
    assert "/ann/tiny/commit/" in capfd.readouterr().out
    pushed = hub.repositories["ann/tiny"]["v2"]
    assert {"model.safetensors", "config.json", "README.md", "manifest.json"} <= set(pushed)
    assert "notes of mine.txt" not in pushed
    for revision, seed in ((None, 1), ("v2", 2), (hub.sha("ann/tiny", "v2"), 2)):
        pulled = Predictor.from_pretrained("ann/tiny", revision=revision, device="cpu")
        own = Predictor.from_pretrained(tmp_path / f"run{seed}/export", device="cpu")
        assert pulled(POSTS) == own(POSTS)
    (tmp_path / "posts.txt").write_text("\n".join(POSTS))
    words = ["--model", "ann/tiny", "--revision", "v2", "--input", str(tmp_path / "posts.txt")]
    predict.main([*words, "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["mood"]["label"] for row in rows] == [row["mood"]["label"] for row in own(POSTS)]
    # Without a network, from the cache.
    again = find_export("ann/tiny", revision="v2", local_files_only=True)
    assert (again / "model.safetensors").is_file()
    told = "".join(capfd.readouterr())
    assert TOKEN not in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_a_private_model_is_refused_without_the_token_and_a_wrong_one_is_not_told(
    hub, tmp_path, monkeypatch
):
    export_tiny(tmp_path / "run")
    push_export(tmp_path / "run/export", "ann/tiny", token=TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, "hf_aWrongToken"):
        with pytest.raises(ValueError, match="ann/tiny is no folder, and the hub does not") as told:
            Predictor.from_pretrained("ann/tiny", token=token, device="cpu")
        assert "hf_aWrongToken" not in str(told.value)
    with pytest.raises(ValueError, match="the hub does not give it"):
        Predictor.from_pretrained("ann/tiny", revision="v9", token=TOKEN, device="cpu")
    with pytest.raises(ValueError, match="is no name on the hub; write organization/name"):
        push_export(tmp_path / "run/export", "tiny")
    with pytest.raises(ValueError, match="has no revisions"):
        Predictor.from_pretrained(tmp_path / "run/export", revision="main")


def test_a_push_without_a_network_is_a_sentence(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    export_tiny(tmp_path)
    with pytest.raises(
        SystemExit, match="could not be pushed to ann/tiny .ConnectError: "
    ) as ended:
        push.main(["--model", str(tmp_path / "export"), "--to", "ann/tiny"])
    assert ended.value.code == 2 and "report it" not in str(ended.value)


def test_a_predictor_is_saved_and_pushed_as_the_files_that_it_was_read_from(hub, tmp_path):
    predictor = tiny_predictor(tmp_path)
    predictor.save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert Predictor.from_pretrained(tmp_path / "copy", device="cpu")(POSTS) == predictor(POSTS)
    predictor.push_to_hub("ann/pushed", private=True)
    files = hub.repositories["ann/pushed"]["main"]
    assert files["model.safetensors"] == (tmp_path / "export/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the folder that the model was read from"):
        predictor.save_pretrained(tmp_path / "export")
    assert (tmp_path / "export/config.json").is_file()
    (tmp_path / "export/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json has 2 bytes"):
        push_export(tmp_path / "export", "ann/pushed")


def test_auto_model_loads_an_export_and_gives_the_logits_of_the_predictor(tmp_path):
    export_tiny(tmp_path)
    folder = tmp_path / "export"
    assert isinstance(AutoConfig.from_pretrained(folder), comoe.hub.ComoeConfig)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, comoe.hub.ComoeModel) and not model.training
    with torch.inference_mode():
        logits = model(**tokenizer(["good day"], return_tensors="pt")).logits
    assert set(logits) == {task.name for task in TASKS}
    scores = Predictor.from_pretrained(folder, device="cpu")(["good day"])[0]["mood"]["scores"]
    assert logits["mood"].softmax(dim=1)[0].tolist() == pytest.approx(list(scores.values()))
    export_tiny(tmp_path / "routed", route_by="task")
    routed = AutoModel.from_pretrained(tmp_path / "routed/export")
    with pytest.raises(ValueError, match="use comoe.Predictor"):
        routed(**tokenizer(["good day"], return_tensors="pt"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


def test_a_malicious_export_executes_nothing(hub, tmp_path, monkeypatch):
    """Pickles, Python files that a configuration asks for, and a plugin, each of which would leave a mark."""
    mark = tmp_path / "mark"
    export_tiny(tmp_path / "run")
    folder = tmp_path / "run/export"
    evil = Evil()
    evil.mark = str(mark)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(evil))
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: ...\n"
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    remote = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    config |= {"auto_map": remote}
    config["encoder"]["auto_map"] = remote
    config["model"]["trust_remote_code"] = True
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    monkeypatch.syspath_prepend(folder)
    write_manifest(folder, spared=("README.md",))
    hub.repositories["ann/evil"] = {
        "main": {path.name: path.read_bytes() for path in folder.iterdir()}
    }
    pulled = find_export("ann/evil")
    assert not [path for path in pulled.iterdir() if path.suffix in (".py", ".bin", ".pt")]
    # The manifest names what was left behind, so the digests alone would refuse it.
    for place in (pulled, folder):
        assert len(Predictor.from_pretrained(place, device="cpu", verify=False)(POSTS)) == 2
        AutoModel.from_pretrained(place, trust_remote_code=True, verify=False)
    config["plugins"] = ["evil"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names the plugin evil, whose code would run"):
        load_exported(folder, verify=False)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../outside/x.json", "a/../../outside/x.json", "{}/outside/x.json", "..\\x"]
)
def test_a_manifest_names_no_file_outside_of_its_folder(name, tmp_path):
    export_tiny(tmp_path / "theirs")
    folder = tmp_path / "theirs/export"
    (tmp_path / "theirs/outside").mkdir()
    (tmp_path / "theirs/outside/x.json").write_text("{}")  # a download may hold it
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name.format(tmp_path / "theirs")] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "outside").mkdir()
    with pytest.raises(ValueError, match="its manifest is damaged"):
        copy_export(folder, tmp_path / "copy")
    assert not list((tmp_path / "outside").iterdir())
    with pytest.raises(ValueError, match="its manifest is damaged"):
        load_exported(folder)


def test_the_card_names_no_path_and_no_user(tmp_path):
    export_tiny(tmp_path)
    config = json.loads((tmp_path / "export/config.json").read_text())
    for path in (
        "/home/ann/mood.csv",
        "../ann/mood.csv",
        "ann/mood.csv",
        r"C:\Users\ann\mood.csv",
        "~ann/mood.csv",
    ):
        recipe = tiny_recipe()
        recipe.tasks["mood"].path = path
        recipe.distill.teachers = [path.replace("mood.csv", "teacher/export")]
        card = model_card("tiny", recipe=recipe, tasks=TASKS, config=config, results=None)
        assert "mood.csv" in card and "teacher/export" in card
        assert "ann/" not in card and "ann\\" not in card and "/home" not in card
    recipe.tasks["mood"].path, recipe.tasks["mood"].format = "org/mood", "hub"
    assert "| mood | org/mood |" in model_card(
        "tiny", recipe=recipe, tasks=TASKS, config=config, results=None
    )
