"""Training runs on the Ray cluster of the drills: the same small model as on Slurm, one CPU rank a node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.ray import RAY, RayCluster
from tests.cluster.runs import ROOT, START_SECONDS, STEPS
from tests.support.training import settings
from tests.support.waiting import until
from trainer.checkpoint.verify import committed_steps

STEADFAST = [sys.executable, str(ROOT / "steadfast.py")]


class RayRun:
    """One run directory, its configuration, and the newest job that works on it."""

    def __init__(self, cluster: RayCluster, directory: Path, store: Path) -> None:
        directory.mkdir()
        self.cluster = cluster
        self.path = directory / "run"
        self.config = directory / "config.yaml"
        values = settings(self.path, store, train__max_steps=STEPS, checkpoint__every_steps=20, checkpoint__keep=2)
        self.config.write_text(yaml.safe_dump(values))
        self.job = ""

    def submit(self, *options: str, nodes: int = 2) -> str:
        """Submit the run as a user would; returns the id of the job."""
        done = self.steadfast(
            "ray", str(self.config), "--nodes", str(nodes), "--address", self.cluster.api, *options
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split()[2].rstrip(";")
        return self.job

    def submit_by_hand(self, nodes: int = 2) -> str:
        """Submit the run with Ray's own command."""
        driver = [*STEADFAST, "launch", "ray", str(self.config), "--nodes", str(nodes)]
        submit = [*RAY, "job", "submit", "--no-wait"]
        self.job = f"by-hand-{self.path.parent.name}"
        done = self.cluster.run(
            *submit, "--address", self.cluster.api, "--submission-id", self.job, "--", *driver, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return self.job

    def steadfast(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Type `steadfast launch ...` on the head node."""
        return self.cluster.run(*STEADFAST, "launch", *words, timeout=360, **options)

    def status(self) -> dict[str, Any]:
        """What `launch status` says."""
        done = self.steadfast("status", str(self.path), "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {"state": done.stderr}

    def output(self) -> str:
        """What the newest job wrote."""
        return self.steadfast("logs", str(self.path), "--lines", "100000").stdout

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Events of the run, of these names."""
        try:
            lines = (self.path / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [entry for entry in map(json.loads, lines) if entry["event"] in names]

    def hosts(self) -> list[str]:
        """Names of the nodes of the newest attempt, rank 0's first."""
        return list(self.events("launch")[-1]["hosts"])

    def wait_for_step(self, step: int) -> None:
        """Wait until a checkpoint at or after `step` is committed."""
        checkpoints = self.path / "checkpoints"
        try:
            until(lambda: next(iter(committed_steps(checkpoints)), 0) >= step, f"step {step}", START_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def wait_for(self, *states: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Wait until the state of the job ends in one of `states`; returns the status then."""
        status: dict[str, Any] = {}

        def reached() -> bool:
            nonlocal status
            status = self.status()
            return any(status["state"].endswith(f": {state}") for state in states)

        try:
            until(reached, f"{states}", seconds, 1.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: {status}\n{self.output()}") from None
        return status
