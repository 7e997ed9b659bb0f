"""Experts from a dense block: the selected ones of each token together give what it gave."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from comoe.config.recipe import MoeConfig
from comoe.models.moe.router import build_gate, mean_weight_at_start

INPUTS, OUTPUTS = "mixture.experts.gate_up_proj", "mixture.experts.down_proj"
SHARED_INPUTS, SHARED_OUTPUTS = "shared.gate_up.weight", "shared.down.weight"
ROUTER = ("mixture.gate.weight", "task_projection.weight")
"""Names of a block's tensors."""


def upcycle(
    dense: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    *,
    source: MoeConfig,
    config: MoeConfig,
    num_tasks: int,
) -> dict[str, Tensor]:
    """The tensors of a block of experts that computes what a block of one expert does.

    The hidden units of the dense block (those of its shared expert first) are cut into the new
    shared expert and k slices. Expert e gets slice e mod k, so experts 0 to k - 1 are the whole
    block, k to 2 k - 1 again. The router's rows of these k are equal, so a token selects all of
    them, at equal weights, or none: the output is that of the dense block up to rounding. With k =
    1 each expert is the whole block and its weight differs from token to token; 1 is its mean at
    the start.

    Args:
        dense: tensors of the dense block by their names in a ``CooperativeBlock``.
        fresh: tensors of a new block of ``config``; gives the widths, and the router.
        source: ``model.moe`` of the dense block, ``num_experts`` 1.
        config: ``model.moe`` of the new one.
        num_tasks: T of the new one.

    Returns:
        What to put in the place of the tensors of ``fresh``, by name.

    Raises:
        ValueError: the widths do not add up, or no k experts can be told from the others.

    Source: sparse upcycling, arXiv:2212.05055; slices and equal rows: arXiv:2410.07524.
    """
    k, (E, M, F) = config.top_k, fresh[OUTPUTS].shape
    shared = config.shared_width
    units_UM, down_MU = _hidden_units(dense, build_gate(source, M).scale)
    U = down_MU.shape[1]
    if shared + k * F != U:
        raise ValueError(
            f"model.moe.top_k ({k}) experts of model.moe.expert_width ({F}) beside model.moe.shared_width ({shared}) "
            f"have {shared + k * F} hidden units, the dense block of model.start_from has {U}; "
            f"make them equal, with model.moe.expert_width={(U - shared) // k} for one."
        )
    if k > 1 and (E % k or config.task_prior):
        raise ValueError(
            f"model.start_from splits each dense block into model.moe.top_k ({k}) parts, which a token must meet all: "
            f"model.moe.num_experts ({E}) must be a multiple of them, and model.moe.task_prior 0."
        )
    cuts = [slice(0, shared)] + [slice(shared + s * F, shared + (s + 1) * F) for s in range(k)]
    parts = [(units_UM[:, cut].flatten(0, 1), down_MU[:, cut]) for cut in cuts]
    weight = build_gate(config, M, num_tasks).scale * mean_weight_at_start(config, M, num_tasks)
    experts = [parts[1 + e % k] for e in range(E)]
    made = {
        INPUTS: torch.stack([inputs for inputs, _ in experts]),
        OUTPUTS: torch.stack([outputs for _, outputs in experts]) / weight,
    }
    if shared:
        made |= {SHARED_INPUTS: parts[0][0], SHARED_OUTPUTS: parts[0][1]}
    first_E = torch.arange(E) // k * k
    made |= {name: fresh[name][first_E] for name in ROUTER if name in fresh}
    return made | {name: value for name, value in dense.items() if name.startswith("norm.")}


def _hidden_units(dense: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Input weights (2, U, M) and output weights (M, U) of all hidden units of a dense block, at weight 1."""
    (inputs_2FM,), (outputs_MF,) = dense[INPUTS], dense[OUTPUTS]
    inputs, outputs = [inputs_2FM.unflatten(0, (2, -1))], [scale * outputs_MF]
    if SHARED_INPUTS in dense:
        inputs.insert(0, dense[SHARED_INPUTS].unflatten(0, (2, -1)))
        outputs.insert(0, dense[SHARED_OUTPUTS])
    return torch.cat(inputs, dim=1), torch.cat(outputs, dim=1)
