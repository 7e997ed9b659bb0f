"""An export gives back the model that went in, and says what is wrong with a folder that cannot."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_export import TASKS, WORDS, export_tiny, make, make_run, tiny_recipe, tiny_tokenizer
from helpers_model import HF_CONFIGS, VARIANTS, moe_config, random_batch, tiny_model
from safetensors.torch import load_file, save_file

from comoe.config.files import lock_beside, locked
from comoe.data.posts import unlabelled_posts
from comoe.data.seen_posts import SEEN, write_seen
from comoe.inference.checkpoint_folder import MANIFEST, whats_wrong
from comoe.inference.export import Backbone, export_checkpoint, export_model, make_room
from comoe.inference.exported import load_exported
from comoe.inference.hub import export_files
from comoe.inference.model_card import model_card
from comoe.train.checkpoint.folder import find_checkpoint

ROOT = Path(__file__).parents[3]


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("route_by", ["token", "task", "both"])
def test_a_round_trip_leaves_every_logit_as_it_was(tmp_path, route_by):
    model = export_tiny(tmp_path, route_by=route_by)
    loaded = load_exported(tmp_path / "export")
    batch = random_batch()
    expected, found = model(batch), loaded.model(batch)
    for name, logits in expected.logits.items():
        torch.testing.assert_close(found.logits[name], logits, atol=1e-6, rtol=0)
    assert loaded.tasks == TASKS and not loaded.model.training
    assert (loaded.model_config.moe.route_by, loaded.data_config.max_length) == (route_by, 16)


@pytest.mark.parametrize("family", HF_CONFIGS | VARIANTS)
def test_every_family_of_encoders_survives(tmp_path, family):
    recipe = tiny_recipe()
    recipe.model.train_layers = 1
    model = tiny_model(recipe.model.moe, family=family, seed=4, recompute=True).eval()
    export_model(
        tmp_path / "e",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=TASKS,
        # As a run leaves it for the export.
        backbone=Backbone(
            json.loads(json.dumps(model.encoder.config.to_dict(), default=str)),
            tiny_tokenizer(tmp_path / "v"),
        ),
    )
    batch = random_batch()
    expected, found = model(batch), load_exported(tmp_path / "e").model(batch)
    for name, logits in expected.logits.items():
        torch.testing.assert_close(found.logits[name], logits, atol=1e-6, rtol=0)


def test_the_balance_bias_travels_with_the_weights(tmp_path):
    model = tiny_model(tiny_recipe().model.moe).eval()
    gates = [layer.mixture.gate for layer in model.moe_layers()]
    for number, gate in enumerate(gates):
        gate.e_score_correction_bias.copy_(torch.arange(4.0) + number)
    backbone = Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v"))
    options = dict(recipe=tiny_recipe(), tasks=TASKS, backbone=backbone)
    export_model(
        tmp_path / "e",
        state_dict=model.state_dict(),
        **options,
    )
    found = [
        layer.mixture.gate.e_score_correction_bias
        for layer in load_exported(tmp_path / "e").model.moe_layers()
    ]
    for number, bias in enumerate(found):
        assert bias.tolist() == [number, number + 1, number + 2, number + 3]


def test_the_folder_is_in_hugging_face_style(tmp_path):
    export_tiny(tmp_path)
    folder = tmp_path / "export"
    names = {path.name for path in folder.iterdir()}
    expected = "model.safetensors config.json README.md tokenizer.json tokenizer_config.json"
    assert set(expected.split()) <= names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("comoe", ["MultiTaskModel"])
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert [task["name"] for task in config["tasks"]] == ["mood", "topic", "heat", "words", "signs"]
    assert config["columns"]["heat"] == {"text": "text", "pair": None, "label": "label"}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.float32
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    modes = {path.stat().st_mode for path in (tmp_path / "export").iterdir()}
    assert len(modes) == 1, "safetensors alone would write for the owner only"


def test_no_path_of_the_training_machine_is_in_the_export(tmp_path):
    recipe = tiny_recipe()
    recipe.model.encoder = str(make(tmp_path / "home/me/encoders/minilm"))
    recipe.tasks["mood"].path = str(tmp_path / "home/me/mood.jsonl")
    encoder_config = HF_CONFIGS["bert"].to_dict() | {"_name_or_path": recipe.model.encoder}
    tokenizer = tiny_tokenizer(tmp_path / "v")
    model = tiny_model(recipe.model.moe)
    export_model(
        tmp_path / "e",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=TASKS,
        backbone=Backbone(encoder_config, tokenizer),
    )
    for path in (tmp_path / "e").glob("*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert json.loads((tmp_path / "e/config.json").read_text())["model"]["encoder"] == "minilm"


def test_the_model_card_shows_the_measured_results(tmp_path):
    scores = {"macro_f1": 0.61234, "majority/macro_f1": 0.2}
    results = {"metrics": {"test": {"mood": scores}}, "seconds": 90.0, "best_step": 5, "step": 10}
    export_tiny(tmp_path, results=results)
    card = (tmp_path / "export/README.md").read_text()
    assert card.startswith("---\n")
    assert "| mood | macro_f1 | 0.612 | 0.200 |" in card and "step 5 of 10, 1.5 minutes" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "comoe" and "comoe" in front["tags"]
    (found,) = front["model-index"][0]["results"]
    assert found["metrics"] == [{"type": "macro_f1", "value": 0.6123}]
    assert found["dataset"] == {"name": "mood", "type": "mood", "split": "test"}


def test_the_model_card_says_when_nothing_was_measured(tmp_path):
    export_tiny(tmp_path)
    assert "Nothing was measured on these weights" in (tmp_path / "export/README.md").read_text()


def test_an_export_replaces_an_older_one_but_nothing_else(tmp_path):
    export_tiny(tmp_path, seed=1)
    model = export_tiny(tmp_path, seed=2)
    loaded = load_exported(tmp_path / "export").model
    assert torch.equal(loaded.projection.weight, model.projection.weight)
    shutil.rmtree(tmp_path / "export")
    (make(tmp_path / "export") / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"export exists and is not an export of comoe; choose another folder"
    ):
        export_tiny(tmp_path)
    assert (tmp_path / "export/thesis.txt").read_text() == "years of work"
    (tmp_path / "export/config.json").write_text('["a list"]')
    with pytest.raises(ValueError, match="is not an export of comoe"):
        export_tiny(tmp_path)


def test_a_file_that_the_digests_alone_name_and_that_is_gone_is_told(tmp_path):
    export_tiny(tmp_path)
    manifest = tmp_path / "export/manifest.json"
    content = json.loads(manifest.read_text())
    content["sha256"]["gone.txt"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gone.txt was changed after it was written"):
        load_exported(tmp_path / "export")


def test_a_model_with_one_block_is_no_mixture(tmp_path):
    export_tiny(tmp_path)
    recipe = tiny_recipe()
    recipe.model.moe.num_experts = 1
    config = json.loads((tmp_path / "export/config.json").read_text())
    card = model_card("tiny", recipe=recipe, tasks=TASKS, config=config, results=None)
    assert "with one dense block beside the" in card


def test_weights_that_do_not_fit_leave_no_export(tmp_path):
    state = tiny_model(tiny_recipe().model.moe).state_dict()
    state["surplus"] = state.pop("projection.weight")
    backbone = Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v"))
    options = dict(recipe=tiny_recipe(), tasks=TASKS, backbone=backbone)
    with pytest.raises(
        ValueError, match=r"1 missing \(projection.weight\); 1 not in the model \(surplus\)"
    ):
        export_model(tmp_path / "e", state_dict=state, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def narrow_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["projection.weight"] = weights["projection.weight"][:4].contiguous()
    save_file(weights, folder / "model.safetensors")


BAD_EXPORTS = {
    "is not an export: config.json and model.safetensors missing": shutil.rmtree,
    "is not an export: model.safetensors missing; `comoe export` makes one": lambda folder: (
        folder / "model.safetensors"
    ).unlink(),
    "has format_version 99, made by comoe 9.9; this comoe .* reads 1": lambda folder: (
        rewrite_config(folder, format_version=99, comoe_version="9.9")
    ),
    "has model_type 'bert' instead of 'comoe'": lambda folder: rewrite_config(
        folder, model_type="bert"
    ),
    "model.safetensors cannot be read .* copy or export the folder again": cut_weights,
    r"1 of another shape \(projection.weight\)": narrow_weights,
    "config.json is not JSON .* the file is damaged": lambda folder: (
        folder / "config.json"
    ).write_text('{"model_type": "como'),
}


@pytest.mark.parametrize("message", BAD_EXPORTS)
def test_a_folder_that_cannot_be_loaded_is_refused_with_what_to_do(tmp_path, message):
    export_tiny(tmp_path)
    BAD_EXPORTS[message](tmp_path / "export")
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "export", verify=False)


def flip(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


EXPORTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", EXPORTED)
def test_a_changed_byte_anywhere_in_an_export_is_noticed(tmp_path, name):
    export_tiny(tmp_path)
    flip(tmp_path / "export", name)
    with pytest.raises(ValueError, match=f"{name} was changed after|config.json is not JSON"):
        load_exported(tmp_path / "export")


def test_an_export_may_be_changed_on_purpose(tmp_path):
    export_tiny(tmp_path)
    (tmp_path / "export/README.md").write_text("my own words")
    load_exported(tmp_path / "export")
    config = tmp_path / "export/config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match="config.json has .* bytes instead of .* give --no-verify"):
        load_exported(tmp_path / "export")
    load_exported(tmp_path / "export", verify=False)
    (tmp_path / "export/manifest.json").unlink()
    load_exported(tmp_path / "export")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_exported_nor_loaded(tmp_path, value):
    export_tiny(tmp_path)
    weights = load_file(tmp_path / "export/model.safetensors")
    weights["projection.weight"][0, 0] = value
    save_file(weights, tmp_path / "export/model.safetensors")
    with pytest.raises(ValueError, match=r"1 not finite \(projection.weight\)"):
        load_exported(tmp_path / "export", verify=False)
    backbone = Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "v"))
    options = dict(recipe=tiny_recipe(), tasks=TASKS, backbone=backbone)
    with pytest.raises(ValueError, match="1 not finite"):
        export_model(
            tmp_path / "new",
            state_dict=weights,
            **options,
        )
    assert not (tmp_path / "new").exists()


def test_a_folder_of_an_export_with_files_of_others_is_not_replaced(tmp_path):
    export_tiny(tmp_path, seed=1)
    (make(tmp_path / "export/.git") / "HEAD").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that comoe did not write \(.git/HEAD\)"):
        export_tiny(tmp_path, seed=2)
    assert (tmp_path / "export/.git/HEAD").read_text() == "years of work"


def test_an_export_of_an_older_version_is_replaced_and_what_is_no_part_of_it_is_not(tmp_path):
    export_tiny(tmp_path, seed=1)
    (tmp_path / "export/manifest.json").unlink()
    export_tiny(tmp_path, seed=2)
    (tmp_path / "export/manifest.json").unlink()
    (tmp_path / "export/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"files that comoe did not write \(thesis.txt\)"):
        export_tiny(tmp_path, seed=3)


def test_a_run_sets_an_export_with_files_of_others_aside(tmp_path, capsys):
    for number, content in enumerate(["mine", "mine too"], start=1):
        export_tiny(tmp_path)
        (tmp_path / "export/notes.txt").write_text(content)
        make_room(tmp_path / "export")
        assert f"(notes.txt); it was renamed to export.kept-{number}\n" in capsys.readouterr().err
        assert (tmp_path / f"export.kept-{number}/notes.txt").read_text() == content
    export_tiny(tmp_path)
    make_room(tmp_path / "export")
    make_room(tmp_path / "export")
    assert not (tmp_path / "export").exists() and capsys.readouterr().err == ""


def test_two_exports_to_one_folder_do_not_meet(tmp_path):
    with (
        locked(lock_beside(tmp_path / "export"), "x"),
        pytest.raises(ValueError, match="export is in use by process"),
    ):
        export_tiny(tmp_path)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".writing-step-00000006", "its name is not that of a whole checkpoint"),
        ("step-00000007", "it is that of step 6"),
        ("six", "its name is not that of a whole checkpoint"),
    ],
)
def test_a_checkpoint_under_another_name_is_not_exported(tmp_path, name, message):
    make_run(tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / name)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoints / name, tmp_path / "out")


@pytest.mark.parametrize(
    ("which", "best", "step"), [("best", 3, 3), ("best", None, 6), ("last", 3, 6)]
)
def test_a_run_folder_exports_its_best_or_last_checkpoint(tmp_path, which, best, step):
    models = make_run(tmp_path / "run", best=best)
    used = export_checkpoint(tmp_path / "run", tmp_path / "out", which=which)
    assert used.name == f"step-{step:08d}"
    loaded = load_exported(tmp_path / "out").model
    assert torch.equal(loaded.projection.weight, models[step].projection.weight)


def test_the_filter_of_training_posts_goes_with_the_export_and_may_be_deleted(tmp_path):
    make_run(tmp_path / "run", steps=(3,))
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "run", out)
    assert not (out / SEEN).exists()  # a run of an older version
    write_seen(tmp_path / "run" / SEEN, unlabelled_posts(["a post"], tasks=[]))
    export_checkpoint(tmp_path / "run", out)  # over the older one
    export_checkpoint(tmp_path / "run", out)
    assert (out / SEEN).read_bytes() == (tmp_path / "run" / SEEN).read_bytes()
    assert SEEN not in (out / MANIFEST).read_text() and SEEN not in export_files(out)
    (out / SEEN).unlink()
    load_exported(out)


def test_one_checkpoint_can_be_named_and_has_only_its_own_results(tmp_path):
    scores = {"test": {"mood": {"macro_f1": 0.5}}}
    results = {"metrics": scores, "seconds": 1.0, "best_step": 3, "step": 6}
    make_run(tmp_path / "run", best=3, results=results)
    export_checkpoint(tmp_path / "run/checkpoints/step-00000003", tmp_path / "three")
    export_checkpoint(tmp_path / "run/checkpoints/step-00000006", tmp_path / "six")
    assert "| mood | macro_f1 | 0.500 |" in (tmp_path / "three/README.md").read_text()
    assert "Nothing was measured" in (tmp_path / "six/README.md").read_text()


def test_a_folder_without_whole_checkpoints_is_refused(tmp_path):
    make_run(tmp_path / "run")
    make_run(tmp_path / "bare")
    (tmp_path / "bare/tasks.json").unlink()
    for folder, which, message in (
        ("run", "bset", r"bset is not a choice of --which; did you mean best\?"),
        ("bare", "best", "tasks.json is missing; --checkpoint wants a run folder"),
        ("nosuch", "best", "nosuch: there is no such folder; name that of a run"),
        (".", "best", "holds no whole checkpoint; give a run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(tmp_path / folder, tmp_path / "out", which=which)


def test_a_torn_checkpoint_is_no_more_exported_than_resumed(tmp_path):
    make_run(tmp_path / "run", best=6)
    checkpoints = tmp_path / "run/checkpoints"
    torn = checkpoints / "step-00000006"
    weights = torn / "weights/model.safetensors"
    whole = weights.read_bytes()
    manifest = (torn / "manifest.json").read_text()
    spoiled = {
        "has 100 bytes instead of": lambda: weights.write_bytes(whole[:100]),
        "its manifest is damaged": lambda: (torn / "manifest.json").write_text("{}"),
        "it has no manifest": (torn / "manifest.json").unlink,
    }
    for problem, spoil in spoiled.items():
        spoil()
        said = whats_wrong(torn)
        assert problem in said
        with pytest.raises(ValueError, match=re.escape(f"{torn}: {said}; use another one in")):
            export_checkpoint(torn, tmp_path / "out")
        with pytest.raises(ValueError, match=re.escape(f"{torn.name}: {said}); give one of")):
            export_checkpoint(tmp_path / "run", tmp_path / "out")
        found = find_checkpoint(checkpoints)
        assert found.broken == (f"{torn.name}: {said}",)
        used = export_checkpoint(tmp_path / "run", tmp_path / "out", which="last")
        assert used == found.path
        weights.write_bytes(whole)
        (torn / "manifest.json").write_text(manifest)
    weights.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="weights/model.safetensors was changed after"):
        export_checkpoint(torn, tmp_path / "out")
    with pytest.raises(ValueError, match="step-00000006/weights/model.safetensors cannot be read"):
        export_checkpoint(torn, tmp_path / "out", verify=False)


def test_exporting_and_predicting_never_import_deepspeed():
    code = (
        "import sys, comoe.inference.predict_file, comoe.inference.score, comoe.inference.export;"
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_task_of_each_kind_survives(tmp_path):
    export_tiny(tmp_path, tasks=(WORDS,))
    assert load_exported(tmp_path / "export").tasks == (WORDS,)


def test_experts_that_were_drawn_become_one_block_in_the_export(tmp_path):
    recipe = tiny_recipe()
    moe = moe_config(gate="random", top_k=1, balance="none", gate_scale=3.0)
    recipe.model.moe = moe
    model = tiny_model(moe).eval()
    export_model(
        tmp_path / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=TASKS,
        backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(tmp_path / "vocabulary")),
    )
    loaded = load_exported(tmp_path / "export")
    assert (loaded.model_config.moe.num_experts, loaded.config["num_local_experts"]) == (1, 1)
    batch = random_batch()
    for name, logits in model(batch).logits.items():
        torch.testing.assert_close(loaded.model(batch).logits[name], logits, atol=1e-5, rtol=1e-5)
    assert recipe.model.moe.num_experts == 4
