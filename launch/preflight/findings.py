"""What a judgement consists of, and what follows from all of it: an exit code and the hosts to leave out. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainer.errors import CannotWriteError, MissingInputError, PeerLostError, UsageError

Level = Literal["ok", "warning", "error"]
# What no restart would cure comes first: it decides the exit code when there are several kinds of trouble.
_GRAVITY = (UsageError.exit_code, MissingInputError.exit_code, CannotWriteError.exit_code, PeerLostError.exit_code)


@dataclass(frozen=True)
class Finding:
    """One line of a report. `host` is empty when it is not about one host; `code` is the exit code of an error."""

    level: Level
    check: str
    fact: str
    remedy: str = ""
    code: int = 0
    host: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ok(check: str, fact: str, host: str = "") -> Finding:
    """Good news."""
    return Finding("ok", check, fact, host=host)


def warning(check: str, fact: str, remedy: str, host: str = "") -> Finding:
    """It will work, but not well."""
    return Finding("warning", check, fact, remedy, host=host)


def error(check: str, fact: str, remedy: str, code: int, host: str = "") -> Finding:
    """It will not work; `code` is the exit code."""
    return Finding("error", check, fact, remedy, code, host)


def exit_code(findings: Iterable[Finding]) -> int:
    """0 without an error, else the code of the error that is furthest from being cured by a restart."""
    codes = {finding.code for finding in findings if finding.level == "error"}
    return next((code for code in _GRAVITY if code in codes), max(codes, default=0))


def bad_hosts(findings: Iterable[Finding], hosts: Iterable[str]) -> list[str]:
    """Hosts to leave out: those with an error of their own, unless every host has one. `hosts` is all of them."""
    bad = sorted({finding.host for finding in findings if finding.level == "error" and finding.host})
    return bad if set(hosts) - set(bad) else []
