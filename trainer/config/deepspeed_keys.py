"""What a DeepSpeed JSON may say: the keys of DeepSpeed 0.19.8, sorted by what we do with them.

DeepSpeed itself accepts any top-level key, so `zero_optimisation` trains at stage 0 without a word. The lists are
literal because this side of the program imports neither torch nor DeepSpeed; a test compares them with the installed
DeepSpeed, so a new version is noticed.
"""

from __future__ import annotations

from collections.abc import Callable

# Kinds of values.
FLAG, COUNT, NUMBER, TEXT, ANY = "true or false", "a whole number", "a number", "text", "any"

# Set by us from the configuration: absent or "auto" in the JSON. Key of the configuration that decides:
OWNED: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_gradient_norm",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
}

# Passed on as they are.
PASSED: dict[str, str] = {
    "communication_data_type": TEXT,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "zero_allow_untested_optimizer": FLAG,
    "disable_allgather": FLAG,
    "disable_python_gc": FLAG,
    "dump_state": FLAG,
    "log_level": TEXT,
    "memory_breakdown": FLAG,
    "steps_per_print": COUNT,
    "wall_clock_breakdown": FLAG,
    "timers": ANY,
    "flops_profiler": ANY,
    "comms_logger": ANY,
}

# Known to DeepSpeed, refused here: each would change the mathematics, or would be silently without effect.
REFUSED: dict[str, str] = {
    "managed_gradient_accumulation": "the loop decides when a step is complete",
    "gradient_allreduce_op": "gradients are always averaged and weighted by supervised tokens",
    "zero_force_ds_cpu_optimizer": "the engine chooses the optimizer that fits the device",
    "torch_autocast": "model.dtype decides the precision",
    "bfloat16": "model.dtype decides the precision",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported",
    "use_data_before_expert_parallelism": "expert parallelism is not supported",
    "hybrid_engine": "generation inside training is not supported",
    "compile": "compiled ZeRO is not supported",
    "weight_quantization": "steadfast quantize works on exported models",
    "data_efficiency": "the order of data is ours: a pure function of seed and position",
    "dataloader_drop_last": "rows come from the token store, not from a DeepSpeed data loader",
    "vocabulary_size": "the tokenizer of the token store decides",
    "autotuning": "it would start training runs of its own",
    "datastates_ckpt": "checkpoints are ours, DeepSpeed's writers are not used",
    "tensorboard": "use logging.tensorboard; DeepSpeed would write a second set of files",
    "wandb": "monitors of DeepSpeed are not used; metrics.jsonl in run.dir has every number",
    "csv_monitor": "monitors of DeepSpeed are not used; metrics.jsonl in run.dir has every number",
    "comet": "monitors of DeepSpeed are not used; metrics.jsonl in run.dir has every number",
}

# Gone from DeepSpeed; old files still carry them.
REMOVED: frozenset[str] = frozenset(
    {
        "nebula",
        "compression_training",
        "amp",
        "quantize_training",
        "sparse_gradients",
        "eigenvalue",
        "sparse_attention",
        "elasticity",
        "graph_harvesting",
        "curriculum_learning",
        "progressive_layer_drop",
        "zero_optimization.mics_shard_size",
        "zero_optimization.mics_hierarchical_params_gather",
        "zero_optimization.zeropp_loco_param",
    }
)

