"""Warm pools of ranks: starting torch and DeepSpeed takes seconds, a case takes tenths of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "rank_worker.py"


class CaseFailed(Exception):
    """A case raised on a rank."""


class RankPool:
    """`world_size` processes in one process group that run cases `module:function(world, kind, **arguments)`."""

    def __init__(self, world_size: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        threads = str(max(1, (os.cpu_count() or 1) // world_size))
        common = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {name: str(value) for name, value in common.items()}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads},
            )
            for rank in range(world_size)
        ]

    def run(self, case: str, **arguments) -> list:
        """Run the case on all ranks; returns their results in rank order."""
        request = json.dumps({"case": case, "arguments": arguments}) + "\n"
        for process in self.processes:
            process.stdin.write(request)
            process.stdin.flush()
        replies = [json.loads(process.stdout.readline() or '{"error": "the rank died"}') for process in self.processes]
        errors = [f"rank {rank}:\n{reply['error']}" for rank, reply in enumerate(replies) if "error" in reply]
        if errors:
            raise CaseFailed("\n".join(errors))
        return [reply["result"] for reply in replies]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.wait()
