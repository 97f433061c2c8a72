"""What travels between ranks, and what rank 0 knows besides: the facts that the judgement is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from launch.preflight.facts import Facts, HostFacts


class Probe(Facts):
    """How far the child with the first collectives came, and what it measured; rates in GiB/s."""

    stage: str = ""
    """The last stage that it reached: imported, (libraries,) joined, gloo, gpu, nccl, done; empty before the first."""
    error: str = ""
    import_seconds: float | None = None
    torch: str = ""
    cuda: str = ""
    nccl: str = ""
    device: str = ""
    free_gpu_gib: float | None = None
    gloo_gib_per_second: float | None = None
    nccl_gib_per_second: float | None = None


class RankFacts(Facts):
    """What one rank tells before it has met the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    pid: int
    master: str
    """MASTER_ADDR:MASTER_PORT as this rank has them."""
    master_addresses: list[str]
    """What MASTER_ADDR resolves to here; empty when it does not."""
    code: str
    config: str
    device: str
    visible_gpus: int
    missing_inputs: list[str]
    run_dir: str
    run_dir_file_system: str
    run_dir_free_gib: float | None
    run_dir_problem: str
    """Why this rank cannot write there; empty when it can."""
    host: HostFacts


Nonce = Literal["seen", "missing", "stale"]


class RankResult(Facts):
    """What one rank has seen after it met the others."""

    nonce: Nonce
    """Whether the file that rank 0 wrote into run.dir is there, and is the one of this very start."""
    clock_skew: float
    """Seconds by which this host's clock is ahead of that of rank 0."""
    probe: Probe


@dataclass(frozen=True)
class Requirements:
    """Versions by package, and of `python`: those we are tested with, and the oldest that may do."""

    tested: Mapping[str, str]
    oldest: Mapping[str, str]


@dataclass(frozen=True)
class Expected:
    """What the run wants, as rank 0 knows it; None where nobody knows."""

    ranks_per_host: int
    checkpoint_gib: float | None = None
    checkpoint_source: str = ""
    checkpoints_to_come: int = 1
    """How many more checkpoints will lie there at once."""
    checkpoint_seconds: float | None = None
    seconds_left: float | None = None
    """Until the scheduler ends the job."""
    warning_seconds: float = 300.0
    """How long before that end the scheduler asks for the last checkpoint."""


@dataclass(frozen=True)
class Attendance:
    """Who came, and who did not."""

    reports: Mapping[int, RankFacts]
    """Facts of the ranks that reached rank 0, and its own."""
    results: Mapping[int, RankResult]
    absent: Mapping[int, str] = field(default_factory=dict)
    """Ranks that never answered, and the host where they should run as far as it is known, else empty."""
    unreachable: Mapping[int, RankFacts] = field(default_factory=dict)
    """Ranks that did not come but left their facts in run.dir."""
    silent: frozenset[int] = frozenset()
    """Ranks that came and then gave no result in time."""
    gone: frozenset[int] = frozenset()
    """Ranks whose connection broke: they have ended."""
    doubles: tuple[str, ...] = ()
    """Sentences about ranks that two processes claim to be."""

    def hosts(self) -> dict[str, list[RankFacts]]:
        """The facts of every host that is heard of, by the scheduler's name of it and in the order of ranks."""
        found: dict[str, list[RankFacts]] = {}
        for _, facts in sorted({**self.reports, **self.unreachable}.items()):
            found.setdefault(facts.host.node, []).append(facts)
        return found
