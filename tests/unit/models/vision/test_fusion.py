"""Fusions: what a picture may change, what it may not, and that every part learns on every rank."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViltImageProcessorPil, ViTImageProcessorPil

from comoe.config.recipe import ImageTextConfig, ModelConfig, VisionConfig
from comoe.data.images.pixels import ImageProcessor
from comoe.inference.export import Backbone, export_model
from comoe.inference.exported import load_exported
from comoe.inference.predictor import Predictor
from comoe.models.build import build_model
from comoe.models.vision.fusion import FUSIONS
from comoe.train.parallel.setup import parameter_group
from tests.helpers_export import tiny_recipe, tiny_tokenizer
from tests.helpers_model import (
    CAUSAL,
    HF_CONFIGS,
    MOOD,
    TASKS,
    moe_config,
    random_batch,
    take,
    tiny_model,
)
from tests.helpers_vision import (
    FUSED,
    SIDE,
    VILT,
    save_tower,
    seeing_batch,
    seeing_model,
    with_pictures,
)

BOTH = ImageTextConfig(separate_passes=True)
EXACT = dict(atol=2e-6, rtol=1e-5)


def every_number(output):
    """A scalar that depends on all that the model answers."""
    total = sum(
        value.square().sum() for value in [*output.logits.values(), *output.embeddings.values()]
    )
    if output.image_text is not None:
        sides = output.image_text
        parts = (sides.text_embeddings_IP, sides.image_embeddings_IP, sides.match_logits_I2)
        total = total + sum(part.pow(3).sum() for part in parts if part is not None)
    return total


@pytest.mark.parametrize("fusion", FUSED)
def test_a_post_without_picture_gets_the_answer_of_its_text_alone(fusion):
    model = seeing_model(fusion).eval()
    batch = seeing_batch()
    seen, blank = model(batch).logits, model(with_pictures(batch, [])).logits
    for name, logits in seen.items():
        torch.testing.assert_close(logits[[1, 4]], blank[name][[1, 4]], **EXACT)
        assert (logits[[0, 2, 3, 5]] - blank[name][[0, 2, 3, 5]]).abs().amax(dim=-1).gt(1e-5).any()
    if fusion != "vilt":
        blind = tiny_model()
        blind.load_state_dict(
            {name: v for name, v in model.state_dict().items() if name in blind.state_dict()}
        )
        expected = blind.eval()(batch).logits
        # Behind a text stand image tokens, whose tags nobody reads.
        blank["words"][~batch.word_starts_BL] = expected["words"][~batch.word_starts_BL]
        torch.testing.assert_close(blank, expected, **EXACT)


@pytest.mark.parametrize("fusion", FUSED)
def test_a_picture_of_several_rows_goes_through_the_tower_once_and_counts_for_each(fusion):
    """The rows of a post under ``route_by: both``: the same answers and gradients as with a copy for each row."""
    model = seeing_model(
        fusion, train_tower=True, moe=moe_config(route_by="both"), image_text=BOTH
    ).eval()
    batch = seeing_batch()
    distinct, numbers = batch.pixels_I3HW[:2], torch.tensor([1, 1, 0, 1])
    seen = []
    if fusion != "vilt":
        model.tower.register_forward_hook(lambda module, given, answer: seen.append(len(given[0])))
    results = []
    for pixels, places in ((distinct[numbers], None), (distinct, numbers)):
        model.zero_grad()
        output = model(replace(batch, pixels_I3HW=pixels, image_numbers_I=places))
        every_number(output).backward()
        results.append(
            (output.logits, {name: weight.grad for name, weight in model.named_parameters()})
        )
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    assert seen == ([] if fusion == "vilt" else [4, 2])


@pytest.mark.parametrize("fusion", FUSED)
def test_own_layers_that_are_alike_change_nothing_of_texts_with_pictures(fusion):
    def outputs(**sharing):
        sharing |= {"pooling": "layers", "task_attention_width": 4}
        moe = moe_config(layers=[0])
        return seeing_model(fusion, moe=moe, image_text=BOTH, sharing=sharing)(seeing_batch())

    plain, own = outputs(), outputs(own_layers=2)
    torch.testing.assert_close(own.logits, plain.logits, atol=1e-6, rtol=1e-5)
    ours, theirs = own.image_text, plain.image_text
    texts = tuple(text.roll(1, dims=0) for text in ours.texts)
    alike = theirs.match(tuple(text.roll(1, dims=0) for text in theirs.texts), torch.arange(4))
    torch.testing.assert_close(ours.match(texts, torch.arange(4)), alike, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fusion", FUSED)
@pytest.mark.parametrize("route_image_tokens", [False, True])
def test_an_answer_does_not_depend_on_the_other_posts_of_the_batch(fusion, route_image_tokens):
    model = seeing_model(fusion, route_image_tokens=route_image_tokens).eval()
    batch, pictures = seeing_batch(), (0, 2, 3, 5)
    together = model(batch).logits
    for row in range(6):
        length = int(batch.attention_mask_BL[row].sum())
        alone = take(batch, [row])
        alone = replace(
            alone,
            input_ids_BL=alone.input_ids_BL[:, :length],
            attention_mask_BL=alone.attention_mask_BL[:, :length],
        )
        alone = with_pictures(alone, [0] if row in pictures else [])
        for name, logits in model(alone).logits.items():
            expected = together[name][[row]]
            torch.testing.assert_close(
                logits, expected[:, :length] if logits.dim() == 3 else expected, **EXACT
            )


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_image_tokens_can_be_read_by_every_family_of_text_encoders(family):
    if family in CAUSAL:
        with pytest.raises(ValueError, match="where a decoder-only model.encoder does not look"):
            seeing_model("tokens", family=family)
        return
    model = seeing_model("tokens", family=family).eval()
    batch = seeing_batch()
    together = model(batch).logits["mood"]
    torch.testing.assert_close(
        together[[1, 4]], model(with_pictures(batch, [])).logits["mood"][[1, 4]], **EXACT
    )
    moved = replace(batch, pixels_I3HW=batch.pixels_I3HW.flip(0))
    changed = (model(moved).logits["mood"] - together).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("pictures", [(0, 2), ()])
@pytest.mark.parametrize("fusion", FUSED)
def test_every_parameter_gets_a_gradient_with_and_without_pictures_on_the_rank(fusion, pictures):
    model = seeing_model(fusion, train_tower=True)
    every_number(model(seeing_batch(pictures=pictures))).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    seeing = [
        name for name, _ in model.named_parameters() if name.startswith(("fusion.", "tower."))
    ]
    moved = [name for name in seeing if model.get_parameter(name).grad.any()]
    # A blank picture counts nothing; a real one reaches every part, and the tower's first layer.
    assert (
        not moved if not pictures else {n for n in seeing if n.startswith("fusion.")} <= set(moved)
    )
    assert (
        not pictures
        or fusion == "vilt"
        or "tower.inner.embeddings.patch_embeddings.projection.weight" in moved
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_frozen_tower_is_unchanged_by_a_step_and_the_fusion_is_not(fusion):
    model = seeing_model(fusion).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    every_number(model(seeing_batch())).backward()
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1).step()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert not any(name.startswith("tower.") for name in changed)
    assert any(name.startswith("fusion.image.") for name in changed)


def test_parameters_of_the_tower_follow_the_encoders_rate_and_the_rest_that_of_heads():
    of = dict.fromkeys(("fusion", "image_text", "projection", "heads"), "heads")
    for name, _ in seeing_model(image_text=BOTH).named_parameters():
        expected = of.get(name.partition(".")[0], "encoder")
        if ".block." in name:
            expected = "router" if ".mixture.gate." in name else "experts"
        assert parameter_group(f"module.model.{name}") == expected, name


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("fusion", "tokens"), [("tokens", 5), ("vilt", 5), ("attention", 0)])
def test_image_tokens_go_through_the_experts_only_when_asked_and_count_as_load_only(
    fusion, tokens, routed
):
    batch = seeing_batch(pictures=(0, 3))
    text = int(batch.attention_mask_BL.sum())
    output = seeing_model(fusion, route_image_tokens=routed)(batch)
    load = text + 2 * tokens * routed
    assert [int(routing.counts_E.sum()) for routing in output.routings] == [2 * load] * 3
    assert [picks.shape for picks in output.selected] == [(load, 2)] * 3
    for routing in output.routings:
        assert len(routing.logits_SE) == len(routing.weights_Sk) == text
    lengths = batch.attention_mask_BL.sum(1).tolist()
    assert torch.bincount(output.token_rows_S).tolist() == lengths


def test_a_second_pass_repeats_the_picks_of_image_tokens_too():
    model = seeing_model("tokens", route_image_tokens=True, moe=moe_config(top_k=1))
    batch = seeing_batch()
    first = model(batch)
    for routing, block in zip(first.routings, model.moe_layers(), strict=True):
        block.mixture.gate.e_score_correction_bias.copy_(-10.0 * routing.counts_E)
    turned, repeated = model(batch), model(batch, first.selected)
    assert not torch.equal(turned.selected[0], first.selected[0])
    torch.testing.assert_close(repeated.logits, first.logits, atol=0, rtol=0)


@pytest.mark.parametrize("fusion", FUSED)
def test_a_filler_row_is_answered_and_counts_nothing(fusion):
    batch = with_pictures(random_batch(rows=1), [])
    batch = replace(batch, task_ids_B=torch.tensor([-1]), row_ids_B=torch.tensor([-1]))
    output = seeing_model(fusion, image_text=BOTH, route_image_tokens=True)(batch)
    assert all(logits.isfinite().all() for logits in output.logits.values())
    assert output.selected == () and not any(routing.counts_E.any() for routing in output.routings)
    assert output.image_text.rows_I.tolist() == [-1]


@pytest.mark.parametrize("fusion", ["attention", "tokens", "vilt"])
@pytest.mark.parametrize("route_by", ["token", "both"])
def test_recomputed_layers_give_the_same_gradients_with_the_further_passes_of_pictures(
    fusion, route_by
):
    def gradients(recompute):
        model = seeing_model(
            fusion,
            image_text=BOTH,
            dropout=0.3,
            recompute=recompute,
            moe=moe_config(route_by=route_by),
            seed=2,
        )
        torch.manual_seed(5)
        output = model(seeing_batch())
        sides = output.image_text
        texts = tuple(text.roll(1, dims=0) for text in sides.texts)
        matched = sides.match(texts, torch.arange(4))
        (every_number(output) + matched.square().sum()).backward()
        return {
            name: weight.grad
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }

    torch.testing.assert_close(gradients(True), gradients(False), atol=0, rtol=0)


@pytest.mark.parametrize("fusion", FUSED)
def test_texts_alone_are_compared_and_pictures_never_change_them(fusion):
    model, batch = seeing_model(fusion, image_text=BOTH).eval(), seeing_batch()
    batch.input_ids_BL[:, 0] = 3  # the sign that all texts begin with
    first = model(batch).image_text
    other = model(replace(batch, pixels_I3HW=batch.pixels_I3HW.flip(0))).image_text
    turned = other.image_embeddings_IP.flip(0)
    for one, two in (
        (first.text_embeddings_IP, other.text_embeddings_IP), (first.image_embeddings_IP, turned)
    ):  # fmt: skip
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.norm(dim=1), torch.ones(4))
    texts = batch.input_ids_BL.clone()
    texts[:, 1:] = texts[:, 1:].flip(0)
    third = model(replace(batch, input_ids_BL=texts)).image_text
    torch.testing.assert_close(third.image_embeddings_IP, first.image_embeddings_IP)
    assert (third.text_embeddings_IP - first.text_embeddings_IP).abs().amax() > 1e-4


def test_either_side_alone_in_one_stream_is_the_librarys_encoder_on_its_embeddings():
    """In float64, the two sides put together by hand from the parts of the library's own model."""
    model = seeing_model("vilt", image_text=BOTH, moe=moe_config(num_experts=0)).double().eval()
    batch = seeing_batch()
    rows, pixels = batch.image_rows_I, batch.pixels_I3HW.double()
    sides = model(replace(batch, pixels_I3HW=pixels)).image_text
    vilt, head = model.encoder, model.image_text
    parts = vilt.embeddings

    def mean_state(embedded, begins):
        states = vilt.layernorm(vilt.encoder(embedded).last_hidden_state)
        return states[:, begins:].mean(dim=1)

    def kind(number):
        return parts.token_type_embeddings(torch.full((1, 1), number))

    for place, row in enumerate(rows.tolist()):
        ids = batch.input_ids_BL[[row], : int(batch.attention_mask_BL[row].sum())]
        text = mean_state(parts.text_embeddings(ids) + kind(0), 0) @ head.text.weight.T
        patches = parts.patch_embeddings(pixels[[place]]).flatten(2).transpose(1, 2)
        seen = torch.cat([parts.cls_token, patches], dim=1) + parts.position_embeddings + kind(1)
        sign = parts.text_embeddings(ids[:, :1]) + kind(0)
        image = mean_state(torch.cat([sign, seen], dim=1), 1) @ head.image.weight.T
        for found, expected in (
            (sides.text_embeddings_IP, text), (sides.image_embeddings_IP, image)
        ):  # fmt: skip
            torch.testing.assert_close(
                found[[place]], torch.nn.functional.normalize(expected).float(), atol=1e-6, rtol=0
            )


