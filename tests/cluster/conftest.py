"""The cluster of the drills: one for all of them, made when the first one asks for it; and the table they fill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.runs import Runs
from tests.cluster.slurm import SlurmCluster, why_no_slurm

_TABLE: list[tuple[str, str]] = []


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A head node and two compute nodes."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    began = time.monotonic()
    with SlurmCluster() as cluster:
        _TABLE.append(("cluster", f"up after {time.monotonic() - began:.1f} s"))
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with all nodes on and no job left from the drill before."""
    slurm_cluster.recover()
    yield slurm_cluster
    slurm_cluster.recover()


@pytest.fixture(scope="session")
def runs(slurm_cluster: SlurmCluster, store, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Training runs on the cluster, and the run that none of them may differ from."""
    return Runs(slurm_cluster, store.path, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add what a drill has seen to the table that is printed at the end."""
    began = time.monotonic()
    name = request.node.name.removeprefix("test_").replace("_", " ")
    return lambda fact: _TABLE.append((name, f"{fact} ({time.monotonic() - began:.0f} s)"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the drills; the seconds in brackets count from the start of the drill."""
    if _TABLE:
        terminalreporter.section("drills")
        for name, fact in _TABLE:
            terminalreporter.write_line(f"| {name} | {fact} |")
