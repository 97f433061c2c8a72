"""The engine of a run, from its configuration: the model is loaded, frozen in part, sharded and given its optimizer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from trainer import collectives
from trainer.config.deepspeed import accumulation_steps, compile_deepspeed
from trainer.config.schema import Config
from trainer.data.teacher import Teacher
from trainer.engine import device as devices
from trainer.engine.deepspeed_engine import DeepSpeedEngine, ZeroThreeHook
from trainer.errors import ConfigError, DataError, UsageError
from trainer.model.load import load_language_model, train_only, trainable_share
from trainer.model.lora import add_adapters
from trainer.model.supervised import SupervisedLanguageModel, unsupported_head
from trainer.objective.distillation import Distillation
from trainer.optim.schedules import share_of_peak
from trainer.prepare import model_directory
from trainer.run_directory import RunDirectory
from trainer.world import World


def refuse_shared_devices(ranks: Sequence[dict[str, str]]) -> None:
    """UsageError when two ranks (host and device each) hold the same GPU: NCCL would fail later, and less clearly."""
    for rank, place in enumerate(ranks):
        first = ranks.index(place)
        if place["device"] and first != rank:
            raise UsageError(
                f"ranks {first} and {rank} share {place['device']} of {place['host']}", "start one rank a GPU"
            )


def build_engine(
    config: Config,
    world: World,
    run: RunDirectory,
    device: torch.device,
    kind: devices.DeviceType,
    teacher: Teacher | None = None,
) -> DeepSpeedEngine:
    """All ranks call it together. Raises ConfigError or DataError for what cannot be trained or saved."""
    deepspeed_config = compile_deepspeed(
        config,
        world_size=world.world_size,
        accumulation_steps=accumulation_steps(config, world.world_size),
        device=kind,
        hidden_size=json.loads((model_directory(config, run) / "config.json").read_text()).get("hidden_size"),
    )
    torch.manual_seed(config.run.seed + world.rank)
    hook = ZeroThreeHook(deepspeed_config)
    try:
        language_model = load_language_model(
            model_directory(config, run),
            dtype=config.model.dtype,
            attention=config.model.attention,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
    finally:
        hook.release()
    if config.model.lora is not None:
        add_adapters(language_model, config.model.lora, config.run.seed)
    else:
        train_only(language_model, config.model.trainable)
    trained, all_of_them = trainable_share(language_model)
    if world.is_first and trained < all_of_them:
        print(f"training {trained:,} of {all_of_them:,} parameters ({trained / all_of_them:.2%})", flush=True)
    if (reason := unsupported_head(language_model)) is not None:
        raise DataError(f"{model_directory(config, run)} cannot be trained: {reason}", "it is not supported yet")
    optimizer = config.optimizer
    engine = DeepSpeedEngine(
        SupervisedLanguageModel(
            language_model,
            None if teacher is None else Distillation(config.train.teacher_share, teacher.temperature),
        ),
        deepspeed_config,
        optimizer_settings={
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.epsilon,
        },
        weight_decay=optimizer.weight_decay,
        saves_frozen=config.model.lora is None,
        share_of_peak=share_of_peak(config.schedule, config.train.max_steps),
        device=device,
        kind=kind,
    )
    collectives.bound_all_groups(config.engine.timeout_seconds)
    try:
        # What cannot be saved fails now, not at the first checkpoint hours later.
        engine.owned_slices()
    except (AttributeError, KeyError, RuntimeError, IndexError) as error:
        raise ConfigError(
            [f"engine.deepspeed: {config.engine.deepspeed} keeps optimizer state where checkpoints cannot read it"]
        ) from error
    return engine
