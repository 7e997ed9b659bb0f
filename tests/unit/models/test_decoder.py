"""Tasks that a decoder answers: without experts every number is the library's own, with them all stay consistent."""

from dataclasses import replace

import pytest
import torch

from comoe.losses.objective import count_units
from comoe.types import IGNORED
from tests.helpers_model import SEQ2SEQ, cut, moe_config, scaled, without_gradient
from tests.helpers_seq2seq import (
    DECODED,
    END,
    MIXED,
    OFF,
    OPINION,
    POLARITY,
    decoder_batch,
    decoder_model,
    decoder_objective,
    filler,
    whole_model,
    words,
)
from tests.helpers_vision import seeing_model, with_pictures

NONE = moe_config(num_experts=0)
FAMILIES = sorted(SEQ2SEQ)


def library_loss(model, batch, rows):
    """The library's own teacher forcing, from the same labels; mBART's would take its start from the label's end."""
    labels = batch.target_ids_BD[rows]
    before = torch.full_like(labels, model.config.pad_token_id)
    before[:, 1:] = labels[:, :-1]
    before[:, 0] = model.config.comoe_answering["decoder_start_token_id"]
    before[before == IGNORED] = model.config.pad_token_id
    return model(
        input_ids=batch.input_ids_BL[rows], attention_mask=batch.attention_mask_BL[rows], decoder_input_ids=before,
        labels=labels,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_without_experts_the_loss_of_a_text_is_the_librarys_own(family):
    objective = decoder_objective(family, NONE, tasks=(OPINION,)).double()
    batch = scaled(decoder_batch(5, tasks=(OPINION,), family=family), (OPINION,))
    expected = library_loss(whole_model(family).double(), batch, torch.arange(5)).loss
    logits = objective.model(batch).logits["opinion"]
    assert logits.dtype == torch.float64 and logits.shape == (5, 1)
    units = batch.labels["opinion"].sum()
    torch.testing.assert_close(-logits.sum() / units, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        objective(batch).terms["task/opinion"].double(), expected.detach(), atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_experts_the_log_probabilities_of_choices_are_the_librarys_own_one_by_one(family):
    model = decoder_model(family, NONE, tasks=(POLARITY,)).double().eval()
    batch = decoder_batch(4, tasks=(POLARITY,), family=family)
    found = model(batch).logits["polarity"]
    plain = whole_model(family).double()
    for row in range(4):
        for label in range(3):
            ids = torch.tensor([words(label, family)])
            one = replace(batch, target_ids_BD=ids.expand(4, -1))
            likely = library_loss(plain, one, torch.tensor([row])).logits.log_softmax(-1)
            torch.testing.assert_close(
                found[row, label],
                likely[0, torch.arange(ids.shape[1]), ids[0]].sum(),
                atol=1e-11,
                rtol=1e-11,
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_without_experts_texts_are_written_as_the_library_writes_them(family, beams):
    task = replace(OPINION, num_beams=beams)
    model = decoder_model(family, NONE, tasks=(task,)).eval()
    batch = decoder_batch(5, tasks=(task,), family=family)
    generated = model(batch).generated["opinion"]
    assert generated.dtype == torch.int64
    plain = whole_model(family)
    expected = plain.generate(
        input_ids=batch.input_ids_BL,
        attention_mask=batch.attention_mask_BL,
        num_beams=beams,
        max_new_tokens=7,
    )[:, 1:]
    for row, ids in enumerate(expected.tolist()):
        ids = ids[: ids.index(END[family])] if END[family] in ids else ids
        found = generated[row]
        assert found[: len(ids)].tolist() == ids and (found[len(ids) :] == -1).all()


def own_words(row):
    return [int(number) for number in row if number >= 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_with_new_experts_equals_the_pre_trained_model(family):
    new = decoder_model(family, moe_config(output_init=0.0, shared_width=8)).eval()
    bare, batch = decoder_model(family, NONE).eval(), decoder_batch(family=family)
    assert len(new.moe_layers()) == 5
    bare.load_state_dict(new.state_dict(), strict=False)
    plain = {
        name: value for name, value in bare.state_dict().items() if name.startswith("encoder.")
    }
    moved = {name.replace(".inner.", "."): value for name, value in new.state_dict().items()}
    bare.load_state_dict({name: moved[name] for name in plain}, strict=False)
    expected, found = bare(batch).logits, new(batch).logits
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=2e-6, rtol=0)
    trained = decoder_model(family).eval()(batch).logits
    assert (trained["polarity"] - expected["polarity"]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_one_expert_equals_the_dense_block_in_the_decoder_too(family):
    def awake(model):
        torch.manual_seed(3)
        with torch.no_grad():
            for block in model.moe_layers():
                up, down = torch.randn(16, 32) * 0.3, torch.randn(16, 16) * 0.3
                if block.shared is None:
                    block.mixture.experts.gate_up_proj[0] = up.T
                    block.mixture.experts.down_proj[0] = down.T
                else:
                    block.shared.gate_up.weight.copy_(up.T), block.shared.down.weight.copy_(down.T)
        return model.eval()

    one = awake(
        decoder_model(family, moe_config(num_experts=1, top_k=1, expert_width=16, balance="none"))
    )
    dense = awake(decoder_model(family, moe_config(output_init=0.0, shared_width=16)))
    names = {name for name, _ in one.named_parameters()} & {
        name for name, _ in dense.named_parameters()
    }
    same = {
        name: value
        for name, value in one.state_dict().items()
        if name in names and "mixture" not in name
    }
    dense.load_state_dict(same, strict=False)
    batch = decoder_batch(family=family)
    expected = dense(batch).logits
    for name, logits in one(batch).logits.items():
        torch.testing.assert_close(logits, expected[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "route_by", "prior"),
    [("t5", "both", 1.0), ("umt5", "task", "own"), ("bart", "task", 0), ("mbart", "token", 0)],
)
def test_greedy_words_with_a_cache_are_those_of_teacher_forcing_with_experts(
    family, route_by, prior
):
    """Each step's context is its own: were a token routed by another row's task, the paths would part."""
    model = decoder_model(
        family,
        moe_config(route_by=route_by, shared_width=8, task_prior=prior),
        tasks=(OPINION, POLARITY),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "task_projection" in name or "gate_up" in name or "gate.weight" in name:
                parameter.mul_(10)
    batch = decoder_batch(6, tasks=(OPINION, POLARITY), family=family)
    rows = (batch.task_ids_B == 0).nonzero().squeeze(1)
    found = model(batch)
    written = [own_words(row) for row in found.generated["opinion"][rows]]
    scores = found.logits["opinion"][rows, 1]
    for row, ids, score in zip(rows.tolist(), written, scores, strict=True):
        forced = []
        while len(forced) < 7 and END[family] not in forced:
            texts = torch.tensor([[*forced, token] for token in range(60)])
            forced.append(int(taught(model, batch, row, texts).argmax()))
        assert [token for token in forced if token != END[family]] == ids
        torch.testing.assert_close(
            score, taught(model, batch, row, torch.tensor([forced]))[0], atol=1e-4, rtol=0
        )


def taught(model, batch, row, texts):
    """Log-probability of each text for a row, by teacher forcing; without dropout training changes nothing else."""
    rows = batch.take(torch.full((len(texts),), row))
    model.train()
    logits = model(replace(rows, target_ids_BD=texts)).logits["opinion"][:, 0].detach()
    model.eval()
    return logits


@pytest.mark.parametrize("family", ["t5", "umt5", "bart"])
@pytest.mark.parametrize("served", [None, [-1, -1], [1, 3, 3, 4]])
def test_every_parameter_gets_a_gradient_whatever_rows_a_rank_has(family, served):
    objective = decoder_objective(
        family, moe_config(route_by="both", shared_width=8), private_width=8
    )
    batch = decoder_batch(family=family, served=served)
    objective(scaled(batch, MIXED)).loss.backward()
    assert [name for name, weight in objective.named_parameters() if weight.grad is None] == []
    reached = any(
        weight.grad.any()
        for name, weight in objective.model.named_parameters()
        if ".decoder." in name
    )
    assert reached is (served != [-1, -1])


def test_a_whole_model_in_one_process_writes_nothing_that_no_row_asks_for():
    model, batch = decoder_model().eval(), decoder_batch(served=[1, -1, 1])
    calls = []
    model.decoder.stack.register_forward_hook(lambda *_: calls.append(1))
    found = model(batch)
    # Own texts, labels, written texts: the first and the last of no row.
    assert len(calls) == 3 and not found.logits["opinion"].any()
    assert found.logits["opinion"].shape == (3, 2)
    assert found.generated["opinion"].tolist() == [[-1]] * 3
    model(decoder_batch(served=[1, 3, 4]))
    assert len(calls) > 6


def test_a_filler_row_runs_the_decoder_and_counts_nowhere():
    objective, batch = decoder_objective(), decoder_batch()
    step = objective(replace(filler(batch), unit_scale_T=torch.full((3 * len(MIXED) + 4,), 0.5)))
    step.loss.backward()
    assert float(step.loss.detach()) == 0.0
    assert all(not p.grad.any() for p in objective.parameters())
    assert len(step.output.routings) == 5
    assert step.output.num_answer_layers == 2
    assert step.output.selected == ()
    assert all(len(rows) == 0 for rows in step.output.layer_rows)
    assert not count_units(filler(batch), MIXED).any()
    empty = replace(filler(batch), row_ids_B=torch.tensor([5]))
    answered = objective.model.eval()(empty).logits
    assert answered["polarity"].shape == (1, 3) and answered["opinion"][0, 0] == 0.0


@pytest.mark.parametrize("served", [None, [-1, -1, -1], [1, 3, 4]])
def test_layer_rows_name_the_row_of_every_routed_token(served):
    model, batch = decoder_model(), decoder_batch(served=served)
    output = model(batch)
    assert [block.layer for block in model.moe_layers()] == [0, 1, 2, 3, 4]
    assert output.num_answer_layers == 2
    wanted = (batch.target_ids_BD != IGNORED).sum(dim=1)
    for number, (routing, rows_S) in enumerate(
        zip(output.routings, output.layer_rows, strict=True)
    ):
        expected = batch.attention_mask_BL.sum(dim=1) if number < 3 else wanted
        assert torch.bincount(rows_S, minlength=len(wanted)).tolist() == expected.tolist()
        assert len(routing.logits_SE) == len(rows_S)
        assert int(routing.counts_E.sum()) == 2 * len(rows_S)


def test_a_batch_counts_alike_however_it_is_cut():
    loss = replace(OFF, z_weight=0.1, balance_weight=0.0)
    objective, batch = decoder_objective(loss=loss), decoder_batch(rows=10)
    assert count_units(batch, MIXED)[-1] == (batch.target_ids_BD != IGNORED).sum()
    parts = cut(batch, [[0, 1, 2, 3], [4, 8], [5, 6, 7, 9]], MIXED)
    steps = [objective(part) for part in parts]
    whole = objective(scaled(batch, MIXED))
    torch.testing.assert_close(sum(step.loss for step in steps) / 3, whole.loss)
    for name in ("z", "task/opinion", "task/polarity"):
        torch.testing.assert_close(sum(step.terms[name] for step in steps) / 3, whole.terms[name])


@pytest.mark.parametrize("served", [None, [-1, -1, -1], [3, 4, -1], [1, 1]])
def test_with_soft_labels_every_label_is_scored_in_training(served):
    objective, batch = (
        decoder_objective(loss=replace(OFF, z_weight=0.1)),
        decoder_batch(served=served),
    )
    mine = batch.task_ids_B == 1
    soft = torch.tensor([0.2, 0.3, 0.5]).repeat(len(mine), 1).masked_fill(~mine[:, None], torch.nan)
    taught = scaled(replace(batch, soft_labels={"polarity": soft}), MIXED)
    expected = objective.model.eval()(batch).logits["polarity"].detach()
    plain = objective.model.train()(batch).logits
    step = objective(taught)
    logits = step.output.logits
    torch.testing.assert_close(logits["polarity"].detach(), expected)
    for task in MIXED:
        if task.name != "polarity":
            torch.testing.assert_close(logits[task.name], plain[task.name])
    assert count_units(taught, MIXED)[-1] == len(step.output.answer_rows_S)
    if mine.any():
        losses = -(soft[mine] * expected[mine].log_softmax(-1)).sum(dim=1)
        torch.testing.assert_close(step.terms["soft/polarity"], losses.mean())
    step.loss.backward()
    assert without_gradient(objective) == []


def test_a_row_is_answered_alone_as_in_a_batch_of_other_tasks():
    model = decoder_model("bart", moe_config(route_by="both"), private_width=8).eval()
    torch.nn.init.normal_(model.private[1].feed_forward.down.weight, std=0.5)
    batch = decoder_batch(family="bart")
    together = model(batch)
    for row in range(8):
        number = int(batch.task_ids_B[row])
        alone = model(batch.take(torch.tensor([row])))
        for task in MIXED if number < 0 else [MIXED[number]]:
            if (task.mode == "decoder") is (number >= 0):
                found, expected = alone.logits[task.name][0], together.logits[task.name][row]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            if task.name in alone.generated:
                ids = together.generated[task.name][row]
                assert own_words(alone.generated[task.name][0]) == own_words(ids)


def test_a_row_of_another_task_has_zeros_and_no_words():
    found = decoder_model().eval()(batch := decoder_batch())
    logits = found.logits
    assert list(logits) == [task.name for task in MIXED]
    for number, task in enumerate(MIXED):
        if task.mode == "decoder":
            others = batch.task_ids_B != number
            assert not logits[task.name][others].any()
            assert task.label_words or (found.generated[task.name][others] == -1).all()


@pytest.mark.parametrize("labels", [8, 9, 17])
def test_many_labels_are_scored_in_several_passes_and_alike(labels):
    names = tuple(f"l{number}" for number in range(labels))
    task = replace(POLARITY, labels=names, label_words=names)
    model = decoder_model(tasks=(task, OPINION)).eval()
    batch = decoder_batch(6, tasks=(task, OPINION))
    found = model(batch).logits["polarity"]
    for label in (0, 7, labels - 1):
        one = {"polarity": batch.choices["polarity"][[label]]}
        few = decoder_model(
            tasks=(replace(task, labels=names[:1], label_words=names[:1]), OPINION)
        ).eval()
        few.load_state_dict(model.state_dict())
        alone = few(replace(batch, choices=one)).logits["polarity"]
        torch.testing.assert_close(alone[:, 0], found[:, label], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_encodes_then_one_backward_are_the_same_with_recomputed_layers_of_both_stacks(family):
    def gradients(recompute):
        moe = moe_config(route_by="both", shared_width=8, task_prior=1.0)
        objective = decoder_objective(family, moe, dropout=0.3, recompute=recompute)
        torch.manual_seed(5)
        batches = decoder_batch(family=family, seed=1), decoder_batch(5, 7, family=family, seed=2)
        steps = [objective(scaled(batch, MIXED)) for batch in batches]
        sum(step.loss for step in steps).backward()
        return [p.grad for p in objective.parameters()], [step.loss.detach() for step in steps]

    torch.testing.assert_close(gradients(True), gradients(False), atol=0, rtol=0)


def test_a_layers_feed_forward_keeps_nothing_after_the_layer():
    objective = decoder_objective("bart", recompute=True)
    step = objective(scaled(decoder_batch(family="bart"), MIXED))
    halves = [
        module
        for module in objective.modules()
        if type(module).__name__ in ("FirstHalf", "SecondHalf")
    ]
    assert len(halves) == 10 and all(half._passed.value is None for half in halves)
    step.loss.backward()
    assert all(half._passed.value is None for half in halves)
    assert objective.model.holder.context is None


def test_a_second_pass_repeats_the_choices_of_the_first_in_both_stacks():
    model, batch = decoder_model().train(), decoder_batch()
    first = model(batch)
    assert len(first.selected) == 5
    for block in model.moe_layers():
        block.mixture.gate.e_score_correction_bias.normal_(std=10)
    turned, repeated = model(batch), model(batch, first.selected)
    assert not all(map(torch.equal, turned.selected, first.selected))
    assert all(map(torch.equal, repeated.selected, first.selected))
    torch.testing.assert_close(repeated.logits, first.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_decoder_reads_its_own_words_whole_whatever_the_confidence_of_the_post(family):
    tasks = tuple(replace(task, confidence_strategy="input") for task in MIXED)
    model, batch = decoder_model(family, tasks=tasks), decoder_batch(family=family)
    weights = torch.linspace(0.1, 1.0, 8)
    seen = {}
    encoder, decoder = model.decoder.encoder.get_encoder(), model.decoder.stack
    path = "block" if family == "t5" else "layers"
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        first = getattr(stack, path)[0]
        first.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    model(batch)
    plain = dict(seen)
    model(replace(batch, confidences={task.name: weights for task in tasks}))
    torch.testing.assert_close(seen["encoder"], plain["encoder"] * weights[:, None, None])
    torch.testing.assert_close(seen["decoder"], plain["decoder"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layers_of_both_stacks_train_and_the_table_of_words_does_not(family):
    model = decoder_model(family, NONE, train_layers=1)
    trained = {name for name, weight in model.encoder.named_parameters() if weight.requires_grad}
    path, after = ("block", "final_layer_norm") if "t5" in family else ("layers", "layer_norm")
    stacks = ("encoder", "decoder") if "t5" in family else ("model.encoder", "model.decoder")
    last = tuple(f"{stack}.{path}.{number}." for stack, number in zip(stacks, (2, 1), strict=True))
    norms = tuple(f"{stack}.{after}." for stack in stacks) if family != "bart" else ()
    assert trained == {
        name for name, _ in model.encoder.named_parameters() if name.startswith((*last, *norms))
    }


def test_layers_chosen_by_a_word_are_chosen_in_each_stack_and_by_number_through_both():
    for layers, expected in (
        ("alternate", [0, 2, 4]), ("last_half", [1, 2, 4]), ("all", [0, 1, 2, 3, 4]), ("top-1", [2, 4]),
        ([1, 4], [1, 4]),
    ):  # fmt: skip
        blocks = decoder_model(moe=moe_config(layers=layers)).moe_layers()
        assert [block.layer for block in blocks] == expected
    with pytest.raises(ValueError, match="from 0 to 4"):
        decoder_model(moe=moe_config(layers=[5]))


def test_answers_longer_than_the_decoder_can_number_are_refused():
    with pytest.raises(ValueError, match="tasks.opinion.max_answer_length .41. must be at most 40"):
        decoder_model("bart", tasks=(replace(OPINION, max_answer_length=41),))
    decoder_model("t5", tasks=(replace(OPINION, max_answer_length=4000),))


@pytest.mark.parametrize(
    ("fusion", "family"),
    [("attention", "t5"), ("tokens", "t5"), ("tokens", "bart"), ("gated", "mbart")],
)
def test_the_decoder_reads_states_that_have_seen_the_picture(fusion, family):
    model = seeing_model(fusion, tasks=MIXED, family=family, moe=moe_config(route_by="both")).eval()
    for name, weight in model.named_parameters():
        if (name.startswith("fusion.") or "encoder_attn" in name) and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    batch = with_pictures(decoder_batch(family=family), [1, 3, 4])
    before = model(batch).logits
    after = model(replace(batch, pixels_I3HW=batch.pixels_I3HW.flip(0) * 3)).logits
    # Other rows may move by a rounding: their experts' products have other sizes.
    moved = (after["polarity"] - before["polarity"]).abs().amax(dim=1) > 1e-5
    moved |= (after["opinion"] - before["opinion"])[:, :2].abs().amax(dim=1) > 1e-5
    moved |= (after["reason"] - before["reason"])[:, :2].abs().amax(dim=1) > 1e-5
    assert batch.task_ids_B.tolist() == [-1, 1, 3, 4, -1, 1, 3, 4]
    assert moved.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_a_second_view_of_posts_does_without_the_decoder_and_without_heads_nothing_is_projected():
    model, bare = decoder_model(), decoder_model(tasks=DECODED)
    output = model(decoder_batch(), decode=False)
    assert list(output.logits) == ["mood", "heat"]
    assert output.answer_rows_S is None and len(output.layer_rows) == 3
    assert (bare.projection, len(bare.heads)) == (None, 0)
    assert model.projection is not None and len(model.heads) == 2