# Keys of the sections that are checked inside.
SECTIONS: dict[str, dict[str, str]] = {
    "zero_optimization": {
        "stage": COUNT,
        "contiguous_gradients": FLAG,
        "reduce_scatter": FLAG,
        "reduce_bucket_size": COUNT,
        "use_multi_rank_bucket_allreduce": FLAG,
        "allgather_partitions": FLAG,
        "allgather_bucket_size": COUNT,
        "overlap_comm": FLAG,
        "compute_grad_norm": FLAG,
        "load_from_fp32_weights": FLAG,
        "elastic_checkpoint": FLAG,
        "offload_param": ANY,
        "offload_optimizer": ANY,
        "zenflow": ANY,
        "sub_group_size": COUNT,
        "stage3_prefetch_bucket_size": COUNT,
        "stage3_param_persistence_threshold": COUNT,
        "stage3_model_persistence_threshold": COUNT,
        "stage3_max_live_parameters": COUNT,
        "stage3_max_reuse_distance": COUNT,
        "stage3_gather_16bit_weights_on_model_save": FLAG,
        "stage3_module_granularity_threshold": COUNT,
        "stage3_use_all_reduce_for_fetch_params": FLAG,
        "stage3_allgather_sequential": FLAG,
        "ignore_unused_parameters": FLAG,
        "legacy_stage1": FLAG,
        "round_robin_gradients": FLAG,
        "parameter_alignment": FLAG,
        "zero_hpz_partition_size": COUNT,
        "zero_quantized_weights": FLAG,
        "zero_quantized_nontrainable_weights": FLAG,
        "zero_quantized_gradients": FLAG,
        "memory_efficient_linear": FLAG,
        "pipeline_loading_checkpoint": FLAG,
        "override_module_apply": FLAG,
        "log_trace_cache_warnings": FLAG,
        "enable_sanity_checks": FLAG,
        "save_muon_momentum_buffer_in_memory": FLAG,
        "leaf_module": ANY,
    },
    "zero_optimization.offload_param": {
        "device": TEXT,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "buffer_size": COUNT,
        "max_in_cpu": COUNT,
        "pin_memory": FLAG,
    },
    "zero_optimization.offload_optimizer": {
        "device": TEXT,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "pin_memory": FLAG,
        "pipeline_read": FLAG,
        "pipeline_write": FLAG,
        "fast_init": FLAG,
        "ratio": NUMBER,
        "super_offload": FLAG,
        "cpuadam_cores_perc": NUMBER,
    },
    "zero_optimization.leaf_module": {"classes": ANY, "names": ANY, "name_suffixes": ANY},
    "bf16": {
        "enabled": FLAG,
        "immediate_grad_update": FLAG,
        "check_grad_overflow": FLAG,
        "bf16_master_weights_and_grads": FLAG,
        "bf16_optimizer_states": FLAG,
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": FLAG,
        "overlap_events": FLAG,
        "use_gds": FLAG,
    },
    "activation_checkpointing": {
        "partition_activations": FLAG,
        "number_checkpoints": COUNT,
        "contiguous_memory_optimization": FLAG,
        "synchronize_checkpoint_boundary": FLAG,
        "profile": FLAG,
        "cpu_checkpointing": FLAG,
    },
    "checkpoint": {
        "tag_validation": TEXT,
        "checkpoint_serialization": FLAG,
        "load_universal": FLAG,
        "use_node_local_storage": FLAG,
        "parallel_write": ANY,
        "writer": ANY,
    },
    "checkpoint.parallel_write": {"pipeline_stage": FLAG},
    "checkpoint.writer": {
        "type": TEXT,
        "decoupled": FLAG,
        "io_buffer_size": COUNT,
        "io_buffer_double": FLAG,
        "io_multiplier": COUNT,
        "show_statistics": FLAG,
        "data_parallel": TEXT,
    },
    "data_types": {
        "grad_accum_dtype": TEXT,
        "param_dtype": TEXT,
        "buffer_dtype": TEXT,
        "keep_in_fp32_modules": ANY,
    },
}

# Keys that may be "auto": sized by the model when its hidden size is known, else as DeepSpeed does by itself.
AUTO: dict[str, Callable[[int | None], int]] = {
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden**2 if hidden else 500_000_000,
    "zero_optimization.allgather_bucket_size": lambda _: 500_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: hidden**2 * 9 // 10 if hidden else 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: hidden * 10 if hidden else 100_000,
}

# What would keep state where checkpoints do not look for it, or in a layout they do not know; every value but null and
# those named here is refused.
UNSAVED: dict[str, tuple[float, ...]] = {
    "zero_optimization.offload_optimizer.ratio": (1,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.offload_optimizer.pipeline_read": (False,),
    "zero_optimization.offload_optimizer.pipeline_write": (False,),
    "zero_optimization.zero_hpz_partition_size": (0, 1),
    "zero_optimization.zenflow": (False,),
    "data_types.grad_accum_dtype": (),
}

# What only a CUDA device can do, when the value is neither false nor 0.
GPU_ONLY: tuple[str, ...] = (
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.stage3_module_granularity_threshold",
    "aio.use_gds",
)
