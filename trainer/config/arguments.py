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


TRUST_REMOTE_CODE = "--trust-remote-code"


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option `trust_remote_code`: a revision, or None. It is never a key of a configuration."""
    parser.add_argument(
        TRUST_REMOTE_CODE,
        metavar="REVISION",
        help="run the code that lies in the model's directory, if it is exactly this revision (sha256:...); a refusal "
        "names the revision to give",
    )
