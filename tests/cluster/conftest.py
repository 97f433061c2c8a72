"""The cluster of the drills: one for all of them, made when the first one asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.runs import Runs
from tests.cluster.slurm import SlurmCluster, why_no_slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two compute nodes and a head node."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def runs(slurm: SlurmCluster, store, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Training runs on the cluster, and the run that none of them may differ from."""
    return Runs(slurm, store.path, tmp_path_factory.mktemp("runs"))
