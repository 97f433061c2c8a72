"""Start a training run on this machine, with Slurm, or on a Ray cluster; see how it does; stop it.

steadfast launch local configs/tiny.yaml --ranks-per-node 2 --max-restarts 3
steadfast launch slurm configs/tiny.yaml --nodes 2 --gpus-per-node 8 --sbatch="--partition=gpu --time=12:00:00"
steadfast launch ray configs/tiny.yaml --nodes 2 --gpus-per-node 8 --address http://HEAD:8265
steadfast launch slurm configs/tiny.yaml --nodes 2 --gpus-per-node 8 --dry-run

steadfast launch status runs/tiny
steadfast launch logs runs/tiny --follow
steadfast launch stop runs/tiny --graceful

On several nodes the checkout, its Python and the paths of the configuration must be the same on every node.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import local_place, places
from launch.attempts import record_submit, run_with_restarts, write_reference
from launch.contract import LAUNCHER_PID, VARIABLES, resolve
from launch.local import launch_local, plan_local
from launch.train_command import (
    add_permission_arguments,
    add_restart_argument,
    check_remote_code,
    checked_config,
    permission_words,
    preflight_command,
    rank_command,
    require_gpus,
)
from trainer.config.arguments import add_config_arguments
from trainer.config.deepspeed import accumulation_steps
from trainer.config.device import guess_device
from trainer.config.schema import Config
from trainer.errors import UsageError
from trainer.run_directory import RunDirectory


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the places to launch in, and what can be done with a run that was launched."""
    commands = parser.add_subparsers(dest="place", required=True, metavar="PLACE|VERB")
    local = commands.add_parser("local", help="every rank on this machine, as `steadfast train --nproc`")
    slurm = commands.add_parser("slurm", help="submit slurm/sft.sh: one task of srun a rank, requeued when preempted")
    ray = commands.add_parser("ray", help="one host process a node in a Ray cluster, which starts that node's ranks")
    for place in (local, slurm, ray):
        add_config_arguments(place)
        place.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes to run on")
        place.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs of a node; 0: CPU")
        place.add_argument("--ranks-per-node", type=int, metavar="K", help="ranks on a node (default: one a GPU, or 1)")
        place.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
        place.add_argument("--json", action="store_true", help="with --dry-run: print the plan as JSON")
        add_permission_arguments(place)
    add_restart_argument(local)
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTIONS", help='options for sbatch, e.g. --sbatch="--time=60"'
    )
    ray.add_argument(
        "--address",
        metavar="ADDRESS",
        help="job API to submit to (http://HEAD:8265), or a cluster to be the driver in: auto, HOST:6379 "
        "(default: RAY_ADDRESS, which jobs have; else a cluster on this machine)",
    )
    ray.add_argument(
        "--allow-unauthenticated", action="store_true", help="use a remote cluster even if it asks for no token"
    )

    status = commands.add_parser("status", help="where a launched run is, and how its attempts ended")
    logs = commands.add_parser("logs", help="what a launched run has written")
    stop = commands.add_parser("stop", help="end a launched run")
    for verb in (status, logs, stop):
        verb.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory (run.dir of the configuration)")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    logs.add_argument("--lines", type=int, default=50, metavar="N", help="lines from the end")
    logs.add_argument("--follow", action="store_true", help="go on as more is written")
    stop.add_argument("--graceful", action="store_true", help="save an agreed checkpoint first")
    # What slurm/sft.sh and its srun call; nobody types these.
    for inner in ("slurm-job", "slurm-task"):
        parser = commands.add_parser(inner)
        add_config_arguments(parser)
        add_permission_arguments(parser)
    # The job that a graceful stop sends to a Ray cluster.
    commands.add_parser("ray-stop").add_argument("job")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code, that of the run where this process waits for it."""
    if arguments.place in ("status", "logs", "stop"):
        return _look_after(arguments)
    if arguments.place == "ray-stop":
        from launch.ray.place import stop_from_within

        return stop_from_within(arguments.job)
    if arguments.place == "slurm-job":
        from launch.slurm.job import run_job

        return run_job(
            arguments.config, arguments.overrides, permission_words(arguments), show_traceback=arguments.traceback
        )
    if arguments.place == "slurm-task":
        from launch.slurm.task import run_task

        return run_task(
            rank_command(
                arguments.config, arguments.overrides, permission_words(arguments), show_traceback=arguments.traceback
            )
        )
    return _launch(arguments)


def _look_after(arguments: argparse.Namespace) -> int:
    run = RunDirectory(arguments.run)
    reference = places.reference_of(run)
    place = places.place_of(reference)
    if arguments.place == "logs":
        return int(place.logs(reference, lines=arguments.lines, follow=arguments.follow))
    if arguments.place == "stop":
        print(place.stop(reference, graceful=arguments.graceful))
        return 0
    status = places.status_of(run)
    print(json.dumps(status, indent=2) if arguments.json else "\n".join(places.status_lines(status)))
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked without a process, then launch."""
    if (world := resolve(os.environ)) is not None:
        raise UsageError(
            f"launch inside a launched rank (RANK={world.rank} is set)", "use train, or unset RANK and its companions"
        )
    nodes, gpus = arguments.nodes, arguments.gpus_per_node
    ranks = arguments.ranks_per_node if arguments.ranks_per_node is not None else gpus or 1
    for name, value, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus, 0), ("--ranks-per-node", ranks, 1)):
        if value < least:
            raise UsageError(f"{name} {value}", f"give at least {least}")
    if arguments.place == "local" and nodes != 1:
        raise UsageError(
            f"launch local --nodes {nodes}", "this machine is one node; use launch slurm or ray for several"
        )
    if arguments.place == "local":
        require_gpus("--ranks-per-node", ranks, os.environ)
    device = "cuda" if gpus else guess_device(os.environ) if arguments.place == "local" else "cpu"
    config = checked_config(arguments.config, arguments.overrides, nodes * ranks, device)
    check_remote_code(config, arguments.trust_remote_code)
    permissions = permission_words(arguments)
    command = rank_command(arguments.config, arguments.overrides, permissions, show_traceback=arguments.traceback)
    if arguments.place == "slurm":
        return _submit(arguments, config, nodes, ranks)
    if arguments.place == "ray":
        from launch.ray.api import is_api

        arguments.address = arguments.address or os.environ.get("RAY_ADDRESS")
        if is_api(arguments.address):
            return _submit_to_ray(arguments, config, nodes, ranks)
    if arguments.dry_run:
        _show(_plan(arguments, config, command, nodes, ranks), as_json=arguments.json)
        return 0
    if arguments.place == "local":
        write_reference(RunDirectory(Path(config.run.dir)), local_place.reference())
        return run_with_restarts(
            lambda: launch_local(command, processes=ranks, environ=os.environ, run_dir=Path(config.run.dir)),
            config,
            arguments.max_restarts,
        )
    from launch.ray.run import run_ray

    # The ranks' supervisor looks too, but only after minutes of waiting for nodes.
    RunDirectory(Path(config.run.dir)).refuse_second_start()
    return run_ray(
        command,
        config,
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        address=arguments.address,
        allow_unauthenticated=arguments.allow_unauthenticated,
        preflight=preflight_command(arguments.config, arguments.overrides),
    )


