"""What a recipe asks for in vain or unwisely is said, and nothing else."""

import re

import pytest

from comoe.config.load import recipe_from_dict
from comoe.config.validate import validate
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.moe.gate import GATES
from comoe.starter.registry import prepare
from comoe.train.recipe_warnings import recipe_warnings


def warnings_of(**sections):
    raw = {"tasks": {"mood": {"path": "mood.csv"}, "heat": {"path": "heat.csv"}}} | sections
    recipe = recipe_from_dict(raw)
    validate(recipe)
    return recipe_warnings(recipe)


def test_the_defaults_need_no_warning():
    assert warnings_of() == []
    assert warnings_of(model={"moe": {"num_experts": 0}}) == []
    assert warnings_of(model={"moe": {"num_experts": 1, "top_k": 1}}) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [({"model": {"moe": {"gate": "uniform"}}}, "model.moe.gate is uniform, which ignores the tokens"),
     ({"model": {"dropout": 0.0}, "loss": {"r_drop_weight": 1.0}},
      "loss.r_drop_weight is 1.0, without effect: model.dropout is 0"),
     ({"train": {"reptile_steps": 5}}, r"train.betas is .* with train.reptile_steps; .*: take \[0.0, 0.999\]"),
     ({"train": {"reptile_steps": 5, "optimizer": "sgd", "momentum": 0.9}},
      "train.momentum is 0.9 with train.reptile_steps; .*: take 0 "),
     ({"train": {"reptile_rate": 0.5}}, "train.reptile_rate is 0.5, without effect: train.reptile_steps is 0"),
     ({"model": {"moe": {"temperature": 2.0}}}, "model.moe.temperature is 2.0; .*2602.01466"),
     ({"model": {"moe": {"task_embedding_width": 8}}},
      "task_embedding_width is 8, without effect: model.moe.route_by is token; task or both would read it"),
     ({"model": {"moe": {"balance": "none", "balance_rate": 0.1}}},
      "balance_rate is 0.1, without effect: model.moe.balance is none"),
     ({"model": {"moe": {"top_k": 1, "cooperation_threshold": 0.5}}}, "cooperation_threshold is 0.5, .*top_k is 1"),
     ({"model": {"moe": {"num_experts": 0, "shared_width": 8}}}, "model.moe.shared_width is 8, without effect"),
     ({"loss": {"adversarial": {"predict": "platform"}}},
      "loss.adversarial.predict is platform, without effect: loss.adversarial.weight is 0"),
     ({"model": {"moe": {"num_experts": 0}}, "loss": {"balance_weight": 0.1}}, "loss.balance_weight is 0.1, "),
     ({"model": {"moe": {"num_experts": 0}}, "loss": {"z_weight": 0.1}}, "loss.z_weight is 0.1, without effect"),
     ({"model": {"moe": {"num_experts": 1, "top_k": 1}}, "loss": {"task_separation_weight": 0.4}},
      "loss.task_separation_weight is 0.4, without effect: model.moe.num_experts is 1"),
     ({"tasks": {"mood": {"path": "x"}, "plain": {"path": "y", "kind": "unlabelled"}},
      "loss": {"contrastive": {"weight": 0.0}}},
      "tasks.plain.kind is unlabelled, without effect: only that loss reads its posts"),
     ({"data": {"noise": ["no_emoji"], "noise_rate": 0.3}},
      "data.noise_rate is 0.3, without effect: data.noise is .*; typos or informal would read it"),
     ({"loss": {"contrastive": {"queue_warmup": 9}}},
      "queue_warmup is 9, without effect: loss.contrastive.queue_size is 0"),
     ({"loss": {"contrastive": {"weight": 0.0, "queue_size": 9}}},
      "queue_size is 9, without effect: .*weight is 0"),
     ({"loss": {"contrastive": {"weight": 0.0, "first_steps": 9, "queue_size": 9}}},
      "data.posts_per_label is 0 with loss.contrastive.first_steps; 2 gives every label"),
     ({"loss": {"contrastive": {"weight": 0.0, "negatives": "all"}}},
      "negatives is all, without effect: .*weight is 0"),
     ({"tasks": {"mood": {"path": "x"}}, "loss": {"contrastive": {"negatives": "all"}}},
      "negatives is all, without effect: there is one task"),
     ({"model": {"dropout": 0.0}, "loss": {"contrastive": {"views": 2}}},
      "loss.contrastive.views is 2, without effect: model.dropout is 0"),
     ({"tasks": {"mood": {"path": "x"}}, "loss": {"task_separation_weight": 0.4}},
      r"loss.task_separation_weight is 0.4, without effect: the number of tasks is 1"),
     ({"tasks": {"mood": {"path": "x", "weight": 2.0}}},
      "tasks.mood.weight is 2.0, without effect: loss.weighting is equal; static would read it"),
     ({"loss": {"soft_sharing_weight": 0.1}}, "soft_sharing_weight is 0.1, without effect: model.own_layers is 0"),
     ({"tasks": {"mood": {"path": "x"}}, "model": {"own_layers": 1}, "loss": {"soft_sharing_weight": 0.1}},
      "soft_sharing_weight is 0.1, without effect: the number of tasks is 1"),
     ({"tasks": {"mood": {"path": "x"}, "who": {"path": "y", "kind": "tags"}}, "model": {"task_attention_width": 8}},
      "task_attention_width is 8, without effect: of the tasks 1 have a head that pools, and it takes two"),
     ({"model": {"task_attention_width": 8, "pooling": "mean"}},
      "task_attention_width is 8, but under model.pooling mean all tasks pool the same states"),
     ({"tasks": {"who": {"path": "y", "kind": "tags"}}, "model": {"pooling": "first"}},
      "model.pooling is first, without effect: no task has a head that pools"),
     ({"train": {"momentum": 0.9}}, "train.momentum is 0.9, without effect: train.optimizer is adamw")],
)  # fmt: skip
def test_an_option_in_vain_is_named_with_its_value_and_the_reason(sections, message):
    (said,) = warnings_of(**sections)
    assert re.search(message, said)


