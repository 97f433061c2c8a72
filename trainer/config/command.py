"""Check, show and explain a configuration before anything runs. Needs no GPU and no torch: a login node will do.

steadfast config check configs/tiny.yaml train.max_steps=50
steadfast config show configs/tiny.yaml --ranks 8 --device cuda
steadfast config explain data.overlap
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from trainer.config.arguments import add_config_arguments
from trainer.config.deepspeed import accumulation_steps, check_deepspeed, check_swap_place, compile_deepspeed
from trainer.config.device import Device, device_warnings, guess_device
from trainer.config.explain import explain, explanations, json_schema
from trainer.config.load import config_as_yaml, load_config, named_deepspeed
from trainer.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare check, show, schema and explain."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = commands.add_parser("check", help="find every problem of a configuration and its DeepSpeed JSON")
    add_config_arguments(check)
    check.add_argument("--device", choices=["cpu", "cuda"], help="where it shall run (default: as on this machine)")
    check.add_argument("--json", action="store_true", help="print problems as JSON")

    show = commands.add_parser("show", help="print the resolved configuration, defaults included")
    add_config_arguments(show)
    show.add_argument("--ranks", type=int, metavar="N", help="also print what DeepSpeed gets with N ranks")
    show.add_argument("--device", choices=["cpu", "cuda"], help="where it shall run (default: as on this machine)")
    show.add_argument("--json", action="store_true", help="print as JSON")

    schema = commands.add_parser("schema", help="print the JSON schema that editors complete and check with")
    schema.add_argument("--json", action="store_true", help="accepted for symmetry: the schema is JSON")

    explanation = commands.add_parser("explain", help="explain a key, a section or everything")
    explanation.add_argument("key", nargs="?", metavar="KEY", help="e.g. data.overlap or data")
    explanation.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    if arguments.action == "check":
        return _check(arguments)
    if arguments.action == "show":
        return _show(arguments)
    if arguments.action == "schema":
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    elif arguments.json:
        print(json.dumps(explanations(arguments.key), indent=2, ensure_ascii=False))
    else:
        print(explain(arguments.key))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    device: Device = arguments.device or guess_device(os.environ)
    problems: list[str] = []
    try:
        config = load_config(arguments.config, arguments.overrides)
        sys.stderr.writelines(f"{warning}\n" for warning in device_warnings(config, device))
        problems = check_swap_place(config)
    except ConfigError as error:
        problems = error.problems
    deepspeed = named_deepspeed(arguments.config, arguments.overrides)
    if deepspeed is not None:
        problems = [*problems, *check_deepspeed(deepspeed, device)]
    if arguments.json:
        print(json.dumps({"config": str(arguments.config), "ok": not problems, "problems": problems}, indent=2))
        return ConfigError.exit_code if problems else 0
    if problems:
        raise ConfigError(problems)
    print(f"{arguments.config}: ok ({deepspeed} on {device})")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    device: Device = arguments.device or guess_device(os.environ)
    compiled = None
    if arguments.ranks is not None:
        if arguments.ranks < 1:
            raise ConfigError([f"--ranks {arguments.ranks}: a run has at least one rank"])
        compiled = compile_deepspeed(
            config,
            world_size=arguments.ranks,
            accumulation_steps=accumulation_steps(config, arguments.ranks),
            device=device,
        )
    if arguments.json:
        shown = {"config": config.model_dump()} | ({} if compiled is None else {"deepspeed": compiled})
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    print(config_as_yaml(config), end="")
    if compiled is not None:
        # As a comment, so that the output is still a configuration.
        print(f"# DeepSpeed on {arguments.ranks} ranks ({device}):")
        print("\n".join(f"# {line}" for line in json.dumps(compiled, indent=2).splitlines()))
    return 0
