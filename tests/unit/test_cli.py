"""The command line's frame: dispatch, exit codes, and never a traceback unless asked for."""

import argparse
import types

import pytest

from trainer.cli import run_command
from trainer.config.arguments import add_config_arguments
from trainer.errors import ConfigError, DataError

COMMANDS = {"train": ("train", "trains"), "data": ("data", "stores")}


def module(run, configure=lambda parser: None):
    return types.SimpleNamespace(__doc__="What it does.", configure=configure, run=run)


def failing(error):
    def run(arguments):
        raise error

    return module(run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.jsonl:3: no messages", "mend the row"), 65, "error: a.jsonl:3: no messages; mend the row\n"),
        (ConfigError(["c:1: a", "c:2: b"]), 2, "error: 2 configuration problems\n  c:1: a\n  c:2: b\n"),
        (ZeroDivisionError("x"), 70, "error: ZeroDivisionError: x (a bug of ours; --traceback shows where)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)  # fmt: skip
def test_errors_become_lines_and_exit_codes(error, code, line, capsys):
    assert run_command(COMMANDS, lambda name: failing(error), ["train"]) == code
    assert capsys.readouterr().err == line


def test_a_traceback_only_when_asked_for(capsys):
    assert run_command(COMMANDS, lambda name: failing(DataError("bad")), ["train", "--traceback"]) == 65
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_command_gets_a_hint_and_nothing_is_imported(capsys):
    assert run_command(COMMANDS, lambda name: pytest.fail("imported"), ["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert run_command(COMMANDS, lambda name: pytest.fail("imported"), ["--help"]) == 0


def test_overrides_may_stand_anywhere():
    seen = []

    def configure(parser: argparse.ArgumentParser) -> None:
        check = parser.add_subparsers(dest="action", required=True).add_parser("check")
        add_config_arguments(check)
        check.add_argument("--nproc", type=int)

    def run(arguments: argparse.Namespace) -> int:
        seen.append((str(arguments.config), arguments.overrides, arguments.nproc))
        return 0

    for line in ("c.yaml --nproc 2 a.b=c", "c.yaml a.b=c --nproc 2", "--nproc 2 c.yaml a.b=c"):
        assert run_command(COMMANDS, lambda name: module(run, configure), ["train", "check", *line.split()]) == 0
    assert seen == [("c.yaml", ["a.b=c"], 2)] * 3
    for wrong in (["c.yaml", "--nproc", "2", "more"], ["c.yaml", "--npoc=2"]):
        with pytest.raises(SystemExit) as stop:
            run_command(COMMANDS, lambda name: module(run, configure), ["train", "check", *wrong])
        assert stop.value.code == 2
