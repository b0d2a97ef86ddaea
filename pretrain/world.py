"""Who am I in this job? Rank facts, read once from the environment that the launcher left.

Order: `RANK`/`WORLD_SIZE` (torchrun, `accelerate launch`, hand-set), then a Slurm *step* (`srun`), then one
process. No launcher library is imported: `accelerate launch`, torchrun, srun and plain python only start
processes (design notes, "one code path for every launcher").
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from pretrain.errors import ConfigError

EXPECTED_WORLD = "PRETRAIN_WORLD_SIZE"
"""A launch script may state here how many processes it meant to start; another number is refused."""


@dataclass(frozen=True)
class World:
    """The place of this process in the job. `0 <= rank < size`, `0 <= local_rank`."""

    rank: int
    size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def export(self, env: MutableMapping[str, str]) -> None:
        """Write the facts under the names that torch and DeepSpeed read."""
        env.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def from_environment(env: Mapping[str, str]) -> World:
    """Read the world from `env`; raises `ConfigError` if the launch cannot be what was meant."""
    if "RANK" in env:
        world = _from_names(env, "launcher", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in env:
        _require_address(env)
        world = _from_names(env, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        _refuse_silent_single_process(env)
        world = World(0, 1, 0, "127.0.0.1", 0, "python")

    expected = env.get(EXPECTED_WORLD)
    if expected is not None and expected != str(world.size):
        raise ConfigError(
            f"the launcher meant to start {expected} processes ({EXPECTED_WORLD}) but this process sees "
            f"{world.size} (started by: {world.launcher}).\n"
            "  Start the ranks with `accelerate launch --config_file launch/single_node.yaml`, torchrun or srun."
        )
    return world


def _from_names(env: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str) -> World:
    facts = {}
    for name in (rank, size, local_rank):
        text = env.get(name, "0" if name == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise ConfigError(
                f"the environment sets {rank}={env.get(rank)!r} but {name}={text!r}; it must be a number"
            )
        facts[name] = int(text)
    if not facts[rank] < facts[size]:
        raise ConfigError(
            f"the environment sets {rank}={facts[rank]} of {size}={facts[size]}; ranks count from 0"
        )
    port = env.get("MASTER_PORT", "0" if facts[size] == 1 else "29500")
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT={port!r} is not a port number")
    return World(
        facts[rank], facts[size], facts[local_rank], env.get("MASTER_ADDR", "127.0.0.1"), int(port), launcher
    )


def _require_address(env: Mapping[str, str]) -> None:
    """srun says nothing of where the ranks meet: on several nodes they would wait for one another for ever."""
    nodes = env.get("SLURM_STEP_NUM_NODES", "1")
    if nodes != "1" and "MASTER_ADDR" not in env:
        raise ConfigError(
            f"srun started this step on {nodes} nodes, but MASTER_ADDR is not set: the ranks cannot find each other.\n"
            "  In the batch script: export MASTER_PORT=29500 MASTER_ADDR=$(scontrol show hostnames "
            '"$SLURM_JOB_NODELIST" | head -n 1)'
        )


def _refuse_silent_single_process(env: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing: catch it here."""
    if env.get(EXPECTED_WORLD) == "1":
        return
    traces = sorted(name for name in env if name.startswith("ACCELERATE_"))
    if traces:
        raise ConfigError(
            f"`accelerate launch` started a single process without a rank ({', '.join(traces[:3])} set, RANK not).\n"
            "  Its CPU mode does this silently, whatever --num_processes says.\n"
            "  Use `accelerate launch --config_file launch/single_node.yaml`, or torchrun; if one process is what\n"
            f"  you want, start it with plain python, or set {EXPECTED_WORLD}=1."
        )
