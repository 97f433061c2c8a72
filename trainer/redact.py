"""Secrets stay out of what is written down: logs, configuration dumps, ledgers, crash reports.

Known by where they are (the values of environment variables that are named like secrets), by what stands around them
(a password in a URL, a signature in its query, an Authorization header) and by the shape of common tokens. A secret
that has neither name nor shape cannot be known: keep them in environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote

HIDDEN = "[redacted]"
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
SHORTEST = 8
"""Shorter values of secret variables are left alone: hiding every "1" of a text would hide the text."""
_NOT_SECRET = re.compile(r"(_FILE|_PATH|_DIR|_TIMEOUT|_ID)$|TOKENIZER|^SSH_|KEYBOARD|KEYMAP|KEYRING")
_SHAPES = re.compile(
    # Userinfo of a URL: only the password, or the name where there is no password.
    r"(?P<url>\b[a-z][a-z0-9+.-]*://(?:[^\s/:@?#'\"]*:)?)[^\s/@?#'\"]+(?=@)"
    # Signatures and tokens in a query string, or as key=value or a JSON member elsewhere.
    r"|(?P<name>(?i:\b(?:[a-z0-9_-]*(?:signature|credential|token|secret|password|passwd|api[_-]?key|access[_-]?key)|sig|auth)"
    r"['\"]?(?:=|: ?)['\"]?))(?!\[redacted\]|None\b|null\b|true\b|false\b|\d+\b|<)[^\s&'\",;}\])]{8,}"
    r"|(?P<header>(?i:authorization['\"]?: ?['\"]?(?:bearer |basic )?|bearer ))[A-Za-z0-9._~+/=-]{8,}"
    r"|\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    upper = name.upper()
    return any(word in upper for word in SECRET_WORDS) and not _NOT_SECRET.search(upper)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with every secret in it replaced by `[redacted]`."""
    values = tuple(
        sorted({value for name, value in environ.items() if len(value) >= SHORTEST and is_secret_name(name)})
    )
    if values:
        text = _any_of(values).sub(HIDDEN, text)
    return _SHAPES.sub(_keep_what_is_around, text)


def redacted(value: Any) -> Any:
    """Plain values (dict, list, text, numbers) with every text in them redacted, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return value


class RedactedStream:
    """A text stream that redacts what is written to it, and is the stream in everything else.

    Whole lines only would be surer, but a progress bar writes parts of lines and must be seen at once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets; returns its length, as the caller knows it."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@lru_cache(maxsize=4)
def _any_of(values: tuple[str, ...]) -> re.Pattern[str]:
    # As it is, as part of a URL, and with the escapes of JSON and repr.
    forms = {*values, *(quote(value, safe="") for value in values)}
    forms |= {value.encode("unicode_escape").decode() for value in values}
    return re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))


def _keep_what_is_around(found: re.Match[str]) -> str:
    return next((part for part in found.groups() if part is not None), "") + HIDDEN