def test_options_that_work_are_left_alone():
    tags = {"who": {"path": "y", "kind": "tags"}}
    assert warnings_of(tasks=tags, model={"pooling": "layers"}) == []
    assert (
        warnings_of(model={"pooling": "mean", "private_width": 8, "task_attention_width": 8}) == []
    )
    assert warnings_of(model={"own_layers": 1}, loss={"soft_sharing_weight": 0.1}) == []
    assert warnings_of(
        model={"moe": {"route_by": "both", "task_embedding_width": 8, "cooperation_threshold": 0.5}},
        loss={"weighting": "static", "balance_weight": 0.1, "z_weight": 0.1, "task_separation_weight": 0.1,
              "contrastive": {"views": 2, "negatives": "all", "first_steps": 9}},
        tasks={"mood": {"path": "x", "weight": 2.0}, "heat": {"path": "y"}},
        train={"optimizer": "sgd", "momentum": 0.9},
    ) == []  # fmt: skip


def test_every_gate_and_weighting_says_whether_it_is_warned_about():
    assert [name for name, gate in GATES.items() if gate.for_measuring] == ["uniform"]
    assert [name for name, kind in WEIGHTINGS.items() if not kind.adapts] == [
        "equal",
        "posts",
        "static",
    ]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"weighting": "cagrad", "cagrad_c": 0.4}, []),
        ({"weighting": "gradnorm", "weighting_rate": 0.1, "gradnorm_alpha": 1.0}, []),
        ({"weighting_rate": 0.1}, ["loss.weighting_rate is 0.1, without effect: loss.weighting is equal; "
                                   "uncertainty or uncertainty_positive or gradnorm would read it."]),
        ({"weighting": "pcgrad", "cagrad_c": 0.4, "weighting_window": 9},
         ["loss.weighting_window is 9, without effect: loss.weighting is pcgrad; dynamic_average would read it.",
          "loss.cagrad_c is 0.4, without effect: loss.weighting is pcgrad; cagrad would read it."]),
    ],
)  # fmt: skip
def test_an_option_that_the_weighting_does_not_read_is_named(loss, said):
    assert warnings_of(loss=loss, tasks={"mood": {"path": "x"}, "heat": {"path": "y"}}) == said


def test_one_task_alone_has_nothing_to_be_weighed_by():
    (said,) = warnings_of(loss={"weighting": "pcgrad"}, tasks={"mood": {"path": "x"}})
    assert said.startswith(
        "loss.weighting is pcgrad, without effect: there is one task with labels"
    )


