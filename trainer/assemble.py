"""Puts a run together. The only file that knows all concrete classes; read `train` from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

from trainer.config.deepspeed import accumulation_steps, compile_deepspeed
from trainer.config.load import config_as_yaml
from trainer.config.schema import Config
from trainer.data.feed import Feed, evaluation_batches
from trainer.data.packing import RowPlan
from trainer.data.store import TokenStore, open_store
from trainer.durable import write_file
from trainer.engine import device as devices
from trainer.errors import ConfigError, DataError, SteadfastError, UsageError
from trainer.loop import Loop, Observer, StopFlag, fit
from trainer.plan import Plan, make_plan
from trainer.prepare import (
    collect_model_files,
    model_directory,
    open_held_out,
    prepare_model,
    probe_prompts,
    run_identity,
)
from trainer.run_directory import RunDirectory
from trainer.state import TrainState
from trainer.world import World


def train(config: Config, world: World, stop: StopFlag) -> None:
    """Run one rank of a training run to its end, or to a requested stop. All ranks call this with the same config.

    Returns normally when the run is complete or stopped on request after a commit (rank 0 then leaves the marker
    stopped.json). Raises a SteadfastError otherwise; after an exception no further collective may run.
    """
    kind = devices.prepare()
    from trainer import collectives

    run = RunDirectory(Path(config.run.dir))
    lock = run.lock() if world.is_first else None
    collectives.join(world, devices.communication_backend(kind), config.engine.timeout_seconds)
    train_joined(config, world, stop, run, kind)
    collectives.leave()
    if lock is not None:
        lock.close()


def train_joined(config: Config, world: World, stop: StopFlag, run: RunDirectory, kind: devices.DeviceType) -> None:
    """The same, inside a process group that exists already and outlives the run; rank 0 holds the run's lock."""
    from trainer import collectives
    from trainer.checkpoint.resume import Checkpointer
    from trainer.model.self_check import check_model

    device = devices.torch_device(kind, world.local_rank)
    refuse_shared_devices(collectives.exchange({"host": gethostname(), "device": devices.device_name(device)}))
    if world.is_first:
        # Under the lock: before it these may be those of a run that is just ending.
        run.stopped.unlink(missing_ok=True)
        run.outcome.unlink(missing_ok=True)
    store = open_store(Path(config.data.train), rank=world.rank, world_size=world.world_size)
    held_out = open_held_out(config, store, rank=world.rank, world_size=world.world_size)
    rows = store.plan(config.data.sequence_length, config.data.overlap, config.data.packing)
    plan = make_plan(config, world_size=world.world_size, rows=rows.n_rows, sequence_length=rows.sequence_length)
    if world.is_first:
        prepare_model(config, store, rows, run)
    collectives.barrier()

    engine = _build_engine(config, world, run, device, kind)
    feed = Feed(
        store,
        rows,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
    )
    check_model(
        engine,
        store.vocabulary_size,
        micro_batch_size=config.train.micro_batch_size,
        packing=config.data.packing,
        dtype=config.model.dtype,
    )
    checkpointer = Checkpointer(
        directory=run.checkpoints,
        engine=engine,
        feed=feed,
        world=world,
        exchange=collectives.exchange,
        identity=run_identity(config, store, rows, run),
        model_files=run.model_files,
        probe=probe_prompts(store, rows.sequence_length),
        seed=config.run.seed,
        keep=config.checkpoint.keep,
    )
    restored = checkpointer.restore()
    state = restored or TrainState()
    if world.is_first:
        # Only now: a start that was refused leaves the record of the run as it was.
        write_file(run.config, config_as_yaml(config))
        write_file(run.plan, json.dumps(plan.as_json(), indent=1) + "\n")
        collect_model_files(config, store, run)
    with _observers(config, run, plan, feed, state, world, kind, resumed=restored is not None) as observed:
        loop = Loop(
            engine=engine,
            feed=feed,
            max_steps=config.train.max_steps,
            max_skipped_steps=config.train.max_skipped_steps,
            evaluate_every=config.evaluate.every_steps,
            save_every=config.checkpoint.every_steps,
            evaluate=_evaluation(config, engine, held_out, rows, world),
            save=checkpointer.save,
            observers=observed.observers,
            stop=stop,
        )
        state, stopped = fit(loop, state)
        observed.finish(state, stopped, stop.requested)
    engine.close()


def refuse_shared_devices(ranks: Sequence[dict[str, str]]) -> None:
    """UsageError when two ranks (host and device each) hold the same GPU: NCCL would fail later, and less clearly."""
    for rank, place in enumerate(ranks):
        first = ranks.index(place)
        if place["device"] and first != rank:
            raise UsageError(
                f"ranks {first} and {rank} share {place['device']} of {place['host']}", "start one rank a GPU"
            )


