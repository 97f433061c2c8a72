#!/bin/sh
# Make .venv and install the tested set into it. Called by make; safe to run again, also after a kill at any point.
#
# torch comes first: deepspeed's own build looks for it. A suitable torch that is already there (in .venv, or in the
# interpreter we start from) is kept: its exact version goes into the constraints, so that nothing can replace it.
set -eu
cd "$(dirname "$0")/.."

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$("$PYTHON" --version 2>&1 | head -n 1) || found=""
    echo "error: $PYTHON is not Python 3.11 or newer (${found:-not found}); name one: make PYTHON=/path/to/python" >&2
    exit 2
fi

suitable='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 10))'

# A venv without pip is what Debian leaves where python3-venv is missing. Any other .venv is kept, whoever made it.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if [ -e .venv ]; then echo "making .venv anew: what is there has no working pip"; fi
    "$PYTHON" -m venv --clear .venv
fi
if ! .venv/bin/python -c "$suitable" 2>/dev/null && "$PYTHON" -c "$suitable" 2>/dev/null; then
    # A path file, not --system-site-packages: that one would miss the torch of an interpreter that is itself in a
    # virtual environment.
    packages=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
    here=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$packages" >"$here/packages-of-the-parent.pth"
    echo "keeping the torch in $packages"
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

pip install --quiet --upgrade pip setuptools wheel
if ! .venv/bin/python -c "$suitable" 2>/dev/null; then
    echo "installing $TORCH"
    pip install --quiet "$TORCH" numpy
fi
grep -v '^torch==' constraints.txt >.venv/constraints.txt
.venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>.venv/constraints.txt

echo "installing deepspeed (against the installed torch), then the rest"
# No operator is compiled now: CPU runs need none, GPU runs build theirs on first use.
DS_BUILD_OPS=0 pip install --quiet --no-build-isolation -c .venv/constraints.txt deepspeed
# setuptools warns that folders beside an editable package may shadow it: here that is the purpose (pyproject.toml).
PYTHONWARNINGS=ignore pip install --quiet -c .venv/constraints.txt --editable '.[dev]'
echo "ready: .venv has $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"
