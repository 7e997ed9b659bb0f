"""The discriminator behind the reversed gradient: its value by hand, its gradients, and what it does to an encoder."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from comoe.config.recipe import AdversarialConfig, ContrastiveConfig, LossConfig, Recipe
from comoe.losses.adversarial import AdversarialLoss, reversal_strength, reversed_gradient
from comoe.losses.objective import Objective
from comoe.models.pooling import mean_state
from comoe.train.monitor.log_window import LogWindow
from comoe.train.parallel.engine import StepReport
from comoe.train.parallel.setup import parameter_groups
from comoe.types import DOMAINS, IGNORED
from tests.helpers_model import (
    TASKS,
    cut,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
    without_gradient,
)

OFF = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
ON = replace(OFF, adversarial=AdversarialConfig(weight=0.5, hidden_width=6))


def domain_batch(**options):
    """Posts of three domains, one without, each weighing 1; halfway through the run."""
    batch = random_batch(**options)
    classes = torch.arange(len(batch.row_ids_B)) % 3
    classes[1] = IGNORED
    return replace(batch, domains_B=classes, domain_weights_B=(classes >= 0).float(), progress=0.5)


def objective_of(loss=ON, *, seed=0, **options):
    moe = moe_config()
    return Objective(tiny_model(moe, seed=seed, **options), TASKS, loss, moe, num_domains=3)


def states_and_batch(states_BLM, mask_BL, classes, weights, *, progress=0.3, scale=None):
    weights_B = torch.tensor(weights, dtype=torch.float64)
    scale = 1 / weights_B.sum() if scale is None else scale
    output = SimpleNamespace(sharing=SimpleNamespace(shared_BLM=states_BLM, mask_BL=mask_BL))
    scale_T = torch.zeros(3, dtype=torch.float64)
    scale_T[DOMAINS] = scale
    classes_B = torch.tensor(classes)
    batch = SimpleNamespace(
        domains_B=classes_B, domain_weights_B=weights_B, progress=progress, unit_scale_T=scale_T
    )
    return output, batch


def test_the_strength_of_the_reversal_goes_from_0_towards_1():
    assert reversal_strength(0.0, 10.0) == 0.0
    assert reversal_strength(0.2, 10.0) == pytest.approx(math.tanh(1.0))
    assert 0.9999 < reversal_strength(1.0, 10.0) < 1.0
    assert reversal_strength(0.7, 0.0) == 0.0
    # At the start of a run nothing flows back into the encoder.
    states = torch.randn(2, 3, requires_grad=True)
    reversed_gradient(states, reversal_strength(0.0, 10.0)).square().sum().backward()
    assert not states.grad.any()


def test_the_loss_equals_the_one_computed_by_hand():
    loss = AdversarialLoss(AdversarialConfig(hidden_width=3), model_width=2, num_domains=2).double()
    nn.init.zeros_(loss.discriminator.output.weight)
    # Whatever the post: probabilities 1/4 and 3/4.
    loss.discriminator.output.bias.data = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    states = torch.randn(4, 3, 2, dtype=torch.float64)
    output, batch = states_and_batch(
        states, torch.ones(4, 3), [0, 1, 1, IGNORED], [1.0, 0.5, 0.5, 0.0]
    )
    value, terms = loss(output, batch)
    assert value.item() == pytest.approx((math.log(4) + 2 * 0.5 * math.log(4 / 3)) / 2)
    assert terms["adversarial_accuracy"] == pytest.approx(0.5)
    assert terms["adversarial_commonest"] == pytest.approx(0.5)
    assert terms["adversarial_even"] == 0.5
    assert terms["adversarial_lambda"] == pytest.approx(math.tanh(1.5))


def test_the_encoder_gets_the_reversed_gradient_and_the_discriminator_the_plain_one():
    torch.manual_seed(0)
    loss = AdversarialLoss(AdversarialConfig(hidden_width=5), model_width=3, num_domains=3).double()
    states = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4], [1]])).long()
    output, batch = states_and_batch(states, mask, [2, 0, IGNORED, 1], [1.0, 2.0, 0.0, 0.5])
    (0.7 * loss(output, batch)[0]).backward()
    parameters = dict(loss.named_parameters())
    found = {
        "states": states.grad,
        **{name: parameter.grad for name, parameter in parameters.items()},
    }

    def value(states, **weights):
        pooled = torch.stack(
            [
                row[: int(length)].mean(dim=0)
                for row, length in zip(states, mask.sum(1), strict=True)
            ]
        )
        logits = torch.func.functional_call(loss.discriminator, weights, (pooled,))
        rows = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        picked = logits.log_softmax(dim=1)[[0, 1, 3], [2, 0, 1]]
        return -(picked * rows).sum() / 3.5

    inner = {
        name.removeprefix("discriminator."): parameter.detach().clone()
        for name, parameter in parameters.items()
    }
    copies = {name: parameter.requires_grad_() for name, parameter in inner.items()}
    leaf = states.detach().clone().requires_grad_()
    value(leaf, **copies).backward()
    torch.testing.assert_close(found["states"], -math.tanh(1.5) * 0.7 * leaf.grad)
    for name, copy in copies.items():
        torch.testing.assert_close(found[f"discriminator.{name}"], 0.7 * copy.grad)
    # And the reference itself against differences.
    assert torch.autograd.gradcheck(lambda states: value(states, **inner), leaf)


def test_every_parameter_gets_its_gradient_and_the_terms_add_up():
    batch = scaled(domain_batch())
    plain, step = objective_of(OFF)(batch), (objective := objective_of())(batch)
    torch.testing.assert_close(step.loss, plain.loss + 0.5 * step.terms["adversarial"])
    assert 0 <= step.terms["adversarial_accuracy"] <= 1
    assert step.terms["adversarial_even"] == pytest.approx(1 / 3)
    torch.testing.assert_close(step.terms["adversarial_commonest"], torch.tensor(2 / 5))
    step.loss.backward()
    assert without_gradient(objective) == []
    assert objective.losses["adversarial"].discriminator.output.weight.grad.any()


def test_the_loss_does_not_depend_on_how_posts_are_cut_into_micro_batches():
    objective, batch = objective_of(), domain_batch()
    steps = [objective(part) for part in cut(batch, [[0, 1, 2], [3], [4, 5]])]
    whole = objective(scaled(batch)).terms
    for name in ("", "_accuracy", "_commonest", "_lambda"):
        name = f"adversarial{name}"
        torch.testing.assert_close(sum(step.terms[name] for step in steps) / 3, whole[name])


def test_posts_without_a_domain_cost_nothing_and_still_give_gradients():
    batch = domain_batch()
    none = replace(batch, domains_B=torch.full((6,), IGNORED), domain_weights_B=torch.zeros(6))
    objective = objective_of()
    step = objective(scaled(none))
    step.loss.backward()
    assert step.terms["adversarial"] == 0
    gradients = [parameter.grad for parameter in objective.losses["adversarial"].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("posts", [0.0, 3.0])
def test_a_step_without_any_domain_logs_no_accuracy(posts):
    step = objective_of()(scaled(domain_batch()))
    terms = {name: value for name, value in step.terms.items() if name.startswith("adversarial")}
    batch = replace(domain_batch(), unit_scale_T=torch.tensor([0.0, posts, 1.0, 0.0]))
    report = StepReport(torch.tensor(1.0), terms, [step], grad_norm=None, skipped=False)
    engine = SimpleNamespace(device=torch.device("cpu"))
    line = LogWindow(()).reduce(engine, report, [batch])
    always = {"adversarial_even", "adversarial_lambda"}
    assert set(line["terms"]) == (set(terms) if posts else always)


def test_evaluation_runs_nothing_of_it_and_exports_hold_nothing_of_it():
    objective = objective_of()
    calls = []
    objective.losses["adversarial"].register_forward_hook(lambda *_: calls.append(0))
    objective.eval()
    assert objective(random_batch(), mode="evaluate").sharing is None and calls == []
    assert not any("discriminator" in name for name in objective.model.state_dict())
    roles = {group["name"]: group for group in parameter_groups(objective, Recipe())}
    discriminator = list(objective.losses["adversarial"].parameters())
    in_heads = [p for name in ("heads/decay", "heads/plain") for p in roles[name]["params"]]
    assert all(any(p is q for q in in_heads) for p in discriminator)


@pytest.mark.parametrize(("gamma", "lowest", "highest"), [(0.0, 0.95, 1.0), (10.0, 0.0, 0.62)])
def test_behind_the_reversal_an_encoder_forgets_the_domain_and_without_it_keeps_it(
    gamma, lowest, highest
):
    """Domain and label are a coordinate of the input each; noise on the states makes distances
    count. A gamma of 0 never reverses: the discriminator learns, and the encoder does not mind."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (256, 2), generator=generator)
    inputs = torch.cat([2.5 * (2.0 * signs - 1), torch.randn(256, 2, generator=generator)], dim=1)
    domains, labels = signs[:, 0], signs[:, 1]
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 4), nn.Linear(4, 2)
    nn.init.eye_(encoder.weight)
    loss = AdversarialLoss(
        AdversarialConfig(hidden_width=16, gamma=gamma), model_width=4, num_domains=2
    )
    groups = [
        {"params": [*encoder.parameters()]},
        {"params": [*head.parameters(), *loss.parameters()], "lr": 0.02},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.005)
    accuracies = []
    for step in range(400):
        states = encoder(inputs) + torch.randn(256, 4)
        one_token = {
            "mask_BL": torch.ones(256, 1),
            "classes": domains.tolist(),
            "weights": [1.0] * 256,
        }
        value, terms = loss(*states_and_batch(states[:, None], **one_token, progress=step / 400))
        accuracies.append(terms["adversarial_accuracy"].item())
        optimizer.zero_grad()
        (nn.functional.cross_entropy(head(states), labels) + value).backward()
        optimizer.step()
    assert (head(encoder(inputs)).argmax(dim=1) == labels).float().mean() > 0.99
    assert lowest <= sum(accuracies[-50:]) / 50 <= highest


def test_only_real_tokens_are_in_the_mean():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [90.0, 90.0]]])
    torch.testing.assert_close(
        mean_state(states, torch.tensor([[1, 1, 0]])), torch.tensor([[2.0, 3.0]])
    )
