"""A task of hidden words: its loss, metrics, weights, and that it is trained and measured but never predicted."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import labelled_rows, recipe_of, write_jsonl
from helpers_export import export_tiny, tiny_predictor, tiny_recipe, tiny_tokenizer
from helpers_model import (
    MOOD,
    TOPIC,
    VOCABULARY,
    WORDS,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
    tiny_objective,
    without_gradient,
)
from scipy.special import erf

from comoe.config.load import recipe_from_dict
from comoe.config.recipe import LossConfig, ModelConfig, TaskConfig
from comoe.config.validate import validate
from comoe.data.collator import Collator
from comoe.data.corpus import Corpus, load_corpus
from comoe.evaluation.evaluate import check_chosen_metric, evaluate, mean_metric
from comoe.evaluation.tables import format_results_table
from comoe.inference.exported import load_exported
from comoe.inference.onnx_export import check_exportable
from comoe.inference.predictor import Predictor
from comoe.losses.objective import count_units
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.heads import MaskedWordHead
from comoe.tasks.task import build_task
from comoe.train.memory_plan import plan_run
from comoe.train.parallel.ds_config import fill_settings, plan_layout
from comoe.train.start_from import start_from_export
from comoe.types import IGNORED, Batch

DOMAIN = build_task("domain", TaskConfig(kind="masked_words"), labels=(), label_counts={})
TASKS = (MOOD, DOMAIN, WORDS)


def batch_of(tasks=TASKS, *, hidden: int = 3, rows: int = 6, seed: int = 0) -> Batch:
    """Rows 0 to 2 are of other tasks; of the others each hides some of its first tokens."""
    others = tuple(task for task in tasks if task.mode != "masked")
    batch = random_batch(rows=rows, tasks=others, seed=seed)
    ids_BL = torch.full_like(batch.input_ids_BL, IGNORED)
    counts_B = torch.full((rows,), IGNORED)
    tasks_B = torch.full((rows,), -1)
    number = tasks.index(DOMAIN)
    for row in range(3, rows):
        tasks_B[row] = number
        count = min(hidden, 1 + row % 3)
        if count:
            ids_BL[row, :count] = batch.input_ids_BL[row, :count]
            batch.input_ids_BL[row, :count] = 4
            counts_B[row] = count
    labels = {
        name: torch.cat([values[:3], torch.full_like(values[3:], IGNORED)])
        for name, values in batch.labels.items()
    }
    batch = replace(
        batch, labels=labels | {"domain": counts_B}, masked_ids_BL=ids_BL, task_ids_B=tasks_B
    )
    return scaled(batch, tasks)


def reference(head, states_BLM, ids_BL, table_VE):
    """The same in NumPy: (log-probability, found) per row."""
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}
    found = np.zeros((len(ids_BL), 2))
    for row, column in np.argwhere(ids_BL != IGNORED):
        x = states_BLM[row, column] @ weights["dense.weight"].T + weights["dense.bias"]
        x = 0.5 * x * (1 + erf(x / math.sqrt(2)))
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        z = table_VE @ (x * weights["norm.weight"] + weights["norm.bias"]) + weights["bias"]
        token = ids_BL[row, column]
        found[row] += z[token] - np.log(np.exp(z).sum()), z.argmax() == token
    return found


@pytest.mark.parametrize("width", [16, 8])
def test_the_head_equals_a_float64_reference(width):
    torch.manual_seed(1)
    embedding = torch.nn.Embedding(VOCABULARY, width).double()
    head = MaskedWordHead(embedding, 16).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    states_BLM = torch.randn(4, 5, 16, dtype=torch.float64)
    ids_BL = torch.full((4, 5), IGNORED)
    ids_BL[0, 1], ids_BL[0, 4], ids_BL[2, 0] = 7, 12, 31
    z_V = embedding.weight @ head.norm(torch.nn.functional.gelu(head.dense(states_BLM[3, 3])))
    ids_BL[3, 3] = int((z_V + head.bias).argmax())
    found = head(states_BLM, ids_BL, embedding)
    expected = reference(
        head, states_BLM.numpy(), ids_BL.numpy(), embedding.weight.detach().numpy()
    )
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)
    assert found[3, 1] == 1 and found[1].tolist() == [0, 0]


def test_the_loss_is_the_mean_over_hidden_tokens_whatever_the_rows():
    objective = tiny_objective(tasks=TASKS).eval()
    batch = batch_of()
    output = objective.model(batch)
    (loss,) = objective.task_losses(output, batch)[[1]]
    states_BLM = objective.model.encode(objective.model._texts(batch), None).fused_BLM
    table = objective.model.encoder.get_input_embeddings().weight.detach().double().numpy()
    head, ids = objective.model.masked_heads[0].double(), batch.masked_ids_BL.numpy()
    rows = reference(head, states_BLM.detach().double().numpy(), ids, table)
    assert int(count_units(batch, TASKS)[1]) == (ids != IGNORED).sum() == 6
    assert loss.item() == pytest.approx(-rows[:, 0].sum() / 6, rel=1e-5)
    # Nothing is said of the rows of other tasks, and these are not of hidden words.
    assert not output.logits["domain"][:3].any()


@pytest.mark.parametrize("hidden", [3, 0])
@pytest.mark.parametrize("private_width", [0, 4])
def test_every_weight_has_a_gradient_with_and_without_hidden_words(hidden, private_width):
    objective = tiny_objective(
        moe_config(route_by="task"), tasks=TASKS, private_width=private_width
    ).train()
    step = objective(batch_of(hidden=hidden))
    step.loss.backward()
    assert without_gradient(objective.model.masked_heads) == []
    assert bool(objective.model.masked_heads[0].dense.weight.grad.any()) == bool(hidden)
    assert bool(step.terms["task/domain"] > 0) == bool(hidden)
    assert "domain" not in step.output.embeddings


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_weighs_it(weighting):
    loss = LossConfig(weighting=weighting)
    objective = tiny_objective(tasks=TASKS, loss=loss, dropout=0.1, private_width=4).train()
    step = objective(batch_of())
    step.loss.backward()
    assert step.loss.isfinite() and step.terms["weight/domain"] > 0
    assert without_gradient(objective.model) == []


def test_gradients_of_tasks_read_the_same_logits_as_the_step():
    model = tiny_model(tasks=TASKS, dropout=0.2, private_width=4).train()
    for part in model.private:  # at the start they add nothing
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    torch.manual_seed(3)
    output = model(batch_of(), probed=True)
    for name in ("mood", "domain", "words"):
        torch.testing.assert_close(output.probe.logits[name], output.logits[name])


def test_r_drop_leaves_it_out():
    objective = tiny_objective(tasks=TASKS, loss=LossConfig(r_drop_weight=1.0), dropout=0.1)
    step = objective.train()(batch_of())
    step.loss.backward()
    assert step.terms["r_drop"] > 0 and without_gradient(objective.model.masked_heads) == []


def corpus_of(root: Path, **tasks: TaskConfig) -> Corpus:
    write_jsonl(root / "moods" / "train.jsonl", labelled_rows(40))
    (root / "posts.txt").write_text("".join(f"plain post {i}\n" for i in range(60)))
    return load_corpus(recipe_of(root, **tasks))


def test_posts_need_no_label_and_give_up_a_part_for_validation(tmp_path):
    mood = TaskConfig(path="moods")
    domain = TaskConfig(path="posts.txt", kind="masked_words", probability=0.4)
    corpus = corpus_of(tmp_path, mood=mood, domain=domain)
    counts = corpus.report.posts["posts"]
    assert counts["train"] + counts["validation"] == 60 and counts["validation"] > 0
    validation = corpus.splits["validation"]
    assert validation.labels["domain"].count(0) == counts["validation"]
    assert corpus.tasks[1] == replace(DOMAIN, probability=0.4, auxiliary=True)
    check_chosen_metric("mean", corpus.tasks, measured={"mood"})
    alone = corpus_of(tmp_path, domain=domain).tasks
    assert not alone[0].auxiliary
    for name in ("mean", "domain/perplexity", "domain/masked_accuracy", "domain/loss"):
        check_chosen_metric(name, alone, measured={"domain"})
    # On posts with labels, those without a label stay, too.
    write_jsonl(tmp_path / "some.jsonl", [*labelled_rows(20), {"text": "none"}])
    both = corpus_of(
        tmp_path,
        mood=TaskConfig(path="some.jsonl"),
        domain=TaskConfig(path="some.jsonl", kind="masked_words"),
    )
    assert sum(both.report.posts["some"].values()) == 21


def test_a_confidence_that_is_not_there_is_refused(tmp_path):
    domain = TaskConfig(path="posts.txt", kind="masked_words", confidence="sure")
    with pytest.raises(ValueError, match=r"tasks\.domain\.confidence"):
        corpus_of(tmp_path, domain=domain)


def test_metrics_are_over_all_hidden_tokens_and_the_same_at_each_evaluation(tmp_path):
    collator = Collator(tiny_tokenizer(tmp_path), TASKS)
    split = collator.encode_texts(["good day in paris", "bad rain", "the sunny user good", ""])
    labelled = split.labelled.copy()
    labelled[:, 1] = True
    labels = {name: [None] * 4 for name in ("mood", "words")} | {"domain": [0] * 4}
    split = replace(split, labelled=labelled, posts=replace(split.posts, labels=labels))
    model, seen = tiny_model(tasks=TASKS).eval(), []

    def forward(batch):
        seen.append(batch)
        return model(batch)

    def found(*batches):
        return evaluate(
            forward, split, collator=collator, tasks=TASKS, gather=lambda share: [share],
            batches=[np.array(batch, dtype=np.int64) for batch in batches],
        )  # fmt: skip

    first, again = found([0, 1, 2, 3]), found([3, 1], [], [2, 0])
    metrics = first.metrics["domain"]
    assert set(first.metrics) == {"domain"}
    assert again.metrics["domain"] == pytest.approx(metrics, rel=1e-5)
    with torch.no_grad():
        logits = model(seen[0]).logits["domain"]
    counts = seen[0].labels["domain"]
    total = int(counts[:3].sum())
    assert metrics["n"] == 3 and counts[3] == IGNORED
    assert metrics["loss"] == pytest.approx(-float(logits[:, 0].sum()) / total, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]), rel=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(float(logits[:, 1].sum()) / total)
    rows = first.predictions["domain"]
    assert [row["gold"] for row in rows] == [*counts[:3].tolist(), None]
    gold, predicted = DOMAIN.rules.compared([row for row in rows if row["gold"]], DOMAIN)
    assert DOMAIN.rules.measure(gold, predicted, DOMAIN) == pytest.approx(
        metrics["masked_accuracy"]
    )
    assert mean_metric(first.metrics, (DOMAIN,)) == metrics["masked_accuracy"]
    assert "domain" in format_results_table({"test": first.metrics}, TASKS)


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_an_export_predicts_the_other_tasks(tmp_path, route_by):
    tasks = (MOOD, DOMAIN, TOPIC)
    predictor = tiny_predictor(tmp_path, tasks=tasks, route_by=route_by)
    assert [task.name for task in predictor.tasks] == ["mood", "topic"]
    (answer,) = predictor(["a sunny day"], explain=True)
    assert list(answer) == ["text", "mood", "topic"]
    with pytest.raises(ValueError, match="domain"):
        predictor(["a sunny day"], tasks=["domain"])
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "2 tasks: mood, topic" in card and "domain" not in card.split("## Training")[0]


def test_an_export_of_hidden_words_alone_is_where_another_run_starts(tmp_path):
    model = export_tiny(tmp_path, tasks=(DOMAIN,))
    assert model.projection is None and len(model.heads) == 0
    with pytest.raises(ValueError, match=r"predicts nothing.*model\.start_from="):
        Predictor.from_pretrained(tmp_path / "export", device="cpu")
    with pytest.raises(ValueError, match="--format onnx: the model predicts nothing"):
        check_exportable(load_exported(tmp_path / "export"))
    assert "model.start_from" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    other = replace(DOMAIN, name="other")
    moe = tiny_recipe().model.moe
    fresh = tiny_model(moe, tasks=(MOOD, other, DOMAIN), seed=4)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    folder = str(tmp_path / "export")
    (line,) = start_from_export(ModelConfig(start_from=folder, moe=moe), fresh)
    assert "tasks known there: domain" in line
    theirs, ours = model.state_dict(), fresh.state_dict()
    for name, value in ours.items():
        if name.startswith("encoder."):
            assert torch.equal(value, theirs[name]), name
        elif name.startswith("masked_heads.1."):
            assert torch.equal(value, theirs[name.replace("heads.1", "heads.0")]), name
        elif name.startswith(("heads.", "masked_heads.0.")):
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"mood": {"probability": 0.2}}}, r"tasks\.mood\.probability has no meaning.*single_label"),
        ({"tasks": {"domain": {"probability": 0}}}, r"tasks\.domain\.probability"),
        ({"tasks": {"domain": {"probability": 1.5}}}, r"tasks\.domain\.probability"),
        ({"tasks": {"domain": {"contrastive": True}}}, r"tasks\.domain\.contrastive is true.*unlabelled"),
        ({"tasks": {"domain": {"limit_per_label": 3}}}, r"tasks\.domain\.limit_per_label"),
        ({"tasks": {"domain": {"per": "author", "author": "a"}}}, r"tasks\.domain\.per"),
        ({"data": {"hide": "text"}}, r"data\.hide is text.*tasks\.domain"),
        ({"train": {"early_stop_metric": "domain/loss"}}, r"tasks\.domain is auxiliary"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change, message):
    raw = {
        "tasks": {"mood": {"path": "m.csv"}, "domain": {"path": "p.txt", "kind": "masked_words"}}
    }
    for section, options in change.items():
        place = raw.setdefault(section, {})
        for name, value in options.items():
            place[name] = place[name] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        validate(recipe_from_dict(raw))


def test_it_is_auxiliary_beside_labels_and_counts_alone():
    tasks = {"domain": {"path": "p.txt", "kind": "masked_words"}}
    plain = {"plain": {"path": "p.txt", "kind": "unlabelled"}}
    mood = {"mood": {"path": "m.csv"}}
    for others, auxiliary in (({}, False), (plain, False), (mood, True), (plain | mood, True)):
        assert recipe_from_dict({"tasks": tasks | others}).tasks["domain"].auxiliary == auxiliary


def test_the_memory_plan_counts_rows_and_vocabulary_of_hidden_words(tmp_path):
    recipe, raw = tiny_recipe(tasks=TASKS), {"zero_optimization": {"stage": 1}}
    layout = plan_layout(recipe, raw, world_size=1, gpu=False)
    settings = fill_settings(raw, recipe, layout, gpu=False)
    split = Collator(tiny_tokenizer(tmp_path), TASKS).encode_texts(["good day in paris"] * 4)
    lengths, parts = split.head_lengths, []
    for labels in ([1, 0, 0], [1, 1, 0]):
        labelled = np.tile(np.array(labels, dtype=bool), (4, 1))
        plan = plan_run(
            recipe, layout, tiny_model(tasks=TASKS), replace(split, labelled=labelled), settings
        )
        parts.append({part.name: part.device_bytes for part in plan.parts})
    name, posts = "logits of the vocabulary", layout.micro_batch_size
    tokens = int(posts * lengths.mean() * DOMAIN.probability)
    assert name not in parts[0]
    assert parts[1][name] == tokens * VOCABULARY * (8 + 2 * layout.bf16)
    # A row of its own for each post.
    rows = [found["activations (rough)"] for found in parts]
    assert rows[1] > 1.5 * rows[0]
