"""Who this process is among the ranks of a run: a value, the same type for one process and for a thousand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The place of one rank; `master_address` and `master_port` are where rank 0 listens for the rendezvous."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @property
    def is_first(self) -> bool:
        """True on rank 0, the only rank that writes files which belong to the whole run."""
        return self.rank == 0


def agent_opens_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent serves torch's store at MASTER_PORT, so that every rank is a client."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def opens_store(world: World, environ: Mapping[str, str]) -> bool:
    """Whether this rank serves torch's store to the others."""
    return world.is_first and not agent_opens_store(environ)
