"""Train a model as a configuration says. Starting the same command again resumes the run.

steadfast train configs/tiny.yaml --nproc 2
steadfast train configs/tiny.yaml data.train=out/store train.max_steps=40
torchrun --nproc-per-node 2 steadfast.py train configs/tiny.yaml

Ctrl-C once: all ranks agree on a checkpoint and stop (exit code 75). Twice: everything stops at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from launch import local_place
from launch.attempts import run_with_restarts, write_reference
from launch.contract import LAUNCHER_PID, resolve
from launch.faults import name_of_fault
from launch.local import launch_local
from launch.rendezvous import MEETING_SECONDS, meet
from launch.signals import StopRequests, die_with_launcher
from trainer.checkout import ROOT
from trainer.cli import report
from trainer.config.arguments import TRUST_REMOTE_CODE, add_config_arguments, add_trust_argument
from trainer.config.deepspeed import check_deepspeed, check_swap_place
from trainer.config.device import Device, device_warnings, guess_device, visible_gpus
from trainer.config.load import load_config
from trainer.config.resume_law import check_allowed
from trainer.config.schema import Config
from trainer.durable import make_directory, write_file
from trainer.errors import ConfigError, RunLockedError, SteadfastError, UsageError
from trainer.model.remote_code import checked_code
from trainer.redact import redact
from trainer.run_directory import RunDirectory
from trainer.world import World


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `train CONFIG [section.key=value ...] [--nproc N]`."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (1 when not given)")
    add_permission_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="a damaged newest checkpoint is an error (checkpoint.strict=true)"
    )
    add_restart_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Be one rank when a launcher started us, else start ranks on this machine; returns the exit code."""
    world = resolve(os.environ)
    permissions = permission_words(arguments)
    if arguments.strict:
        arguments.overrides.append("checkpoint.strict=true")
    if world is None:
        processes = 1 if arguments.nproc is None else arguments.nproc
        require_gpus("--nproc", processes, os.environ)
        config = checked_config(arguments.config, arguments.overrides, processes, guess_device(os.environ))
        check_remote_code(config, arguments.trust_remote_code)
        command = rank_command(arguments.config, arguments.overrides, permissions, show_traceback=arguments.traceback)
        write_reference(RunDirectory(Path(config.run.dir)), local_place.reference())
        return run_with_restarts(
            lambda: launch_local(command, processes=processes, environ=os.environ, run_dir=Path(config.run.dir)),
            config,
            arguments.max_restarts,
        )
    if arguments.nproc is not None and arguments.nproc > 1:
        raise UsageError(
            f"--nproc {arguments.nproc} inside a launched rank (RANK={world.rank} is set)",
            "let one launcher start the ranks: drop --nproc, or unset RANK and its companions",
        )
    config = load_config(arguments.config, arguments.overrides)
    if world.is_first and LAUNCHER_PID not in os.environ:
        # Our launchers have said it already.
        _warn(config, guess_device(os.environ))
    return _be_a_rank(config, world, arguments)


def add_permission_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what only a command line may allow, never a file: `allow_change` and `trust_remote_code`."""
    add_trust_argument(parser)
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although KEY differs from the checkpoint's (`config explain KEY` says what a change means); it "
        "is recorded; may be given several times",
    )


def add_restart_argument(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option `max_restarts`."""
    parser.add_argument(
        "--max-restarts",
        type=_restarts,
        default=0,
        metavar="N",
        help="start again after a crash, at most N times in all and twice from the same checkpoint (default 0)",
    )


