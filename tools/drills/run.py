"""Carry out a drill and compare what is left with the runs that were left alone."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.drills.attempt import Attempted, attempt, empty, fill, signal_launcher, small_disk, train_command
from tools.drills.plan import KEEP, SAVE_EVERY, Round, Strike
from tools.prove import prove
from trainer.checkpoint.slices import KINDS, SliceReader
from trainer.checkpoint.verify import committed_steps, find_checkpoint, step_directory
from trainer.errors import DataError, SteadfastError
from trainer.observe.faults import Fault
from trainer.observe.ledger import read_lines
from trainer.run_directory import RunDirectory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    round: int
    fault: str
    victim: str
    phase: str
    step: int
    said: str
    """The last line of the run's stderr."""
    exit_code: int
    reached: int
    """Last step that was done when it struck."""
    resumed_at: int | None
    """Step from which the next attempt went on; None when none was needed."""
    lost_steps: int
    problem: str
    """Why this fault was not survived as promised; empty when it was."""
    equal: bool
    """Whether the run ended with the very weights of the run that was left alone."""


@dataclass(frozen=True)
class Job:
    """What is trained."""

    config: Path
    overrides: tuple[str, ...]
    ranks: int
    steps: int
    directory: Path

    def run(self, name: str) -> RunDirectory:
        """A run directory of the drill."""
        return RunDirectory(self.directory / name)

    def command(self, run: RunDirectory) -> list[str]:
        """How it is started."""
        settings = [
            f"run.dir={run.path}",
            f"train.max_steps={self.steps}",
            f"checkpoint.every_steps={SAVE_EVERY}",
            f"checkpoint.keep={KEEP}",
            f"evaluate.every_steps={SAVE_EVERY}",
            "evaluate.max_rows=8",
            "logging.every_steps=1",
            "engine.timeout_seconds=30",
        ]
        return train_command(self.config, [*settings, *self.overrides], self.ranks)

    def attempt(
        self,
        run: RunDirectory,
        faults: Sequence[Fault] = (),
        strike: Callable[..., None] | None = None,
        *,
        one_is_enough: bool = False,
    ) -> Attempted:
        """Start it once and see it end."""
        log = self.directory / "logs" / f"{run.path.name}.txt"
        return attempt(self.command(run), run, log, faults, strike, one_is_enough=one_is_enough)


def carry_out(job: Job, rounds: Sequence[Round], seed: int, say: Say) -> Iterator[Row]:
    """Run every round; a row for each fault, when its round has ended.

    Raises DataError when a run that is left alone does not end well.
    """
    alone = _left_alone(job, "left-alone", ())
    say(f"left alone: {job.steps} steps on {job.ranks} ranks, weights {weights_hash(alone)[:16]}")
    for number, each in enumerate(rounds, start=1):
        run = job.run(f"round-{number}")
        at_once = (f"checkpoint.asynchronous={str(each.background).lower()}", *job.overrides)
        struck = replace(job, overrides=at_once)
        if each.poisoned:
            # Which rank had the NaN makes no difference: the step is skipped on all of them.
            elsewhere = [
                replace(fault, rank=(fault.rank + 1) % job.ranks) for strike in each.strikes for fault in strike.faults
            ]
            yield from _poisoned(struck, number, each, run, _left_alone(job, f"poisoned-alone-{number}", elsewhere))
        else:
            yield from _struck(struck, number, each, run, alone, seed)


def weights_hash(run: RunDirectory) -> str:
    """sha256 over all weights and moments of the newest valid checkpoint."""
    reader = SliceReader(find_checkpoint(run.path))
    total = hashlib.sha256()
    for name in reader.parameters:
        for kind in KINDS:
            total.update(f"{kind} {name}".encode())
            total.update(reader.read(kind, name).tobytes())
    return total.hexdigest()


def _left_alone(job: Job, name: str, faults: Sequence[Fault]) -> RunDirectory:
    run = job.run(name)
    ended = job.attempt(run, faults)
    if ended.code or ended.problem:
        raise DataError(
            f"the job fails when it is left alone (exit code {ended.code}): {ended.problem or ended.said}",
            f"see {job.directory / 'logs' / name}.txt",
        )
    return run


def _poisoned(job: Job, number: int, each: Round, run: RunDirectory, alone: RunDirectory) -> Iterator[Row]:
    ended = job.attempt(run, [fault for strike in each.strikes for fault in strike.faults])
    skipped = [entry["step"] for entry in read_lines(run.events) if entry["event"] == "skip"]
    difference = _difference(run, alone)
    for strike in each.strikes:
        problem = ended.problem or _unexpected_code(strike, ended)
        if strike.step not in skipped:
            problem = problem or f"step {strike.step} was not skipped"
        yield _row(number, strike, ended, job.steps, None, 0, problem or difference, equal=not difference)


