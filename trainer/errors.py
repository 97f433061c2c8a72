"""User-facing errors. Each class is one kind of trouble and carries the exit code that launchers act on.

    SteadfastError                 70  a bug of ours (also: any exception that is none of the below)
    ├── NotEqualError               1  two things were compared and are not equal
    ├── UsageError                  2  the command line makes no sense
    │   └── ConfigError             2  the configuration is wrong; holds every problem found, not only the first
    ├── DataError                  65  a row, a template or a store is bad
    ├── MissingInputError          66  a file or directory that was named does not exist
    ├── PeerLostError              69  another rank or the rendezvous is gone (restart helps)
    ├── HangError                  71  no progress within the bound (restart helps)
    ├── CannotWriteError           73  disk full, read-only, no permission
    ├── CheckpointError            74  a checkpoint is damaged and none before it is valid
    ├── StoppedOnRequest           75  stopped as asked, with a committed checkpoint (requeue)
    ├── ResumeRefusedError         76  config, data or tokenizer differ from the checkpoint's
    ├── RunLockedError             77  another live process owns the run directory
    ├── DivergedError              78  too many non-finite steps in a row
    └── Interrupted               130  a second Ctrl-C

A message is one line: fact, place, remedy. Only the command line catches these (`trainer.cli`).
"""

from __future__ import annotations

from collections.abc import Sequence


class SteadfastError(Exception):
    """Base of all user-facing errors: `fact` (what and where) and `remedy` (what to do now).

    Each class has the exit code of its kind of trouble, and `meaning`, that code in a few words.
    """

    exit_code = 70
    meaning = "a bug of ours"

    def __init__(self, fact: str, remedy: str = "") -> None:
        super().__init__(fact)
        self.fact = fact
        self.remedy = remedy

    def lines(self) -> list[str]:
        """The error as the user sees it, one entry a line."""
        return [f"{self.fact}; {self.remedy}" if self.remedy else self.fact]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class NotEqualError(SteadfastError):
    """What was to be shown equal is not: an export and its checkpoint, a model and its signature."""

    exit_code = 1
    meaning = "not equal"


class UsageError(SteadfastError):
    """The command line makes no sense."""

    exit_code = 2
    meaning = "usage or configuration"


class ConfigError(UsageError):
    """The configuration is wrong: `problems` holds every problem found, each one line with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = len(problems)
        super().__init__(f"{count} configuration problem{'s' if count != 1 else ''}")
        self.problems = list(problems)

    def lines(self) -> list[str]:
        """The count, then every problem."""
        return [self.fact, *(f"  {problem}" for problem in self.problems)]


class DataError(SteadfastError):
    """A row, a chat template, a token store or one of its files is bad."""

    exit_code = 65
    meaning = "bad data"


class MissingInputError(SteadfastError):
    """A file or directory that was named does not exist."""

    exit_code = 66
    meaning = "input missing"


class PeerLostError(SteadfastError):
    """Another rank, its host or the rendezvous is gone; a restart helps."""

    exit_code = 69
    meaning = "peer lost"


class HangError(SteadfastError):
    """Nothing moved within the bound; a restart helps."""

    exit_code = 71
    meaning = "no progress"


class CannotWriteError(SteadfastError):
    """Disk full, read-only or no permission."""

    exit_code = 73
    meaning = "cannot write"


class CheckpointError(SteadfastError):
    """A checkpoint is damaged and no valid one before it exists."""

    exit_code = 74
    meaning = "checkpoint damaged"


class StoppedOnRequest(SteadfastError):
    """Stopped as asked; the last checkpoint is committed, so the run can be requeued."""

    exit_code = 75
    meaning = "stopped on request"


class ResumeRefusedError(SteadfastError):
    """Configuration, data or tokenizer differ from what the checkpoint was made with."""

    exit_code = 76
    meaning = "resume refused"


class RunLockedError(SteadfastError):
    """Another live process owns the run directory."""

    exit_code = 77
    meaning = "run locked"


class DivergedError(SteadfastError):
    """Too many non-finite steps in a row."""

    exit_code = 78
    meaning = "diverged"


class Interrupted(SteadfastError):
    """A second Ctrl-C: stop now."""

    exit_code = 130
    meaning = "interrupted"
