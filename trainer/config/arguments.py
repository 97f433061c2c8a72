"""How commands take a configuration: `CONFIG [section.key=value ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the positionals `config` (a path) and `overrides` (a list of texts)."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="values that win over the file's"
    )
