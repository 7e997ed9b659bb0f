"""The layers that are timed against one another: comoe's block, a dense one, DeepSpeed's own, and the plain loop."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from comoe.config.recipe import ModelConfig, MoeConfig, Recipe
from comoe.distributed import world_size
from comoe.losses.objective import Objective
from comoe.models.encoders.build import build_encoder_from_config
from comoe.models.model import MultiTaskModel
from comoe.models.moe.experts import GatedFeedForward
from comoe.tasks.task import Task
from comoe.train.parallel.ds_config import ZERO_2, fill_settings, plan_layout
from comoe.train.parallel.setup import build_deepspeed_engine

OUTPUT_INIT = 0.02
"""Spread of the output projections: with zeros the backward pass would multiply by zero all the
way."""

TASK = Task("label", "single_label", ("no", "yes"), "macro_f1")


class Block(nn.Module):
    """The mixture as a run trains it: built by the engine, so through AutoEP, with our gate.

    Args:
        num_experts: E.
        model_width: M.
        expert_width: F.
        top_k: k.
        device: of this rank; bfloat16 on a GPU.
    """

    def __init__(
        self,
        num_experts: int,
        model_width: int,
        expert_width: int,
        *,
        top_k: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        moe = MoeConfig(
            num_experts=num_experts,
            top_k=top_k,
            expert_width=expert_width,
            layers="all",
            output_init=OUTPUT_INIT,
        )
        self.mixture = _built_by_the_engine(moe, model_width, device)
        _own_parameters(self.mixture)

    @property
    def gate_weight(self) -> nn.Parameter:
        """Router weight (E, M)."""
        return self.mixture.router.gate.weight

    def forward(self, x_SM: Tensor) -> Tensor:
        """Router, dispatch, experts, weighted sum; (S, M)."""
        self.mixture.router.prepare(None)
        output = self.mixture(x_SM.unsqueeze(0)).squeeze(0)
        self.mixture.router.collect()
        return output


class Native(nn.Module):
    """DeepSpeed's own ``deepspeed.moe.layer.MoE`` without drops, with the same gated experts; same arguments as Block.

    The second expert is the second best, as in ours: sampling it, DeepSpeed's default, would be
    another load.
    """

    def __init__(
        self,
        num_experts: int,
        model_width: int,
        expert_width: int,
        *,
        top_k: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        expert = GatedFeedForward(model_width, expert_width, output_init=OUTPUT_INIT)
        with contextlib.redirect_stdout(io.StringIO()):
            self.moe = MoE(
                model_width,
                expert.to(device=device, dtype=precision(device)),
                num_experts=num_experts,
                ep_size=world_size(),
                k=top_k,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            ).to(device)
            self.moe.set_deepspeed_parallelism()

    @property
    def gate_weight(self) -> nn.Parameter:
        """Router weight (E, M)."""
        return self.moe.deepspeed_moe.gate.wg.weight

    def forward(self, x_SM: Tensor) -> Tensor:
        """Same as ``Block.forward``."""
        return self.moe(x_SM)[0]


class EveryExpert(nn.Module):
    """The form of the paper's code: a Python loop, every expert on every token, a dense mixture; arguments as Block."""

    def __init__(
        self,
        num_experts: int,
        model_width: int,
        expert_width: int,
        *,
        top_k: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        experts = [
            GatedFeedForward(model_width, expert_width, output_init=OUTPUT_INIT)
            for _ in range(num_experts)
        ]
        self.experts = nn.ModuleList(experts).to(device=device, dtype=precision(device))
        self.gate = nn.Linear(model_width, num_experts, bias=False).to(device)

    def forward(self, x_SM: Tensor) -> Tensor:
        """Sum over all experts of g_i expert_i(x), g normalized sigmoid scores; (S, M)."""
        scores_SE = torch.sigmoid(self.gate(x_SM.float()))
        weights_SE = (scores_SE / scores_SE.sum(dim=1, keepdim=True)).to(x_SM.dtype)
        total = torch.zeros_like(x_SM)
        for index, expert in enumerate(self.experts):
            total = total + weights_SE[:, index : index + 1] * expert(x_SM)
        return total


def build_dense(
    model_width: int, expert_width: int, *, top_k: int, device: torch.device
) -> nn.Module:
    """One gated feed-forward as wide as the experts of one token together: equal active FLOPs, no router."""
    return GatedFeedForward(model_width, top_k * expert_width, output_init=OUTPUT_INIT).to(
        device=device, dtype=precision(device)
    )


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def forward_backward(layer: nn.Module, x_SM: Tensor, upstream_SM: Tensor) -> Callable[[], None]:
    """One forward and backward pass with fresh gradients, those of the input too.

    Args:
        layer: what is run.
        x_SM: its input.
        upstream_SM: gradient of its output; the same tensor serves every layer.
    """
    x_SM = x_SM.detach().requires_grad_()

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x_SM).backward(upstream_SM)
        # Dozens of layers wait for their turns: none keeps the gradient of its input meanwhile.
        x_SM.grad = None

    return run


def adam_step(layer: nn.Module) -> Callable[[], None]:
    """One AdamW step on the layer's parameters; needs gradients, so run forward and backward before."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5)
    return lambda: optimizer.step() and None


def _built_by_the_engine(moe: MoeConfig, model_width: int, device: torch.device) -> nn.Module:
    fields = {
        "model_type": "bert", "hidden_size": model_width, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 16,
    }  # fmt: skip
    recipe = Recipe(model=ModelConfig(moe=moe))
    model = MultiTaskModel(build_encoder_from_config(fields), [TASK], recipe.model)
    gpu = device.type == "cuda"
    # The other layers are timed in float32 on a CPU.
    settings = {**ZERO_2, "bf16": {"enabled": gpu}}
    layout = plan_layout(recipe, settings, world_size=world_size(), gpu=gpu)
    filled = fill_settings(settings, recipe, replace(layout, accumulation=1), gpu=gpu)
    objective = Objective(model, [TASK], recipe.loss, moe)
    with contextlib.redirect_stdout(io.StringIO()):
        build_deepspeed_engine(objective, recipe, filled)
    return model.moe_layers()[0].mixture


def _own_parameters(module: nn.Module) -> None:
    # ZeRO's hooks hang on the old ones and would reduce gradients over ranks in the midst of the
    # measurement.
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                setattr(
                    part,
                    name,
                    nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad),
                )
