"""What the jobs of a site look like: the profile, a YAML file read as strictly as the config of a stage.

Every field's description is its documentation; `slurm/profiles/example.yaml` shows them in use. What a profile does
not name does not reach the job: neither an option of Slurm nor a variable of the environment.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from launch import plain
from pretrain.config.load import read_settings, read_text
from pretrain.config.section import Positive, Section
from pretrain.errors import ConfigError
from pretrain.redact import redact_setting

TEMPLATES = Path(__file__).resolve().parents[1] / "slurm"
"""Beside this package, in a clone and where it is installed."""

Name = Annotated[str, Field(pattern=plain.NAME)]
NodeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\[\],-]{1,256}$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@/+=*-]+)?$")]
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+/-]{1,128}$")]

OURS = frozenset(
    [
        "array",
        "chdir",
        "dependency",
        "error",
        "export",
        "export-file",
        "job-name",
        "kill-on-invalid-dep",
        "nodes",
        "no-requeue",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "requeue",
        "signal",
        "test-only",
        "wait",
        "wrap",
        "account",
        "partition",
        "qos",
        "reservation",
        "constraint",
        "gpus-per-node",
        "gres",
        "cpus-per-task",
        "mem",
        "time",
        "exclusive",
        "exclude",
        "kill-on-bad-exit",
        "label",
    ]
)
"""Options of sbatch and srun that the script or another key of the profile sets."""

RESERVED = re.compile(
    r"SLURM_.*|SBATCH_.*|SRUN_.*|PRETRAIN_.*|RANK|WORLD_SIZE|LOCAL_RANK|BASH.*|ENV|IFS|SHELLOPTS|PS4"
)
"""Variables that say who a rank is, or how bash reads a script."""


class Container(Section):
    kind: Literal["pyxis", "apptainer"] = Field(
        description="pyxis: srun starts the image itself; apptainer: each rank runs `apptainer exec`"
    )
    image: Annotated[str, Field(min_length=1)] = Field(description="image, as srun or apptainer takes it")
    mounts: tuple[str, ...] = Field((), description="SOURCE:TARGET of each folder to be seen inside")
    python: str = Field("python", description="interpreter inside of the image")

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if not re.fullmatch(r"/[^:,]*:/[^:,]*", mount):
                raise ValueError(f"{mount!r} is not /SOURCE:/TARGET, without commas")
        return mounts


class Retry(Section):
    without_progress: Annotated[int, Field(ge=0)] = Field(
        3, description="attempts in a row that end without a new checkpoint before the job gives up"
    )
    failures_per_day: Annotated[int, Field(ge=0)] = Field(
        10, description="attempts that fail within 24 hours before the job gives up, progress or not"
    )


class Profile(Section):
    account: Name | None = Field(None, description="what the job is charged to")
    partition: Name | None = Field(None, description="partition; none: the site's default")
    qos: Name | None = Field(None, description="quality of service")
    reservation: Name | None = Field(None, description="reservation")
    constraint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.&|*()\[\]-]{1,256}$")] | None = Field(
        None, description="features that nodes must have"
    )
    nodes: Positive | Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?$")] = Field(
        1, description="nodes, or MIN-MAX: the job starts on what is free, and a requeue on what is left"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(
        0, description="GPUs of each node, one rank each; 0: CPUs"
    )
    gpu_type: Name | None = Field(None, description="type of GPU as the site names it, such as a100")
    gpu_option: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="how the site wants GPUs to be asked for"
    )
    ranks_per_node: Positive | None = Field(None, description="ranks of each node; none: one a GPU, or one")
    cpus_per_rank: Positive | None = Field(
        None, description="CPU cores of each rank; none: the site's default"
    )
    mem: Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        None, description="memory of each node, such as 400G; 0: all of it"
    )
    time: Positive | Annotated[str, Field(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$")] = Field(
        description="time limit of one attempt: minutes, HH:MM:SS or D-HH:MM:SS"
    )
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = Field(
        180, description="before the time limit the ranks are told to save: a step, a save and a minute"
    )
    exclusive: bool = Field(False, description="whole nodes")
    exclude: tuple[NodeName, ...] = Field((), description="nodes not to use")
    sbatch: tuple[Option, ...] = Field((), description="more options of sbatch, each --name=value")
    srun: tuple[Option, ...] = Field((), description="more options of srun, each --name=value")
    python: str | None = Field(None, description="interpreter on the nodes; none: the one that submits")
    setup: str | None = Field(None, description="a shell file of the site that the job sources first")
    modules: tuple[Module, ...] = Field((), description="environment modules to load")
    container: Container | None = Field(None, description="image that the ranks run in")
    env: dict[VariableName, str | int] = Field({}, description="variables of the job; never secrets")
    pass_env: tuple[VariableName, ...] = Field(
        (), description="variables, secrets too, taken from whoever submits; never written down by us"
    )
    preflight_minutes: Annotated[int, Field(ge=0, le=60)] = Field(
        1,
        description="before training, every rank looks at what it needs, within so long: more where the file system takes "
        "Python longer to import; 0: not at all",
    )
    retry: Retry = Retry()

    @field_validator("sbatch", "srun")
    @classmethod
    def _not_ours(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if option[2:].partition("=")[0] in OURS:
                raise ValueError(f"{option} is set by the script or by a key of the profile")
        return options

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str | int]) -> dict[str, str | int]:
        for name, value in env.items():
            if RESERVED.fullmatch(name):
                raise ValueError(f"{name} is set by Slurm or by the script")
            if redact_setting(name, str(value)) != str(value):
                raise ValueError(
                    f"{name} looks like a secret, and a script is read by many: set it in your environment and name "
                    "it in pass_env"
                )
        return env

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"nodes {self.nodes}: the first number is the smaller one")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError("gpu_type needs gpus_per_node")
        if self.signal_seconds >= self.seconds:
            raise ValueError(f"signal_seconds {self.signal_seconds} is not below the time limit {self.time}")
        for name in self.pass_env:
            if RESERVED.fullmatch(name):
                raise ValueError(f"pass_env: {name} is set by Slurm or by the script")
        return self

    @property
    def min_nodes(self) -> int:
        return int(str(self.nodes).partition("-")[0])

    @property
    def max_nodes(self) -> int:
        return int(str(self.nodes).rpartition("-")[2])

    @property
    def seconds(self) -> int:
        """The time limit. Slurm reads M, M:S and H:M:S, and with days D-H, D-H:M and D-H:M:S."""
        days, dash, rest = str(self.time).rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if dash:
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:
            hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def num_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable

    def for_one_rank(self) -> "Profile":
        """The same site for a job of a single process: one node, one GPU where there are any."""
        return self.model_copy(
            update={
                "nodes": 1,
                "ranks_per_node": 1,
                "gpus_per_node": min(1, self.gpus_per_node),
                "exclusive": False,
                "mem": None,
                "preflight_minutes": 0,
            }
        )


def load(path_or_name: str, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile from a file, or one of those beside the template by its name, and apply `key=value` overrides.

    Raises `ConfigError` with every mistake found.
    """
    path = Path(path_or_name)
    if not path.is_file():
        shipped = TEMPLATES / "profiles" / f"{path_or_name}.yaml"
        if not re.fullmatch(r"[\w.-]+", path_or_name) or not shipped.is_file():
            raise ConfigError(
                f"there is no profile {path_or_name!r}: give the path of a YAML file; start from "
                f"{TEMPLATES / 'profiles' / 'example.yaml'}"
            )
        path = shipped
    return read_settings(Profile, read_text(path, "profile"), str(path), overrides)
