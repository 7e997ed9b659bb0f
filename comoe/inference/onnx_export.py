"""``comoe export --format onnx``: the model of an export as an ONNX file beside its weights.

PyTorch's dynamo exporter traces the encoder, the experts and the heads once, with a dynamic number
of rows and tokens. Three things differ from the PyTorch model, not in their results: experts run on
all tokens, padding included, and every expert on every token, with weight 0 where the gate did not
select it. That is two matrix products per block, of constant weights. And the copies of a layer that
each task has run on all rows, and each row takes what its own made.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.extras import need
from comoe.config.files import read_json, write_json
from comoe.data.seen_posts import SEEN
from comoe.inference.checkpoint_folder import MANIFEST, SPARED, write_manifest
from comoe.inference.export import replacing
from comoe.inference.export_config import CONFIG
from comoe.inference.exported import Exported, describe_tokenizer, load_exported
from comoe.inference.hub import copy_export
from comoe.inference.onnx_model import ATTENTION, EMBEDDING, INPUTS, LOGITS, ONNX, OnnxModel
from comoe.models.encoders.own_layers import OwnLayer
from comoe.models.model import MultiTaskModel
from comoe.models.moe.block import CooperativeBlock, RoutingContext
from comoe.tasks.task import TOGETHER
from comoe.types import Batch, ModelOutput

CLOSE = 1e-4
"""Greatest difference of a float32 logit from PyTorch's."""

# Not 1 row or token: PyTorch takes these numbers for fixed ones in the batch that it traces.
SHAPES = ((2, 7), (5, 19), (1, 3))
"""Rows and tokens of the batches that a new file is tried on; the first one is traced."""


@dataclass(slots=True)
class _AllTokens(RoutingContext):
    """Every position is routed."""

    mask_S1: Tensor | None = None
    """1 on real tokens, 0 on padding."""