def _build_engine(config: Config, world: World, run: RunDirectory, device: Any, kind: devices.DeviceType) -> Any:
    import torch

    from trainer import collectives
    from trainer.engine.deepspeed_engine import DeepSpeedEngine, ZeroThreeHook
    from trainer.model.load import load_language_model
    from trainer.model.supervised import SupervisedLanguageModel, unsupported_head
    from trainer.optim.schedules import share_of_peak

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
    if (reason := unsupported_head(language_model)) is not None:
        raise DataError(f"{model_directory(config, run)} cannot be trained: {reason}", "it is not supported yet")
    optimizer = config.optimizer
    engine = DeepSpeedEngine(
        SupervisedLanguageModel(language_model),
        deepspeed_config,
        optimizer_settings={
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.epsilon,
        },
        weight_decay=optimizer.weight_decay,
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


def _evaluation(
    config: Config, engine: Any, held_out: TokenStore | None, rows: RowPlan, world: World
) -> Callable[[TrainState], dict[str, float]] | None:
    if held_out is None:
        return None
    from trainer.evaluate.evaluator import evaluate_loss

    held_out_rows = held_out.plan(rows.sequence_length, rows.overlap, config.data.packing)

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = evaluation_batches(
            held_out,
            held_out_rows,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            max_rows=config.evaluate.max_rows,
        )
        return {f"eval/{held_out.path.name}/{name}": value for name, value in evaluate_loss(engine, batches).items()}

    return evaluate


@dataclass(frozen=True)
class _Observed:
    observers: list[Observer]
    finish: Callable[[TrainState, bool, str | None], None]


@contextmanager
def _observers(
    config: Config,
    run: RunDirectory,
    plan: Plan,
    feed: Feed,
    state: TrainState,
    world: World,
    kind: devices.DeviceType,
    *,
    resumed: bool,
) -> Iterator[_Observed]:
    """The observers of rank 0 (other ranks have none), closed at the end whatever happens."""
    if not world.is_first:
        yield _Observed([], lambda state, stopped, reason: None)
        return
    from trainer.observe.events import EventLedger
    from trainer.observe.guard import Guarded
    from trainer.observe.metrics import Metrics, MetricsFile, Sink
    from trainer.observe.progress import progress_for_stdout
    from trainer.observe.step_ledger import StepLedger
    from trainer.observe.tensorboard import TensorBoard

    sinks: list[Sink] = [MetricsFile(run.metrics, state.step), progress_for_stdout(state.step, plan.max_steps)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run.tensorboard, state.step))
    events = EventLedger(run.events)
    metrics = Metrics(
        sinks,
        every_steps=config.logging.every_steps,
        max_steps=plan.max_steps,
        peak_memory_gib=lambda: devices.peak_memory_gib(kind),
    )
    observers: list[Observer] = [
        Guarded(observer) for observer in (events, StepLedger(run.step_ledger, feed, state.step), metrics)
    ]
    events.record("resume" if resumed else "start", step=state.step, world_size=world.world_size, device=kind)
    _say_where_we_begin(config, plan, state, resumed)

    def finish(final: TrainState, stopped: bool, reason: str | None) -> None:
        outcome = {"status": "stopped" if stopped else "done", "max_steps": plan.max_steps, **final.as_json()}
        events.record("stop" if stopped else "done", step=final.step)
        write_file(run.outcome, json.dumps(outcome, indent=1) + "\n")
        if stopped:
            write_file(run.stopped, json.dumps({"step": final.step, "reason": reason}) + "\n")
            print(f"stopped at step {final.step} of {plan.max_steps} as asked; the same command continues", flush=True)
        else:
            print(
                f"done: step {final.step}, loss {_number(final.loss_first)} -> {_number(final.loss_last)}; "
                f"checkpoints in {run.checkpoints}",
                flush=True,
            )

    try:
        yield _Observed(observers, finish)
    except BaseException as error:
        failed = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        with suppress(SteadfastError):
            events.record("fault", error=failed["error"])
            write_file(run.outcome, json.dumps(failed, indent=1, ensure_ascii=False) + "\n")
        raise
    finally:
        for observer in observers:
            observer.close()


def _say_where_we_begin(config: Config, plan: Plan, state: TrainState, resumed: bool) -> None:
    where = f"resuming at step {state.step}" if resumed else "starting"
    print(
        f"{where} of {plan.max_steps}: {plan.world_size} ranks, ZeRO config {config.engine.deepspeed}, global batch "
        f"{plan.global_batch_size} rows x {plan.sequence_length} tokens = {plan.accumulation_steps} micro-batches of "
        f"{plan.micro_batch_size} a rank; the store has {plan.rows} rows, this is {plan.epochs:.2f} epochs",
        flush=True,
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
