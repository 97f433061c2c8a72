"""When this process was started. Torch-free."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_began() -> float:
    """Seconds since the epoch at which this process was started; now, where the system does not say."""
    try:
        # The name of the program, in parentheses, may hold anything; the fields after it do not.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        # Counted in whole ticks. The end of the tick is taken: a process must not seem older than what started it.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - max(0.0, age)
