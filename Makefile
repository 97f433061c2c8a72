# Everything runs in .venv, made once; a second run of any target installs nothing.
#   make demo   the whole line on this machine, about six minutes
#   make test   all tests, no GPU and no network needed
#   make check  format, lint, types, import directions
#   make soak   the long random tests: hours of kills, crash states, corruption and mutated input; SEED=N replays
#   make test-cluster  drills on a real Slurm and Ray of namespaces; skipped, with the reason, where rights are missing
#
# PYTHON  the interpreter to start from. A suitable torch it already has is kept and never replaced.
# TORCH   what to install when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
SEED ?= $(shell date +%Y%m%d)

.PHONY: demo test test-cluster check soak install clean

demo: .venv/.ready
	.venv/bin/python steadfast.py demo

test: .venv/.ready
	.venv/bin/python -m pytest

test-cluster: .venv/.ready
	sh tests/cluster/install.sh
	.venv/bin/python -m pytest tests/cluster -m cluster

check: .venv/.ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

soak: .venv/.ready
	@echo "replay with: make soak SEED=$(SEED)"
	.venv/bin/python -m pytest -m soak -s --seed $(SEED)

install: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh tools/install.sh
	touch $@

clean:
	rm -rf .venv
