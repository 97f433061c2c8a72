"""Run the ranks of a preflight and pass on what they say. Rank 0 speaks for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from launch.processes import Output
from launch.supervise import Ranks
from trainer.errors import PeerLostError


def watch(ranks: Ranks, count: int, is_stopped: Callable[[], bool] = lambda: False) -> int:
    """Start `ranks`, of which there are `count`, and wait for all of them; returns the code of rank 0.

    When `is_stopped` becomes true they are ended. A rank that is killed, or lost with its host, is named; the code is
    69 when that was rank 0.
    """
    running = set(range(count))
    code = PeerLostError.exit_code
    try:
        ranks.start()
        while running and not is_stopped():
            for event in ranks.next_events(0.2):
                if isinstance(event, Output):
                    if event.rank == 0:
                        print(event.line, flush=True)
                    else:
                        sys.stderr.write(f"[rank {event.rank}] {event.line}\n")
                    continue
                running.discard(event.rank)
                if event.note:
                    sys.stderr.write(f"error: rank {event.rank} {event.note}\n")
                elif event.status < 0:
                    sys.stderr.write(f"error: rank {event.rank} was killed by signal {-event.status}\n")
                elif event.rank == 0:
                    code = event.status
    finally:
        ranks.close()
    return code