@pytest.mark.parametrize("fusion", FUSED)
def test_matching_a_picture_with_its_own_text_again_gives_the_same_logits(fusion):
    sides = seeing_model(fusion, image_text=BOTH).eval()(seeing_batch()).image_text
    again = sides.match(sides.texts, torch.arange(4))
    torch.testing.assert_close(again, sides.match_logits_I2, **EXACT)
    longer = tuple(
        torch.nn.functional.pad(text, (*[0, 0] * (text.ndim - 2), 0, 4)) for text in sides.texts
    )
    torch.testing.assert_close(sides.match(longer, torch.arange(4)), again, **EXACT)


def test_what_a_loss_does_not_ask_for_is_not_built():
    batch = seeing_batch()
    assert seeing_model()(batch).image_text is None
    assert seeing_model(image_text=BOTH)(batch, compare=False).image_text is None
    usual = ImageTextConfig()
    assert seeing_model("vilt", image_text=usual)(batch).image_text.text_embeddings_IP is None
    only = seeing_model(image_text=ImageTextConfig(itm_weight=0.0))(batch).image_text
    assert only.match_logits_I2 is None and only.text_embeddings_IP is not None
    off = ImageTextConfig(itc_weight=0.0, itm_weight=0.0)
    assert seeing_model(image_text=off).image_text is None
    # One stream has no space of two sides.
    assert seeing_model("vilt", image_text=replace(off, itc_weight=0.1)).image_text is None


