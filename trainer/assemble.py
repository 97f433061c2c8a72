"""Puts a run together; read `train` from top to bottom. `open_data` and `build_engine` make its two largest parts."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from socket import gethostname, socket
from typing import TYPE_CHECKING, Any

from trainer.adapter_file import adapted_modules
from trainer.checkpoint.verify import read_manifest, step_directory
from trainer.config.load import config_as_yaml
from trainer.config.resume_law import identity_differences
from trainer.config.schema import Config
from trainer.data.feed import Feed, evaluation_batches
from trainer.data.store import TokenStore
from trainer.data.store.packing import RowPlan
from trainer.durable import write_file
from trainer.engine import device as devices
from trainer.errors import DivergedError
from trainer.loop import Loop, OnPhase, StopFlag, fit
from trainer.observe.events import EventLedger
from trainer.observe.faults import Faults, PoisonedEngine, planned
from trainer.observe.forensics import Forensics
from trainer.observe.heartbeat import Heartbeat
from trainer.observe.interval import save_schedule
from trainer.observe.phases import Phases
from trainer.observe.quarantine import put_into_quarantine
from trainer.observe.record import Record, recorded
from trainer.observe.time_ledger import TimeLedger
from trainer.observe.watchdog import Post
from trainer.prepare import (
    changed_settings,
    collect_model_files,
    model_directory,
    open_cache,
    probe_prompts,
    run_identity,
)
from trainer.run_directory import RunDirectory
from trainer.run_lock import RunLock
from trainer.state import TrainState
from trainer.weight_files import weights_fingerprint
from trainer.world import World

if TYPE_CHECKING:
    from trainer.checkpoint.capture import Capture, RunSaver
    from trainer.open_data import OpenData

MOST_REWINDS = 3


@dataclass(frozen=True)
class Allowed:
    """What only a command line may allow, never a configuration."""

    changes: tuple[str, ...] = ()
    """What may differ from the checkpoint although it is part of the run's identity."""
    code: str | None = None
    """Revision of the model's own code that may run."""


def train(
    config: Config,
    world: World,
    stop: StopFlag,
    listener: socket | None = None,
    *,
    allow_changes: Sequence[str] = (),
    trusted_code: str | None = None,
    lock: RunLock | None = None,
) -> None:
    """Run one rank of a training run to its end, or to a requested stop. All ranks call this with the same config.

    `listener` is the port where rank 0 meets the others, when it is open already (`collectives.join`). `allow_changes`
    names what may differ from the checkpoint although it is part of the run's identity, `trusted_code` the
    revision of the model's own code that may run (`trainer.model.remote_code`). Rank 0 brings the run
    directory's `lock`, which is released at the end.

    Returns normally when the run is complete or stopped on request after a commit (rank 0 then leaves the marker
    stopped.json). Raises a SteadfastError otherwise; after an exception no further collective may run.
    """
    kind = devices.prepare()
    from trainer import collectives

    run = RunDirectory(Path(config.run.dir))
    collectives.join(world, devices.communication_backend(kind), config.engine.timeout_seconds, listener)
    allowed = Allowed(tuple(allow_changes), trusted_code)
    train_joined(config, world, stop, run, kind, allowed, lock)
    # All ranks end together, after rank 0 has closed the record. The process group is left standing: the process ends.
    collectives.barrier()
    if lock is not None:
        lock.close()


def train_joined(
    config: Config,
    world: World,
    stop: StopFlag,
    run: RunDirectory,
    kind: devices.DeviceType,
    allowed: Allowed = Allowed(),
    lock: RunLock | None = None,
) -> None:
    """The same, inside a process group that exists already and outlives the run; rank 0 holds the run's lock."""
    from trainer import collectives

    collectives.time_collectives()
    faults = Faults(planned(os.environ), world.rank, run.path)
    first = collectives.exchange({"attempt": f"{os.getpid()}-{time.time():.3f}"})[0]
    post = Post(world.rank, world.world_size, os.getpid(), str(run.path), first["attempt"])
    heartbeat = Heartbeat(post, config.engine.hang_seconds, config.engine.timeout_seconds)
    with closing(heartbeat):
        for rewinds_left in reversed(range(MOST_REWINDS + 1)):
            times = TimeLedger(run, world.world_size, collectives.blocked_seconds) if world.is_first else None
            # Faults come after those who write: what they strike down in a phase has begun it.
            writers: list[OnPhase] = [heartbeat] if times is None else [heartbeat, times]
            attempt = _Attempt(config, world, run, kind, stop, allowed, lock, Phases([*writers, faults]), faults, times)
            try:
                _train_once(attempt)
                return
            except DivergedError as error:
                if config.train.on_divergence != "rewind" or not rewinds_left or not attempt.skipped:
                    raise
                if world.is_first:
                    put_into_quarantine(run.path, attempt.skipped)
                    print(f"rewinding: {error.fact}; the rows of {len(attempt.skipped)} steps are left out", flush=True)
            gc.collect()