def _struck(job: Job, number: int, each: Round, run: RunDirectory, alone: RunDirectory, seed: int) -> Iterator[Row]:
    chance = random.Random(f"{seed} {number}")
    rows: list[Row] = []
    needs_disk = any(strike.kind == "enospc" and strike.outside for strike in each.strikes)
    size = 4 * sum(file.stat().st_size for file in alone.checkpoints.rglob("*") if file.is_file()) + (8 << 20)
    with small_disk(run.checkpoints, size) if needs_disk else contextlib.nullcontext():
        waiting: list[tuple[Strike, Attempted, int]] = []
        for strike in each.strikes:
            before = len(_starts(run))
            ended = _strike(job, run, strike)
            if starts := _starts(run)[before:]:
                rows += [_resumed(number, each.background, *struck, starts[0]) for struck in waiting]
                waiting = []
            # One that was struck before it trained has lost no step.
            waiting.append((strike, ended, _reached(run) if starts else 0))
            if strike.kind == "flip":
                _flip_a_bit(run, chance)
            if needs_disk:
                empty(run.checkpoints)
        before = len(_starts(run))
        ended = job.attempt(run)
        starts = _starts(run)[before:]
        rows += [_resumed(number, each.background, *struck, starts[0] if starts else None) for struck in waiting]
    if ended.code or ended.problem:
        difference = f"the last attempt ended with {ended.code}: {ended.problem or ended.said}"
    else:
        difference = _difference(run, alone)
    for row in rows:
        yield replace(row, equal=not difference, problem=row.problem or difference)


def _strike(job: Job, run: RunDirectory, strike: Strike) -> Attempted:
    outside: Callable[..., None] | None = None
    if strike.outside and strike.kind == "enospc":
        outside = fill(run.checkpoints)
    elif strike.outside:
        outside = signal_launcher(signal.SIGTERM if strike.kind == "term" else signal.SIGKILL)
    return job.attempt(run, strike.faults, outside, one_is_enough=not strike.outside)


def _resumed(number: int, background: bool, strike: Strike, ended: Attempted, reached: int, start: int | None) -> Row:
    problem = ended.problem or _unexpected_code(strike, ended)
    if start is None:
        return _row(number, strike, ended, reached, None, 0, problem or "no later attempt began", equal=False)
    lost = max(0, reached - start)
    if lost > (most := strike.most_lost(background)):
        problem = problem or f"{lost} steps were lost, at most {most} may be"
    return _row(number, strike, ended, reached, start, lost, problem, equal=False)


def _row(
    number: int, strike: Strike, ended: Attempted, reached: int, resumed: int | None, lost: int, problem: str, *,
    equal: bool,
) -> Row:  # fmt: skip
    return Row(
        round=number,
        fault=strike.kind,
        victim=strike.victim,
        phase=strike.phase,
        step=strike.step,
        said=ended.said,
        exit_code=ended.code,
        reached=reached,
        resumed_at=resumed,
        lost_steps=lost,
        problem=problem,
        equal=equal,
    )


def _unexpected_code(strike: Strike, ended: Attempted) -> str:
    expected = " or ".join(map(str, strike.codes))
    return "" if ended.code in strike.codes else f"it ended with {ended.code} instead of {expected}"


def _difference(run: RunDirectory, alone: RunDirectory) -> str:
    """Why a run is not the same as the one left alone; nothing when it is, to the last bit."""
    try:
        proof = prove(run.path, alone.path)
        if proof.difference is not None:
            found = proof.difference
            return f"step {found.step}: {found.what} is {found.first}, should be {found.second}"
        if proof.exact_steps != proof.steps or weights_hash(run) != weights_hash(alone):
            return "the last weights differ"
    except SteadfastError as error:
        return error.fact
    return ""


def _starts(run: RunDirectory) -> list[int]:
    """The steps at which attempts began to train."""
    return [int(entry["step"]) for entry in read_lines(run.events) if entry["event"] in ("start", "resume")]


def _reached(run: RunDirectory) -> int:
    return max((int(entry["step"]) for entry in read_lines(run.step_ledger)), default=0)


def _flip_a_bit(run: RunDirectory, chance: random.Random) -> None:
    """Damage the newest checkpoint: one bit of one of its tensor files."""
    steps = committed_steps(run.checkpoints)
    if not steps:
        return
    victim = chance.choice(sorted(step_directory(run.checkpoints, steps[0]).glob("rank-*.safetensors")))
    with victim.open("rb+") as stream:
        place = chance.randrange(victim.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << chance.randrange(8)]))