def test_too_many_image_tokens_for_the_position_table_are_refused():
    config = HF_CONFIGS["bert"].to_dict() | {"max_position_embeddings": 12}
    vision = VisionConfig(tower="t", fusion="tokens")
    model = build_model(
        ModelConfig(projection_width=8, moe=moe_config(), vision=vision),
        TASKS,
        encoder_config=config,
        tower_config=seeing_model().tower.inner.config.to_dict(),
    )
    model(seeing_batch(length=7))
    with pytest.raises(
        ValueError, match="5 image tokens behind a text of 8, but model.encoder numbers at most 12"
    ):
        model(seeing_batch(length=8))


def test_the_same_folders_build_the_same_model(tmp_path):
    AutoModel.from_config(HF_CONFIGS["bert"]).save_pretrained(tmp_path / "bert")
    vision = VisionConfig(tower=str(save_tower(tmp_path / "tower", "clip")))
    config = ModelConfig(encoder=str(tmp_path / "bert"), moe=moe_config(), vision=vision)
    trained = build_model(config, TASKS).eval()
    rebuilt = build_model(
        config,
        TASKS,
        encoder_config=trained.encoder.config.to_dict(),
        tower_config=trained.tower.inner.config.to_dict(),
    ).eval()
    rebuilt.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(
        rebuilt(seeing_batch()).logits, trained(seeing_batch()).logits, atol=0, rtol=0
    )