@dataclass(frozen=True)
class _Attempt:
    """One way of this rank from data to the last step: what it was given, and who follows it through its phases."""

    config: Config
    world: World
    run: RunDirectory
    kind: devices.DeviceType
    stop: StopFlag
    allowed: Allowed
    lock: RunLock | None
    on_phase: Phases
    faults: Faults
    times: TimeLedger | None
    """Rank 0's."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Filled with the steps that were not applied."""


def _train_once(attempt: _Attempt) -> None:
    from trainer import collectives
    from trainer.build_engine import build_engine, refuse_shared_devices
    from trainer.model.remote_code import trust_remote_code
    from trainer.model.self_check import check_model
    from trainer.open_data import open_data, quarantined

    config, world, run, on_phase = attempt.config, attempt.world, attempt.run, attempt.on_phase
    on_phase("start", 0)
    device = devices.torch_device(attempt.kind, world.local_rank)
    places = collectives.exchange({"host": gethostname(), "device": devices.device_name(device)})
    refuse_shared_devices(places)
    if world.is_first:
        # Under the lock: before it these may be those of a run that is just ending.
        run.stopped.unlink(missing_ok=True)
    code = trust_remote_code(Path(config.model.path) if config.model.path else None, attempt.allowed.code)
    cache = open_cache(config, world)
    data = open_data(config, world, run, cache)

    on_phase("load", 0)
    engine: Any = build_engine(config, world, run, device, attempt.kind, data.teacher)
    if attempt.faults.poisons:
        engine = PoisonedEngine(engine, attempt.faults.take_poison)
    feed = _feed(config, world, data, quarantined(run, world))
    check_model(
        engine,
        data.store.vocabulary_size,
        micro_batch_size=config.train.micro_batch_size,
        packing=config.data.packing,
        dtype=config.model.dtype,
    )
    capture = _capture(attempt, data, engine, feed, code)

    on_phase("restore", 0)
    restored = _restore(attempt, capture)
    record = _record(attempt, data, capture, restored, code, [place["host"] for place in places])
    saver = _saver(attempt, capture, restored)
    with closing(engine), record as observed, closing(feed), closing(saver.saves):
        if config.checkpoint.asynchronous:
            saver.write_in_background()
        state = restored or TrainState()
        loop = Loop(
            engine=engine,
            feed=feed,
            max_steps=config.train.max_steps,
            max_skipped_steps=config.train.max_skipped_steps,
            evaluate_every=config.evaluate.every_steps,
            save_due=save_schedule(config.checkpoint, state.step, collectives.add_up, attempt.times),
            evaluate=_evaluation(config, engine, data.held_out, data.rows, world, on_phase),
            saver=saver,
            observers=observed.observers,
            stop=attempt.stop,
            on_phase=on_phase,
            rank=world.rank,
            world_size=world.world_size,
            on_skip=Forensics(run.path, engine, data.store, data.rows, world, attempt.skipped).on_skip,
        )
        final, stopped = fit(loop, state)
        observed.finish(final, stopped, attempt.stop.requested)
    if cache is not None:
        cache.close()


def _capture(attempt: _Attempt, data: OpenData, engine: Any, feed: Feed, code: str | None) -> Capture:
    """What a checkpoint holds, and whose it is. Collective."""
    from trainer.checkpoint.capture import Capture

    config, world, run = attempt.config, attempt.world, attempt.run
    return Capture(
        engine=engine,
        feed=feed,
        world=world,
        identity=run_identity(config, data.store, data.rows, run, code) | _base_identity(config, world, run),
        model_files=run.model_files,
        probe=probe_prompts(data.store, data.rows.sequence_length),
    )


def _restore(attempt: _Attempt, capture: Capture) -> TrainState | None:
    """The newest valid checkpoint, put into engine and feed; None where a run begins. Collective."""
    from trainer import collectives
    from trainer.checkpoint.resume import Restorer

    return Restorer(
        attempt.run.checkpoints,
        capture,
        collectives.exchange,
        seed=attempt.config.run.seed,
        strict=attempt.config.checkpoint.strict,
        allow_changes=attempt.allowed.changes,
    ).restore()


