"""tools/install.sh with a Python that only pretends: what is half made is made again, what is finished is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for the Python we start from and, copied, for that of .venv; writes down what it was asked for.
PYTHON = """#!/bin/sh
echo "$*" >>asked
case "$*" in
--version) echo "Python 3.9.1" ;;
*version_info*) [ ! -e old ] ;;
*"-m venv"*) rm -rf .venv; mkdir -p .venv/bin .venv/packages; cp "$0" .venv/bin/python ;;
*"-m pip"*) [ ! -e .venv/without-pip ] ;;
*sysconfig*) [ ! -e killed ] && echo .venv/packages ;;
*"sys, torch"*) case "$0" in *.venv*) [ -e .venv/packages/packages-of-the-parent.pth ] ;; esac ;;
*"os, torch"*) echo /parent/packages ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "install.sh", tmp_path / "tools")
    (tmp_path / "constraints.txt").write_text("torch==1\nnumpy==2\n")
    (tmp_path / "fake-python").write_text(PYTHON)
    (tmp_path / "fake-python").chmod(0o755)
    return tmp_path


def install(checkout: Path, python: str = "./fake-python") -> subprocess.CompletedProcess[str]:
    (checkout / "asked").write_text("")
    return subprocess.run(
        ["sh", "tools/install.sh"], cwd=checkout, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHON": python, "TORCH": "torch==1"},
    )  # fmt: skip


def makes_venv(checkout: Path) -> bool:
    return "-m venv" in (checkout / "asked").read_text()


def test_an_old_or_missing_python_is_one_line(checkout: Path) -> None:
    (checkout / "old").touch()
    for python, found in (("./fake-python", "(Python 3.9.1)"), ("./absent", "not found")):
        done = install(checkout, python)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {python} is not Python 3.11 or newer")
        assert found in line
    assert not (checkout / ".venv").exists()


def test_a_venv_that_works_is_kept_whoever_made_it(checkout: Path) -> None:
    """It may hold the CUDA torch of somebody who made it by hand."""
    assert install(checkout).returncode == 0
    assert makes_venv(checkout)
    mine = checkout / ".venv/packages/my-torch"
    mine.touch()
    assert install(checkout).returncode == 0
    assert not makes_venv(checkout)
    assert mine.exists()


def test_a_kill_before_the_path_file_does_not_lose_the_torch_that_is_there(checkout: Path) -> None:
    (checkout / "killed").touch()
    assert install(checkout).returncode != 0
    assert (checkout / ".venv" / "bin" / "python").exists()
    (checkout / "killed").unlink()
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert not makes_venv(checkout)
    assert (checkout / ".venv/packages/packages-of-the-parent.pth").read_text() == "/parent/packages\n"


def test_a_venv_without_pip_is_made_again(checkout: Path) -> None:
    assert install(checkout).returncode == 0
    (checkout / ".venv" / "without-pip").touch()
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert makes_venv(checkout)