def test_one_stream_reads_pictures_as_the_library_does(tmp_path):
    torch.manual_seed(3)
    whole = AutoModel.from_config(VILT).eval()
    whole.save_pretrained(tmp_path)
    ViltImageProcessorPil(size={"shortest_edge": SIDE}).save_pretrained(tmp_path)
    model = build_model(
        ModelConfig(encoder=str(tmp_path), moe=moe_config(output_init=0.0)), TASKS
    ).eval()
    batch = seeing_batch(pictures=range(6))
    seen = []
    model.heads[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(batch)
    expected = whole(
        batch.input_ids_BL, attention_mask=batch.attention_mask_BL, pixel_values=batch.pixels_I3HW
    ).last_hidden_state[:, : batch.input_ids_BL.shape[1]]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)
    # Another size of picture stretches the table of places.
    model(replace(batch, pixels_I3HW=torch.randn(6, 3, 2 * SIDE, SIDE)))


@pytest.mark.parametrize("fusion", FUSED)
def test_an_export_carries_the_tower_and_its_processor_and_answers_alike(tmp_path, fusion):
    model = seeing_model(fusion, image_text=BOTH, tower="resnet", seed=4).eval()
    recipe = tiny_recipe()
    if fusion != "vilt":
        recipe.model.vision = VisionConfig(tower="./home/me/towers/tiny", fusion=fusion)
        (tmp_path / "home").mkdir()
    inner = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    export_model(
        tmp_path / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=TASKS,
        # As a run leaves them.
        backbone=Backbone(
            json.loads(json.dumps(model.encoder.config.to_dict(), default=str)),
            tiny_tokenizer(tmp_path / "v"),
            None
            if model.tower is None
            else json.loads(json.dumps(model.tower.inner.config.to_dict())),
            ImageProcessor(inner, side=SIDE),
        ),
    )
    loaded = load_exported(tmp_path / "export")
    torch.testing.assert_close(
        loaded.model(seeing_batch()).logits, model(seeing_batch()).logits, atol=0, rtol=0
    )
    assert loaded.model.image_text is None and loaded.image_processor.shape == (3, SIDE, SIDE)
    assert "home/me" not in (tmp_path / "export/config.json").read_text()
    picture = Image.new("RGB", (20, 30), "red")
    predictor = Predictor.from_pretrained(tmp_path / "export", device="cpu")
    seen, blind = predictor(["good day", "good day"], images=[picture, None])
    assert seen["mood"]["scores"] != blind["mood"]["scores"]


@pytest.mark.parametrize("fusion", ["concat", "attention", "gated", "tokens"])
def test_each_fusion_learns_a_label_that_neither_side_tells_alone(fusion):
    """Two words, two pictures; the label says whether they agree."""
    torch.manual_seed(0)
    task = replace(MOOD, labels=("no", "yes"))
    model = seeing_model(fusion, tasks=(task,), moe=moe_config(num_experts=0)).train()
    batch = random_batch(rows=8, length=4, tasks=(task,))
    words = torch.tensor([7, 7, 8, 8] * 2)
    ids = batch.input_ids_BL[:1].repeat(8, 1)
    ids[:, 1] = words
    shades = torch.tensor([1.0, -1.0] * 4)[:, None, None, None].expand(8, 3, SIDE, SIDE).clone()
    batch = replace(
        batch, input_ids_BL=ids, attention_mask_BL=torch.ones_like(ids), pixels_I3HW=shades,
        image_rows_I=torch.arange(8),
    )  # fmt: skip
    gold = ((words == 7) == (shades[:, 0, 0, 0] > 0)).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch).logits["mood"], gold)
        if loss < 0.1:
            break
        loss.backward()
        optimizer.step()
    assert loss < 0.1
