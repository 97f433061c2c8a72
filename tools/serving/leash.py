"""Start a program that dies with us: python -m tools.serving.leash PARENT_PID PROGRAM WORD...

Engines of others do not watch who started them; a gateway that is killed must not leave one with the GPU's memory.
The wish survives `exec`, so the program itself needs to know nothing.
"""

from __future__ import annotations

import os
import sys

from trainer.orphans import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
