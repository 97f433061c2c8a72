"""Kill ranks of the commit protocol at random moments, many times, in one directory that goes on from kill to kill.

argv: directory, kills, seed. Prints one JSON object: kills, how many hit which phase, steps committed, and `bad`, a
list of what was lost or invalid (empty: all is well). Ranks are forked from this process, which imports no torch, so
a kill costs some ten milliseconds.
"""

import json
import mmap
import os
import random
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.commit_model import commit_step, newest_step  # noqa: E402
from trainer.errors import SteadfastError  # noqa: E402

PHASES = ["start", "open", "write", "middle of the file", "commit", "rename", "retain", "announced"]
MAX_RANKS = 3


class Board:
    """What each rank says of itself, in memory that outlives it: its phase and the last step it announced."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * MAX_RANKS)

    def clear(self) -> None:
        self._memory[:] = bytes(8 * MAX_RANKS)

    def write(self, rank: int, phase: str, announced: int) -> None:
        self._memory[8 * rank : 8 * rank + 8] = struct.pack("=ii", PHASES.index(phase), announced)

    def read(self, rank: int) -> tuple[str, int]:
        phase, announced = struct.unpack("=ii", self._memory[8 * rank : 8 * rank + 8])
        return PHASES[phase], announced


def be_a_rank(directory: Path, rank: int, world_size: int, first: int, hub: socket.socket, board: Board) -> None:
    stream = hub.makefile("rw")

    def exchange(message: dict) -> list:
        stream.write(json.dumps(message) + "\n")
        stream.flush()
        return json.loads(stream.readline())

    announced = 0
    for step in range(first, first + 1_000_000):

        def on_phase(phase: str) -> None:
            board.write(rank, phase, announced)  # noqa: B023 - called within the iteration

        commit_step(directory, step, rank=rank, world_size=world_size, exchange=exchange, on_phase=on_phase)
        announced = step
        board.write(rank, "announced", announced)


def serve(hubs: list[socket.socket], until: float) -> None:
    """Pass the ranks' messages around until the moment `until` (monotonic)."""
    waiting: dict[int, bytes] = {}
    parts = [b""] * len(hubs)
    with selectors.DefaultSelector() as selector:
        for rank, hub in enumerate(hubs):
            selector.register(hub, selectors.EVENT_READ, rank)
        while (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                try:
                    received = hubs[key.data].recv(1 << 16)
                except OSError:
                    received = b""
                if not received:
                    selector.unregister(hubs[key.data])
                    continue
                parts[key.data] += received
                if parts[key.data].endswith(b"\n"):
                    waiting[key.data], parts[key.data] = parts[key.data], b""
            if len(waiting) == len(hubs):
                reply = b"[" + b",".join(waiting.pop(rank).strip() for rank in range(len(hubs))) + b"]\n"
                for hub in hubs:
                    try:
                        hub.sendall(reply)
                    except OSError:
                        return


def one_kill(
    directory: Path, generator: random.Random, first: int, board: Board, longest: float
) -> tuple[list[str], int]:
    """Run ranks from step `first`, kill some or all within `longest` seconds.

    Returns the victims' phases and the last announced step.
    """
    world_size = generator.randint(1, MAX_RANKS)
    board.clear()
    hubs, ranks = [], []
    for rank in range(world_size):
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            try:
                for hub in [*hubs, ours]:
                    hub.close()
                be_a_rank(directory, rank, world_size, first, theirs, board)
            finally:
                os._exit(1)
        theirs.close()
        hubs.append(ours)
        ranks.append(child)
    serve(hubs, time.monotonic() + generator.uniform(0.002, longest))
    victims = generator.choice([[0], [world_size - 1], list(range(world_size))])
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)
    phases = [board.read(rank)[0] for rank in victims]
    # The others go on for a moment, as on other hosts, then the launcher ends them.
    serve(hubs, time.monotonic() + generator.choice([0, 0.005, 0.02]))
    for child in ranks:
        os.kill(child, signal.SIGKILL)
    for child in ranks:
        os.waitpid(child, 0)
    for hub in hubs:
        hub.close()
    return phases, max(board.read(rank)[1] for rank in range(world_size))


def main() -> None:
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    generator, board = random.Random(seed), Board()
    by_phase = dict.fromkeys(PHASES, 0)
    bad: list[str] = []
    newest, longest = 0, 0.1
    for number in range(kills):
        phases, announced = one_kill(directory, generator, newest + 1, board, longest)
        # About two commits before a kill, on a busy machine as on an idle one.
        longest = max(longest / 1.5, 0.02) if announced > newest + 1 else min(longest * 1.3, 5.0)
        for phase in phases:
            by_phase[phase] += 1
        try:
            newest = newest_step(directory, max(newest, announced))
        except (AssertionError, SteadfastError) as error:
            bad.append(f"kill {number} of seed {seed}: {error}")
            break
    commit_step(directory, newest + 1, rank=0, world_size=1, exchange=lambda message: [message])
    left = [path.name for path in directory.iterdir() if path.name.startswith(".")]
    print(json.dumps({"kills": kills, "by_phase": by_phase, "committed": newest, "bad": bad, "left": left}))


main()