def _restarts(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of restarts, e.g. 3")
    return int(text)


def checked_config(path: Path, overrides: Sequence[str], ranks: int, device: Device) -> Config:
    """Everything that can be known to be wrong before a process is started, as one ConfigError.

    What will work, but badly, is a warning on stderr.
    """
    if ranks < 1:
        raise UsageError(f"{ranks} ranks asked for", "a run has at least one rank")
    config = load_config(path, overrides)
    if problems := [*check_deepspeed(config.engine.deepspeed, device), *check_swap_place(config)]:
        raise ConfigError(problems)
    _warn(config, device)
    return config


def require_gpus(option: str, ranks: int, environ: Mapping[str, str]) -> None:
    """Raise UsageError when ranks on GPUs are asked for and this machine shows fewer GPUs; `option` asked for them."""
    if guess_device(environ) == "cuda" and ranks > (gpus := visible_gpus(environ)):
        raise UsageError(
            f"{option} {ranks} needs {ranks} GPUs, this machine shows {gpus}",
            f"give {option} {gpus} at most, or set DS_ACCELERATOR=cpu to train on the CPU",
        )


def permission_words(arguments: argparse.Namespace) -> list[str]:
    """What the user allowed, as the next process takes it. Raises UsageError when a name of a change is none."""
    words = [f"--allow-change={key}" for key in check_allowed(arguments.allow_change)]
    trusted = arguments.trust_remote_code
    return words if trusted is None else [*words, f"{TRUST_REMOTE_CODE}={trusted}"]


def check_remote_code(config: Config, trusted: str | None) -> None:
    """Refuse code of a model that is not the trusted one before a process is started; see `checked_code`."""
    checked_code(None if config.model.path is None else Path(config.model.path), trusted)


def rank_command(
    config: Path, overrides: Sequence[str], permissions: Sequence[str] = (), *, show_traceback: bool
) -> list[str]:
    """The command of every rank: this checkout's steadfast.py with this Python, however we were started.

    `permissions` are those of `permission_words`.
    """
    words = [sys.executable, str(ROOT / "steadfast.py"), "train", str(config), *overrides, *permissions]
    return [*words, "--traceback"] if show_traceback else words


def preflight_command(config: Path, overrides: Sequence[str]) -> list[str]:
    """The command of every rank of a preflight; nothing when the site leaves it out (SFT_PREFLIGHT=0)."""
    if os.environ.get("SFT_PREFLIGHT") == "0":
        return []
    return [sys.executable, str(ROOT / "steadfast.py"), "preflight", str(config), *overrides]


def _warn(config: Config, device: Device) -> None:
    for warning in device_warnings(config, device):
        sys.stderr.write(f"{warning}\n")


def _be_a_rank(config: Config, world: World, arguments: argparse.Namespace) -> int:
    """Train as one rank and end the process with its exit code.

    The launcher (if ours) decides what Ctrl-C means, and takes us along when it dies.
    """
    if os.environ.get(LAUNCHER_PID):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (reason := die_with_launcher(os.environ)) is not None and world.is_first:
        sys.stderr.write(f"warning: {reason}\n")
    stop_requests = StopRequests()
    stop_requests.install()
    lock = None
    try:
        # Before anything slow is imported: a second start shall not wait for torch to be refused.
        run = RunDirectory(Path(config.run.dir))
        if world.is_first:
            make_directory(run.path)
        run.keep_private(share_with_group=config.run.share_with_group)
        lock = run.lock() if world.is_first else None
        listener = meet(world, os.environ, min(MEETING_SECONDS, config.engine.timeout_seconds))
        from trainer.assemble import train

        train(
            config,
            world,
            stop_requests,
            listener,
            allow_changes=arguments.allow_change,
            trusted_code=arguments.trust_remote_code,
            lock=lock,
        )
    except BaseException as error:
        code = _say_what_failed(error, config, world, show_traceback=arguments.traceback)
        if lock is not None:
            lock.close()
        _leave(code)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End this rank at once, without the interpreter's teardown.

    After a failure that teardown would wait for peers in gloo's and NCCL's destructors, up to the full timeout; after
    a success it was seen to abort now and then, when native threads were still there. Nothing is lost: files are
    closed, and what a checkpoint committed is on disk.
    """
    for stream in (sys.stdout, sys.stderr):
        # Whoever read our output may be gone.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _say_what_failed(error: BaseException, config: Config, world: World, *, show_traceback: bool) -> int:
    """Say what happened in one line and keep the whole traceback in run.dir/errors; returns the exit code."""
    fault = name_of_fault(error)
    place = RunDirectory(Path(config.run.dir)).error_report(world.rank)
    kept = f"the whole traceback is in {place}"
    try:
        # A run directory that another run holds is not ours to write to.
        if not isinstance(error, RunLockedError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, redact("".join(traceback.format_exception(error))))
    except (OSError, SteadfastError) as failure:
        kept = f"its traceback could not be kept: {failure}"
        show_traceback |= fault is None
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        code = 130
        sys.stderr.write("error: interrupted\n")
    elif fault is not None:
        code = fault.exit_code
        report(fault)
    else:
        code = SteadfastError.exit_code
        text = (str(error).strip().splitlines() or [""])[0]
        sys.stderr.write(f"error: {type(error).__name__}: {text} (a bug of ours; {kept})\n")
    return code
