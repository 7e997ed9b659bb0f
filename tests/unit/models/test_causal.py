"""Decoder-only models: padding changes nothing; labels and texts are scored and generated as by the library's model."""

from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import ContrastiveConfig, LossConfig, ModelConfig
from comoe.losses.objective import Objective
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder_from_config
from comoe.models.moe.lora import LoraLinear, adapters_of
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch
from tests.helpers_model import (
    CAUSAL,
    MOOD,
    VOCABULARY,
    WORDS,
    moe_config,
    scaled,
    without_gradient,
)

LABELS = [[7, 2], [8, 9, 2], [10, 11, 12, 2], [7, 13, 2]]
"""Tokens of the labels' words, end token included; two begin alike."""
POLARITY = Task(
    "polarity", "label_words", ("a", "b", "c", "d"), "accuracy", prompt="{text}", label_words=("a", "b", "c", "d"),
)  # fmt: skip
OTHER = replace(POLARITY, name="other", labels=("x", "y"), label_words=("x", "y"))
TASKS = (MOOD, POLARITY, WORDS, OTHER)
NONE = moe_config(num_experts=0)
LORA = moe_config(form="lora", route_by="both", top_k=2, rank=2)


def ragged(rows) -> torch.Tensor:
    width = max(1, *map(len, rows))
    return torch.tensor(
        [[*row, *[IGNORED] * (width - len(row))] for row in rows], dtype=torch.int64
    )


