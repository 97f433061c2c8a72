"""Names of files that somebody else wrote down: an index, a manifest. They stay inside the directory they belong to."""

from __future__ import annotations

import re
from typing import TypeGuard

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether `name` names a file in its own directory: no separator, no dot in front, nothing a shell would read."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def is_plain_path(name: object) -> TypeGuard[str]:
    """The same for a path of plain names joined by `/`, at most eight of them."""
    return isinstance(name, str) and 0 < len(parts := name.split("/")) <= 8 and all(map(is_plain_name, parts))
