"""What a run trains and evaluates on, opened and planned: equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer import collectives
from trainer.config.schema import Config
from trainer.data.order import Order
from trainer.data.store import TokenStore, open_store
from trainer.data.store.packing import RowPlan
from trainer.data.store.remote import ShardCache
from trainer.data.teacher import Teacher, open_teacher
from trainer.observe.quarantine import quarantined_positions
from trainer.plan import Plan, make_plan
from trainer.prepare import left_out, open_held_out, prepare_model, row_order, row_spec, source_epochs
from trainer.run_directory import RunDirectory
from trainer.world import World


@dataclass(frozen=True)
class OpenData:
    """What is trained and evaluated on, and in which order."""

    store: TokenStore
    held_out: TokenStore | None
    teacher: Teacher | None
    rows: RowPlan
    order: Order
    plan: Plan


def open_data(config: Config, world: World, run: RunDirectory, cache: ShardCache | None) -> OpenData:
    """Open the stores and plan the run; rank 0 also prepares the model's files. All ranks call it together."""
    store = open_store(config.data.train, rank=world.rank, world_size=world.world_size, cache=cache)
    teacher = None
    if config.data.teacher is not None:
        teacher = open_teacher(Path(config.data.teacher), store, world.rank, world.world_size)
    held_out = open_held_out(config, store, rank=world.rank, world_size=world.world_size, cache=cache)
    spec = row_spec(config, store)
    if world.is_first and not store.has_plan(spec):
        print(f"{store.location} has no {spec.name}: computing it, a second or two per million documents", flush=True)
    rows = store.plan(spec)
    if world.is_first:
        for line in left_out(rows):
            print(line, flush=True)
    order = row_order(config, store, rows)
    plan = make_plan(
        config,
        world_size=world.world_size,
        rows=rows.n_rows,
        sequence_length=rows.sequence_length,
        source_epochs=source_epochs(config, store, rows, order),
    )
    if world.is_first:
        prepare_model(config, store, rows, run)
    collectives.barrier()
    return OpenData(store, held_out, teacher, rows, order, plan)


def quarantined(run: RunDirectory, world: World) -> list[int]:
    """The same on all ranks, whatever a shared file system shows them."""
    positions = quarantined_positions(run.path) if world.is_first else []
    if positions:
        print(f"{len(positions)} steps are in quarantine (quarantine.json): their rows are left out", flush=True)
    found: list[int] = collectives.exchange({"positions": positions})[0]["positions"]
    return found
