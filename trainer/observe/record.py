"""The record of a run, kept by rank 0: all observers, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import Config
from trainer.data.feed import Feed
from trainer.durable import write_file
from trainer.errors import RunLockedError, SteadfastError
from trainer.loop import Observer
from trainer.observe.events import EventLedger
from trainer.observe.guard import Guarded
from trainer.observe.metrics import Metrics, MetricsFile, Sink
from trainer.observe.progress import progress_for_stdout
from trainer.observe.step_ledger import StepLedger
from trainer.observe.stragglers import Stragglers
from trainer.observe.tensorboard import TensorBoard
from trainer.observe.time_ledger import TimeLedger
from trainer.plan import Plan
from trainer.redact import redacted
from trainer.run_directory import RunDirectory
from trainer.state import TrainState


@dataclass(frozen=True)
class Record:
    """What the loop reports to, and what is said when it has ended: `finish(state, was it stopped, why)`."""

    observers: list[Observer]
    finish: Callable[[TrainState, bool, str | None], None]


@contextmanager
def recorded(
    config: Config,
    run: RunDirectory,
    plan: Plan,
    feed: Feed,
    restored: TrainState | None,
    changes: Sequence[str],
    peak_memory_gib: Callable[[], float],
    hosts: Sequence[str],
    generators: Callable[[], dict[str, Any]],
    times: TimeLedger,
) -> Iterator[Record]:
    """Open the ledgers, cut back to the restored step, and close them whatever happens; a failure is recorded too.

    `changes` are the settings that differ from the previous start, `hosts` those of all ranks; `generators` tells the
    state of the random number generators of this rank. Rank 0 only.
    """
    state = restored or TrainState()
    # From here on the previous outcome is no longer how the run ended.
    run.outcome.unlink(missing_ok=True)
    sinks: list[Sink] = [MetricsFile(run.metrics, state.step), progress_for_stdout(state.step, plan.max_steps)]
    tensorboard = TensorBoard(run.tensorboard, state.step) if config.logging.tensorboard else None
    if tensorboard is not None:
        sinks.append(tensorboard)
    events = EventLedger(run.events)
    metrics = Metrics(
        sinks,
        every_steps=config.logging.every_steps,
        max_steps=plan.max_steps,
        peak_memory_gib=peak_memory_gib,
        time_totals=times.totals,
    )
    ledger = StepLedger(run.step_ledger, feed, state.step, plan.world_size, generators)
    stragglers = Stragglers(hosts, events.record, *([tensorboard.say] if tensorboard is not None else []))
    observers: list[Observer] = [Guarded(observer) for observer in (times, events, ledger, metrics, stragglers)]
    event = "resume" if restored else "start"
    events.record(event, step=state.step, world_size=plan.world_size, changes=list(changes))
    _say_where_we_begin(config, plan, state, changes)

    def finish(final: TrainState, stopped: bool, reason: str | None) -> None:
        status = "stopped" if stopped else "done"
        _write_outcome(run, {"status": status, "max_steps": plan.max_steps, **final.as_json()})
        events.record("stop" if stopped else "done", step=final.step)
        if stopped:
            write_file(run.stopped, json.dumps({"step": final.step, "reason": reason}) + "\n")
            print(f"stopped at step {final.step} of {plan.max_steps} as asked; the same command continues", flush=True)
        else:
            losses = f"loss {_number(final.loss_first)} -> {_number(final.loss_last)}"
            print(f"done: step {final.step}, {losses}; checkpoints in {run.checkpoints}", flush=True)

    times.begin_training(state.step)
    try:
        yield Record(observers, finish)
    except BaseException as error:
        times.fail()
        if isinstance(error, RunLockedError):
            # The record belongs to the run that took over.
            raise
        with suppress(SteadfastError):
            events.record("fault", error=f"{type(error).__name__}: {error}")
            _write_outcome(run, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        for observer in observers:
            observer.close()


def _write_outcome(run: RunDirectory, outcome: dict[str, Any]) -> None:
    write_file(run.outcome, json.dumps(redacted(outcome), indent=1, ensure_ascii=False) + "\n")


def _say_where_we_begin(config: Config, plan: Plan, state: TrainState, changes: Sequence[str]) -> None:
    if changes:
        print(f"changed since the last start: {'; '.join(changes)}", flush=True)
    if state.step >= plan.max_steps:
        print(f"nothing to do: the run is at step {state.step}, train.max_steps is {plan.max_steps}", flush=True)
        return
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    empty = f" ({plan.empty_rows_per_step} row slots of a step stay empty)" if plan.empty_rows_per_step else ""
    begin = f"resuming at step {state.step}" if state.step else "starting"
    batch = f"global batch {plan.global_batch_size} rows x {plan.sequence_length} tokens"
    print(
        f"{begin}, {plan.max_steps} steps in all: {ranks}, ZeRO config {config.engine.deepspeed}, {batch}, micro-batch "
        f"{plan.micro_batch_size}, accumulation {plan.accumulation_steps}{empty}; the store has {plan.rows} rows, all "
        f"steps are {plan.epochs:.2f} epochs",
        flush=True,
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
