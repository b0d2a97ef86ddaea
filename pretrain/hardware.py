"""What this machine computes with: the current CUDA device where there is one, else the processor."""

import os
import platform
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from pretrain.config.plan import Hardware

CPUINFO = Path("/proc/cpuinfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Without one of these a bf16 matrix product is emulated, 10 to 100 times slower than in fp32."""

BF16_CAPABILITY = (8, 0)
"""Ampere, the first CUDA generation that multiplies bf16; torch's `is_bf16_supported` counts emulation too."""


def detect() -> Hardware:
    """The hardware of this process. Any rank may call it, after it has chosen its device; imports torch."""
    import torch

    if torch.cuda.is_available():
        return Hardware(
            device="cuda",
            name=torch.cuda.get_device_name(),
            has_bf16=torch.cuda.get_device_capability() >= BF16_CAPABILITY,
        )
    return cpu(CPUINFO.read_text() if CPUINFO.exists() else "")


def cpu(cpuinfo: str) -> Hardware:
    """The processor that the text of Linux's /proc/cpuinfo describes; an empty text says nothing of bf16."""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*: *(.*)$", cpuinfo, re.MULTILINE)
        return found[1] if found else ""

    return Hardware(
        device="cpu",
        name=field("model name") or platform.machine(),
        has_bf16=not BF16_FLAGS.isdisjoint(field("flags").split()),
    )


def cores_given() -> int:
    """Processor cores for this rank: what the job was given on this machine, shared out among its ranks there."""
    usable = len(os.sched_getaffinity(0))
    own = OWN_CGROUPS.read_text() if OWN_CGROUPS.exists() else ""
    return share_of_cores(min([usable, *quotas(own, CGROUPS)]), os.environ)


def quotas(own: str, root: Path) -> list[int]:
    """Cores that the control groups of this process allow, each at least 1; none where there is no limit.

    own: text of /proc/self/cgroup; root: where the groups are mounted. A limit of a group holds for all below it. In a
    container its own group may be mounted as the root, and the path in `own` may not exist there.
    """
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == base or base in folder.parents:
                found.append(_quota(folder))
    return [max(1, cores) for cores in found if cores is not None]


def _quota(folder: Path) -> int | None:
    """Of cgroup 2 (`cpu.max`) or 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) // int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or `max`
        return None


def ranks_here() -> int:
    """Ranks of this job on this machine, as far as the launcher says so; else 1."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    per_node = re.match(r"[0-9]+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(1, int(local) if local.isdecimal() else int(per_node[0]) if per_node else 1)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: shards, cached blocks and sockets are many, the usual 1,024 few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptors_to_use() -> int:
    """How many files one reader may keep open: a quarter of what the process may, since there are others beside it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else max(16, soft // 4)


def share_of_cores(usable: int, env: Mapping[str, str]) -> int:
    """At least 1. usable: cores that this process may run on, by its affinity and the limits of its control groups.

    torchrun and `accelerate launch` start LOCAL_WORLD_SIZE ranks from one process, and all of them inherit what it was
    given. Slurm binds each task to its own SLURM_CPUS_PER_TASK cores, or, where it does not bind, lets each of the
    step's tasks see all SLURM_CPUS_ON_NODE.
    """

    def number(name: str) -> int | None:
        found = re.match(r"[0-9]+", env.get(name, ""))
        return int(found[0]) if found else None

    per_task, on_node = number("SLURM_CPUS_PER_TASK"), number("SLURM_CPUS_ON_NODE")
    tasks = number("SLURM_STEP_TASKS_PER_NODE")  # such as 4(x2): four on each of two nodes
    if per_task is not None:
        usable = min(usable, per_task)
    elif on_node is not None and tasks is not None and usable >= on_node:
        usable = on_node // tasks
    return max(1, usable // (number("LOCAL_WORLD_SIZE") or 1))
