"""The command line's frame: dispatch to one command module and turn errors into exit codes.

No command is defined here and no command module is imported before its name was typed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType
from typing import Any

from trainer.errors import SteadfastError
from trainer.redact import RedactedStream

VERSION = "0.1.0"


def run_command(commands: Mapping[str, tuple[str, str]], load: Callable[[str], ModuleType], argv: Sequence[str]) -> int:
    """Run the command named by `argv[0]` and return its exit code; `commands` maps a name to (module, help).

    Whatever it prints, tracebacks included, is printed without secrets (see `trainer.redact`).
    """
    with redirect_stdout(RedactedStream(sys.stdout)), redirect_stderr(RedactedStream(sys.stderr)):
        return _run_command(commands, load, argv)


def _run_command(
    commands: Mapping[str, tuple[str, str]], load: Callable[[str], ModuleType], argv: Sequence[str]
) -> int:
    with_traceback = "--traceback" in argv
    words = [word for word in argv if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(overview(commands))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"steadfast {VERSION}")
        return 0
    name = words[0]
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see steadfast --help"
        sys.stderr.write(f"error: there is no command '{name}'; {hint}\n")
        return 2
    module_name, summary = commands[name]
    module = load(module_name)
    parser = _Parser(prog=f"steadfast {name}", description=module.__doc__ or summary)
    module.configure(parser)
    parser.epilog = parser.epilog or "--traceback shows the full Python traceback of an error."
    try:
        arguments = parse(parser, words[1:])
        arguments.traceback = with_traceback
        return int(module.run(arguments))
    except SteadfastError as error:
        if with_traceback:
            traceback.print_exc()
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`steadfast ... | head`): nothing is wrong and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        hint = "" if with_traceback else "; --traceback shows where"
        sys.stderr.write(f"error: {type(error).__name__}: {_first_line(error)} (a bug of ours{hint})\n")
        return SteadfastError.exit_code


def report(error: SteadfastError) -> None:
    """Write `error` to stderr as the user reads it."""
    first, *rest = error.lines()
    sys.stderr.write("\n".join([f"error: {first}", *rest]) + "\n")


def overview(commands: Mapping[str, tuple[str, str]]) -> str:
    """The text of `steadfast --help`."""
    width = max(len(name) for name in commands)
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in commands.items())
    return (
        "usage: steadfast COMMAND ...\n\n"
        "Fine-tune large language models with DeepSpeed ZeRO: raw text in, proven safetensors out.\n\n"
        f"commands:\n{listing}\n\n"
        "steadfast COMMAND --help says more. --traceback shows the full Python traceback of an error."
    )


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """As parse_args, but `section.key=value` may also stand after options, where argparse no longer looks for them."""
    arguments, rest = parser.parse_known_args(words)
    overrides = getattr(arguments, "overrides", None)
    if rest and overrides is not None and all("=" in word and not word.startswith("-") for word in rest):
        overrides.extend(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Module docstrings are the descriptions (kept as written); defaults that say something are shown."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or isinstance(action.default, bool | list)
        return action.help if silent or "(default" in (action.help or "") else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Formats its help as above, and so do the parsers of its actions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **settings})
