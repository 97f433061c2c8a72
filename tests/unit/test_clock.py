"""When a process was started."""

import subprocess
import sys
import time

BEGAN = "from trainer.observe.clock import process_began; print(process_began())"


def test_a_process_is_never_older_than_its_launcher_says():
    """Else its first record sorts before the one that announces it, and one attempt is counted as two."""
    for _ in range(10):
        before = time.time()
        began = float(subprocess.run([sys.executable, "-c", BEGAN], capture_output=True, text=True, check=True).stdout)
        assert before <= began <= time.time()
