"""A real Slurm cluster on one machine: a head node with the controller, and compute nodes with a daemon each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.nodes import Cluster, Node, make_nodes, why_not
from tests.support.waiting import until

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
# Every node claims this much, whatever the machine has.
CPUS, MEGABYTES = 8, 32000

CONFIGURATION = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,defer_batch=0
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait={kill_wait}
Waittime=0
InactiveLimit=0
MinJobAge=3600
MessageTimeout=10
BatchStartTimeout=10
UnkillableStepTimeout=20
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory={megabytes} Gres=gpu:test:2 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES State=UP DefaultTime=30 MaxTime=1440 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL State=UP DefaultTime=30 MaxTime=1440 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL State=UP DefaultTime=30 MaxTime=1440 PriorityTier=10 PreemptMode=OFF
"""


def why_no_slurm() -> str | None:
    """Why this machine cannot have a Slurm cluster, or None."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed; `make test-cluster` as root installs Debian's packages"
    return why_not()


class SlurmCluster(Cluster):
    """`nodes[0]` is the head (where one logs in), the others compute. Use it as a context manager."""

    def __init__(self, compute_nodes: int = 2, *, grace_seconds: int = 60, kill_wait_seconds: int = 5) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="slurm-")))
        self.state.chmod(0o755)
        self._grace, self._kill_wait = grace_seconds, kill_wait_seconds
        self._names = [f"node{number}" for number in range(1, compute_nodes + 1)]
        self._munged: subprocess.Popen[bytes] | None = None

    def node(self, name: str) -> Node:
        """A node by its name."""
        return next(node for node in self.nodes if node.name == name)

    def run(self, *command: str, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the head node."""
        environ = {"SLURM_CONF": str(self.state / "slurm.conf"), **options.pop("environ", {})}
        return self.head.run(command, environ, timeout=timeout, **options)

    def sbatch(self, *arguments: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit a job and return its id."""
        done = self.run("sbatch", "--parsable", *arguments, environ=dict(environ or {}), cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_for(self, job: str, states: Sequence[str], seconds: float) -> dict[str, str]:
        """Wait until the job is in one of `states`; returns what the controller knows of it."""
        known: dict[str, str] = {}

        def reached() -> bool:
            nonlocal known
            known = self.job(job)
            return known.get("JobState") in states

        until(reached, f"job {job} is {' or '.join(states)}, not {known.get('JobState')}", seconds, 0.2)
        return known

    def recover(self) -> None:
        """End all jobs and have all compute nodes on and idle."""
        self.run("scancel", "--user=root")
        self.run("scancel", "--state=pending", "--user=root")
        for name in self._names:
            if not self.node(name).is_on:
                self.restore(name)
        self.wait_idle(self._names, 60)

    def restore(self, name: str) -> None:
        """Switch a node on again."""
        self.node(name).switch_on()
        self.start_daemon(name)

    def start_daemon(self, name: str) -> None:
        """Start slurmd on a compute node that is on."""
        daemon = ["slurmd", "-D", "-N", name, "-f", str(self.state / "slurm.conf")]
        with (self.state / f"{name}.out").open("wb") as out:
            self.node(name).popen(daemon, stdout=out, stderr=out, start_new_session=True)

    def wait_idle(self, names: Sequence[str], seconds: float = 30) -> None:
        """Wait until the nodes take jobs."""

        def states() -> list[str]:
            return self.run("sinfo", "-h", "-N", "-p", "batch", "-n", ",".join(names), "-o", "%T").stdout.split()

        until(lambda: states() == ["idle"] * len(names), f"{names} are idle", seconds, 0.2)

    def _stop(self) -> None:
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()

    def _start(self) -> None:
        state = self.state
        (state / "controller").mkdir()
        key = state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # One private munge for all nodes: its socket is a file, which namespaces do not separate.
        self._munged = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--",
             "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={state}/munge.socket",
             f"--pid-file={state}/munged.pid", f"--log-file={state}/munged.log", f"--seed-file={state}/munged.seed"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(state / "munged.err").open("wb"),
        )  # fmt: skip
        self.nodes = make_nodes(["head", *self._names], state)
        for number in range(2):
            # A device that is no GPU: enough for Slurm to hand it out.
            os.mknod(state / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        (state / "gres.conf").write_text(f"Name=gpu Type=test File={state}/nvidia[0-1]\n")
        (state / "cgroup.conf").write_text(self._cgroup_setting())
        (state / "slurm.conf").write_text(
            CONFIGURATION.format(
                head=self.head.address,
                state=state,
                nodes=f"node[1-{len(self._names)}]",
                cpus=CPUS,
                megabytes=MEGABYTES,
                grace=self._grace,
                kill_wait=self._kill_wait,
                preempt_signal="SlurmctldParameters=preempt_send_user_signal",
            )
        )
        until((state / "munge.socket").exists, "munged listens", 10)
        with (state / "slurmctld.out").open("wb") as out:
            self.head.popen(
                ["slurmctld", "-D", "-i", "-f", str(state / "slurm.conf")], stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        for name in self._names:
            self.start_daemon(name)
        self.wait_idle(self._names)

    @staticmethod
    def _cgroup_setting() -> str:
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout
        found = re.search(r"(\d+)\.", version)
        return "CgroupPlugin=disabled\n" if found and int(found[1]) >= 23 else ""
