"""What may change when a run resumes: every key of the configuration is identity, tunable or free.

identity  the checkpoint rests on it: other samples, another order, another batch or another network would be another
          run under the same name. Compared with the checkpoint as it took effect (defaults resolved, a path by the
          fingerprint of what lies there); a difference is refused (exit code 76) unless `--allow-change KEY` names it.
tunable   changes what is learned from here on, on purpose: said at the start and recorded in events.jsonl.
free      where and how the same computation is done, or what is written about it: never mentioned.

A key that stands in no class is a failed test. Torch-free.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from trainer.config.schema import Config
from trainer.config.words import keys
from trainer.errors import ResumeRefusedError, UsageError
from trainer.redact import redacted

Change = Literal["identity", "tunable", "free"]

LAW: dict[str, Change] = {
    "run.dir": "free",
    "run.seed": "identity",
    "run.share_with_group": "free",
    "model.path": "free",  # what it holds is compared as `architecture`; after the start, weights come from checkpoints
    "model.config": "identity",
    "model.dtype": "tunable",
    "model.gradient_checkpointing": "free",
    "model.trainable": "identity",
    "model.lora": "identity",
    "model.attention": "free",
    "data.train": "free",  # what it holds is compared as `data`, `tokenizer` and `template`
    "data.eval": "tunable",
    "data.teacher": "free",  # what it holds is compared as `teacher`
    "data.sequence_length": "identity",
    "data.window": "identity",
    "data.overlap": "identity",
    "data.pin_prefix": "identity",
    "data.long_text": "identity",
    "data.packing": "identity",
    "data.mixture": "identity",
    "data.shuffle_blocks": "identity",
    "data.cache_dir": "free",
    "data.cache_gib": "free",
    "train.max_steps": "tunable",
    "train.global_batch_size": "identity",
    "train.micro_batch_size": "free",
    "train.teacher_share": "tunable",
    "train.max_gradient_norm": "tunable",
    "train.max_skipped_steps": "free",
    "train.on_divergence": "free",
    "optimizer.type": "identity",
    "optimizer.learning_rate": "tunable",
    "optimizer.weight_decay": "tunable",
    "optimizer.beta1": "tunable",
    "optimizer.beta2": "tunable",
    "optimizer.epsilon": "tunable",
    "schedule.type": "tunable",
    "schedule.warmup_steps": "tunable",
    "schedule.final_ratio": "tunable",
    "engine.deepspeed": "free",  # any ZeRO stage and offload reads any checkpoint
    "engine.nvme_path": "free",
    "engine.timeout_seconds": "free",
    "engine.hang_seconds": "free",
    "checkpoint.every_steps": "free",
    "checkpoint.auto_at_least": "free",
    "checkpoint.auto_at_most": "free",
    "checkpoint.keep": "free",
    "checkpoint.asynchronous": "free",
    "checkpoint.strict": "free",
    "checkpoint.upload": "free",
    "evaluate.every_steps": "free",
    "evaluate.max_rows": "tunable",
    "logging.every_steps": "free",
    "logging.tensorboard": "free",
}
FINGERPRINTS: dict[str, str] = {
    "data": "token ids, spans and order of the documents in data.train",
    "tokenizer": "ids that the tokenizer of data.train gives for fixed texts, and its special tokens",
    "template": "chat template that data.train was built with",
    "teacher": "predictions in data.teacher, or that there are none",
    "architecture": "settings of config.json in model.path",
    "code": "Python files of model.path that --trust-remote-code allowed to run",
    "base": "contents of the weight files of the base model, which under LoRA is in no checkpoint",
    "by_source": "whether every row holds documents of one source only, as the store was built or a mixture needs",
}
"""What is compared beside the keys: by content, wherever it lies."""
_MEANING: dict[Change, str] = {
    "identity": "must stay: a change is refused unless --allow-change names it",
    "tunable": "may change: it is said and recorded",
    "free": "may change",
}


def at_resume(key: str) -> str:
    """What happens at a resume when `key` of the configuration has changed, in words."""
    return _MEANING[LAW[key]]


def check_allowed(names: Sequence[str]) -> tuple[str, ...]:
    """`names` of `--allow-change`; UsageError for one that is no identity key, because nothing would be allowed."""
    identity = [key for key, change in LAW.items() if change == "identity"] + list(FINGERPRINTS)
    for name in names:
        if name in identity or name.startswith(("model.config.", "model.lora.", "architecture.")):
            continue
        if name in LAW:
            raise UsageError(f"--allow-change {name!r}: a resumed run takes a new {name} without asking", "drop it")
        close = difflib.get_close_matches(name, identity, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(identity)}"
        raise UsageError(f"--allow-change {name!r}: nothing of this name is compared at a resume", hint)
    return tuple(names)


def identity_differences(saved: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Key to `key: old -> new` of everything that differs between two identities."""
    return {
        name: f"{name}: {saved.get(name, 'absent')} -> {present.get(name, 'absent')}"
        for name in sorted(saved.keys() | present.keys())
        if saved.get(name) != present.get(name)
    }


def accept_identity(
    place: str, saved: Mapping[str, str], present: Mapping[str, str], allowed: Sequence[str] = ()
) -> list[str]:
    """The allowed differences between the run that saved `place` and the run that resumes, `key: old -> new` each.

    Raises ResumeRefusedError naming every difference that is not allowed.
    """
    found = identity_differences(saved, present)
    refused = [key for key in found if not any(key == name or key.startswith(f"{name}.") for name in allowed)]
    if refused:
        raise ResumeRefusedError(
            f"{place} was made with other settings ({'; '.join(found[key] for key in refused)})",
            f"restore them, set another run.dir to start a new run, or allow it: --allow-change {refused[0]}",
        )
    return list(found.values())


def tuned(before: Any, config: Config) -> list[str]:
    """Tunable keys that differ from `before` (the values of an earlier configuration), `key: old -> new` each."""
    old, new = dict(_flat(before)), dict(_flat(redacted(config.model_dump(mode="json"))))
    return [
        f"{key}: {_text(old[key])} -> {_text(new[key])}"
        for key in keys(Config)
        if LAW.get(key) == "tunable" and key in old and old[key] != new[key]
    ]


def settings_text(prefix: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """A mapping of settings as identity entries, one `prefix.name` each."""
    return {f"{prefix}.{name}": _text(value) for name, value in settings.items()}


def _flat(values: Any) -> Iterator[tuple[str, Any]]:
    for section, entries in values.items() if isinstance(values, dict) else ():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            yield f"{section}.{name}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