class DenseBlock(nn.Module):
    """A cooperative block as products of constant weights, its update 0 on padding.

    Args:
        block: in evaluation mode.
    """

    def __init__(self, block: CooperativeBlock) -> None:
        super().__init__()
        self.block = block
        experts = block.mixture.experts
        self.averaged = block.mixture.router.draws
        weights = (experts.gate_up_proj.detach(), experts.down_proj.detach())
        if self.averaged:
            weights = tuple(weight.mean(dim=0, keepdim=True) for weight in weights)
        gate_EFM, up_EFM = weights[0].chunk(2, dim=1)
        self.num_experts, width = gate_EFM.shape[:2]
        self.gate_MN = nn.Parameter(gate_EFM.reshape(self.num_experts * width, -1).t().contiguous())
        self.up_MN = nn.Parameter(up_EFM.reshape(self.num_experts * width, -1).t().contiguous())
        self.down_NM = nn.Parameter(weights[1].transpose(1, 2).reshape(self.gate_MN.shape[1], -1))

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The update of each token, (B, L, M)."""
        block, context = self.block, self.block.holder.context
        x_SM = block.norm(x_BLM.reshape(-1, x_BLM.shape[-1]))
        mixture = block.mixture
        logits_SE, own_SE = block.of_tasks(context)
        mixture.router.prepare(logits_SE, own_SE=own_SE)
        mixture.router.route(mixture.gate, x_SM, mixture.gate.e_score_correction_bias)
        routing = mixture.router.collect()
        weights_SE = routing.weights_Sk
        if not self.averaged:
            weights_SE = torch.zeros_like(routing.scores_SE)
            weights_SE = weights_SE.scatter(1, routing.indices_Sk, routing.weights_Sk)
        weights_SE = (weights_SE * context.mask_S1)[:, :, None]
        hidden_SN = F.silu(x_SM @ self.gate_MN) * (x_SM @ self.up_MN)
        hidden_SEF = hidden_SN.view(x_SM.shape[0], self.num_experts, -1) * weights_SE
        update_SM = hidden_SEF.view(x_SM.shape[0], -1) @ self.down_NM
        if block.shared is not None:
            update_SM = update_SM + block.shared(x_SM) * context.mask_S1
        return update_SM.view_as(x_BLM)


class Graph(nn.Module):
    """The pass of a prediction, tensors in and a dict of tensors out; changes the model's blocks.

    Args:
        model: in evaluation mode, without decoder and tower.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model
        for module in list(model.modules()):
            if isinstance(getattr(module, "block", None), CooperativeBlock):
                module.block = DenseBlock(module.block)
        for layer in model.own_layers:
            layer.forward = partial(_every_copy, layer)
        reads = {"token_type_ids": model.has_segments, "task_ids": model.reads_tasks}
        reads["lexicon"] = model.lexicon is not None
        self.inputs = [name for name in INPUTS if reads.get(name, True)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        lexicon: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits and attentions by task, and the embedding of each row."""
        model, (rows, length) = self.model, input_ids.shape
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if model.has_segments:
            arguments["token_type_ids"] = token_type_ids
        index_S = torch.arange(rows * length, device=input_ids.device)
        mask = attention_mask.to(torch.float32)
        context = _AllTokens(index_S, index_S // length, mask_S1=mask.reshape(-1, 1))
        context.lexicon_BLK = lexicon
        if model.reads_tasks:
            context.task_ids_B = task_ids.clamp_min(0)
        if model.task_embedding is not None:
            context.task_embeddings_BD = model.task_embedding(context.task_ids_B)
        states_BLM = model.run_encoder(arguments, context)
        lower = context.inputs if model.mixes_layers else ()
        logits, _, attentions, *_ = model.head_outputs(states_BLM, attention_mask, lower)
        found = {LOGITS + name: values for name, values in logits.items()}
        found |= {ATTENTION + name: values for name, values in attentions.items()}
        sums_BM = (states_BLM * mask[:, :, None]).sum(dim=1)
        return found | {EMBEDDING: F.normalize(sums_BM, dim=1)}


def _every_copy(layer: OwnLayer, *inputs: Any, **options: Any) -> Any:
    """What ``OwnLayer`` gives, of every copy on all rows."""
    outputs = [own(*inputs, **options) for own in layer.copies]
    states = [output[0] if isinstance(output, tuple) else output for output in outputs]
    chosen_BLM, tasks_B11 = states[0], layer.holder.context.task_ids_B[:, None, None]
    for task, own_BLM in enumerate(states[1:], start=1):
        chosen_BLM = torch.where(tasks_B11 == task, own_BLM, chosen_BLM)
    return (chosen_BLM, *outputs[0][1:]) if isinstance(outputs[0], tuple) else chosen_BLM


def add_onnx(source: Path, out: Path, *, int8: bool = False, verify: bool = True) -> str:
    """Copy an export and give the copy an ONNX file, which is tried on a few batches first.

    Args:
        source: an export.
        out: the copy; may be ``source`` itself. An older export there is replaced.
        int8: quantize the products of constant weights, and the table of words: weights to 8 bits
            when it is written, states to 8 bits as they come.
        verify: compare the digests of the export's files.

    Returns:
        One sentence: how far its logits are from PyTorch's.

    Raises:
        ValueError: no such export, a model that ONNX cannot hold, a package is missing, or logits
            that differ.
    """
    need("onnx", what="comoe export --format onnx")
    exported = load_exported(source, verify=verify)
    check_exportable(exported)
    with tempfile.TemporaryDirectory(prefix="comoe-onnx-") as name:
        copy = Path(name) / "export"
        copy_export(source, copy)  # before ``out``, which may be the same, is replaced
        if (source / SEEN).is_file():
            shutil.copyfile(source / SEEN, copy / SEEN)
        limit = exported.data_config.max_length
        batches = sample_batches(exported.model, limit)
        with torch.inference_mode():
            expected = [exported.model(batch) for batch in batches]
        write_onnx(exported.model, copy / ONNX, batches[0], limit)
        if int8:
            quantize(exported.model, copy / ONNX)
        found = largest_difference(OnnxModel(copy / ONNX), batches, expected)
        if not int8 and not found <= CLOSE:
            raise ValueError(
                f"the ONNX file of {source} gives logits that differ by {found:.2g} from PyTorch's, more than "
                f"{CLOSE:g}; please report it, and predict with the export as it is."
            )
        about = {"precision": "int8" if int8 else "float32", "max_length": limit}
        config = read_json(copy / CONFIG) | {"onnx": about}
        describe_tokenizer(copy, config)
        write_json(copy / CONFIG, config)
        with replacing(out) as aside:
            shutil.copytree(copy, aside, dirs_exist_ok=True)
            (aside / MANIFEST).unlink(missing_ok=True)
            write_manifest(aside, spared=SPARED)
    return f"{about['precision']} logits within {found:.1g} of PyTorch's on random tokens"


def check_exportable(exported: Exported) -> None:
    """ValueError for a model that predicts by more than an encoder of texts and heads."""
    decoded = [task.name for task in exported.tasks if task.mode == "decoder"]
    if decoded:
        raise ValueError(
            f"--format onnx: the tasks {', '.join(decoded)} are answered by a decoder, which writes one token after "
            "another and is no single graph; predict with the export as it is."
        )
    if not any(task.rules.predicts for task in exported.tasks):
        raise ValueError(
            "--format onnx: the model predicts nothing, as its tasks learn from plain posts alone."
        )
    joined = [task.name for task in exported.tasks if task.reads in TOGETHER]
    if joined:
        raise ValueError(
            f"--format onnx: the tasks {', '.join(joined)} read several posts together, which the "
            "graph of a post does not; predict with the export as it is."
        )
    if exported.image_processor is not None:
        raise ValueError(
            "--format onnx: the model reads images, which the ONNX file does not; predict with the export as it is."
        )


def write_onnx(model: MultiTaskModel, path: Path, batch: Batch, limit: int) -> None:
    """Trace and write the model, weights included; its blocks are others from then on.

    Args:
        model: in evaluation mode, without decoder and tower.
        path: the file.
        batch: that is traced.
        limit: most tokens of a row.

    Raises:
        ValueError: the file would be larger than ONNX allows, 2 GiB.
    """
    # The attention of PyTorch becomes the same products, and more around them against rows of no token.
    model.encoder.set_attn_implementation("eager")
    graph = Graph(model).eval()
    size = sum(weight.nbytes for weight in graph.parameters())
    if size >= 2**31:
        raise ValueError(
            f"--format onnx: the weights are {size / 2**30:.1f} GiB, and an ONNX file holds less "
            "than 2 GiB; predict with the export as it is."
        )
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", max=max(limit, 4))
    given = {name: getattr(batch, INPUTS[name]) for name in graph.inputs}
    shapes = {
        name: {0: rows, 1: tokens} if value.ndim > 1 else {0: rows} for name, value in given.items()
    }
    with _quiet(), torch.no_grad():
        outputs = list(graph(**given))
        program = torch.onnx.export(
            graph, (), kwargs=given, dynamo=True, input_names=graph.inputs, output_names=outputs,
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        program.save(str(path))


def quantize(model: MultiTaskModel, path: Path) -> None:
    """Make the file one of 8-bit weights, one scale per output column; gates and heads stay float32.

    A gate is a hundredth of the work, and an error in it sends a token to other experts.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = [head.output.weight for head in model.heads if head.output is not None]
    for module in model.modules():
        if isinstance(module, CooperativeBlock):
            kept.append(module.mixture.gate.weight)
    small = {frozenset(weight.shape) for weight in kept}
    graph = onnx.load(path).graph
    constants = {one.name: tuple(one.dims) for one in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    skipped = [
        node.name
        for node in products
        if len(shape := constants.get(node.input[1], ())) != 2 or frozenset(shape) in small
    ]
    whole = path.with_suffix(".float32")
    path.rename(whole)
    with _quiet():
        quantize_dynamic(
            whole,
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # It makes a product without a bias of a Gemm first, under another name.
            nodes_to_exclude=[*skipped, *(f"{name}_MatMul" for name in skipped)],
            extra_options={"MatMulConstBOnly": True},
        )
    whole.unlink()


def sample_batches(model: MultiTaskModel, limit: int) -> list[Batch]:
    """Batches of random tokens, most with padding; gates that read tasks see them all."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, batches = model.encoder.config.vocab_size, []
    for rows, length in SHAPES:
        shape = (rows, min(length, limit))
        ids_BL = torch.randint(min(5, vocabulary - 1), vocabulary, shape, generator=generator)
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1:, -(length // 3) :] = 0
        rows_B = torch.arange(rows)
        tasks_B = rows_B % len(model.tasks)
        if not model.reads_tasks:
            tasks_B = torch.full_like(rows_B, -1)
        segments_BL = torch.zeros_like(ids_BL) if model.has_segments else None
        batch = Batch(ids_BL, mask_BL, segments_BL, mask_BL.bool(), tasks_B, rows_B)
        if model.lexicon is not None:
            numbers = (*shape, model.word_numbers + 1)
            batch = replace(batch, lexicon_BLK=torch.randn(numbers, generator=generator))
        batches.append(batch)
    return batches


def largest_difference(
    model: Callable[[Batch], ModelOutput], batches: Sequence[Batch], expected: Sequence[ModelOutput]
) -> float:
    """Largest absolute difference of a logit at a real token."""
    worst = 0.0
    for batch, output in zip(batches, expected, strict=True):
        for name, found in model(batch).logits.items():
            differences = (found - output.logits[name]).abs()
            real = batch.attention_mask_BL.bool() if differences.ndim == 3 else slice(None)
            # NaN is larger than any number.
            worst = float(torch.tensor([worst, differences[real].max()]).max())
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporters say nothing of packages that they would also know."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