def batch_of(
    lengths=(9, 3, 6, 4, 7), served=(-1, 1, 1, 3, 1), gold=(0, 2, 1, 0, 3), seed=0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    B, L = len(lengths), max(lengths)
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(14, VOCABULARY, (B, L), generator=generator) * mask
    tasks = torch.tensor(served)
    golds = torch.tensor(gold)
    of = {
        name: tasks == number for number, name in enumerate(("mood", "polarity", "words", "other"))
    }
    labels = {name: torch.where(mine, golds, IGNORED) for name, mine in of.items()}
    labels["mood"] = torch.where(tasks == -1, 1, IGNORED)
    labels["words"] = torch.full((B, L), IGNORED)
    targets = [LABELS[g] if task > 0 else [] for task, g in zip(served, gold, strict=True)]
    return Batch(
        ids, mask, None, mask.bool(), tasks, torch.arange(B), labels, target_ids_BD=ragged(targets),
        choices={"polarity": ragged(LABELS), "other": ragged(LABELS[:2])},
    )  # fmt: skip


def model_of(family: str, moe=NONE, *, tasks=TASKS, seed=0, recompute=False, **options):
    torch.manual_seed(seed)
    config = ModelConfig(dropout=0.0, projection_width=8, moe=moe, **options)
    model = build_model(config, tasks, encoder_config=CAUSAL[family].to_dict(), recompute=recompute)
    return model.double().eval()


def one_row(batch: Batch, row: int) -> Batch:
    """A row without its padding."""
    length = int(batch.attention_mask_BL[row].sum())
    alone = batch.take(torch.tensor([row]))
    cut = {
        name: getattr(alone, name)[:, :length]
        for name in ("input_ids_BL", "attention_mask_BL", "word_starts_BL")
    }
    labels = dict(alone.labels, words=alone.labels["words"][:, :length])
    return replace(alone, **cut, labels=labels)


@pytest.mark.parametrize("pooling", ["attention", "mean", "last"])
@pytest.mark.parametrize("family", CAUSAL)
def test_padding_changes_no_logit(family, pooling):
    moe = moe_config(form="lora", route_by="token", gate_scope="layer")
    model, batch = model_of(family, moe, pooling=pooling), batch_of()
    with torch.no_grad():
        found = model(batch)
        for row in range(len(batch.task_ids_B)):
            alone = model(one_row(batch, row))
            length = alone.attentions["mood"].shape[1]
            assert found.attentions["mood"][row].sum() == pytest.approx(1)
            for name, logits in alone.logits.items():
                mine = found.logits[name][row : row + 1]
                mine = mine[:, :length] if name == "words" else mine
                torch.testing.assert_close(mine, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_label_words_score_as_in_the_library_one_by_one(family):
    model, batch = model_of(family), batch_of()
    torch.manual_seed(1)
    library = build_encoder_from_config(CAUSAL[family].to_dict(), dropout=0.0, generates=True)
    library = library.double().eval()
    library.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        found, trained = model(batch).logits, model.train()(batch).logits
        for name, task in (("polarity", 1), ("other", 3)):
            for row in (batch.task_ids_B == task).nonzero().flatten().tolist():
                prompt = batch.input_ids_BL[row][batch.attention_mask_BL[row].bool()].tolist()
                for label in range(found[name].shape[1]):
                    ids = torch.tensor([prompt + LABELS[label]])
                    logs = library(input_ids=ids).logits[0].log_softmax(dim=1)
                    words = range(len(prompt), ids.shape[1])
                    expected = sum(logs[at - 1, ids[0, at]] for at in words)
                    assert float(found[name][row, label]) == pytest.approx(
                        float(expected), abs=1e-9
                    )
                    gold = label == int(batch.labels[name][row])
                    own = float(expected) if gold else 0.0
                    assert float(trained[name][row, label]) == pytest.approx(own, abs=1e-9)
            assert (found[name][batch.task_ids_B != task] == 0).all()


@pytest.mark.parametrize("moe", [LORA, moe_config(route_by="task")], ids=["lora", "beside"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_labels_see_neither_one_another_nor_other_rows_under_experts(family, moe):
    model, batch = model_of(family, moe), batch_of(served=(0, 1, 1, 3, 1))
    with torch.no_grad():
        found = model(batch).logits["polarity"]
        for label, words in enumerate(LABELS):
            choices = {"polarity": ragged([words] * 4), "other": batch.choices["other"]}
            alone = replace(one_row(batch, 2), choices=choices)
            assert float(model(alone).logits["polarity"][0, label]) == pytest.approx(
                float(found[2, label]), abs=1e-9
            )


def test_a_gradient_reaches_all_that_trains_and_is_the_same_recomputed():
    grads = []
    for recompute in (False, True):
        model = model_of("llama", LORA, recompute=recompute).train()
        output = model(batch_of(served=(0, 1, 1, 3, 1)))
        total = sum(value.square().sum() for value in output.logits.values())
        (total + sum(value.sum() for value in output.embeddings.values())).backward()
        assert without_gradient(model) == []
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert [routing.scores_SE.shape[0] for routing in output.routings] == [29]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    # A batch without a row of the kind still runs the output layer.
    empty = model(batch_of(served=(0, 0, 0, 0, 0)))
    assert (empty.logits["polarity"] == 0).all() and empty.logits["polarity"].requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_normalized_scores_are_by_token_in_prediction_alone(training):
    batch, found = batch_of(), []
    for normalized in (False, True):
        tasks = (MOOD, replace(POLARITY, length_normalized=normalized), WORDS, OTHER)
        with torch.no_grad():
            found.append(model_of("llama", tasks=tasks).train(training)(batch).logits)
    counts = torch.ones(4) if training else torch.tensor([len(words) for words in LABELS])
    torch.testing.assert_close(found[1]["polarity"], found[0]["polarity"] / counts)
    torch.testing.assert_close(found[1]["other"], found[0]["other"])


OPINION = Task("opinion", "text", (), "token_f1", prompt="{text}", max_answer_length=7, num_beams=1)
REASON = replace(OPINION, name="reason", num_beams=3, max_answer_length=5)
WRITTEN = (MOOD, POLARITY, OPINION, REASON)
OWN = [[9, 8, 7, 2], [], [20, 2], [30, 31, 32, 33, 2], [40, 2]]
"""Tokens of the texts that the rows want."""


def texts_of(served=(0, 1, 2, 3, 2), lengths=(9, 3, 6, 4, 7)) -> Batch:
    """Rows for a head, for label words and for both texts."""
    batch = batch_of(lengths, [min(task, 1) for task in served])
    tasks = torch.tensor(served)
    own = {
        "mood": torch.where(tasks == 0, 1, IGNORED),
        "polarity": torch.where(tasks == 1, 2, IGNORED),
    }
    texts = [OWN[row] if task > 1 else LABELS[2] if task else [] for row, task in enumerate(served)]
    counts = torch.tensor([len(text) for text in texts])
    for number, name in ((2, "opinion"), (3, "reason")):
        own[name] = torch.where((tasks == number) & (counts > 0), counts, IGNORED)
    choices = {"polarity": ragged(LABELS)}
    return replace(
        batch, task_ids_B=tasks, labels=own, target_ids_BD=ragged(texts), choices=choices
    )


def wake(model):
    """Ends come early enough to be seen, and gates tell tokens and tasks apart."""
    with torch.no_grad():
        model.encoder.get_output_embeddings().weight[2] *= 4
        for name, parameter in model.named_parameters():
            if "task_projection" in name or "gate.weight" in name:
                parameter.mul_(10)
    return model


def library_of(model, family):
    torch.manual_seed(1)
    library = build_encoder_from_config(CAUSAL[family].to_dict(), dropout=0.0, generates=True)
    library = library.double().eval()
    library.load_state_dict(model.encoder.state_dict())
    return library


def prompt_of(batch, row):
    return batch.input_ids_BL[row][batch.attention_mask_BL[row].bool()].tolist()


@pytest.mark.parametrize("family", CAUSAL)
def test_without_experts_the_loss_of_a_text_is_the_librarys_own(family):
    model, batch = model_of(family, tasks=WRITTEN), texts_of()
    library = library_of(model, family)
    trained = model.train()(batch).logits
    for name, row in (("opinion", 2), ("opinion", 4), ("reason", 3)):
        prompt = prompt_of(batch, row)
        ids = torch.tensor([prompt + OWN[row]])
        labels = ids.clone()
        labels[0, : len(prompt)] = IGNORED
        with torch.no_grad():
            output = library(input_ids=ids, labels=labels)
        found = -float(trained[name][row, 0].detach())
        assert trained[name].shape == (5, 1)
        # Its loss is a float32 number.
        assert found == pytest.approx(float(output.loss) * len(OWN[row]), rel=1e-6)
        logits, wanted = output.logits[0, len(prompt) - 1 : -1], torch.tensor(OWN[row])
        expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        assert found == pytest.approx(float(expected), abs=1e-9)
    assert float(trained["opinion"][0, 0]) == float(trained["opinion"][3, 0]) == 0.0


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", CAUSAL)
def test_without_experts_texts_are_generated_as_the_library_does_without_padding(family, beams):
    tasks = (MOOD, POLARITY, replace(OPINION, num_beams=beams), REASON)
    model = wake(model_of(family, tasks=tasks))
    batch = texts_of((2, 2, 2, 3, 2))
    library, ended = library_of(model, family), []
    # The end is what is generated third behind the first prompt.
    first = torch.tensor([prompt_of(batch, 0)])
    end = int(library.generate(input_ids=first, max_new_tokens=3, pad_token_id=0)[0, -1])
    library.generation_config.eos_token_id = model.encoder.generation_config.eos_token_id = end
    model.causal_decoder.generator.ends = [end]
    with torch.no_grad():
        output = model(batch)
        for row in (0, 1, 2, 4):
            prompt = torch.tensor([prompt_of(batch, row)])
            ids = library.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), num_beams=beams,
                max_new_tokens=7, do_sample=False, pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()  # fmt: skip
            ended.append(end in ids)
            text = ids[: ids.index(end) + 1] if end in ids else ids
            bare = [token for token in text if token != end]
            found = output.generated["opinion"][row].tolist()
            assert found[: len(bare)] == bare and set(found[len(bare) :]) <= {-1}
            whole = torch.tensor([[*prompt[0].tolist(), *text]])
            logs = library(input_ids=whole).logits[0].log_softmax(dim=1)
            score = sum(logs[at - 1, whole[0, at]] for at in range(prompt.shape[1], whole.shape[1]))
            assert float(output.logits["opinion"][row, 1]) == pytest.approx(float(score), abs=1e-9)
    assert any(ended) or beams > 1
    assert set(output.generated["opinion"][3].tolist()) == {-1}
    assert float(output.logits["opinion"][3].abs().sum()) == 0


@pytest.mark.parametrize("private_width", [0, 8])
@pytest.mark.parametrize(
    ("family", "moe"),
    [("llama", LORA), ("gemma3_text", moe_config(form="lora", route_by="token", gate_scope="layer")),
     ("gpt2", moe_config(route_by="both", shared_width=8)), ("qwen3", moe_config(route_by="task", task_prior="own"))],
)  # fmt: skip
def test_greedy_texts_with_a_cache_are_those_of_teacher_forcing_with_experts(
    family, moe, private_width
):
    model = wake(model_of(family, moe, tasks=WRITTEN, private_width=private_width))
    if private_width:
        torch.nn.init.normal_(model.private[2].feed_forward.down.weight)
    batch = texts_of((2, 2, 1, 3, 2))
    with torch.no_grad():
        output = model(batch)
        for row in (0, 1, 4):
            forced = []
            while len(forced) < 7 and 2 not in forced:
                texts = torch.tensor([[*forced, token] for token in range(VOCABULARY)])
                forced.append(int(taught(model, batch, row, texts).argmax()))
            found = [token for token in output.generated["opinion"][row].tolist() if token >= 0]
            assert found == [token for token in forced if token != 2]
            expected = float(taught(model, batch, row, torch.tensor([forced]))[0])
            assert float(output.logits["opinion"][row, 1]) == pytest.approx(expected, abs=1e-9)


def taught(model, batch, row, texts):
    """Log-probability of each text behind a row's prompt, as training has it."""
    rows = replace(batch.take(torch.full((len(texts),), row)), target_ids_BD=texts)
    logits = model.train()(rows).logits["opinion"][:, 0]
    model.eval()
    return logits


def test_padding_and_other_rows_change_no_text():
    model, batch = wake(model_of("llama", LORA, tasks=WRITTEN)), texts_of()
    with torch.no_grad():
        found = model(batch)
        for row, name in ((2, "opinion"), (3, "reason"), (4, "opinion")):
            length = len(prompt_of(batch, row))
            alone = batch.take(torch.tensor([row]))
            cut = {
                key: getattr(alone, key)[:, :length]
                for key in ("input_ids_BL", "attention_mask_BL", "word_starts_BL")
            }
            one = model(replace(alone, **cut))
            width = one.generated[name].shape[1]
            assert one.generated[name][0].tolist() == found.generated[name][row, :width].tolist()
            torch.testing.assert_close(
                one.logits[name][0], found.logits[name][row], rtol=0, atol=1e-9
            )


def test_a_gradient_of_texts_reaches_the_experts_and_a_row_of_none_adds_nothing():
    model = model_of("llama", LORA, tasks=WRITTEN, recompute=True).train()
    output = model(texts_of())
    (output.logits["opinion"].sum() + output.logits["reason"].sum()).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, _ in model.named_parameters() if "lora_" in n} <= reached
    none = model(texts_of((0, 1, 0, 1, 0))).logits["opinion"]
    assert (none == 0).all() and none.requires_grad
    alone = model.eval()(texts_of((0, 1, 0, 1, 0)))
    assert (alone.generated["opinion"] == -1).all() and (alone.logits["opinion"] == 0).all()


def test_longest_posts_leave_room_for_texts():
    assert model_of("gpt2", tasks=WRITTEN).longest_text == 40 - 7
    assert model_of("gpt2").longest_text == 40
    with pytest.raises(ValueError, match="max_answer_length"):
        model_of("gpt2", tasks=(replace(OPINION, max_answer_length=41),))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_the_gradient_of_the_experts_is_that_of_the_librarys_loss_at_merged_weights(family):
    """Packed and padded here; row by row there, each map being W + sum of g_e (alpha / r) B_e A_e of the row's task."""
    moe = moe_config(
        form="lora",
        num_experts=3,
        top_k=3,
        rank=2,
        alpha=5.0,
        route_by="task",
        gate_scale=1.0,
        balance="none",
    )
    tasks = (POLARITY, OPINION)
    model = wake(model_of(family, moe, tasks=tasks))
    batch = texts_of((1, 2, 2, 1, 2))
    batch = scaled(replace(batch, task_ids_B=batch.task_ids_B - 1), tasks)
    off = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
    objective = Objective(model, tasks, off, moe).double().train()
    loss = objective(batch).loss
    loss.backward()
    names = [
        n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("projection")
    ]
    leaves = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in names}
    total = sum(library_loss(model, family, leaves, batch, task) for task in range(len(tasks)))
    total.backward()
    assert float(loss) == pytest.approx(float(total), rel=1e-6)
    assert sum("lora_" in n for n in names) == 2 * len(adapters_of(model))
    for name in names:
        found, expected = model.get_parameter(name).grad, leaves[name].grad
        assert found.abs().max() > 1e-5
        # Losses are float32 numbers.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def library_loss(model, family, leaves, batch, task):
    """Mean over a task's rows, or over the tokens of its texts, of the cross-entropy of the library's logits."""
    name = next(n for n in leaves if n.endswith("task_projection.weight"))
    scores = torch.sigmoid(leaves[name] @ leaves["task_embedding.weight"][task])
    weights = scores / scores.sum()
    library = library_of(without_experts(model, family), family)
    changed = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            A, B = leaves[f"{path}.lora_A"].view(3, 2, -1), leaves[f"{path}.lora_B"].view(-1, 3, 2)
            update = 2.5 * torch.einsum("e,oer,eri->oi", weights, B, A)
            plain = path.removeprefix("encoder.").replace(".inner", "")
            inner = module.inner.weight.detach()
            changed[f"{plain}.weight"] = inner + (
                update if isinstance(module.inner, torch.nn.Linear) else update.T
            )
    losses, units = [], 0
    for row in (batch.task_ids_B == task).nonzero().flatten().tolist():
        prompt = prompt_of(batch, row)
        text = [token for token in batch.target_ids_BD[row].tolist() if token != IGNORED]
        if not text:
            continue
        given = {"input_ids": torch.tensor([prompt + text])}
        logits = torch.func.functional_call(library, changed, kwargs=given).logits[0]
        behind = logits[len(prompt) - 1 : -1]
        losses.append(
            torch.nn.functional.cross_entropy(behind, torch.tensor(text), reduction="sum")
        )
        units += 1 if task == 0 else len(text)
    return sum(losses) / units


def without_experts(model, family):
    bare = model_of(family, tasks=(POLARITY,))
    moved = {n.replace(".inner.", "."): v for n, v in model.state_dict().items()}
    bare.load_state_dict({n: moved.get(n, v) for n, v in bare.state_dict().items()})
    return bare
