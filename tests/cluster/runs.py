"""Training runs for drills: the same small model on two ranks, on the cluster or uninterrupted on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.slurm import SlurmCluster
from tests.support.training import losses, settings
from tests.support.waiting import until
from trainer.checkpoint.verify import committed_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
START_SECONDS = 240
"""Most seconds from the submission to the first commit, on a machine that has other things to do."""


class Run:
    """One run directory, its configuration, and the job that works on it."""

    def __init__(self, slurm: SlurmCluster, directory: Path, store: Path, **changes: Any) -> None:
        directory.mkdir()
        self.slurm = slurm
        self.place = directory
        self.path = directory / "run"
        self.config = directory / "config.yaml"
        usual = {"train__max_steps": STEPS, "checkpoint__every_steps": 20, "checkpoint__keep": 2}
        values = settings(self.path, store, **(usual | changes))
        self.config.write_text(yaml.safe_dump(values))
        self.job = ""

    def submit(self, *options: str, script: tuple[str, ...] = (), **environ: str) -> str:
        """Submit slurm/sft.sh as a user would, for one CPU rank a node; `script` follows the configuration.

        Without the preflight, unless SFT_PREFLIGHT says otherwise: one drill has it.
        """
        self.job = self.slurm.sbatch(
            "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={self.place}/%x-%j.out", *options,
            str(ROOT / "slurm" / "sft.sh"), str(self.config), *script,
            environ={"SFT_PYTHON": sys.executable, "SFT_ROOT": str(ROOT), "OMP_NUM_THREADS": "1", "SFT_PREFLIGHT": "0"}
            | environ,
            cwd=self.place,
        )  # fmt: skip
        return self.job

    def output(self) -> str:
        """Everything the jobs wrote."""
        return "".join(file.read_text() for file in sorted(self.place.glob("*.out")))

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Events of the run, of these names."""
        try:
            lines = (self.path / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [entry for entry in map(json.loads, lines) if entry["event"] in names]

    def wait_for_step(self, step: int, seconds: float = START_SECONDS) -> None:
        """Wait until a checkpoint at or after `step` is committed."""
        until(lambda: self._there(step), f"step {step} is committed; output so far:\n{self.output()}", seconds)

    def wait_for(self, *states: str, seconds: float = START_SECONDS) -> dict[str, str]:
        """Wait for a state of the job."""
        try:
            return self.slurm.wait_for(self.job, states, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def _there(self, step: int) -> bool:
        known = self.slurm.job(self.job).get("JobState", "")
        assert known not in ("FAILED", "CANCELLED", "TIMEOUT"), self.output()
        return next(iter(committed_steps(self.path / "checkpoints")), 0) >= step


def rank_processes(run: Run) -> dict[int, int]:
    """Living ranks of a run: rank to process id, as this machine counts processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = next((int(text[5:]) for text in environ if text.startswith(b"RANK=")), None)
            if rank is not None and b"train" in words and str(run.config).encode() in words:
                found[rank] = int(entry.name)
    return found


def environment_of(process: int) -> dict[str, str]:
    """The environment a process was started with."""
    entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Runs:
    """Makes runs; knows the losses of the uninterrupted one."""

    def __init__(self, slurm: SlurmCluster, store: Path, directory: Path) -> None:
        self._slurm, self._store, self._directory = slurm, store, directory
        self._expected: list[float] = []

    def new(self, name: str, **changes: Any) -> Run:
        """A run directory of its own; the same model, data and steps as all others."""
        return Run(self._slurm, self._directory / name, self._store, **changes)

    def expected(self) -> list[float]:
        """The loss of every step of the same run, uninterrupted on this machine with two local ranks."""
        if not self._expected:
            run = self.new("uninterrupted")
            done = subprocess.run(
                [sys.executable, str(ROOT / "steadfast.py"), "train", str(run.config), "--nproc", "2"],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            self._expected = losses(run.path)
        return self._expected
