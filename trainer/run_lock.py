"""One run, one holder: who may write to a run directory, on one host or on many that share a file system.

Two locks, because neither is enough alone. The kernel's (`lock`) ends with its process, but some cluster file systems
keep it to one host or know none. So the holder also writes `holder-00000007.json` (host, pid, boot id, job) and touches
it every HEARTBEAT_SECONDS. The file with the highest number names the holder; a name is made with link(2), which
succeeds for exactly one process, and numbers only grow. Nobody ever removes or overwrites a living holder's file.

A holder is stale, and the next start takes over, when

    it has released the directory,
    its process has ended (same boot of the same host),
    its host has booted since,
    its Slurm job is gone, or is this very job, started again,
    or it has not touched its file for 3 periods, by the file server's clock, nor while we looked on for one more.

A holder that was only frozen finds itself superseded within a heartbeat (`lost`) and in any case before its next commit
(`check_holder`), and stops. Torch-free.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO

from trainer.durable import write_errors
from trainer.errors import RunLockedError
from trainer.locks import take_lock

HEARTBEAT_SECONDS = 10.0
PERIODS = 3
SQUEUE_SECONDS = 3.0
REMEDY = "wait for it, stop it, or set another run.dir"
_NAME = re.compile(r"holder-(\d{8})\.json")


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory; `job` and `attempt` are empty outside a scheduler."""

    host: str
    pid: int
    process_start: str
    """Start time of the process in kernel ticks: pids come again, this does not."""
    namespace: str
    """Where the pid counts: containers on one host have pids of their own."""
    boot_id: str
    job: str
    attempt: int
    since: str
    released: bool = False

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        return f"pid {self.pid} on {self.host}{job}"


