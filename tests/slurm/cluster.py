"""A real Slurm on this machine, thrown away afterwards: munged, slurmctld, and one slurmd for each node.

All nodes are this host under names of their own (`slurmd -N`), so nothing here needs root or a second machine. Nodes
claim more CPUs than there are: the jobs of the tests mostly wait. Times that sites set to minutes are seconds here;
cred_expire, which a requeued job waits for, is at its least.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from patience import PATIENCE, wait_until
from ports import free_port

SBIN = "/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
NODES = 8
CPUS = 16

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
MinJobAge=3600
SlurmdTimeout=300
MessageTimeout=60
BatchStartTimeout=120
ReturnToService=2
RebootProgram=/bin/true
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=node[0-1] Default=YES MaxTime=INFINITE State=UP
PartitionName=loss Nodes=node[2-3] MaxTime=INFINITE State=UP
PartitionName=broken Nodes=node[6-7] MaxTime=INFINITE State=UP
PartitionName=low Nodes=node[4-5] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=node[4-5] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm that are not installed."""
    path = f"{os.environ['PATH']}:{SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A running cluster below `folder`, whose path has to be short: it holds a unix socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            "PATH": f"{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "HOME": str(folder),
            "USER": self.run("id", "-un", env=dict(os.environ)).strip(),
        }

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env=self.env if env is None else env, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for name in ("state", *(f"spool.node{i}" for i in range(NODES))):
            (self.folder / name).mkdir()
        nodes = "\n".join(
            f"NodeName=node{i} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs={CPUS} RealMemory=1000"
            for i in range(NODES)
        )
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                port=free_port(),
                user=self.env["USER"],
                folder=self.folder,
                nodes=nodes,
            )
        )
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        assert version
        # Without cgroups: from 23.02 on they can be left out, before that the plugin named is never used.
        plugin = "disabled" if (int(version[1]), int(version[2])) >= (23, 2) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        munge = {
            "key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log", "seed-file": self.folder / "munge.seed",
        }  # fmt: skip
        self.run("munged", "--force", *(f"--{option}={path}" for option, path in munge.items()))
        self.run("slurmctld")
        for i in range(NODES):
            self.run("slurmd", "-N", f"node{i}")
        wait_until(self._ready, "the nodes are ready")

    def _ready(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=self.env, capture_output=True, text=True
        )
        return len(set(done.stdout.split())) == NODES

    def job(self, number: int) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", str(number))))

    def processes(self, node: str) -> Iterator[int]:
        """What runs on one node: its daemon, the step daemons and the tasks."""
        daemon = (self.folder / f"slurmd.{node}.pid").read_text().strip()
        yield int(daemon)
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and process.name != daemon:
                try:
                    variables = (process / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if {f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={node}".encode()} <= {
                    *variables
                }:
                    yield int(process.name)
                    with contextlib.suppress(OSError):
                        yield from self._step_daemon(process)

    @staticmethod
    def _step_daemon(task: Path) -> Iterator[int]:
        parent = Path("/proc") / re.findall(r"^PPid:\s*(\d+)", (task / "status").read_text(), re.M)[0]
        if (parent / "cmdline").read_bytes().startswith(b"slurmstepd"):
            yield int(parent.name)

    def lose(self, node: str) -> None:
        """The node loses power: everything on it is gone at once, and somebody sees it before `SlurmdTimeout` is over."""
        found = set(self.processes(node))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none sees another one die
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def stop(self) -> None:
        subprocess.run(["scancel", "-f", "-u", self.env["USER"]], env=self.env, timeout=PATIENCE, check=False)
        for node in (f"node{i}" for i in range(NODES)):
            self._end(self.folder / f"slurmd.{node}.pid", b"slurmd")
        self._end(self.folder / "slurmctld.pid", b"slurmctld")
        self._end(self.folder / "munged.pid", b"munged")

    @staticmethod
    def _end(file: Path, program: bytes) -> None:
        if not file.is_file():
            return
        process = Path("/proc") / file.read_text().strip()
        deadline = time.monotonic() + 15
        with contextlib.suppress(OSError):  # it has ended since it was looked at
            while program in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
                time.sleep(0.2)
