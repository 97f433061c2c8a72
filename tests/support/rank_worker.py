"""One warm rank of a pool: joins a process group once, then runs the cases it is told to run.

Protocol on stdin/stdout, JSON lines: {"case": "module:function", "arguments": {...}} -> {"result": ...} or
{"error": text}. What a case prints goes to stderr.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.contract import resolve
from trainer import collectives
from trainer.engine import device as devices


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    world = resolve(os.environ)
    kind = devices.prepare()
    collectives.join(world, devices.communication_backend(kind), timeout_seconds=60)
    for line in sys.stdin:
        request = json.loads(line)
        module, name = request["case"].split(":")
        try:
            function = getattr(importlib.import_module(module), name)
            reply = {"result": function(world, kind, **request["arguments"])}
        except BaseException:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


main()
