"""The environment that llm-compressor gets for itself: it pins another transformers than training does.

Made once, in the user's cache, under a lock; half of one is never used, because it gets its name when it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from trainer.durable import write_errors
from trainer.errors import MissingInputError, UsageError
from trainer.locks import take_lock

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def python_of(named: Path | None) -> Path:
    """The Python of the environment: `named`, or the one in the user's cache, which is made when there is none.

    Raises UsageError when `named` has no llm-compressor, RunLockedError while another process makes one,
    and MissingInputError when it cannot be installed.
    """
    if named is not None:
        python = named / "bin" / "python"
        if not python.is_file():
            raise MissingInputError(f"{named} is no environment of Python", f"make one: {_by_hand(named)}")
        if subprocess.run([python, "-c", "import llmcompressor"], capture_output=True, check=False).returncode:
            raise UsageError(f"{named} has no llm-compressor", f"install it: {_by_hand(named)}")
        return python
    place = cached_environment()
    if not (place / "bin" / "python").exists():
        _make(place)
    return place / "bin" / "python"


def cached_environment() -> Path:
    """Where the environment for these requirements and this torch lies, or will."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wanted = f"{REQUIREMENTS.read_text()}{_torch()}{sys.version_info[:2]}"
    return cache / "steadfast" / f"quantizer-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"


def _make(place: Path) -> None:
    with write_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f"{place.name}.lock")
    with take_lock(lock, f"the environment {place}", "another process makes it: wait for that"):
        if (place / "bin" / "python").exists():
            return
        unfinished = place.with_name(f"{place.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        sys.stderr.write(f"making an environment for llm-compressor, once, about 2 GB: {place}\n")
        with write_errors(unfinished):
            venv.create(unfinished, with_pip=True)
        command = [str(unfinished / "bin" / "python"), "-m", "pip", "install", "-r", str(REQUIREMENTS), _torch()]
        # What pip does is shown: it may take minutes.
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise MissingInputError(
                "llm-compressor could not be installed (pip's reason is above)",
                f"make one where packages can be had, and name it with --environment: {_by_hand(Path('DIR'))}",
            )
        with write_errors(place):
            unfinished.rename(place)


def _torch() -> str:
    """The torch that is used here, without the suffix of its build."""
    return f"torch=={importlib.metadata.version('torch').partition('+')[0]}"


def _by_hand(place: Path) -> str:
    return f"python3 -m venv {place} && {place}/bin/pip install -r {REQUIREMENTS} {_torch()}"
