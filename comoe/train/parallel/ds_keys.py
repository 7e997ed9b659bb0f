"""The keys of a DeepSpeed JSON: each is passed on, set by comoe, or refused with a sentence; nothing is ignored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from comoe.config.errors import nearest
from comoe.config.recipe import Recipe

Check = Callable[[Any], bool]


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    # 5e8, as DeepSpeed's own examples have it, is a float to JSON.
    return _number(value) and value == int(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 10**12


def _one_of(*words: Any) -> Check:
    return lambda value: any(value == word and type(value) is type(word) for word in words)


def _or_auto(check: Check) -> Check:
    return lambda value: value == "auto" or check(value)


FLAG, COUNT = "true or false", "a whole number, at least 0"
FLAG_OR_AUTO, COUNT_OR_AUTO = f'"auto", {FLAG}', f'"auto", {COUNT}'

PASSED: dict[str, tuple[Check, str]] = {
    "train_batch_size": (_or_auto(_count), COUNT_OR_AUTO),
    "train_micro_batch_size_per_gpu": (_or_auto(_count), COUNT_OR_AUTO),
    "gradient_accumulation_steps": (_or_auto(_count), COUNT_OR_AUTO),
    "gradient_clipping": (_or_auto(_number), '"auto", a number, at least 0'),
    "bf16.enabled": (_or_auto(_flag), FLAG_OR_AUTO),
    "data_types.grad_accum_dtype": (_one_of("fp32"), '"fp32"'),
    "zero_optimization.stage": (_one_of(1, 2, 3), "1, 2 or 3: stage 0 clips wrongly with experts"),
    "zero_optimization.contiguous_gradients": (_one_of(True), "true, with experts"),
    "zero_optimization.overlap_comm": (_flag, FLAG),
    "zero_optimization.reduce_scatter": (_one_of(True), "true, with experts"),
    "zero_optimization.reduce_bucket_size": (_or_auto(_count), COUNT),
    "zero_optimization.allgather_bucket_size": (_count, COUNT),
    "zero_optimization.stage3_prefetch_bucket_size": (_count, COUNT),
    "zero_optimization.stage3_param_persistence_threshold": (_count, COUNT),
    "zero_optimization.stage3_max_live_parameters": (_count, COUNT),
    "zero_optimization.stage3_max_reuse_distance": (_count, COUNT),
    "zero_optimization.offload_optimizer.device": (
        _one_of("cpu", "none"),
        '"cpu" or "none" (a disk, "nvme", is not supported)',
    ),
    "zero_optimization.offload_optimizer.pin_memory": (_flag, FLAG),
    "expert_parallel.enabled": (_flag, FLAG),
    "expert_parallel.autoep_size": (_or_auto(_count), COUNT_OR_AUTO),
    "expert_parallel.top_k": (_or_auto(_count), COUNT_OR_AUTO),
    "expert_parallel.use_grouped_mm": (_or_auto(_flag), FLAG_OR_AUTO),
    "expert_parallel.score_func": (
        _one_of("sigmoid", "softmax"),
        '"sigmoid" or "softmax", as model.moe.gate',
    ),
    "expert_parallel.route_norm": (_one_of(True), "true"),
}
"""Key that goes on to DeepSpeed, or is compared with the recipe -> which values, and in words."""

_OWN = "comoe sets it"
_FIXED = "comoe's experts need what it sets itself"
_GONE = "DeepSpeed removed it"
_RANKS = "comoe lays experts and data over the ranks, and nothing else"
_NUMBERS = "it changes the numbers of a run, which comoe does not know of"
_DATA = "comoe draws the posts itself"

SET: dict[str, str] = {
    "optimizer": "train.optimizer, train.learning_rate and train.weight_decay of the recipe set it.",
    "scheduler": "train.schedule and train.warmup_fraction of the recipe set it.",
    "activation_checkpointing": "train.activation_checkpointing of the recipe sets it.",
    "checkpoint": f"{_OWN}, for --resume.",
    "steps_per_print": f"{_OWN}; train.log_every of the recipe says how often a line is logged.",
    "zero_allow_untested_optimizer": f"{_OWN}.",
    "zero_force_ds_cpu_optimizer": f"{_OWN}.",
    "gradient_allreduce_op": f"{_OWN}: gradients are the mean over the global batch.",
    "prescale_gradients": f"{_OWN}: gradients are the mean over the global batch.",
    "gradient_predivide_factor": f"{_OWN}: gradients are the mean over the global batch.",
    "managed_gradient_accumulation": f"{_OWN}.",
    "dataloader_drop_last": f"{_DATA}.",
    "log_level": "run.verbose=true of the recipe lets DeepSpeed log.",
} | {
    f"expert_parallel.{key}": f"{_FIXED}."
    for key in (
        "moe_layer_pattern", "router_pattern", "expert_pattern", "expert_w1", "expert_w2", "expert_w3", "score_apply",
        "preset_model", "route_scale", "routed_scaling_factor", "combine_impl", "row_weighting_impl", "gate_up_impl",
        "num_experts_attr", "top_k_attr", "num_expert_groups", "num_limited_groups", "has_shared_experts",
        "shared_experts_pattern", "shared_experts_gate_pattern", "expert_activation", "comm_backend", "comm_num_sm",
        "comm_qp_margin", "comm_max_tokens_per_rank", "expert_tensor_parallel_size", "validate_folding_routing",
        "async_split_plan", "disable_triton_grouped_mm",
    )
}  # fmt: skip
"""Key that comoe, or the recipe, sets -> who, and where."""

REFUSED: dict[str, str] = {
    "fp16": "use bf16; float16 needs a loss scale that skips steps.",
    "torch_autocast": "use bf16; autocast computes the losses in another precision.",
    "amp": f"{_GONE}; use bf16.",
    "elasticity": f"{_GONE}; start the run again with --resume.",
    "pipeline": f"{_RANKS}.",
    "tensor_parallel": f"{_RANKS}.",
    "sequence_parallel_size": f"{_RANKS}.",
    "use_data_before_expert_parallelism": f"{_RANKS}.",
    "hybrid_engine": f"{_RANKS}.",
    "autotuning": "comoe compare --tune chooses options by runs of their own.",
    "data_efficiency": f"{_DATA}.",
    "curriculum_learning": f"{_GONE}.",
    "progressive_layer_drop": f"{_GONE}.",
    "eigenvalue": f"{_GONE}.",
    "quantize_training": f"{_GONE}.",
    "compression_training": f"{_GONE}.",
    "weight_quantization": f"{_NUMBERS}.",
    "sparse_attention": f"{_GONE}.",
    "sparse_gradients": f"{_GONE}.",
    "nebula": f"{_GONE}.",
    "graph_harvesting": f"{_GONE}.",
    "compile": "comoe compiles nothing; routing gives each step other shapes.",
    "aio": 'it is for an offload to a disk, which is not supported; use "cpu".',
    "tensorboard": "comoe writes metrics.jsonl, plots and TensorBoard itself (docs/monitoring.md).",
    "wandb": "comoe writes metrics.jsonl, plots and TensorBoard itself (docs/monitoring.md).",
    "comet": "comoe writes metrics.jsonl, plots and TensorBoard itself (docs/monitoring.md).",
    "csv_monitor": "comoe writes metrics.jsonl, plots and TensorBoard itself (docs/monitoring.md).",
    "flops_profiler": "comoe bench measures speed; metrics.jsonl has seconds and posts per second.",
    "wall_clock_breakdown": "comoe bench measures speed; metrics.jsonl has seconds and posts per second.",
    "comms_logger": "comoe bench measures speed; metrics.jsonl has seconds and posts per second.",
    "timers": "comoe bench measures speed; metrics.jsonl has seconds and posts per second.",
    "memory_breakdown": "metrics.jsonl has the memory of each rank; --dry-run plans it.",
    "dump_state": "ds_config.json of the run folder has the whole configuration.",
    "disable_allgather": f"{_NUMBERS}.",
    "disable_python_gc": "comoe bench measures what a run takes with it on.",
    "communication_data_type": f"{_NUMBERS}.",
    "seq_parallel_communication_data_type": f"{_NUMBERS}.",
    "datastates": "comoe writes its own checkpoints.",
    "bf16.immediate_grad_update": f"{_NUMBERS}.",
    "bf16.check_grad_overflow": f"{_OWN}.",
    "bf16.bf16_master_weights_and_grads": f"{_NUMBERS}.",
    "bf16.bf16_optimizer_states": f"{_NUMBERS}.",
    "data_types.param_dtype": f"{_NUMBERS}; bf16.enabled chooses the precision.",
    "data_types.buffer_dtype": f"{_NUMBERS}; bf16.enabled chooses the precision.",
    "data_types.keep_in_fp32_modules": f"{_NUMBERS}; bf16.enabled chooses the precision.",
} | {
    f"zero_optimization.{key}": sentence
    for sentence, keys in {
        "comoe offloads the optimizer alone (offload_optimizer); zero3 splits the weights over the ranks.": (
            "offload_param", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "zenflow",
        ),
        f"{_NUMBERS}.": (
            "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
            "load_from_fp32_weights", "compute_grad_norm", "save_muon_momentum_buffer_in_memory",
        ),
        f"{_RANKS}.": ("zero_hpz_partition_size", "leaf_module", "use_multi_rank_bucket_allreduce"),
        f"{_GONE}.": ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param", "legacy_stage1"),
        "comoe writes its own checkpoints and exports.": (
            "elastic_checkpoint", "pipeline_loading_checkpoint", "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
        ),
        "comoe was not tried with it; leave it at its default.": (
            "allgather_partitions", "round_robin_gradients", "sub_group_size",
            "ignore_unused_parameters", "parameter_alignment", "memory_efficient_linear", "override_module_apply",
            "log_trace_cache_warnings", "enable_sanity_checks", "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
        ),
    }.items()
    for key in keys
} | {
    f"zero_optimization.offload_optimizer.{key}": "it is for an offload to a disk, or of a part; leave it out."
    for key in (
        "nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload",
        "cpuadam_cores_perc",
    )
}  # fmt: skip
"""Key that DeepSpeed knows and comoe does not pass on -> why, and what to do instead."""

SECTIONS = tuple(
    sorted({path.rpartition(".")[0] for path in PASSED} - {""}, key=lambda path: path.count("."))
)
"""Keys whose value is an object of keys of these lists."""


def parse_settings(text: str, *, where: str) -> dict[str, Any]:
    """The object of a DeepSpeed JSON, without a key twice; ValueError with the line where it is none."""
    try:
        found = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, line {error.lineno}: {error.msg}; the file must be one JSON object."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}; the file must be one JSON object.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{where}: the file must be one JSON object, not a {type(found).__name__}."
        )
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twin = next((key for key, n in Counter(key for key, _ in pairs).items() if n > 1), None)
    if twin is not None:
        raise ValueError(f"the key {twin} is there twice; keep one")
    return dict(pairs)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def check_settings(settings: Mapping[str, Any], *, where: str, prefix: str = "") -> None:
    """Refuse what a run would ignore or cannot do.

    Args:
        settings: of ``parse_settings``.
        where: the file, for messages.
        prefix: of the keys of an inner object, with a dot.

    Raises:
        ValueError: a key that nobody knows, with the nearest one; that comoe sets, or refuses; or a
            value that the key does not take.
    """
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if path in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(
                    f"{where}: {path} is {value!r}; it must be an object, as in zero2.json."
                )
            check_settings(value, where=where, prefix=f"{path}.")
        elif path in PASSED:
            allowed, words = PASSED[path]
            if not allowed(value):
                raise ValueError(f"{where}: {path} is {json.dumps(value)}; it must be {words}.")
        elif sentence := SET.get(path) or REFUSED.get(path):
            raise ValueError(f"{where}: {path} must not be in the DeepSpeed JSON: {sentence}")
        else:
            known = [*SECTIONS, *PASSED, *SET, *REFUSED]
            there = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
            there = sorted({name for name in there if "." not in name})
            guess = nearest(key, there)
            hint = f"did you mean {prefix}{guess}?" if guess else "leave it out."
            raise ValueError(f"{where}: DeepSpeed has no key {path}; {hint}")


def check_gate(settings: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a score function that is not that of the gate, which decides.

    Raises:
        ValueError: it is another one.
    """
    asked, moe = settings.get("expert_parallel", {}).get("score_func"), recipe.model.moe
    if moe.num_experts and asked not in (None, moe.gate):
        raise ValueError(
            f"expert_parallel.score_func is {asked} in the DeepSpeed JSON, but model.moe.gate "
            f"({moe.gate}) scores the experts; leave it out."
        )
