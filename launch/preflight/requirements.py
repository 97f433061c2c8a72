"""The versions this checkout was tested with and the oldest it accepts, read from its own files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from launch.preflight.facts import PACKAGES
from launch.preflight.reports import Requirements
from trainer.checkout import ROOT


def read_requirements(root: Path = ROOT) -> Requirements:
    """constraints.txt and pyproject.toml of the checkout."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    oldest = {"python": _lower_bound(project["requires-python"])}
    for text in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_.-]+", text)
        if name and name[0] in PACKAGES:
            oldest[name[0]] = _lower_bound(text)
    pinned = (line.strip().split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {name: version for name, version in pinned if name in PACKAGES}
    return Requirements(tested={name: versions[name] for name in PACKAGES if name in versions}, oldest=oldest)


def _lower_bound(text: str) -> str:
    found = re.search(r">=\s*([0-9.]+)", text)
    return found[1] if found else "0"
