"""Keys of `learner.deepspeed`, known without importing DeepSpeed or torch: which exist, which are the learner's own.

DeepSpeed passes over top-level keys that it does not know, so that a misspelt one would do nothing.
"""

import difflib
from typing import Any

OWNED = {
    "train_batch_size": "train.prompts_per_step",
    "train_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "gradient_clipping": "learner.optimizer.gradient_clipping",
    "optimizer": "learner.optimizer",
    "scheduler": "learner.optimizer.schedule",
    "amp": "learner.dtype",
    "bf16": "learner.dtype",
    "bfloat16": "learner.dtype",
    "fp16": "learner.dtype",
    "zero_optimization.stage": "learner.zero_stage",
    "zero_optimization.compute_grad_norm": "learner.optimizer.gradient_clipping",
}
"""DeepSpeed's names of what the learner decides itself, and ours."""

_TOP = """
activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel
flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
gradient_predivide_factor graph_harvesting hybrid_engine log_level managed_gradient_accumulation
memory_breakdown nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensor_parallel
tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
TOP = frozenset(_TOP.split())
"""All that the DeepSpeed of pyproject.toml reads at the top; a test compares them with it."""

_ZERO = """
allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
zero_quantized_nontrainable_weights zero_quantized_weights
"""
ZERO = frozenset(_ZERO.split())
"""All that may stand in `zero_optimization`."""


class DeepSpeedKeyError(ValueError):
    """A key of `learner.deepspeed` that DeepSpeed does not know, or that is the learner's own."""


def check_deepspeed(theirs: dict[str, Any]) -> None:
    """Raise DeepSpeedKeyError for a key of `learner.deepspeed` that does nothing, or that is the learner's own."""
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise DeepSpeedKeyError(
            f"learner.deepspeed.zero_optimization={zero!r} must be a mapping, such as {{overlap_comm: false}}"
        )
    given = [*((key, key, TOP) for key in theirs), *((f"zero_optimization.{key}", key, ZERO) for key in zero)]
    for name, key, known in given:
        if name in OWNED:
            raise DeepSpeedKeyError(f"learner.deepspeed.{name} is the learner's own: set {OWNED[name]} instead")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            guess = f"; did you mean {' or '.join(near)}?" if near else ""
            raise DeepSpeedKeyError(f"learner.deepspeed.{name}: DeepSpeed has no such key{guess}")
