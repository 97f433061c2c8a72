"""Which keys exist, and which one was probably meant by a key that does not."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic.fields import FieldInfo

from trainer.config.schema import Config, Section

_ACCUMULATION = (
    "gradient accumulation follows from train.global_batch_size, train.micro_batch_size and the number of ranks; "
    "remove the key"
)
_STEPS = "the length of a run is given in optimizer steps: train.max_steps"

# What other trainers call things. Only ever a hint: no near word is accepted silently.
NEAR_WORDS: dict[str, str] = {
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "schedule.type",
    "lr_scheduler_type": "schedule.type",
    "scheduler": "schedule.type",
    "warmup": "schedule.warmup_steps",
    "num_warmup_steps": "schedule.warmup_steps",
    "min_lr_ratio": "schedule.final_ratio",
    "optim": "optimizer.type",
    "wd": "optimizer.weight_decay",
    "eps": "optimizer.epsilon",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "batch_size": "train.global_batch_size",
    "bs": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "micro_batch": "train.micro_batch_size",
    "steps": "train.max_steps",
    "clip": "train.max_gradient_norm",
    "grad_clip": "train.max_gradient_norm",
    "gradient_clipping": "train.max_gradient_norm",
    "max_grad_norm": "train.max_gradient_norm",
    "max_length": "data.sequence_length",
    "max_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "cutoff_len": "data.sequence_length",
    "stride": "data.overlap",
    "pack": "data.packing",
    "truncation": "data.long_text",
    "weights": "data.mixture",
    "mix": "data.mixture",
    "interleave_probs": "data.mixture",
    "shuffle_buffer_size": "data.shuffle_blocks",
    "cache": "data.cache_dir",
    "cache_path": "data.cache_dir",
    "dataset": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "eval_data": "data.eval",
    "name_or_path": "model.path",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "attn_implementation": "model.attention",
    "activation_checkpointing": "model.gradient_checkpointing",
    "output_dir": "run.dir",
    "name": "run.dir",
    "deepspeed_config": "engine.deepspeed",
    "zero_stage": "engine.deepspeed",
    "timeout": "engine.timeout_seconds",
    "save_steps": "checkpoint.every_steps",
    "save_every": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "async_save": "checkpoint.asynchronous",
    "freeze": "model.trainable",
    "adapter": "model.lora",
    "peft": "model.lora",
    "lora_r": "model.lora",
    "lora_rank": "model.lora",
    "lora_alpha": "model.lora",
    "lora_dropout": "model.lora",
    "lora_target": "model.lora",
    "lora_target_modules": "model.lora",
    "target_modules": "model.lora",
    "eval_steps": "evaluate.every_steps",
    "logging_steps": "logging.every_steps",
    "log_every": "logging.every_steps",
}
NOT_KEYS: dict[str, str] = {
    "grad_accum": _ACCUMULATION,
    "grad_accumulation": _ACCUMULATION,
    "gradient_accumulation": _ACCUMULATION,
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulation_steps": _ACCUMULATION,
    "epochs": _STEPS,
    "epoch": _STEPS,
    "num_epochs": _STEPS,
    "num_train_epochs": _STEPS,
    "fp16": "float16 is not supported; model.dtype is float32 or bfloat16",
    "<<": "merge keys are not supported; write the keys out",
}


def sections(schema: type[Section] = Config) -> dict[str, type[Section]]:
    """The sections of a document by name, in order."""
    return {
        name: field.annotation
        for name, field in schema.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def keys(schema: type[Section] = Config) -> dict[str, FieldInfo]:
    """Every key with its field, in order: `section.key`, or `key` where it stands in no section."""
    found: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        section = sections(schema).get(name)
        found |= {name: field} if section is None else {f"{name}.{k}": f for k, f in section.model_fields.items()}
    return found


def hint(unknown: str, schema: type[Section] = Config) -> str:
    """What to write instead of the dotted key `unknown`: a sentence for the end of a message."""
    *prefix, last = unknown.split(".")
    word = last.strip().lower().replace("-", "_")
    if word in NOT_KEYS:
        return NOT_KEYS[word]
    if (block := _blocks(schema).get(".".join(prefix))) is not None:
        close = difflib.get_close_matches(word, block.model_fields, n=1)
        known = ", ".join(block.model_fields)
        return f"did you mean '{'.'.join([*prefix, *close])}'?" if close else f"keys of {'.'.join(prefix)}: {known}"
    near = NEAR_WORDS.get(word)
    found = near if near in keys(schema) else _similar(word, prefix[0] if prefix else "", schema)
    if found is not None:
        return f"did you mean '{found}'?"
    if prefix and prefix[0] in sections(schema):
        return f"keys of {prefix[0]}: {', '.join(sections(schema)[prefix[0]].model_fields)}"
    alone = [key for key in keys(schema) if "." not in key]
    return f"{'keys' if alone else 'sections'}: {', '.join([*alone, *sections(schema)])}"


def _blocks(schema: type[Section]) -> dict[str, type[Section]]:
    """Keys whose value is itself a mapping of known keys."""
    return {
        key: choice
        for key, field in keys(schema).items()
        for choice in get_args(field.annotation)
        if isinstance(choice, type) and issubclass(choice, Section)
    }


def _similar(word: str, section: str, schema: type[Section]) -> str | None:
    """The key most like `word`: of its own section first, then a section's name, then a key of any section."""
    here = {key.partition(".")[2]: key for key in keys(schema) if key.startswith(f"{section}.")}
    anywhere = {key.rpartition(".")[2]: key for key in keys(schema)} | {name: name for name in sections(schema)}
    for names, cutoff in ((here, 0.6), (anywhere, 0.8)):
        if match := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return names[match[0]]
    return None
