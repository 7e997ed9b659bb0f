"""Decoder-only models: padding changes nothing, labels are scored as the library's own model scores them one by one."""

from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import ModelConfig
from comoe.models.build import build_model
from comoe.models.encoders.build import build_encoder_from_config
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch
from tests.helpers_model import CAUSAL, MOOD, VOCABULARY, WORDS, moe_config, without_gradient

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


def test_free_text_wants_an_encoder_decoder():
    text = Task("aspect", "text", (), "token_f1", prompt="{text}")
    with pytest.raises(ValueError, match="generated by an encoder-decoder"):
        model_of("llama", tasks=(MOOD, text))
