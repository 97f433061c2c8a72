"""Filters of one row: lengths, scripts, and a function of the user's own. Each returns a reason to drop, or None."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.quality.text import answer_of, text_of
from trainer.data.records import Record, TokenIds
from trainer.errors import DataError, UsageError

SCRIPTS = ("han", "latin", "kana", "hangul", "cyrillic", "arabic", "other")

# Unicode blocks, first and last code point. Of these only letters count: digits, signs and punctuation have no script.
_BLOCKS = {
    "han": [(0x3005, 0x3005), (0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)],
    "latin": [
        (0x0041, 0x024F),
        (0x1E00, 0x1EFF),
        (0x2C60, 0x2C7F),
        (0xA720, 0xA7FF),
        (0xAB30, 0xAB6F),
        (0xFB00, 0xFB06),
        (0xFF21, 0xFF5A),
    ],
    "kana": [(0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    "hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)],
    "cyrillic": [(0x0400, 0x052F), (0x1C80, 0x1C8F), (0xA640, 0xA69F)],
    "arabic": [(0x0600, 0x06FF), (0x0750, 0x077F), (0x0870, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)],
}
_NO_LETTER = len(SCRIPTS)


@dataclass(frozen=True)
class LengthLimits:
    """Bounds in characters without outer white space, both ends allowed; None is no bound."""

    min_characters: int = 0
    max_characters: int | None = None
    min_answer: int = 0
    max_answer: int | None = None

    def __post_init__(self) -> None:
        for what, low, high in (
            ("characters", self.min_characters, self.max_characters),
            ("answer", self.min_answer, self.max_answer),
        ):
            if low < 0 or (high is not None and high < max(low, 1)):
                raise UsageError(f"no text has min_{what} {low} and max_{what} {high}", "give 0 <= min <= max")


def length_reason(record: Record, limits: LengthLimits) -> str | None:
    """Reason "too_short", "too_long", "answer_too_short" or "answer_too_long"; None within the limits.

    The text is `text_of` (user and assistant), the answer `answer_of`. A `TokenIds` has no text and passes.
    """
    if isinstance(record, TokenIds):
        return None
    length = len(text_of(record).strip())
    if length < limits.min_characters:
        return "too_short"
    if limits.max_characters is not None and length > limits.max_characters:
        return "too_long"
    length = len(answer_of(record).strip())
    if length < limits.min_answer:
        return "answer_too_short"
    if limits.max_answer is not None and length > limits.max_answer:
        return "answer_too_long"
    return None


@cache
def _script_of_code_point() -> NDArray[np.uint8]:
    """uint8 [0x40000]: index into `SCRIPTS`, `_NO_LETTER` for what is no letter. Beyond it there are no letters."""
    table = np.full(0x40000, _NO_LETTER, dtype=np.uint8)
    letters = np.fromiter((chr(code).isalpha() for code in range(0x20000)), dtype=bool, count=0x20000)
    table[:0x20000][letters] = SCRIPTS.index("other")
    for script, blocks in _BLOCKS.items():
        for first, last in blocks:
            table[first : last + 1][letters[first : last + 1]] = SCRIPTS.index(script)
    table[[0x3005, 0x3007]] = SCRIPTS.index("han")
    table[0x20000:] = SCRIPTS.index("han")
    return table


def script_shares(text: str) -> dict[str, float]:
    """Share of each of `SCRIPTS` among the letters of `text`; all 0.0 when it has no letter."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = codes[codes < 0x40000]
    counts = np.bincount(_script_of_code_point()[codes], minlength=_NO_LETTER + 1)[:_NO_LETTER]
    total = max(int(counts.sum()), 1)
    return {script: int(count) / total for script, count in zip(SCRIPTS, counts, strict=True)}


def script_reason(text: str, allowed: Sequence[str], share: float) -> str | None:
    """Reason "script" when less than `share` of the letters is of the `allowed` scripts, else None.

    Japanese needs ["han", "kana"]. A text without letters (a number, a formula) passes: it is in no wrong script.

    Raises:
        UsageError: an unknown script, none at all, or a share outside (0, 1].
    """
    unknown = sorted(set(allowed) - set(SCRIPTS))
    if unknown or not allowed:
        raise UsageError(f"unknown script {', '.join(unknown) or '(none)'}", f"known: {', '.join(SCRIPTS)}")
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share} of the letters", "give more than 0 and at most 1")
    shares = script_shares(text)
    found = sum(shares[script] for script in set(allowed))
    return "script" if any(shares.values()) and found < share - 1e-12 else None


@cache
def load_filter(name: str, folder: Path | None = None) -> Callable[[str], bool]:
    """The user's `module:function`, text -> bool. Modules in `folder` are found too, after installed ones.

    Raises:
        UsageError: no such form, module or function, or the module fails while it is imported.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name.isidentifier()):
        raise UsageError(f"filter '{name}' is no module:function", "write it as my_filters:keep")
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"filter '{name}' cannot be imported: {error}", _where_to_put(module_name, folder)) from error
    except Exception as error:
        raise UsageError(
            f"filter '{name}': importing it failed: {type(error).__name__}: {error}", "mend the module"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"filter '{name}': {module_name} has no function '{function_name}'", "define it: text -> bool")
    return function  # type: ignore[no-any-return]


def filter_reason(name: str, text: str, place: str, folder: Path | None = None) -> str | None:
    """Reason "filter module:function" when the user's function says False for `text`, None when it says True.

    Raises:
        UsageError: as `load_filter`.
        DataError: the function raised, or gave something else than True or False; names `place`.
    """
    try:
        keep = load_filter(name, folder)(text)
    except UsageError:
        raise
    except Exception as error:
        raise DataError(
            f"{place}: filter '{name}' raised {type(error).__name__}: {error}", "mend the filter"
        ) from error
    if not isinstance(keep, bool | np.bool_):
        raise DataError(
            f"{place}: filter '{name}' gave {type(keep).__name__}, not bool", "return True to keep, False to drop"
        )
    return None if keep else f"filter {name}"


def _where_to_put(module: str, folder: Path | None) -> str:
    return f"put {module.replace('.', '/')}.py into {folder}, or install it" if folder else "install it"