class RunLock:
    """The right to write to run directory `path` until it is closed or the process ends; see `take`."""

    def __init__(self, path: Path, stream: IO[str], file: Path, taken_over: str | None, period: float) -> None:
        self.path = path
        self.taken_over = taken_over
        """From whom and why, when an earlier holder had not released the directory."""
        self.lost = False
        """Whether a heartbeat has found another holder: this process was taken for dead, and must not write."""
        self.file = file
        """The file that names this process as the holder."""
        self._stream = stream
        self._closed = threading.Event()
        threading.Thread(target=self._beat, args=(period,), name="run lock", daemon=True).start()

    def check(self) -> None:
        """See check_holder."""
        check_holder(self.file)

    def close(self) -> None:
        """Release the directory."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(OSError):
            holder = _read(self.file)
            if holder is not None:
                temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
                temporary.write_text(json.dumps({**asdict(holder), "released": True}) + "\n")
                temporary.replace(self.file)
        self._stream.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self, period: float) -> None:
        while not self._closed.wait(period):
            with suppress(OSError):
                self.lost = self.lost or _newest(self.path)[0] != self.file
                # Without a time of ours: the file server's clock is the one that everybody reads.
                os.utime(self.file)


def check_holder(file: Path) -> None:
    """Raise RunLockedError unless `file` still names the holder of its run directory.

    Whoever finds another one was taken for dead while it was frozen, and must not write any more.
    """
    newest, holder = _newest(file.parent)
    if newest != file:
        raise RunLockedError(
            f"{file.parent} was taken over by {holder or 'another process'} while this run was frozen",
            "nothing was lost; that run goes on",
        )


def take(path: Path, *, period: float = HEARTBEAT_SECONDS, environ: Mapping[str, str] = os.environ) -> RunLock:
    """Take run directory `path`, which exists; a holder that is gone is named on stderr.

    Raises RunLockedError, at once, when it has a living holder; only one of this same Slurm job, on a host that may
    be lost, is waited for.
    """
    stream = take_lock(path / "lock", str(path), REMEDY)
    me = _myself(environ)
    give_up = time.monotonic() + (PERIODS + 2) * period
    try:
        while True:
            file, holder = _newest(path)
            gone = "" if file is None else why_gone(file, holder, me, period)
            if gone is not None:
                mine = _create(path, me, 1 + (0 if file is None else _number(file)))
                if mine is not None and _newest(path)[0] == mine:
                    break
                continue
            same_job = holder is not None and me.job != "" and holder.job == me.job
            if not same_job or time.monotonic() > give_up:
                raise RunLockedError(f"{path} is in use by {holder or 'another process'}", REMEDY)
            time.sleep(period / 2)
    except BaseException:
        stream.close()
        raise
    taken_over = None
    if file is not None and not (holder is not None and holder.released):
        taken_over = f"{holder or 'an unknown process'}: {gone}"
        sys.stderr.write(f"warning: taking over {path} from {taken_over}\n")
    for old in path.glob("holder-*.json"):
        if _NAME.fullmatch(old.name) and _number(old) < _number(mine):
            old.unlink(missing_ok=True)
    return RunLock(path, stream, mine, taken_over, period)


def living_holder(path: Path, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """Who would refuse a start in `path` now, or None. For launchers: quicker than a rank, and it takes nothing."""
    file, holder = _newest(path)
    if _kernel_lock_is_held(path / "lock"):
        return str(holder) if holder is not None and not holder.released else "another process"
    me = _myself(environ)
    if file is None or (holder is not None and me.job != "" and holder.job == me.job):
        return None
    gone = why_gone(file, holder, me, HEARTBEAT_SECONDS, look_on=False)
    return None if gone is not None else str(holder or "another process")


def why_gone(file: Path, holder: Holder | None, me: Holder, period: float, *, look_on: bool = True) -> str | None:
    """Why the holder that wrote `file` counts as gone, or None while it may live. May `look_on` for a period."""
    if holder is not None:
        if holder.released:
            return "released"
        here = holder.boot_id == me.boot_id != ""
        if here and holder.namespace == me.namespace != "":
            return None if _process_start(holder.pid) == holder.process_start else "its process has ended"
        if not here and holder.host == me.host and "" not in (holder.boot_id, me.boot_id):
            return "its host has booted since"
        if holder.job.startswith("slurm "):
            if holder.job == me.job and holder.attempt < me.attempt:
                return "it was an earlier start of this job"
            if holder.job != me.job and _slurm_job_is_gone(holder.job.removeprefix("slurm ")):
                return "its job is gone"
    try:
        touched = file.stat().st_mtime_ns
        silent = (_now(file.parent) - touched) / 1e9
        if silent <= PERIODS * period:
            return None
        # Clocks jump; a living holder touches its file in the meantime.
        time.sleep(1.2 * period if look_on else 0)
        if file.stat().st_mtime_ns != touched:
            return None
    except FileNotFoundError:
        return "its file is gone"
    return f"no sign of life for {silent:.0f} s"


def _newest(path: Path) -> tuple[Path | None, Holder | None]:
    """The file with the highest number, and who wrote it if that can be read."""
    files = [file for file in path.glob("holder-*.json") if _NAME.fullmatch(file.name)]
    if not files:
        return None, None
    newest = max(files, key=lambda file: file.name)
    return newest, _read(newest)


def _number(file: Path) -> int:
    return int(file.name[len("holder-") : -len(".json")])


def _read(file: Path) -> Holder | None:
    try:
        content = json.loads(file.read_bytes())
        holder = Holder(**{field.name: content[field.name] for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    types = {"str": str, "int": int, "bool": bool}
    return holder if all(type(getattr(holder, f.name)) is types[str(f.type)] for f in fields(Holder)) else None


def _create(path: Path, me: Holder, number: int) -> Path | None:
    """Make the file of this number for `me`; None when another process was faster. It has its content from the start.

    Where links are not known (some object and FUSE file systems), the file is made empty and filled a moment later.
    """
    file = path / f"holder-{number:08d}.json"
    content = json.dumps(asdict(me)) + "\n"
    with write_errors(file), _temporary(path, content) as temporary:
        try:
            os.link(temporary, file)
        except FileExistsError:
            return None
        except OSError:
            try:
                with file.open("x") as stream:
                    stream.write(content)
            except FileExistsError:
                return None
    return file


@contextmanager
def _temporary(path: Path, content: str) -> Iterator[Path]:
    temporary = path / f".holder-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary.write_text(content)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _now(path: Path) -> int:
    """The present time in nanoseconds as the file system of `path` tells it."""
    with _temporary(path, "") as probe:
        return probe.stat().st_mtime_ns


def _myself(environ: Mapping[str, str]) -> Holder:
    slurm, ray = environ.get("SLURM_JOB_ID", ""), environ.get("RAY_JOB_ID", "")
    attempt = environ.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        namespace=_namespace(),
        boot_id=_boot_id(),
        job=f"slurm {slurm}" if slurm else f"ray {ray}" if ray else "",
        attempt=int(attempt) if attempt.isdigit() else 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _process_start(pid: int) -> str | None:
    try:
        # The name, in brackets, may hold anything; start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _slurm_job_is_gone(job: str) -> bool:
    """Whether Slurm says so; when it cannot be asked, the heartbeat decides."""
    if not job.isdigit():
        return False
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%T"],
            capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    if asked.returncode != 0:
        return "Invalid job id" in asked.stderr
    return asked.stdout.split() in ([], ["COMPLETED"], ["FAILED"], ["CANCELLED"], ["TIMEOUT"])


def _kernel_lock_is_held(file: Path) -> bool:
    import fcntl

    try:
        with file.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # No such file, or a file system without locks.
        return False
    return False
