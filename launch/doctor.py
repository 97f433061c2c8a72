"""Look at this machine: is it fit to train? One line a check: what was found, and what to do where it is not right.

steadfast doctor
steadfast doctor --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from launch.preflight.collectives import run_probe
from launch.preflight.facts import host_facts
from launch.preflight.findings import Finding, error, exit_code, ok
from launch.preflight.judge_host import judge_host
from launch.preflight.reports import Probe
from launch.preflight.requirements import read_requirements
from launch.processes import free_port
from trainer.config.device import guess_device, visible_gpus
from trainer.errors import PeerLostError
from trainer.world import World

_PROBE_SECONDS = 45.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `doctor`."""
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks that shall run here")
    parser.add_argument("--no-torch", action="store_true", help="do not start torch (a quick look on a login node)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Report on this machine; 0, or the exit code of what is wrong with it."""
    facts = host_facts(os.environ)
    findings = judge_host(facts, read_requirements(), ranks=arguments.ranks)
    probe = None
    if not arguments.no_torch and "torch" in facts.versions:
        world = World(0, 1, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
        probe = run_probe(world, world.master_port, _PROBE_SECONDS, libraries=True)
        findings += judge_probe(probe, gpus=visible_gpus(os.environ) if guess_device(os.environ) == "cuda" else 0)
    code = exit_code(findings)
    if arguments.json:
        print(json.dumps({
            "ok": code == 0, "exit_code": code, "facts": facts.model_dump(),
            "torch": None if probe is None else probe.model_dump(),
            "findings": [finding.as_json() for finding in findings],
        }, indent=1))  # fmt: skip
        return code
    widest = max(len(finding.check) for finding in findings)
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{finding.level:<7}  {finding.check:<{widest}}  {finding.fact}{remedy}")
    sys.stdout.flush()
    return code


def judge_probe(probe: Probe, gpus: int) -> list[Finding]:
    """What torch found on this machine alone; `gpus` are those that it should see."""
    lost = PeerLostError.exit_code
    if probe.error:
        stopped = f"after {probe.stage!r}" if probe.stage else "at once"
        return [error("torch runs", f"it stopped {stopped}: {probe.error}", "reinstall it: make install", lost)]
    if gpus and probe.device != "cuda":
        cuda = f"built for CUDA {probe.cuda}" if probe.cuda else "a build without CUDA"
        fact = f"torch {probe.torch} ({cuda}) sees none of {gpus} GPU(s)"
        remedy = "install a build that fits the driver, or set DS_ACCELERATOR=cpu"
        return [error("torch runs", fact, remedy, lost)]
    said = f"imported in {probe.import_seconds:.1f} s, deepspeed and transformers too; collectives work"
    if probe.device == "cuda":
        said += f", NCCL {probe.nccl}, {probe.free_gpu_gib:.1f} GiB of the GPU free"
    return [ok("torch runs", said)]