def _submit_to_ray(arguments: argparse.Namespace, config: Config, nodes: int, ranks: int) -> int:
    from launch.ray.submit import job_name, plan_ray, submit

    run_dir = Path(config.run.dir)
    plan = plan_ray(
        arguments.config,
        [*arguments.overrides, *permission_words(arguments)],
        run_dir=run_dir,
        address=arguments.address,
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=arguments.gpus_per_node,
        environ=os.environ,
        directory=str(Path.cwd()),
        show_traceback=arguments.traceback,
    )
    if arguments.dry_run:
        shown = json.dumps({"place": "ray", "address": plan.address, **plan.request()}, indent=2)
        print(shown if arguments.json else "\n".join(plan.lines()))
        return 0
    job = job_name(run_dir)
    submit(plan, job, allow_unauthenticated=arguments.allow_unauthenticated)
    reference = {"place": "ray", "job": job, "api": plan.address, "cluster": ""}
    write_reference(RunDirectory(run_dir), reference | {"allow_unauthenticated": arguments.allow_unauthenticated})
    print(f"submitted job {job}; see steadfast launch status {run_dir}")
    return 0


def _submit(arguments: argparse.Namespace, config: Config, nodes: int, ranks: int) -> int:
    from launch.slurm.submit import output_of, plan_slurm, submit

    plan = plan_slurm(
        arguments.config,
        arguments.overrides,
        permission_words(arguments),
        run_dir=Path(config.run.dir),
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=arguments.gpus_per_node,
        sbatch_options=[word for options in arguments.sbatch for word in shlex.split(options)],
    )
    if arguments.dry_run:
        if arguments.json:
            print(json.dumps({"place": "slurm", **asdict(plan)}, indent=2))
        else:
            print("\n".join(plan.lines()))
        return 0
    job = submit(plan)
    run_directory = RunDirectory(Path(config.run.dir))
    write_reference(run_directory, {"place": "slurm", "job": job, "output": output_of(job)})
    record_submit(run_directory, job)
    print(f"submitted job {job}; see steadfast launch status {config.run.dir}")
    return 0


def _plan(arguments: argparse.Namespace, config: Config, command: list[str], nodes: int, ranks: int) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "place": arguments.place,
        "nodes": nodes,
        "ranks_per_node": ranks,
        "world_size": nodes * ranks,
        "gradient_accumulation_steps": accumulation_steps(config, nodes * ranks),
        "command": command,
        "directory": str(Path.cwd()),
    }
    if arguments.place == "ray":
        from launch.ray.hosts import forwarded

        return plan | {
            "address": arguments.address or "a new local cluster",
            "bundle": {"CPU": ranks, "GPU": arguments.gpus_per_node},
            "strategy": "STRICT_SPREAD" if nodes > 1 else "PACK",
            "rendezvous": "address and free port of the host of rank 0, chosen there at start",
            "forwarded_variables": [*forwarded(os.environ)],
        }
    shown = (*VARIABLES, LAUNCHER_PID, "OMP_NUM_THREADS", "PYTHONUNBUFFERED")
    plan["ranks"] = [
        {name: process.environment[name] for name in shown}
        for process in plan_local(command, processes=ranks, environ=os.environ, port=0)
    ]
    for rank in plan["ranks"]:
        rank["MASTER_PORT"] = "a free port, chosen at start"
        rank[LAUNCHER_PID] = "process id of the launcher"
    return plan


def _show(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    for name, value in plan.items():
        if name == "command":
            print(f"command: {shlex.join(value)}")
        elif name == "forwarded_variables":
            print(f"forwarded_variables: {' '.join(value) or 'none'}")
        elif name == "ranks":
            for rank in value:
                print(f"rank {rank['RANK']}: " + " ".join(f"{key}={shlex.quote(text)}" for key, text in rank.items()))
        else:
            print(f"{name}: {value}")
