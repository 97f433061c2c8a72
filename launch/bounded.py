"""Calls that may never return: a dead file server, a resolver that waits for every one of its servers in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


class Overdue(Exception):
    """The call did not return in time; its thread is left behind and dies with the process."""


def bounded(call: Callable[[], _Result], seconds: float) -> _Result:
    """What `call()` returns or raises, or Overdue after `seconds`."""
    results: list[_Result] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if results:
        return results[0]
    if failures:
        raise failures[0]
    raise Overdue(f"no answer in {seconds:.0f} s")