def _record(
    attempt: _Attempt,
    data: OpenData,
    capture: Capture,
    restored: TrainState | None,
    code: str | None,
    hosts: Sequence[str],
) -> AbstractContextManager[Record]:
    """Rank 0 writes down what this start is, and what will happen; the others nothing.

    Only after the restore: a start that was refused leaves the record of the run as it was.
    """
    config, run = attempt.config, attempt.run
    if attempt.times is None:
        return nullcontext(Record([], lambda final, stopped, reason: None))
    changes = [*_allowed(run, capture, restored), *changed_settings(config, run)] if restored else []
    _write_down(config, run, data, attempt.lock, code, [*capture.engine.saved_parameters()])
    memory, generators = devices.memory_probe(attempt.kind), partial(devices.generator_states, attempt.kind)
    return recorded(config, run, data.plan, capture.feed, restored, changes, memory, hosts, generators, attempt.times)


def _saver(attempt: _Attempt, capture: Capture, restored: TrainState | None) -> RunSaver:
    """Who saves this run."""
    from trainer import collectives
    from trainer.checkpoint.capture import RunSaver
    from trainer.checkpoint.saving import Saves

    config, run = attempt.config, attempt.run
    saves = Saves(
        run.checkpoints,
        rank=attempt.world.rank,
        exchange=collectives.exchange,
        keep=config.checkpoint.keep,
        newest=restored.step if restored else None,
        mirror=_uploads(config, run, restored) if attempt.world.is_first else None,
        on_phase=attempt.on_phase.of_save,
        lock=attempt.lock,
    )
    return RunSaver(capture, saves)


def _feed(config: Config, world: World, data: OpenData, quarantined: Sequence[int]) -> Feed:
    return Feed(
        data.store,
        data.rows,
        order=data.order,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        quarantined=quarantined,
        teacher=data.teacher,
    )


def _base_identity(config: Config, world: World, run: RunDirectory) -> dict[str, str]:
    """Under LoRA no checkpoint holds the base model: what its files hold is part of the run's identity. Collective."""
    from trainer import collectives

    if config.model.lora is None:
        return {}
    own = weights_fingerprint(model_directory(config, run), run.base_model) if world.is_first else ""
    return {"base": collectives.exchange({"base": own})[0]["base"]}


def _write_down(
    config: Config, run: RunDirectory, data: OpenData, lock: RunLock | None, code: str | None, parameters: Sequence[str]
) -> None:
    """Rank 0: leave in the run directory what this start is; `parameters` are those that checkpoints will hold."""
    from trainer.model.lora import adapter_config

    write_file(run.config, config_as_yaml(config))
    write_file(run.plan, json.dumps(data.plan.as_json(), indent=1) + "\n")
    adapter = None
    if config.model.lora is not None:
        base = str(model_directory(config, run).absolute())
        adapter = adapter_config(config.model.lora, base, adapted_modules(parameters))
    collect_model_files(config, data.store, run, adapter)
    with closing(EventLedger(run.events)) as events:
        if lock is not None and lock.taken_over is not None:
            events.record("takeover", holder=lock.taken_over)
        if code is not None:
            events.record("trust_remote_code", revision=code, model=config.model.path)


def _allowed(run: RunDirectory, capture: Capture, restored: TrainState) -> list[str]:
    """What of the run's identity differs from the restored checkpoint, by permission."""
    saved = read_manifest(step_directory(run.checkpoints, restored.step)).identity
    differences = identity_differences(saved, capture.identity)
    return [f"{change} (--allow-change {key})" for key, change in differences.items()]


def _uploads(config: Config, run: RunDirectory, restored: TrainState | None) -> Any:
    if config.checkpoint.upload is None:
        return None
    from trainer.checkpoint.upload import Uploads
    from trainer.checkpoint.verify import step_directory

    uploads = Uploads(config.checkpoint.upload)
    if restored is not None:
        # The run before may have ended while this one was being copied.
        uploads.add(step_directory(run.checkpoints, restored.step))
    return uploads


def _evaluation(
    config: Config, engine: Any, held_out: TokenStore | None, rows: RowPlan, world: World, on_phase: OnPhase
) -> Callable[[TrainState], dict[str, float]] | None:
    if held_out is None:
        return None
    from trainer.evaluate.evaluator import evaluate_loss

    # Whatever training does with long documents, the loss is that of all their tokens.
    held_out_rows = held_out.plan(replace(rows.spec, long_text="windows", by_source=held_out.spec.by_source))

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = evaluation_batches(
            held_out,
            held_out_rows,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            max_rows=config.evaluate.max_rows,
        )
        found = evaluate_loss(engine, batches, lambda: on_phase("evaluate", state.step))
        return {f"eval/{held_out.name}/{name}": value for name, value in found.items()}

    return evaluate
