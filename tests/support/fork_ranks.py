"""Runs of `steadfast train` whose ranks are forked from one warm process: a start costs a second or two, not twenty.

Protocol on stdin/stdout, JSON lines: {"config", "overrides", "environ", "ranks", "output", "before"} ->
{"codes": exit code of each rank, negative for a signal, "seconds": when each ended}. `before` is a "module:function"
called in every rank before it trains; stderr of rank R goes to output/R.err.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import steadfast
from trainer.engine import device as devices


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    devices.prepare()
    # What a first engine imports late, and takes longest for.
    for module in (
        "deepspeed.runtime.zero.muon.muon_optimizer", "sentencepiece", "tokenizers",
        "transformers.models.llama.modeling_llama", "trainer.assemble", "trainer.checkpoint.resume",
        "trainer.engine.deepspeed_engine", "trainer.evaluate.evaluator", "trainer.model.self_check",
    ):  # fmt: skip
        importlib.import_module(module)
    for line in sys.stdin:
        replies.write(json.dumps(run(json.loads(line))) + "\n")
        replies.flush()


def run(request: dict) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    ranks = {fork(request, rank, port): rank for rank in range(request["ranks"])}
    codes, seconds = [0] * len(ranks), [0.0] * len(ranks)
    deadline = began + 120
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            rank = ranks.pop(pid)
            codes[rank], seconds[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        elif time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return {"codes": codes, "seconds": seconds}


def fork(request: dict, rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    os.dup2(os.open(Path(request["output"]) / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.dup2(2, 1)
    ranks = request["ranks"]
    os.environ |= request["environ"] | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if request.get("before"):
        module, name = request["before"].split(":")
        getattr(importlib.import_module(module), name)()
    os._exit(steadfast.main(["train", request["config"], *request["overrides"]]))


if __name__ == "__main__":
    main()
