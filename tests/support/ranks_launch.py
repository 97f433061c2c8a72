"""A fake rank without torch: what it does is told by a JSON plan {rank: [action, ...]} on its command line.

Actions: ["print", text] ["error", text] ["exit", code] ["kill", signal] ["sleep", seconds] ["ignore", signal]
["child"] (a sleeping child that would hold the output open) ["stop", marker] (wait for SIGUSR2, write marker, exit 0).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.contract import resolve
from launch.signals import StopRequests, die_with_launcher


def main() -> int:
    world = resolve(os.environ)
    if world is None:
        sys.stderr.write("error: no launcher\n")
        return 2
    if not os.environ.get("FAKE_RANK_SLOW_START"):
        die_with_launcher(os.environ)
    actions = json.loads(sys.argv[1])
    for name, *values in actions.get(str(world.rank), actions.get("*", [])):
        if name == "print":
            print(values[0].replace("$RANK", str(world.rank)), flush=True)
        elif name == "error":
            sys.stderr.write(f"{values[0]}\n")
        elif name == "exit":
            return int(values[0])
        elif name == "kill":
            os.kill(os.getpid(), signal.Signals[values[0]])
        elif name == "sleep":
            time.sleep(values[0])
        elif name == "ignore":
            signal.signal(signal.Signals[values[0]], signal.SIG_IGN)
        elif name == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            print(f"child {child.pid}", flush=True)
        elif name == "stop":
            time.sleep(float(os.environ.get("FAKE_RANK_SLOW_START", "0")))
            requests = StopRequests()
            requests.install()
            print("ready", flush=True)
            while requests.requested is None:
                time.sleep(0.01)
            print(f"asked by {requests.requested.split()[0]}", flush=True)
            if world.is_first:
                marker = Path(values[0])
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.write_text("{}")
            return 0
        else:
            raise ValueError(name)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # As real ranks do: handlers of signals stay until the end.
    os._exit(code)
