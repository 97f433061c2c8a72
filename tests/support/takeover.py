"""Another start takes over the run directory at a chosen moment, as one on another host would after we were frozen."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trainer import run_lock
from trainer.checkpoint.saving import Saves
from trainer.checkpoint.writer_process import WriterProcess
from trainer.data.feed import Feed
from trainer.errors import SteadfastError
from trainer.run_lock import Holder

OTHER = Holder(
    host="node007", pid=1234, process_start="5", namespace="pid:[1]", boot_id="other", job="", attempt=0, since="now"
)
STEP = 3
MOMENTS: dict[str, tuple[type, str]] = {
    "a step": (Feed, "next_step"),
    "a save on the spot": (Saves, "begin"),
    "a save": (WriterProcess, "write"),
    "the commit": (WriterProcess, "commit"),
}


def take_over(run: Path) -> None:
    """Leave a newer holder's file."""
    (run / "holder-00000099.json").write_text(json.dumps(asdict(OTHER)))


def preceded(original: Callable[..., Any], call: int, action: Callable[[], None]) -> Callable[..., Any]:
    """`original`, but before its `call`-th call comes `action`."""
    calls = 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*arguments, **named)

    return called


def train(world: Any, kind: str, values: dict[str, Any], moment: str) -> str | None:
    """Case: a training run whose directory is taken over before a step, a save or a commit; the error of this rank."""
    from tests.support.training import StopAfter
    from trainer.assemble import Allowed, train_joined
    from trainer.config.schema import Config
    from trainer.run_directory import RunDirectory

    config = Config.model_validate(values)
    run = RunDirectory(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)
    owner, name = MOMENTS[moment]
    with ExitStack() as stack:
        lock = None
        if world.is_first:
            period = 0.02 if moment == "a step" else 3600.0
            lock = stack.enter_context(run_lock.take(run.path, period=period))
            call = STEP if moment == "a step" else 2
            stack.enter_context(
                patch.object(owner, name, preceded(getattr(owner, name), call, partial(take_over, run.path)))
            )
        try:
            train_joined(config, world, StopAfter(0), run, kind, Allowed(), lock)  # type: ignore[arg-type]
        except SteadfastError as error:
            return f"{error.exit_code}: {error}"
    return None


def before_the_second_save() -> None:
    """For a rank of the command: rank 0's directory is taken over before its second save."""
    original, saves = WriterProcess.write, 0

    def write(self: WriterProcess, attempt: Path, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            take_over(attempt.parents[1])
        original(self, attempt, *arguments)

    if os.environ["RANK"] == "0":
        WriterProcess.write = write  # type: ignore[method-assign]
