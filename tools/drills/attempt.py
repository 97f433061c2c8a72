"""One attempt at a run of a drill: started as a user starts it, struck from outside where the plan says so."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkout import ROOT
from trainer.errors import CannotWriteError
from trainer.observe.faults import FAULTS, Fault, as_text, not_fired
from trainer.run_directory import RunDirectory

PATIENCE_SECONDS = 600.0
"""After this an attempt hangs: far more than any time limit that the job itself has."""
ORPHAN_SECONDS = 10.0
_SPARE_BYTES = 16 << 10


@dataclass(frozen=True)
class Attempted:
    """How an attempt ended."""

    code: int
    """Exit code of the launcher, or minus the signal that killed it."""
    said: str
    """The last line it wrote to stderr."""
    problem: str = ""
    """What must not happen: it hung, left ranks behind, or was never struck."""


def attempt(
    command: Sequence[str],
    run: RunDirectory,
    log: Path,
    faults: Sequence[Fault] = (),
    strike: Callable[[subprocess.Popen[bytes]], None] | None = None,
    *,
    one_is_enough: bool = False,
) -> Attempted:
    """Run `command` to its end, with `faults` armed; `strike` acts from outside once all of them have fired.

    All faults must fire; with `one_is_enough` the first may take the others' ranks down before theirs do. What the
    command writes is appended to `log`.
    """
    environ = os.environ | {FAULTS: as_text(faults)}
    problem = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output, env=environ
        )
        try:
            if strike is not None and _wait_for_faults(launcher, run, faults):
                strike(launcher)
            launcher.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            problem = f"it did not end within {PATIENCE_SECONDS:.0f} s"
        finally:
            if launcher.poll() is None:
                launcher.kill()
                launcher.wait()
    if not _is_left(run):
        problem = problem or "ranks outlived their launcher"
    missed = not_fired(run.path, faults)
    if missed and not (one_is_enough and len(missed) < len(faults)):
        problem = problem or "the fault never fired"
    return Attempted(launcher.returncode, _last_line(log, begin), problem)


def train_command(config: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """`steadfast train` of this checkout."""
    return [sys.executable, str(ROOT / "steadfast.py"), "train", str(config), *overrides, "--nproc", str(ranks)]


def signal_launcher(number: int) -> Callable[[subprocess.Popen[bytes]], None]:
    """A strike: the launcher gets a signal."""

    def strike(launcher: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            launcher.send_signal(signal.Signals(number))

    return strike


def fill(place: Path) -> Callable[[subprocess.Popen[bytes]], None]:
    """A strike: the file system of `place` is filled but for a few KiB; `empty` takes it back."""

    def strike(launcher: subprocess.Popen[bytes]) -> None:
        _ballast(place).write_bytes(bytes(max(0, shutil.disk_usage(place).free - _SPARE_BYTES)))

    return strike


def empty(place: Path) -> None:
    """Make room again."""
    _ballast(place).unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at `place` for the block. Raises CannotWriteError when it cannot be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = _mount(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "steadfast-drill", str(place)])
    if mounted:
        raise CannotWriteError(f"no small disk at {place}: {mounted}", "run as root, or leave enospc out")
    try:
        yield
    finally:
        # What the run left there is kept, for the comparison and for whoever wants to look.
        kept = place.with_name(f"{place.name}.kept")
        shutil.copytree(place, kept, dirs_exist_ok=True)
        _mount(["umount", "-l", str(place)])
        place.rmdir()
        kept.rename(place)


def can_mount(place: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return False
    probe = place / "can-mount"
    try:
        with small_disk(probe, 1 << 16):
            pass
    except CannotWriteError:
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return True


def _mount(command: Sequence[str]) -> str:
    """Run it; why it failed, or nothing."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""


def _wait_for_faults(launcher: subprocess.Popen[bytes], run: RunDirectory, faults: Sequence[Fault]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not_fired(run.path, faults):
        if launcher.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _is_left(run: RunDirectory) -> bool:
    """Whether nobody holds the run any more; its ranks have a moment to go."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while run.in_use():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as stream:
        stream.seek(begin)
        lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _ballast(place: Path) -> Path:
    return place / "ballast"