@pytest.mark.parametrize(
    ("vision", "losses", "said"),
    [({"tower": "a/b"}, {}, []),
     ({}, {"itc_weight": 0.2}, ["loss.image_text.itc_weight is 0.2, without effect: no image is read"]),
     ({"fusion": "gated"}, {}, ["model.vision.fusion is gated, without effect: no image is read"]),
     ({"tower": "a/b", "route_image_tokens": True}, {}, ["route_image_tokens is True, without effect: under"]),
     ({"tower": "a/b"}, {"itc_weight": 0.0}, ["negatives is hard, without effect: .*random ones are taken"]),
     ({"tower": "a/b"}, {"itc_weight": 0.0, "itm_weight": 0.0}, []),
     ({"tower": "a/b", "fusion": "tokens", "route_image_tokens": True}, {},
      ["each text with an image takes a second pass", "half of the posts with images take one more pass"])],
)  # fmt: skip
def test_what_is_asked_of_images_in_vain_or_at_a_price(vision, losses, said):
    photo = {"image": "photo"} if "tower" in vision else {}
    found = warnings_of(
        model={"vision": vision},
        loss={"image_text": losses},
        tasks={"mood": {"path": "mood.csv", **photo}},
    )
    assert len(found) == len(said) and all(map(re.search, said, found))


def test_a_column_of_images_that_nobody_reads():
    (warning,) = warnings_of(tasks={"mood": {"path": "mood.csv", "image": "photo"}})
    assert warning.startswith("tasks.mood.image is photo, without effect: no image is read")
    columns = {name: {"path": "mood.csv", "image": "photo"} for name in ("mood", "heat", "topic")}
    (warning,) = warnings_of(tasks=columns)
    assert warning.startswith("tasks.mood.image (and of 2 more) is photo, without effect")


def test_a_tower_without_images_and_sides_hidden_from_nobody():
    (warning,) = warnings_of(model={"vision": {"tower": "a/b"}})
    assert warning.startswith(
        "model.vision.tower is a/b, without effect: no task names a column of images"
    )
    assert warnings_of(data={"hide": "image"}) == [
        "data.hide is image, without effect: no image is read: model.vision.tower is null."
    ]
    assert "every post is empty" in warnings_of(data={"hide": "text"})[0]
    photo = {
        "tasks": {"mood": {"path": "mood.csv", "image": "photo"}},
        "model": {"vision": {"tower": "a/b"}},
    }
    assert (
        warnings_of(data={"hide": "text"}, **photo)
        == warnings_of(data={"hide": "image"}, **photo)
        == []
    )


def test_a_ready_made_encoder_of_one_stream_reads_images(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOE_HOME", str(tmp_path))
    prepare(["smoke:vilt"], progress=False)
    losses = {"separate_passes": True, "negatives": "random"}
    found = warnings_of(model={"encoder": "smoke:vilt"}, loss={"image_text": losses}, tasks=_PHOTO)
    assert len(found) == 2 and not any("without effect" in text for text in found)


_PHOTO = {"mood": {"path": "mood.csv", "image": "photo"}}


def test_one_stream_has_no_two_sides_to_compare(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vilt"}')
    found = warnings_of(model={"encoder": str(tmp_path), "vision": {"fusion": "gated"}})
    patterns = [
        "vision.fusion is gated, without",
        "itc_weight is 0.1, .*reads both sides in one stream",
        "random ones",
        "one more pass",
    ]
    assert len(found) == 4 and all(map(re.search, patterns, found))
    losses = {"separate_passes": True}
    found = warnings_of(model={"encoder": str(tmp_path)}, loss={"image_text": losses})
    patterns = ["itc_weight is 0.1: .* second pass, alone, and its image a third", "one more pass"]
    assert len(found) == 2 and all(map(re.search, patterns, found))
    off = losses | {"itc_weight": 0, "itm_weight": 0}
    for given in ({"encoder": str(tmp_path)}, {"vision": {"tower": "a/b"}}):
        found = warnings_of(model=given, loss={"image_text": off}, tasks=_PHOTO)
        assert len(found) == 1 and "only the contrast of an encoder of one stream" in found[0]
